// From what a launch knows at run time to the types and constants that its kernel is compiled for.
#pragma once

#include <type_traits>

#include "common/dtype.h"
#include "cuda/device.cuh"

namespace robustfast::cuda {

// function(T(), std::integral_constant<int, norm>()) for features of a dtype, whose sums are in Wide, and norm 1 or 2.
template <class Wide, class Function>
cudaError_t for_loss(Dtype dtype, int64_t norm, const Function& function) {
  cudaError_t error = cudaSuccess;
  visit_features<Wide>(dtype, [&](auto feature) {
    error = norm == 1 ? function(feature, std::integral_constant<int, 1>())
                      : function(feature, std::integral_constant<int, 2>());
  });
  return error;
}

// function(Wide()) for features of a dtype.
template <class Function>
cudaError_t for_wide(Dtype features, const Function& function) {
  return visit(features, [&](auto zero) { return function(WideOf<decltype(zero)>()); });
}

}  // namespace robustfast::cuda
