// The steps of the loss on CUDA.
#include "cuda/kernels.h"
#include "ops/device.h"
#include "ops/steps.h"

namespace robustfast {
namespace {
namespace steps {

Tensor class_sums(const Tensor& input, const Tensor& target, int64_t num_classes, int64_t ignore_index) {
  const OnDevice device(input);
  const Tensor f = unit_rows(input), sums = empty({num_classes, input.size(1) + 1}, wide_dtype(input), input);
  const cuda::LossParams params = {
      .input = matrix(f),
      .target = matrix(target),
      .n = input.size(0),
      .dim = input.size(1),
      .num_classes = num_classes,
      .ignore_index = ignore_index,
  };
  const Tensor memory = scratch(cuda::class_sums_scratch(params), input);
  check(cuda::class_sums(params, data<void>(sums), data<void>(memory), device.stream()));
  return sums;
}

PullResults::Tuple class_pulls(const Tensor& input, const std::optional<Tensor>& input_noise, const Tensor& target,
                               const Tensor& centroid, const Tensor& sample_share, std::vector<double> settings,
                               const std::optional<Tensor>& scheduled, int64_t norm, int64_t ignore_index) {
  const OnDevice device(input);
  const Tensor f = unit_rows(input), m = dense(centroid), share = dense(sample_share);
  const std::optional<Tensor> g = unit_rows(input_noise);
  const PullResults results(input.size(0), centroid);
  const cuda::LossParams params = {
      .input = matrix(f),
      .input_noise = matrix(g),
      .target = matrix(target),
      .n = input.size(0),
      .dim = input.size(1),
      .num_classes = centroid.size(0),
      .settings = settings_of(settings, scheduled),
      .norm = norm,
      .ignore_index = ignore_index,
      .terms = data<void>(results.terms),
      .slot = data<int32_t>(results.slot),
      .pull = data<void>(results.pull),
  };
  const Tensor memory = scratch(cuda::class_pulls_scratch(params), input);
  check(cuda::class_pulls(params, data<void>(m), data<void>(share), data<void>(results.pull_sum), data<void>(memory),
                          device.stream()));
  return results.tuple();
}

SearchResults::Tuple margin_search(const Tensor& mu, const std::optional<Tensor>& weight_c,
                                   const std::optional<Tensor>& bias_c, const Tensor& weight,
                                   const std::optional<Tensor>& bias, const std::optional<Tensor>& classes,
                                   const std::optional<Tensor>& present) {
  const OnDevice device(mu);
  const Tensor points = dense(mu), w = unit_rows(weight),
               own = weight_c ? unit_rows(torch::stable::to(*weight_c, weight.scalar_type())) : w;
  const SearchResults results(mu);
  const cuda::MarginSearchParams params = {
      .wide = dtype_of(mu),
      .mu = data<void>(points),
      .own = own_rows(own, weight_c ? bias_c : bias, weight_c ? std::nullopt : classes),
      .present = present ? data<int32_t>(*present) : nullptr,
      .weight = matrix(w),
      .bias = matrix(bias),
      .rows = mu.size(0),
      .dim = mu.size(1),
      .num_classes = weight.size(0),
      .score = data<void>(results.score),
      .winner = data<int32_t>(results.winner),
  };
  const Tensor memory = scratch(cuda::margin_search_scratch(params), mu);
  check(cuda::margin_search(params, data<void>(memory), device.stream()));
  return results.tuple();
}

FinishResults::Tuple finish(const Tensor& mu, const Tensor& centroid, const Tensor& pull_sum, const Tensor& counts,
                            const Tensor& tau, const Tensor& weight_c, const std::optional<Tensor>& bias_c,
                            const Tensor& weight_w, const std::optional<Tensor>& bias_w, const Tensor& winner,
                            std::vector<double> settings, const std::optional<Tensor>& scheduled, int64_t norm) {
  const OnDevice device(mu);
  const Tensor m = dense(centroid), n_c = dense(counts), t = dense(tau), own = unit_rows(weight_c),
               other = unit_rows(weight_w);
  const FinishResults results(mu, pull_sum, winner);
  const cuda::FinishParams params = {
      .wide = dtype_of(mu),
      .settings = settings_of(settings, scheduled),
      .norm = norm,
      .rows = mu.size(0),
      .dim = mu.size(1),
      .own = {matrix(own), matrix(bias_c)},
      .other = {matrix(other), matrix(bias_w)},
      .counts = data<void>(n_c),
      .tau = data<void>(t),
      .centroid = data<void>(m),
      .mu_grad = data<void>(results.mu_grad),
      .boundary_grad = data<void>(results.boundary_grad),
      .boundary_bias = data<void>(results.boundary_bias),
      .winner = data<int32_t>(results.winner),
      .terms = data<void>(results.terms),
  };
  const Tensor memory = scratch(cuda::finish_scratch(params), mu);
  check(cuda::finish(params, data<void>(memory), device.stream()));
  return results.tuple();
}

}  // namespace steps
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(RF_CUDA_LIBRARY, RF_CUDA_KEY, m) {
  m.impl("class_sums", TORCH_BOX(&steps::class_sums));
  m.impl("class_pulls", TORCH_BOX(&steps::class_pulls));
  m.impl("margin_search", TORCH_BOX(&steps::margin_search));
  m.impl("finish", TORCH_BOX(&steps::finish));
}

}  // namespace robustfast
