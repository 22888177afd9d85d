// The loss ops on the CPU.
#include "cpu/loss.h"
#include "cpu/parallel.h"
#include "ops/loss.h"
#include "ops/memory.h"

namespace robustfast {

void run_parallel(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(begin, end, grain, [&](int64_t from, int64_t to) { body(from, to, context); });
}

int num_threads() { return int(torch::stable::get_num_threads()); }

namespace {

template <class Wide>
void run(Loss<Wide>& loss, Wide* total, Wide* terms) {
  Wide mean[class_term::count] = {};
  variance(loss, mean);
  mean[class_term::margin] = margin(loss);
  write_terms(loss.settings.template as<Wide>(), bool(loss.input_noise), mean, total, terms);
}

LossResults::Tuple discriminative_loss(const Tensor& input, const std::optional<Tensor>& input_noise,
                                       const Tensor& target, const Tensor& weight, const std::optional<Tensor>& bias,
                                       const Tensor& centroids, const Tensor& seen, std::vector<double> settings,
                                       const std::optional<Tensor>& scheduled, int64_t norm, bool update_state,
                                       int64_t ignore_index) {
  const LossSizes sizes(input, weight.size(0));
  const Tensor f = unit_rows(input), w = unit_rows(weight);
  const std::optional<Tensor> g = unit_rows(input_noise);
  const LossResults results(sizes, input, wide_dtype(input));
  with_huge_pages(results.tables);

  const int64_t rows = sizes.rows, dim = sizes.dim;
  int32_t* const classes = data<int32_t>(results.classes);
  const Groups groups =
      group(matrix(target), sizes.n, sizes.num_classes, ignore_index, rows, data<int32_t>(results.slot), classes);
  const int64_t present = groups.rows();
  std::fill(classes + rows, classes + 2 * rows, -1);
  const auto run_with = [&]<class Wide>(Wide) {
    Wide* const tables = data<Wide>(results.tables);
    Wide* const boundary_bias = data<Wide>(results.boundary_bias);
    // What no sample and no class writes is 0, so that results are the same from run to run down to the last byte.
    std::fill_n(data<Wide>(results.pull), 2 * sizes.n, Wide(0));
    std::fill(boundary_bias + present, boundary_bias + rows, Wide(0));
    for (int t = 0; t < 3; ++t) std::fill(tables + (t * rows + present) * dim, tables + (t + 1) * rows * dim, Wide(0));
    Loss<Wide> loss = {
        .settings = settings_of(settings, scheduled),
        .norm = norm,
        .update_state = update_state,
        .n = sizes.n,
        .dim = dim,
        .num_classes = sizes.num_classes,
        .groups = &groups,
        .input = matrix(f),
        .input_noise = matrix(g),
        .weight = matrix(w),
        .bias = matrix(bias),
        .centroids = data<Wide>(centroids),
        .seen = data<bool>(seen),
        .pull = data<Wide>(results.pull),
        .centroid = tables,
        .mu_grad = tables + rows * dim,
        .boundary_grad = tables + 2 * rows * dim,
        .boundary_bias = boundary_bias,
        .classes = classes,
        .winner = classes + rows,
    };
    run(loss, data<Wide>(results.loss), data<Wide>(results.terms));
  };
  wide_dtype(input) == ScalarType::Double ? run_with(double()) : run_with(float());
  return results.tuple();
}

LossGradients::Tuple discriminative_loss_backward(const Tensor& grad_loss, const Tensor& input,
                                                  const std::optional<Tensor>& input_noise, const Tensor& slot,
                                                  const Tensor& pull, const Tensor& tables, const Tensor& classes,
                                                  const Tensor& boundary_bias, int64_t num_classes,
                                                  ScalarType weight_dtype, ScalarType bias_dtype, int64_t norm,
                                                  std::vector<bool> wanted) {
  const LossSizes sizes(input, num_classes);
  const Tensor f = unit_rows(input);
  const std::optional<Tensor> g = unit_rows(input_noise);
  const LossGradients gradients(sizes, input, weight_dtype, bias_dtype, wanted);
  with_huge_pages(gradients.input);
  with_huge_pages(gradients.input_noise);
  with_huge_pages(gradients.weight);

  const Groups groups = group_by_slot(data<int32_t>(slot), sizes.n, sizes.rows);
  const auto run_with = [&]<class Wide>(Wide) {
    const Wide* const table = data<Wide>(tables);
    const LossBackward<Wide> loss = {
        .grad_loss = *data<Wide>(grad_loss),
        .norm = norm,
        .n = sizes.n,
        .dim = sizes.dim,
        .num_classes = sizes.num_classes,
        .rows = sizes.rows,
        .groups = &groups,
        .input = matrix(f),
        .input_noise = matrix(g),
        .pull = data<Wide>(pull),
        .centroid = table,
        .mu_grad = table + sizes.rows * sizes.dim,
        .boundary_grad = table + 2 * sizes.rows * sizes.dim,
        .boundary_bias = data<Wide>(boundary_bias),
        .slot = data<int32_t>(slot),
        .classes = data<int32_t>(classes),
        .winner = data<int32_t>(classes) + sizes.rows,
    };
    if (wanted[0]) variance_backward(loss, 0, data<void>(gradients.input));
    if (wanted[1]) variance_backward(loss, 1, data<void>(gradients.input_noise));
    if (wanted[2] || wanted[3]) {
      margin_backward(loss, gradients.at(2, gradients.weight), gradients.at(3, gradients.bias));
    }
  };
  wide_dtype(input) == ScalarType::Double ? run_with(double()) : run_with(float());
  return gradients.tuple();
}

}  // namespace
}  // namespace robustfast

STABLE_TORCH_LIBRARY_IMPL(robustfast, CPU, m) {
  m.impl("discriminative_loss", TORCH_BOX(&robustfast::discriminative_loss));
  m.impl("discriminative_loss_backward", TORCH_BOX(&robustfast::discriminative_loss_backward));
}
