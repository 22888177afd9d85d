// Elements of tensors whose dtype only the launch knows.
#pragma once

#include "common/matrix.h"
#include "cuda/device.cuh"

namespace robustfast::cuda {

template <class Wide>
RF_DEVICE Wide element(const Matrix& matrix, int64_t i, int64_t j = 0) {
  return visit(matrix.dtype, [&](auto zero) { return Wide(to_float(matrix.row<decltype(zero)>(i)[j])); });
}

template <class Wide>
RF_DEVICE void set_element(const Output& output, int64_t i, Wide value) {
  visit(output.dtype, [&](auto zero) { output.row<decltype(zero)>(0)[i] = from_float<decltype(zero)>(value); });
}

RF_DEVICE int64_t label_at(const Matrix& target, int64_t i) {
  return visit_label(target.dtype, [&](auto zero) { return int64_t(*target.row<decltype(zero)>(i)); });
}

// The class that a label stands for, or num_classes where it is to be ignored. One out of range is an assertion.
RF_DEVICE int32_t class_of(int64_t label, int64_t num_classes, int64_t ignore_index) {
  const bool ignored = label == ignore_index, inside = label >= 0 && label < num_classes;
  device_assert(ignored || inside, "target: a label is outside 0 ... num_classes - 1 and is not ignore_index");
  return int32_t(ignored || !inside ? num_classes : label);
}

template <class F>
RF_DEVICE bool is_finite(F x) {
  return x - x == F(0);
}

}  // namespace robustfast::cuda
