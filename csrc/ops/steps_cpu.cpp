// The steps of the loss on the CPU.
#include "cpu/loss.h"
#include "ops/steps.h"

namespace robustfast {
namespace {

Groups group_by_label(const Tensor& target, int64_t rows, int64_t ignore_index, int32_t* slot) {
  slots_of_labels(matrix(target), target.size(0), rows, ignore_index, slot);
  return group_by_slot(slot, target.size(0), rows);
}

namespace steps {

Tensor class_sums(const Tensor& input, const Tensor& target, int64_t num_classes, int64_t ignore_index) {
  const Tensor f = unit_rows(input), sums = empty({num_classes, input.size(1) + 1}, wide_dtype(input), input);
  std::vector<int32_t> slot(input.size(0));
  const Groups groups = group_by_label(target, num_classes, ignore_index, slot.data());
  for_wide(wide_dtype(input), [&]<class Wide>(Wide) {
    std::fill_n(data<Wide>(sums), sums.numel(), Wide(0));
    class_sums(Features{f.size(0), f.size(1), &groups, matrix(f), {}}, data<Wide>(sums));
  });
  return sums;
}

PullResults::Tuple class_pulls(const Tensor& input, const std::optional<Tensor>& input_noise, const Tensor& target,
                               const Tensor& centroid, const Tensor& sample_share, std::vector<double> settings,
                               const std::optional<Tensor>& scheduled, int64_t norm, int64_t ignore_index) {
  const Tensor f = unit_rows(input), m = dense(centroid), share = dense(sample_share);
  const std::optional<Tensor> g = unit_rows(input_noise);
  const PullResults results(input.size(0), centroid);
  const Groups groups = group_by_label(target, centroid.size(0), ignore_index, data<int32_t>(results.slot));
  for_wide(wide_dtype(input), [&]<class Wide>(Wide) {
    const SettingsOf<Wide> s = settings_of(settings, scheduled).template as<Wide>();
    std::fill_n(data<Wide>(results.pull), results.pull.numel(), Wide(0));
    std::fill_n(data<Wide>(results.pull_sum), results.pull_sum.numel(), Wide(0));
    const ClassPulls<Wide> pulls = {
        .features = {f.size(0), f.size(1), &groups, matrix(f), matrix(g)},
        .norm = norm,
        .delta_var = s.delta_var,
        .view_weight = s.view_weight(bool(input_noise)),
        .centroid = data<Wide>(m),
        .sample_share = data<Wide>(share),
        .pull = data<Wide>(results.pull),
        .pull_sum = data<Wide>(results.pull_sum),
    };
    Wide terms[class_term::count] = {};
    class_pulls(pulls, terms);
    std::copy(terms, terms + class_term::of_samples, data<Wide>(results.terms));
  });
  return results.tuple();
}

SearchResults::Tuple margin_search(const Tensor& mu, const std::optional<Tensor>& weight_c,
                                   const std::optional<Tensor>& bias_c, const Tensor& weight,
                                   const std::optional<Tensor>& bias, const std::optional<Tensor>& classes,
                                   const std::optional<Tensor>& present) {
  const Tensor points = dense(mu), w = classifier_rows(weight, mu.scalar_type()),
               own = weight_c ? classifier_rows(*weight_c, mu.scalar_type()) : w;
  const int64_t rows = present ? *data<int32_t>(*present) : mu.size(0);
  const SearchResults results(mu);
  for_wide(mu.scalar_type(), [&]<class Wide>(Wide) {
    margin_search(data<Wide>(points), own_rows(own, weight_c ? bias_c : bias, weight_c ? std::nullopt : classes),
                  matrix(w), matrix(bias), rows, mu.size(1), weight.size(0), data<Wide>(results.score),
                  data<int32_t>(results.winner));
  });
  return results.tuple();
}

FinishResults::Tuple finish(const Tensor& mu, const Tensor& centroid, const Tensor& pull_sum, const Tensor& counts,
                            const Tensor& tau, const Tensor& weight_c, const std::optional<Tensor>& bias_c,
                            const Tensor& weight_w, const std::optional<Tensor>& bias_w, const Tensor& winner,
                            std::vector<double> settings, const std::optional<Tensor>& scheduled, int64_t norm) {
  const Tensor m = dense(centroid), n_c = dense(counts), t = dense(tau),
               own = classifier_rows(weight_c, mu.scalar_type()), other = classifier_rows(weight_w, mu.scalar_type());
  const FinishResults results(mu, pull_sum, winner);
  for_wide(mu.scalar_type(), [&]<class Wide>(Wide) {
    const SettingsOf<Wide> s = settings_of(settings, scheduled).template as<Wide>();
    const int64_t rows = mu.size(0), absent = std::count(data<Wide>(n_c), data<Wide>(n_c) + rows, Wide(0));
    const Finish<Wide> to = {
        .settings = s,
        .norm = norm,
        .rows = rows,
        .dim = mu.size(1),
        .present = rows - absent,
        .own = {matrix(own), matrix(bias_c)},
        .other = {matrix(other), matrix(bias_w)},
        .counts = data<Wide>(n_c),
        .tau = data<Wide>(t),
        .centroid = data<Wide>(m),
        .mu_grad = data<Wide>(results.mu_grad),
        .boundary_grad = data<Wide>(results.boundary_grad),
        .boundary_bias = data<Wide>(results.boundary_bias),
        .winner = data<int32_t>(results.winner),
    };
    Wide terms[class_term::count] = {};
    finish(to, terms);
    std::copy(terms + class_term::of_samples, terms + class_term::count, data<Wide>(results.terms));
  });
  return results.tuple();
}

}  // namespace steps
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(robustfast, CPU, m) {
  m.impl("class_sums", TORCH_BOX(&steps::class_sums));
  m.impl("class_pulls", TORCH_BOX(&steps::class_pulls));
  m.impl("margin_search", TORCH_BOX(&steps::margin_search));
  m.impl("finish", TORCH_BOX(&steps::finish));
}

}  // namespace robustfast
