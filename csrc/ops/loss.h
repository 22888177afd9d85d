// What the loss ops take and give, on every device.
#pragma once

#include <algorithm>
#include <tuple>
#include <vector>

#include "ops/tensors.h"

namespace robustfast {

struct LossSizes {
  int64_t n, dim, num_classes, rows;

  LossSizes(const Tensor& input, const Tensor& weight)
      : n(input.size(0)), dim(input.size(1)), num_classes(weight.size(0)), rows(std::min(n, num_classes)) {}
};

// The results of discriminative_loss, to be written.
struct LossResults {
  using Tuple = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
  Tensor loss, terms, slot, pull, tables, classes, boundary_bias;

  LossResults(const LossSizes& sizes, const Tensor& input, ScalarType wide)
      : loss(empty({}, wide, input)),
        terms(empty({5}, wide, input)),
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

  LossGradients(const LossSizes& sizes, const Tensor& f, const Tensor& w, std::vector<bool> which)
      : wanted(std::move(which)),
        input(allocate(0, {sizes.n, sizes.dim}, f, f)),
        input_noise(allocate(1, {sizes.n, sizes.dim}, f, f)),
        weight(allocate(2, {sizes.num_classes, sizes.dim}, w, f)),
        bias(allocate(3, {sizes.num_classes}, w, f)) {}

  // Null where it is not wanted.
  void* at(int which, const Tensor& gradient) const { return wanted[which] ? data<void>(gradient) : nullptr; }
  Tuple tuple() const { return {input, input_noise, weight, bias}; }

 private:
  Tensor allocate(int which, std::initializer_list<int64_t> shape, const Tensor& typed, const Tensor& placed) const {
    return wanted[which] ? empty(shape, typed.scalar_type(), placed) : empty({0}, typed.scalar_type(), placed);
  }
};

inline std::optional<Tensor> unit_rows(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional(unit_rows(*tensor)) : std::nullopt;
}

}  // namespace robustfast
