// The loss ops for every device, whose bindings fill the results of a call.
#pragma once

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "common/loss.h"
#include "ops/tensors.h"

namespace robustfast {

struct LossSizes {
  int64_t n, dim, num_classes, rows;

  LossSizes(const Tensor& input, int64_t num_classes)
      : n(input.size(0)), dim(input.size(1)), num_classes(num_classes), rows(std::min(n, num_classes)) {}
};

inline std::optional<Tensor> unit_rows(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional(unit_rows(*tensor)) : std::nullopt;
}

// The op's `settings`, or what `scheduled` holds in their place, on the CPU.
inline Settings settings_of(const std::vector<double>& settings, const std::optional<Tensor>& scheduled) {
  if (!scheduled && settings.size() != num_settings)
    throw std::invalid_argument("robustfast: the loss was called without all of its settings");
  Settings result;
  memcpy(&result, scheduled ? data<double>(*scheduled) : settings.data(), sizeof(result));
  return result;
}

// A call of discriminative_loss.
struct LossCall {
  const Tensor& input;
  const std::optional<Tensor>& input_noise;
  const Tensor &target, &weight;
  const std::optional<Tensor>& bias;
  const Tensor &centroids, &seen;
  Settings settings;
  int64_t norm;
  bool update_state;
  int64_t ignore_index;

  LossSizes sizes{input, weight.size(0)};
  Tensor f = unit_rows(input);
  std::optional<Tensor> g = unit_rows(input_noise);
};

// Its results, to be written.
struct LossResults {
  using Tuple = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
  Tensor loss, terms, slot, pull, tables, classes, boundary_bias;

  LossResults(const LossSizes& sizes, const Tensor& input, ScalarType wide)
      : loss(empty({}, wide, input)),
        terms(empty({num_terms}, wide, input)),
        slot(empty({sizes.n}, ScalarType::Int, input)),
        pull(empty({2, sizes.n}, wide, input)),
        tables(empty({3, sizes.rows, sizes.dim}, wide, input)),
        classes(empty({2, sizes.rows}, ScalarType::Int, input)),
        boundary_bias(empty({sizes.rows}, wide, input)) {}

  Tuple tuple() const { return {loss, terms, slot, pull, tables, classes, boundary_bias}; }
};

// A call of discriminative_loss_backward.
struct LossBackwardCall {
  const Tensor &grad_loss, &input;
  const std::optional<Tensor>& input_noise;
  const Tensor &slot, &pull, &tables, &classes, &boundary_bias;
  int64_t num_classes, norm;

  LossSizes sizes{input, num_classes};
  int64_t rows = classes.size(1);  // of the tables
  Tensor f = unit_rows(input);
  std::optional<Tensor> g = unit_rows(input_noise);
};

// Its results, to be written where they are wanted.
struct LossGradients {
  using Tuple = std::tuple<Tensor, Tensor, Tensor, Tensor>;
  std::vector<bool> wanted;
  Tensor input, input_noise, weight, bias;

  LossGradients(const LossSizes& sizes, const Tensor& f, ScalarType weight_dtype, ScalarType bias_dtype,
                std::vector<bool> which)
      : wanted(std::move(which)),
        input(allocate(0, {sizes.n, sizes.dim}, f.scalar_type(), f)),
        input_noise(allocate(1, {sizes.n, sizes.dim}, f.scalar_type(), f)),
        weight(allocate(2, {sizes.num_classes, sizes.dim}, weight_dtype, f)),
        bias(allocate(3, {sizes.num_classes}, bias_dtype, f)) {}

  // Without data where it is not wanted.
  Output at(int which, const Tensor& gradient) const {
    return {wanted[which] ? data<void>(gradient) : nullptr, dtype_of(gradient), gradient.stride(0)};
  }
  Tuple tuple() const { return {input, input_noise, weight, bias}; }

 private:
  Tensor allocate(int which, std::initializer_list<int64_t> shape, ScalarType dtype, const Tensor& like) const {
    return wanted[which] ? empty(shape, dtype, like) : empty({0}, dtype, like);
  }
};

// The ops of a device, by its functions that write the results of a call.
template <void run(const LossCall&, const LossResults&),
          void run_backward(const LossBackwardCall&, const LossGradients&)>
struct LossOps {
  static LossResults::Tuple discriminative_loss(const Tensor& input, const std::optional<Tensor>& input_noise,
                                                const Tensor& target, const Tensor& weight,
                                                const std::optional<Tensor>& bias, const Tensor& centroids,
                                                const Tensor& seen, std::vector<double> settings,
                                                const std::optional<Tensor>& scheduled, int64_t norm, bool update_state,
                                                int64_t ignore_index) {
    const LossCall call = {input, input_noise,  target,      weight,
                           bias,  centroids,    seen,        settings_of(settings, scheduled),
                           norm,  update_state, ignore_index};
    const LossResults results(call.sizes, input, wide_dtype(input));
    run(call, results);
    return results.tuple();
  }

  static LossGradients::Tuple discriminative_loss_backward(
      const Tensor& grad_loss, const Tensor& input, const std::optional<Tensor>& input_noise, const Tensor& slot,
      const Tensor& pull, const Tensor& tables, const Tensor& classes, const Tensor& boundary_bias, int64_t num_classes,
      ScalarType weight_dtype, ScalarType bias_dtype, int64_t norm, std::vector<bool> wanted) {
    const LossBackwardCall call = {grad_loss, input,   input_noise,   slot,        pull,
                                   tables,    classes, boundary_bias, num_classes, norm};
    const LossGradients gradients(call.sizes, input, weight_dtype, bias_dtype, std::move(wanted));
    run_backward(call, gradients);
    return gradients.tuple();
  }

  template <class Library>
  static void implement(Library& library) {
    library.impl("discriminative_loss", TORCH_BOX(&LossOps::discriminative_loss));
    library.impl("discriminative_loss_backward", TORCH_BOX(&LossOps::discriminative_loss_backward));
  }
};

}  // namespace robustfast
