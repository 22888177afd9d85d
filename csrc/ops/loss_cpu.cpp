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

void discriminative_loss(const LossCall& call, const LossResults& results) {
  const LossSizes& sizes = call.sizes;
  const ScalarType wide = wide_dtype(call.input);
  const Tensor w = classifier_rows(call.weight, wide);
  with_huge_pages(results.tables);

  const int64_t rows = sizes.rows, dim = sizes.dim;
  int32_t *const slot = data<int32_t>(results.slot), *const classes = data<int32_t>(results.classes);
  slots_of_labels(matrix(call.target), sizes.n, sizes.num_classes, call.ignore_index, slot);
  const Groups groups = group(sizes.n, sizes.num_classes, rows, slot, classes);
  const int64_t present = groups.rows();
  std::fill(classes + rows, classes + 2 * rows, -1);
  for_wide(wide, [&]<class Wide>(Wide) {
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
    const SettingsOf<Wide> s = call.settings.as<Wide>();
    const Features features = {sizes.n, dim, &groups, matrix(call.f), matrix(call.g)};
    const ClassifierRows own = {matrix(w), matrix(call.bias), classes}, other = {own.weight, own.bias, classes + rows};
    const Centroids<Wide> centroids_ = {
        .features = features,
        .momentum = s.momentum,
        .update_state = call.update_state,
        .centroids = data<Wide>(call.centroids),
        .seen = data<bool>(call.seen),
        .classes = classes,
        .mu = boundary_grad,
        .centroid = centroid,
        .tau = tau.data(),
    };
    const ClassPulls<Wide> pulls = {
        .features = features,
        .norm = call.norm,
        .delta_var = s.delta_var,
        .view_weight = s.view_weight(bool(call.input_noise)),
        .centroid = centroid,
        .sample_share = sample_share.data(),
        .pull = data<Wide>(results.pull),
        .pull_sum = mu_grad,
    };
    const Finish<Wide> boundaries = {
        .settings = s,
        .norm = call.norm,
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
    write_terms(s, bool(call.input_noise), mean, data<Wide>(results.loss), data<Wide>(results.terms));
  });
}

void discriminative_loss_backward(const LossBackwardCall& call, const LossGradients& gradients) {
  with_huge_pages(gradients.input);
  with_huge_pages(gradients.input_noise);
  with_huge_pages(gradients.weight);

  const LossSizes& sizes = call.sizes;
  const int64_t rows = call.rows;
  const Groups groups = group_by_slot(data<int32_t>(call.slot), sizes.n, rows);
  for_wide(wide_dtype(call.input), [&]<class Wide>(Wide) {
    const Wide* const table = data<Wide>(call.tables);
    const LossBackward<Wide> loss = {
        .grad_loss = *data<Wide>(call.grad_loss),
        .norm = call.norm,
        .n = sizes.n,
        .dim = sizes.dim,
        .num_classes = sizes.num_classes,
        .rows = rows,
        .groups = &groups,
        .input = matrix(call.f),
        .input_noise = matrix(call.g),
        .pull = data<Wide>(call.pull),
        .centroid = table,
        .mu_grad = table + rows * sizes.dim,
        .boundary_grad = table + 2 * rows * sizes.dim,
        .boundary_bias = data<Wide>(call.boundary_bias),
        .slot = data<int32_t>(call.slot),
        .classes = data<int32_t>(call.classes),
        .winner = data<int32_t>(call.classes) + rows,
    };
    if (gradients.wanted[0]) variance_backward(loss, 0, data<void>(gradients.input));
    if (gradients.wanted[1]) variance_backward(loss, 1, data<void>(gradients.input_noise));
    if (gradients.wanted[2] || gradients.wanted[3]) {
      margin_backward(loss, gradients.at(2, gradients.weight), gradients.at(3, gradients.bias));
    }
  });
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(robustfast, CPU, m) {
  LossOps<discriminative_loss, discriminative_loss_backward>::implement(m);
}

}  // namespace robustfast
