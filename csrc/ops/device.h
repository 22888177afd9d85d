// The device side of a CUDA op: its device, its stream, its errors.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <stdexcept>
#include <string>

#include "ops/tensors.h"

// The emulation of the tests registers the CUDA ops under another name, for CPU tensors.
#ifndef RF_CUDA_LIBRARY
#define RF_CUDA_LIBRARY robustfast
#define RF_CUDA_KEY CUDA
#endif

namespace robustfast {

// Makes a tensor's device the current one while it lives, and knows PyTorch's current stream there.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
  }
  cudaStream_t stream() const { return static_cast<cudaStream_t>(stream_); }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

// Memory for the kernels of one op: PyTorch's allocator gives it to nobody else before they have run.
inline Tensor scratch(size_t bytes, const Tensor& like) { return empty({int64_t(bytes)}, ScalarType::Byte, like); }

inline void check(cudaError_t error) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("robustfast: CUDA error: ") + cudaGetErrorString(error));
}

}  // namespace robustfast
