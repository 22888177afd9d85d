// What the loss ops take and give, on every device.
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

// The op's `settings`, or what `scheduled` holds in their place, on the CPU.
inline Settings settings_of(const std::vector<double>& settings, const std::optional<Tensor>& scheduled) {
  if (!scheduled && settings.size() != num_settings)
    throw std::invalid_argument("robustfast: the loss was called without all of its settings");
  Settings result;
  memcpy(&result, scheduled ? data<double>(*scheduled) : settings.data(), sizeof(result));
  return result;
}

// The results of discriminative_loss, to be written.
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

// The results of discriminative_loss_backward, to be written where they are wanted.
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

inline std::optional<Tensor> unit_rows(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional(unit_rows(*tensor)) : std::nullopt;
}

}  // namespace robustfast
