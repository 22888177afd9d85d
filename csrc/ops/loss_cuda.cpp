// The loss ops on CUDA.
#include "cuda/kernels.h"
#include "ops/device.h"
#include "ops/loss.h"

namespace robustfast {
namespace {

LossResults::Tuple discriminative_loss(const Tensor& input, const std::optional<Tensor>& input_noise,
                                       const Tensor& target, const Tensor& weight, const std::optional<Tensor>& bias,
                                       const Tensor& centroids, const Tensor& seen, std::vector<double> settings,
                                       const std::optional<Tensor>& scheduled, int64_t norm, bool update_state,
                                       int64_t ignore_index) {
  const OnDevice device(input);
  const LossSizes sizes(input, weight.size(0));
  const Tensor f = unit_rows(input), w = unit_rows(weight);
  const std::optional<Tensor> g = unit_rows(input_noise);
  const LossResults results(sizes, input, wide_dtype(input));
  const cuda::LossParams params = {
      .input = matrix(f),
      .input_noise = matrix(g),
      .target = matrix(target),
      .weight = matrix(w),
      .bias = matrix(bias),
      .n = sizes.n,
      .dim = sizes.dim,
      .num_classes = sizes.num_classes,
      .centroids = data<void>(centroids),
      .seen = data<bool>(seen),
      .settings = settings_of(settings, scheduled),
      .norm = norm,
      .update_state = update_state,
      .ignore_index = ignore_index,
      .loss = data<void>(results.loss),
      .terms = data<void>(results.terms),
      .slot = data<int32_t>(results.slot),
      .pull = data<void>(results.pull),
      .tables = data<void>(results.tables),
      .classes = data<int32_t>(results.classes),
      .boundary_bias = data<void>(results.boundary_bias),
  };
  const Tensor memory = scratch(cuda::discriminative_loss_scratch(params), input);
  check(cuda::discriminative_loss(params, data<void>(memory), device.stream()));
  return results.tuple();
}

LossGradients::Tuple discriminative_loss_backward(const Tensor& grad_loss, const Tensor& input,
                                                  const std::optional<Tensor>& input_noise, const Tensor& slot,
                                                  const Tensor& pull, const Tensor& tables, const Tensor& classes,
                                                  const Tensor& boundary_bias, int64_t num_classes,
                                                  ScalarType weight_dtype, ScalarType bias_dtype, int64_t norm,
                                                  std::vector<bool> wanted) {
  const OnDevice device(input);
  const LossSizes sizes(input, num_classes);
  const Tensor f = unit_rows(input);
  const std::optional<Tensor> g = unit_rows(input_noise);
  const LossGradients gradients(sizes, input, weight_dtype, bias_dtype, std::move(wanted));
  const cuda::LossBackwardParams params = {
      .grad_loss = data<void>(grad_loss),
      .input = matrix(f),
      .input_noise = matrix(g),
      .n = sizes.n,
      .dim = sizes.dim,
      .num_classes = sizes.num_classes,
      .rows = classes.size(1),
      .slot = data<int32_t>(slot),
      .pull = data<void>(pull),
      .tables = data<void>(tables),
      .classes = data<int32_t>(classes),
      .boundary_bias = data<void>(boundary_bias),
      .norm = norm,
      .grad_input = gradients.at(0, gradients.input).data,
      .grad_input_noise = gradients.at(1, gradients.input_noise).data,
      .grad_weight = gradients.at(2, gradients.weight),
      .grad_bias = gradients.at(3, gradients.bias),
  };
  const Tensor memory = scratch(cuda::discriminative_loss_backward_scratch(params), input);
  check(cuda::discriminative_loss_backward(params, data<void>(memory), device.stream()));
  return gradients.tuple();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(RF_CUDA_LIBRARY, RF_CUDA_KEY, m) {
  m.impl("discriminative_loss", TORCH_BOX(&discriminative_loss));
  m.impl("discriminative_loss_backward", TORCH_BOX(&discriminative_loss_backward));
}

}  // namespace robustfast
