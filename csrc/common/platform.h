// What lets g++, clang and nvcc compile the same code.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define RF_INLINE __host__ __device__ __forceinline__
// Before a function for both sides that calls what it is given, which may be for one of them.
#define RF_HOST_DEVICE_FUNCTOR _Pragma("nv_exec_check_disable")
#else
#define RF_INLINE inline __attribute__((always_inline))
#define RF_HOST_DEVICE_FUNCTOR
#endif
