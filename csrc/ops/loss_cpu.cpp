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

LossResults::Tuple discriminative_loss(const Tensor& input, const std::optional<Tensor>& input_noise,
                                       const Tensor& target, const Tensor& weight, const std::optional<Tensor>& bias,
                                       const Tensor& centroids, const Tensor& seen, std::vector<double> settings,
                                       const std::optional<Tensor>& scheduled, int64_t norm, bool update_state,
                                       int64_t ignore_index) {
  const LossSizes sizes(input, weight.size(0));
  const Tensor f = unit_rows(input), w = classifier_rows(weight, wide_dtype(input));
  const std::optional<Tensor> g = unit_rows(input_noise);
  const LossResults results(sizes, input, wide_dtype(input));
  with_huge_pages(results.tables);

  const int64_t rows = sizes.rows, dim = sizes.dim;
  int32_t *const slot = data<int32_t>(results.slot), *const classes = data<int32_t>(results.classes);
  slots_of_labels(matrix(target), sizes.n, sizes.num_classes, ignore_index, slot);
  const Groups groups = group(sizes.n, sizes.num_classes, rows, slot, classes);
  const int64_t present = groups.rows();
  std::fill(classes + rows, classes + 2 * rows, -1);
  for_wide(wide_dtype(input), [&]<class Wide>(Wide) {
    Wide *const centroid = data<Wide>(results.tables), *const mu_grad = centroid + rows * dim;
    Wide *const boundary_grad = mu_grad + rows * dim, *const boundary_bias = data<Wide>(results.boundary_bias);
    // What no sample and no class writes is 0, so that results are the same from run to run down to the last byte.
    std::fill_n(data<Wide>(results.pull), 2 * sizes.n, Wide(0));
    std::fill(boundary_bias + present, boundary_bias + rows, Wide(0));
    for (Wide* table : {centroid, mu_grad, boundary_grad})
      std::fill(table + present * dim, table + rows * dim, Wide(0));
    std::vector<Wide> counts(present), sample_share(present), tau(present), score(present);
    for (int64_t row = 0; row < present; ++row) {
      counts[row] = Wide(groups.count(row));
      sample_share[row] = Wide(1) / (counts[row] * Wide(present));
    }
    const SettingsOf<Wide> s = settings_of(settings, scheduled).template as<Wide>();
    const Features features = {sizes.n, dim, &groups, matrix(f), matrix(g)};
    const ClassifierRows own = {matrix(w), matrix(bias), classes}, other = {own.weight, own.bias, classes + rows};
    const Centroids<Wide> centroids_ = {
        .features = features,
        .momentum = s.momentum,
        .update_state = update_state,
        .centroids = data<Wide>(centroids),
        .seen = data<bool>(seen),
        .classes = classes,
        .mu = boundary_grad,
        .centroid = centroid,
        .tau = tau.data(),
    };
    const ClassPulls<Wide> pulls = {
        .features = features,
        .norm = norm,
        .delta_var = s.delta_var,
        .view_weight = s.view_weight(bool(input_noise)),
        .centroid = centroid,
        .sample_share = sample_share.data(),
        .pull = data<Wide>(results.pull),
        .pull_sum = mu_grad,
    };
    const Finish<Wide> boundaries = {
        .delta_dist = s.delta_dist,
        .beta = s.beta,
        .gamma = s.gamma,
        .norm = norm,
        .rows = present,
        .dim = dim,
        .present = present,
        .own = own,
        .other = other,
        .counts = counts.data(),
        .tau = tau.data(),
        .centroid = centroid,
        .mu_grad = mu_grad,
        .boundary_grad = boundary_grad,
        .boundary_bias = boundary_bias,
        .winner = classes + rows,
    };
    Wide mean[class_term::count] = {};
    variance(centroids_, pulls, mean);
    margin_search(boundary_grad, own, own.weight, own.bias, present, dim, sizes.num_classes, score.data(),
                  boundaries.winner);
    finish(boundaries, mean);
    write_terms(s, bool(input_noise), mean, data<Wide>(results.loss), data<Wide>(results.terms));
  });
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

  const int64_t rows = classes.size(1);
  const Groups groups = group_by_slot(data<int32_t>(slot), sizes.n, rows);
  for_wide(wide_dtype(input), [&]<class Wide>(Wide) {
    const Wide* const table = data<Wide>(tables);
    const LossBackward<Wide> loss = {
        .grad_loss = *data<Wide>(grad_loss),
        .norm = norm,
        .n = sizes.n,
        .dim = sizes.dim,
        .num_classes = sizes.num_classes,
        .rows = rows,
        .groups = &groups,
        .input = matrix(f),
        .input_noise = matrix(g),
        .pull = data<Wide>(pull),
        .centroid = table,
        .mu_grad = table + rows * sizes.dim,
        .boundary_grad = table + 2 * rows * sizes.dim,
        .boundary_bias = data<Wide>(boundary_bias),
        .slot = data<int32_t>(slot),
        .classes = data<int32_t>(classes),
        .winner = data<int32_t>(classes) + rows,
    };
    if (wanted[0]) variance_backward(loss, 0, data<void>(gradients.input));
    if (wanted[1]) variance_backward(loss, 1, data<void>(gradients.input_noise));
    if (wanted[2] || wanted[3]) {
      margin_backward(loss, gradients.at(2, gradients.weight), gradients.at(3, gradients.bias));
    }
  });
  return gradients.tuple();
}

}  // namespace
}  // namespace robustfast

STABLE_TORCH_LIBRARY_IMPL(robustfast, CPU, m) {
  m.impl("discriminative_loss", TORCH_BOX(&robustfast::discriminative_loss));
  m.impl("discriminative_loss_backward", TORCH_BOX(&robustfast::discriminative_loss_backward));
}
