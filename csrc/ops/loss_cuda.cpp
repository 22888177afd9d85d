// The loss ops on CUDA.
#include "cuda/kernels.h"
#include "ops/device.h"
#include "ops/loss.h"

namespace robustfast {
namespace {

void discriminative_loss(const LossCall& call, const LossResults& results) {
  const OnDevice device(call.input);
  const Tensor w = unit_rows(call.weight);
  const cuda::LossParams params = {
      .input = matrix(call.f),
      .input_noise = matrix(call.g),
      .target = matrix(call.target),
      .weight = matrix(w),
      .bias = matrix(call.bias),
      .n = call.sizes.n,
      .dim = call.sizes.dim,
      .num_classes = call.sizes.num_classes,
      .centroids = data<void>(call.centroids),
      .seen = data<bool>(call.seen),
      .settings = call.settings,
      .norm = call.norm,
      .update_state = call.update_state,
      .ignore_index = call.ignore_index,
      .loss = data<void>(results.loss),
      .terms = data<void>(results.terms),
      .slot = data<int32_t>(results.slot),
      .pull = data<void>(results.pull),
      .tables = data<void>(results.tables),
      .classes = data<int32_t>(results.classes),
      .boundary_bias = data<void>(results.boundary_bias),
  };
  const Tensor memory = scratch(cuda::discriminative_loss_scratch(params), call.input);
  check(cuda::discriminative_loss(params, data<void>(memory), device.stream()));
}

void discriminative_loss_backward(const LossBackwardCall& call, const LossGradients& gradients) {
  const OnDevice device(call.input);
  const cuda::LossBackwardParams params = {
      .grad_loss = data<void>(call.grad_loss),
      .input = matrix(call.f),
      .input_noise = matrix(call.g),
      .n = call.sizes.n,
      .dim = call.sizes.dim,
      .num_classes = call.sizes.num_classes,
      .rows = call.rows,
      .slot = data<int32_t>(call.slot),
      .pull = data<void>(call.pull),
      .tables = data<void>(call.tables),
      .classes = data<int32_t>(call.classes),
      .boundary_bias = data<void>(call.boundary_bias),
      .norm = call.norm,
      .grad_input = gradients.at(0, gradients.input).data,
      .grad_input_noise = gradients.at(1, gradients.input_noise).data,
      .grad_weight = gradients.at(2, gradients.weight),
      .grad_bias = gradients.at(3, gradients.bias),
  };
  const Tensor memory = scratch(cuda::discriminative_loss_backward_scratch(params), call.input);
  check(cuda::discriminative_loss_backward(params, data<void>(memory), device.stream()));
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(RF_CUDA_LIBRARY, RF_CUDA_KEY, m) {
  LossOps<discriminative_loss, discriminative_loss_backward>::implement(m);
}

}  // namespace robustfast
