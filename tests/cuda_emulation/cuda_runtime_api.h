// The few names of the CUDA runtime that the launchers use, for g++: see emulation.h.
#pragma once

#include <cstddef>
#include <cstring>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorAssert = 710 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorAssert ? "device-side assert triggered" : error ? "invalid value" : "no error";
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 3;  // few multiprocessors, so that persistent kernels go round their loops
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
  if (bytes == 0) return cudaErrorInvalidValue;  // which CUDA may refuse in a stream that is captured
  std::memset(at, value, bytes);
  return cudaSuccess;
}
