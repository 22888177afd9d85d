// What the ops of the loss's steps take and give, on every device.
#pragma once

#include <tuple>

#include "ops/loss.h"

namespace robustfast {

inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// The results of class_pulls, to be written.
struct PullResults {
  using Tuple = std::tuple<Tensor, Tensor, Tensor, Tensor>;
  Tensor slot, pull, pull_sum, terms;

  PullResults(int64_t n, const Tensor& centroid)
      : slot(empty({n}, ScalarType::Int, centroid)),
        pull(empty({2, n}, centroid.scalar_type(), centroid)),
        pull_sum(empty({centroid.size(0), centroid.size(1)}, centroid.scalar_type(), centroid)),
        terms(empty({class_term::of_samples}, centroid.scalar_type(), centroid)) {}

  Tuple tuple() const { return {slot, pull, pull_sum, terms}; }
};

// The rows' own classes in a search: rows of the classifier that `classes` names, or without it all in turn.
inline ClassifierRows own_rows(const Tensor& weight, const std::optional<Tensor>& bias,
                               const std::optional<Tensor>& classes) {
  return {matrix(weight), matrix(bias), classes ? data<int32_t>(*classes) : nullptr};
}

// The results of margin_search, to be written.
struct SearchResults {
  using Tuple = std::tuple<Tensor, Tensor>;
  Tensor score, winner;

  explicit SearchResults(const Tensor& mu)
      : score(empty({mu.size(0)}, mu.scalar_type(), mu)), winner(empty({mu.size(0)}, ScalarType::Int, mu)) {}

  Tuple tuple() const { return {score, winner}; }
};

// The results of finish: mu_grad, boundary_grad and winner hold what the kernels find there, pull_sum, mu and the
// winner of the search.
struct FinishResults {
  using Tuple = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
  Tensor mu_grad, boundary_grad, boundary_bias, winner, terms;

  FinishResults(const Tensor& mu, const Tensor& pull_sum, const Tensor& winner)
      : mu_grad(torch::stable::clone(dense(pull_sum))),
        boundary_grad(torch::stable::clone(dense(mu))),
        boundary_bias(empty({mu.size(0)}, mu.scalar_type(), mu)),
        winner(torch::stable::clone(dense(winner))),
        terms(empty({class_term::count - class_term::of_samples}, mu.scalar_type(), mu)) {}

  Tuple tuple() const { return {mu_grad, boundary_grad, boundary_bias, winner, terms}; }
};

}  // namespace robustfast
