// The dtypes of tensors, and the one place where a dtype becomes a type: visit(dtype, function) gives function(T()),
// on the host and in kernels. A dtype that is not expected there is an error: an exception, in a kernel a trap.
#pragma once

#include <stdexcept>
#include <type_traits>

#include "common/half.h"

namespace robustfast {

enum class Dtype { float32, float64, bfloat16, float16, uint8, int8, int16, int32, int64 };

// The dtype of statistics and state for features of T.
template <class T>
using WideOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

[[noreturn]] RF_INLINE void unexpected_dtype() {
#if defined(__CUDA_ARCH__)
  __trap();
#else
  throw std::invalid_argument("robustfast: a kernel was called with a dtype that it does not take");
#endif
}

// Floating dtypes.
RF_HOST_DEVICE_FUNCTOR
template <class Function>
RF_INLINE auto visit(Dtype dtype, const Function& function) {
  switch (dtype) {
    case Dtype::float32:
      return function(float());
    case Dtype::float64:
      return function(double());
    case Dtype::bfloat16:
      return function(bfloat16());
    case Dtype::float16:
      return function(float16());
    default:
      unexpected_dtype();
  }
}

// Dtypes of images.
RF_HOST_DEVICE_FUNCTOR
template <class Function>
RF_INLINE auto visit_image(Dtype dtype, const Function& function) {
  return dtype == Dtype::uint8 ? function(uint8_t()) : visit(dtype, function);
}

// Dtypes of labels.
RF_HOST_DEVICE_FUNCTOR
template <class Function>
RF_INLINE auto visit_label(Dtype dtype, const Function& function) {
  switch (dtype) {
    case Dtype::int64:
      return function(int64_t());
    case Dtype::int32:
      return function(int32_t());
    case Dtype::int16:
      return function(int16_t());
    case Dtype::int8:
      return function(int8_t());
    case Dtype::uint8:
      return function(uint8_t());
    default:
      unexpected_dtype();
  }
}

// Dtypes of features whose statistics are Wide.
template <class Wide, class Function>
void visit_features(Dtype dtype, const Function& function) {
  visit(dtype, [&](auto zero) {
    if constexpr (std::is_same_v<WideOf<decltype(zero)>, Wide>) {
      function(zero);
    } else {
      unexpected_dtype();
    }
  });
}

}  // namespace robustfast
