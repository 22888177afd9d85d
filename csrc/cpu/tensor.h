// What a kernel sees of a tensor, and the one place where a dtype becomes a type.
#pragma once

#include <cstdint>

#include "math/half.h"

namespace robustfast {

enum class Dtype { float32, float64, bfloat16, float16, uint8, int8, int16, int32, int64 };

// A matrix with unit stride along a row, or (rows of one element) a vector. Strides count elements.
struct Matrix {
  const void* data = nullptr;
  Dtype dtype = Dtype::float32;
  int64_t stride = 0;

  explicit operator bool() const { return data != nullptr; }
  template <class T>
  const T* row(int64_t i) const {
    return static_cast<const T*>(data) + i * stride;
  }
};

// Calls function(T()) with the type of a floating dtype.
template <class Function>
void for_floating(Dtype dtype, const Function& function) {
  switch (dtype) {
    case Dtype::float64:
      return function(double());
    case Dtype::bfloat16:
      return function(bfloat16());
    case Dtype::float16:
      return function(float16());
    default:
      return function(float());
  }
}

// The same for features whose statistics are Wide: float64 features have double ones, all others float.
template <class Wide, class Function>
void for_features(Dtype dtype, const Function& function) {
  if constexpr (sizeof(Wide) == sizeof(double)) {
    function(double());
  } else {
    switch (dtype) {
      case Dtype::bfloat16:
        return function(bfloat16());
      case Dtype::float16:
        return function(float16());
      default:
        return function(float());
    }
  }
}

}  // namespace robustfast
