// The loss ops on CUDA.
#include <algorithm>
#include <tuple>
#include <vector>

#include "cuda/kernels.h"
#include "ops/device.h"

namespace robustfast {
namespace {

using LossResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Memory for the kernels of one op: PyTorch's allocator gives it to nobody else before they have run.
Tensor scratch(size_t bytes, const Tensor& like) { return empty({int64_t(bytes)}, ScalarType::Byte, like); }

LossResult discriminative_loss(const Tensor& input, const std::optional<Tensor>& input_noise, const Tensor& target,
                               const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& centroids,
                               const Tensor& seen, double delta_var, double delta_dist, int64_t norm, double alpha,
                               double beta, double gamma, double momentum, bool update_state, int64_t ignore_index) {
  const OnDevice device(input);
  const int64_t n = input.size(0), dim = input.size(1), num_classes = weight.size(0), rows = std::min(n, num_classes);
  const ScalarType wide = wide_type(input);
  const Tensor f = unit_rows(input), w = unit_rows(weight);
  const std::optional<Tensor> g = input_noise ? std::optional(unit_rows(*input_noise)) : std::nullopt;
  const Tensor total = empty({}, wide, input), terms = empty({5}, wide, input);
  const Tensor slot = empty({n}, ScalarType::Int, input), pull = empty({2, n}, wide, input);
  const Tensor tables = empty({3, rows, dim}, wide, input), classes = empty({2, rows}, ScalarType::Int, input);
  const Tensor boundary_bias = empty({rows}, wide, input);
  const cuda::LossParams params = {
      .input = matrix(f),
      .input_noise = matrix(g),
      .target = matrix(target),
      .weight = matrix(w),
      .bias = matrix(bias),
      .n = n,
      .dim = dim,
      .num_classes = num_classes,
      .centroids = data<void>(centroids),
      .seen = data<bool>(seen),
      .delta_var = delta_var,
      .delta_dist = delta_dist,
      .norm = norm,
      .alpha = alpha,
      .beta = beta,
      .gamma = gamma,
      .momentum = momentum,
      .update_state = update_state,
      .ignore_index = ignore_index,
      .loss = data<void>(total),
      .terms = data<void>(terms),
      .slot = data<int32_t>(slot),
      .pull = data<void>(pull),
      .tables = data<void>(tables),
      .classes = data<int32_t>(classes),
      .boundary_bias = data<void>(boundary_bias),
  };
  const Tensor memory = scratch(cuda::discriminative_loss_scratch(params), input);
  check(cuda::discriminative_loss(params, data<void>(memory), device.stream()));
  return {total, terms, slot, pull, tables, classes, boundary_bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> discriminative_loss_backward(
    const Tensor& grad_loss, const Tensor& input, const std::optional<Tensor>& input_noise, const Tensor& weight,
    const std::optional<Tensor>& bias, const Tensor& slot, const Tensor& pull, const Tensor& tables,
    const Tensor& classes, const Tensor& boundary_bias, int64_t norm, std::vector<bool> wanted) {
  const OnDevice device(input);
  const int64_t n = input.size(0), dim = input.size(1), num_classes = weight.size(0);
  const Tensor f = unit_rows(input);
  const std::optional<Tensor> g = input_noise ? std::optional(unit_rows(*input_noise)) : std::nullopt;
  const auto grad_of = [&](bool want, std::initializer_list<int64_t> sizes, const Tensor& like) {
    return want ? empty(sizes, like.scalar_type(), input) : empty({0}, like.scalar_type(), input);
  };
  const Tensor d_input = grad_of(wanted[0], {n, dim}, input), d_noise = grad_of(wanted[1], {n, dim}, input);
  const Tensor d_weight = grad_of(wanted[2], {num_classes, dim}, weight);
  const Tensor d_bias = grad_of(wanted[3], {num_classes}, weight);
  const auto where = [&](int which, const Tensor& grad) { return wanted[which] ? data<void>(grad) : nullptr; };
  const cuda::LossBackwardParams params = {
      .grad_loss = data<void>(grad_loss),
      .input = matrix(f),
      .input_noise = matrix(g),
      .n = n,
      .dim = dim,
      .num_classes = num_classes,
      .slot = data<int32_t>(slot),
      .pull = data<void>(pull),
      .tables = data<void>(tables),
      .classes = data<int32_t>(classes),
      .boundary_bias = data<void>(boundary_bias),
      .norm = norm,
      .grad_input = where(0, d_input),
      .grad_input_noise = where(1, d_noise),
      .weight_dtype = dtype_of(weight),
      .grad_weight = where(2, d_weight),
      .grad_bias = where(3, d_bias),
  };
  const Tensor memory = scratch(cuda::discriminative_loss_backward_scratch(params), input);
  check(cuda::discriminative_loss_backward(params, data<void>(memory), device.stream()));
  return {d_input, d_noise, d_weight, d_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(RF_CUDA_LIBRARY, RF_CUDA_KEY, m) {
  m.impl("discriminative_loss", TORCH_BOX(&discriminative_loss));
  m.impl("discriminative_loss_backward", TORCH_BOX(&discriminative_loss_backward));
}

}  // namespace robustfast
