// The CPU kernels: plain pointers, sizes and strides (in elements), no PyTorch. docs/ops.md says what they compute.
#pragma once

#include <cstdint>

namespace robustfast {

enum class Dtype { float32, float64, bfloat16, float16, uint8, int8, int16, int32, int64 };

// A tensor's data with the strides of its first two dimensions; strides of the rest are those of a row.
struct Strided {
  const void* data = nullptr;
  Dtype dtype = Dtype::float32;
  int64_t stride = 0;

  explicit operator bool() const { return data != nullptr; }
};

}  // namespace robustfast
