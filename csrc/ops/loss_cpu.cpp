// The loss ops on the CPU.
#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu/loss.h"
#include "cpu/parallel.h"
#include "ops/memory.h"
#include "ops/tensors.h"

namespace robustfast {

void run_parallel(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(begin, end, grain, [&](int64_t from, int64_t to) { body(from, to, context); });
}

int num_threads() { return int(torch::stable::get_num_threads()); }

namespace {

using LossResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Wide>
void run(Loss<Wide>& loss, Wide* total, Wide* terms) {
  const Settings& s = loss.settings;
  Wide parts[3];  // compactness, alignment, regularization
  variance(loss, parts);
  const Wide spread = loss.input_noise ? (parts[0] + parts[1]) / 2 : parts[0], margins = margin(loss);
  *total = Wide(s.alpha) * spread + Wide(s.beta) * margins + Wide(s.gamma) * parts[2];
  const Wide all[] = {spread, margins, parts[2], parts[0], parts[1]};
  std::copy(all, all + 5, terms);
}

LossResult discriminative_loss(const Tensor& input, const std::optional<Tensor>& input_noise, const Tensor& target,
                               const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& centroids,
                               const Tensor& seen, double delta_var, double delta_dist, int64_t norm, double alpha,
                               double beta, double gamma, double momentum, bool update_state, int64_t ignore_index) {
  const int64_t n = input.size(0), dim = input.size(1), num_classes = weight.size(0), rows = std::min(n, num_classes);
  const ScalarType wide = wide_type(input);
  const Tensor f = unit_rows(input), w = unit_rows(weight);
  const std::optional<Tensor> g = input_noise ? std::optional(unit_rows(*input_noise)) : std::nullopt;
  const Tensor total = empty({}, wide, input), terms = empty({5}, wide, input);
  const Tensor slot = empty({n}, ScalarType::Int, input), pull = empty({2, n}, wide, input);
  const Tensor tables = with_huge_pages(empty({3, rows, dim}, wide, input));
  const Tensor classes = empty({2, rows}, ScalarType::Int, input), boundary_bias = empty({rows}, wide, input);

  int32_t* const row_classes = data<int32_t>(classes);
  const Groups groups = group(matrix(target), n, num_classes, ignore_index, rows, data<int32_t>(slot), row_classes);
  std::fill(row_classes + rows, row_classes + 2 * rows, -1);
  const auto run_with = [&]<class Wide>(Wide) {
    Wide* const table = data<Wide>(tables);
    // What no sample and no class writes is 0, so that results are the same from run to run down to the last byte.
    std::fill_n(data<Wide>(pull), 2 * n, Wide(0));
    std::fill(data<Wide>(boundary_bias) + groups.rows(), data<Wide>(boundary_bias) + rows, Wide(0));
    for (int t = 0; t < 3; ++t)
      std::fill(table + (t * rows + groups.rows()) * dim, table + (t + 1) * rows * dim, Wide(0));
    Loss<Wide> loss = {
        .settings = {delta_var, delta_dist, norm, alpha, beta, gamma, momentum, update_state},
        .n = n,
        .dim = dim,
        .num_classes = num_classes,
        .groups = &groups,
        .input = matrix(f),
        .input_noise = matrix(g),
        .weight = matrix(w),
        .bias = matrix(bias),
        .centroids = data<Wide>(centroids),
        .seen = data<bool>(seen),
        .pull = data<Wide>(pull),
        .center = table,
        .center_grad = table + rows * dim,
        .boundary_grad = table + 2 * rows * dim,
        .boundary_bias = data<Wide>(boundary_bias),
        .classes = row_classes,
        .winner = row_classes + rows,
    };
    run(loss, data<Wide>(total), data<Wide>(terms));
  };
  wide == ScalarType::Double ? run_with(double()) : run_with(float());
  return {total, terms, slot, pull, tables, classes, boundary_bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> discriminative_loss_backward(
    const Tensor& grad_loss, const Tensor& input, const std::optional<Tensor>& input_noise, const Tensor& weight,
    const std::optional<Tensor>& bias, const Tensor& slot, const Tensor& pull, const Tensor& tables,
    const Tensor& classes, const Tensor& boundary_bias, int64_t norm, std::vector<bool> wanted) {
  const int64_t n = input.size(0), dim = input.size(1), num_classes = weight.size(0), rows = classes.size(1);
  const Tensor f = unit_rows(input);
  const std::optional<Tensor> g = input_noise ? std::optional(unit_rows(*input_noise)) : std::nullopt;
  const auto grad_of = [&](bool want, std::initializer_list<int64_t> sizes, const Tensor& like) {
    return want ? with_huge_pages(empty(sizes, like.scalar_type(), input)) : empty({0}, like.scalar_type(), input);
  };
  const Tensor d_input = grad_of(wanted[0], {n, dim}, input), d_noise = grad_of(wanted[1], {n, dim}, input);
  const Tensor d_weight = grad_of(wanted[2], {num_classes, dim}, weight);
  const Tensor d_bias = grad_of(wanted[3], {num_classes}, weight);

  const Groups groups = group_by_slot(data<int32_t>(slot), n, rows);
  const auto run_with = [&]<class Wide>(Wide) {
    const Wide* const table = data<Wide>(tables);
    const LossGrads<Wide> grads = {
        .grad_loss = *data<Wide>(grad_loss),
        .norm = norm,
        .n = n,
        .dim = dim,
        .num_classes = num_classes,
        .rows = rows,
        .groups = &groups,
        .input = matrix(f),
        .input_noise = matrix(g),
        .pull = data<Wide>(pull),
        .center = table,
        .center_grad = table + rows * dim,
        .boundary_grad = table + 2 * rows * dim,
        .boundary_bias = data<Wide>(boundary_bias),
        .slot = data<int32_t>(slot),
        .classes = data<int32_t>(classes),
        .winner = data<int32_t>(classes) + rows,
    };
    if (wanted[0]) variance_backward(grads, false, data<void>(d_input));
    if (wanted[1]) variance_backward(grads, true, data<void>(d_noise));
    if (wanted[2] || wanted[3]) {
      margin_backward(grads, dtype_of(weight), wanted[2] ? data<void>(d_weight) : nullptr,
                      wanted[3] ? data<void>(d_bias) : nullptr);
    }
  };
  wide_type(input) == ScalarType::Double ? run_with(double()) : run_with(float());
  return {d_input, d_noise, d_weight, d_bias};
}

}  // namespace
}  // namespace robustfast

STABLE_TORCH_LIBRARY_IMPL(robustfast, CPU, m) {
  m.impl("discriminative_loss", TORCH_BOX(&robustfast::discriminative_loss));
  m.impl("discriminative_loss_backward", TORCH_BOX(&robustfast::discriminative_loss_backward));
}
