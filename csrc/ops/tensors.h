// Between PyTorch's tensors and the kernels' plain arguments, for the bindings of every device.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <utility>
#include <vector>

#include "common/matrix.h"

namespace robustfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline constexpr std::pair<ScalarType, Dtype> dtypes[] = {
    {ScalarType::Float, Dtype::float32}, {ScalarType::Double, Dtype::float64}, {ScalarType::BFloat16, Dtype::bfloat16},
    {ScalarType::Half, Dtype::float16},  {ScalarType::Byte, Dtype::uint8},     {ScalarType::Char, Dtype::int8},
    {ScalarType::Short, Dtype::int16},   {ScalarType::Int, Dtype::int32},      {ScalarType::Long, Dtype::int64}};

inline Dtype dtype_of(ScalarType type) {
  for (const auto& [theirs, ours] : dtypes)
    if (theirs == type) return ours;
  throw std::invalid_argument("robustfast: an op was called with a dtype that it does not take");
}
inline Dtype dtype_of(const Tensor& tensor) { return dtype_of(tensor.scalar_type()); }

// The dtype of statistics and state for features of this dtype.
inline ScalarType wide_dtype(const Tensor& features) {
  return features.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// function(Wide()) for tensors of that dtype.
template <class Function>
void for_wide(ScalarType wide, const Function& function) {
  wide == ScalarType::Double ? function(double()) : function(float());
}

// An uninitialised contiguous tensor on the device of `like`. Not torch::stable::empty, which goes through the
// dispatcher: at the paper's batch size an op's time is the sum of such calls.
inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * std::max<int64_t>(1, sizes.begin()[d]);
  int32_t device_type;
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.begin(), strides.data(),
                                                  torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
                                                  device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}

// The same matrix or vector with unit stride along its rows, copied only where it has none.
inline Tensor unit_rows(const Tensor& tensor) {
  return tensor.dim() < 2 || tensor.size(1) <= 1 || tensor.stride(1) == 1 ? tensor : torch::stable::contiguous(tensor);
}

// A classifier's rows as the CPU's kernels take them beside statistics in `wide`: half types as they are beside
// float32, all others in `wide`. A mixture with float64 is rare, and every kernel compiled for it is a fifth of the
// binary.
inline Tensor classifier_rows(const Tensor& weight, ScalarType wide) {
  const bool taken = weight.scalar_type() == wide || (weight.element_size() == 2 && wide == ScalarType::Float);
  return unit_rows(taken ? weight : torch::stable::to(weight, wide));
}

// Of a tensor that outlives it and went through unit_rows. One without elements has no memory, but it is there.
inline Matrix matrix(const Tensor& tensor) {
  static constexpr char nothing = 0;
  const void* const data = tensor.const_data_ptr();
  return {data ? data : &nothing, dtype_of(tensor), tensor.stride(0)};
}
inline Matrix matrix(const std::optional<Tensor>& tensor) { return tensor ? matrix(*tensor) : Matrix{}; }

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace robustfast
