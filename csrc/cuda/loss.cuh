// What the kernels of the loss share: their arguments, typed, and how they read vectors of any dtype.
#pragma once

#include <type_traits>

#include "common/loss.h"
#include "common/matrix.h"
#include "cuda/block.cuh"
#include "cuda/kernels.h"

namespace robustfast::cuda {

template <class Wide>
struct Loss {
  Matrix input, input_noise, target, weight, bias;
  int64_t n, dim, num_classes, capacity;  // capacity: R of docs/ops.md, the rows that the tables have
  Wide* centroids;
  bool* seen;
  Wide delta_var, delta_dist, alpha, beta, gamma, momentum;
  bool update_state;
  int64_t ignore_index;
  Wide *loss, *terms;
  int32_t* slot;
  Wide *pull, *center, *center_grad, *boundary_grad;
  int32_t *classes, *winner;
  Wide* boundary_bias;

  explicit Loss(const LossParams& p)
      : input(p.input),
        input_noise(p.input_noise),
        target(p.target),
        weight(p.weight),
        bias(p.bias),
        n(p.n),
        dim(p.dim),
        num_classes(p.num_classes),
        capacity(p.n < p.num_classes ? p.n : p.num_classes),
        centroids(static_cast<Wide*>(p.centroids)),
        seen(p.seen),
        delta_var(Wide(p.settings.delta_var)),
        delta_dist(Wide(p.settings.delta_dist)),
        alpha(Wide(p.settings.alpha)),
        beta(Wide(p.settings.beta)),
        gamma(Wide(p.settings.gamma)),
        momentum(Wide(p.settings.momentum)),
        update_state(p.update_state),
        ignore_index(p.ignore_index),
        loss(static_cast<Wide*>(p.loss)),
        terms(static_cast<Wide*>(p.terms)),
        slot(p.slot),
        pull(static_cast<Wide*>(p.pull)),
        center(static_cast<Wide*>(p.tables)),
        center_grad(center + capacity * dim),
        boundary_grad(center_grad + capacity * dim),
        classes(p.classes),
        winner(classes + capacity),
        boundary_bias(static_cast<Wide*>(p.boundary_bias)) {}

  // The weight of compactness, and of alignment, in the loss.
  RF_INLINE Wide share() const { return input_noise.data ? alpha / 2 : alpha; }
};

template <class Wide>
struct LossGrads {
  const Wide* grad_loss;
  Matrix input, input_noise;
  int64_t n, dim, num_classes, capacity;
  const int32_t* slot;
  const Wide *pull, *center, *center_grad, *boundary_grad;
  const int32_t *classes, *winner;
  const Wide* boundary_bias;
  void *grad_input, *grad_input_noise;
  Output grad_weight, grad_bias;

  explicit LossGrads(const LossBackwardParams& p)
      : grad_loss(static_cast<const Wide*>(p.grad_loss)),
        input(p.input),
        input_noise(p.input_noise),
        n(p.n),
        dim(p.dim),
        num_classes(p.num_classes),
        capacity(p.n < p.num_classes ? p.n : p.num_classes),
        slot(p.slot),
        pull(static_cast<const Wide*>(p.pull)),
        center(static_cast<const Wide*>(p.tables)),
        center_grad(center + capacity * dim),
        boundary_grad(center_grad + capacity * dim),
        classes(p.classes),
        winner(classes + capacity),
        boundary_bias(static_cast<const Wide*>(p.boundary_bias)),
        grad_input(p.grad_input),
        grad_input_noise(p.grad_input_noise),
        grad_weight(p.grad_weight),
        grad_bias(p.grad_bias) {}
};

template <class T>
RF_DEVICE const T* row_of(const Matrix& matrix, int64_t i) {
  return matrix.row<T>(i);
}

// An element of a matrix whose dtype is a floating one that only the launch knows.
template <class Wide>
RF_DEVICE Wide element(const Matrix& matrix, int64_t i, int64_t j) {
  return visit(matrix.dtype, [&](auto zero) { return Wide(to_float(matrix.row<decltype(zero)>(i)[j])); });
}

template <class Wide>
RF_DEVICE void set_element(const Output& output, int64_t i, Wide value) {
  visit(output.dtype, [&](auto zero) { output.row<decltype(zero)>(0)[i] = from_float<decltype(zero)>(value); });
}

RF_DEVICE int64_t label_of(const Matrix& target, int64_t i) {
  return visit_label(target.dtype, [&](auto zero) { return int64_t(*target.row<decltype(zero)>(i)); });
}

// The class of a sample, or num_classes for an ignored one. A label out of range is an assertion.
RF_DEVICE int32_t class_of(const Matrix& target, int64_t i, int64_t num_classes, int64_t ignore_index) {
  const int64_t label = label_of(target, i);
  const bool ignored = label == ignore_index, inside = label >= 0 && label < num_classes;
  device_assert(ignored || inside, "target: a label is outside 0 ... num_classes - 1 and is not ignore_index");
  return int32_t(ignored || !inside ? num_classes : label);
}

template <class F>
RF_DEVICE bool is_finite(F x) {
  return x - x == F(0);
}

RF_DEVICE float square_root(float x) { return sqrtf(x); }
RF_DEVICE double square_root(double x) { return sqrt(x); }

template <int norm, class F>
RF_DEVICE F length_of(F terms) {
  return norm == 1 ? terms : square_root(terms);
}

template <class Wide>
RF_DEVICE void consider_lane(Best<Wide>& best, int mask) {
  const Wide other = __shfl_xor_sync(all_lanes, best.score, mask);
  best.consider(other, __shfl_xor_sync(all_lanes, best.winner, mask));
}

// The boundary between a class and the winner of its margin, and what it gives to loss and gradients.
template <class Wide>
struct Boundary {
  Wide margin = 0, scale = 0, score = 0, inverse_distance = 0;  // scale: beta / P where the margin has a gradient

  // `logit` is (W_w - W_c) . mu_c + b_w - b_c, `square` is ||W_w - W_c||^2.
  RF_DEVICE Boundary(Wide logit, Wide square, bool exists, Wide delta_dist, Wide share) {
    if (!exists || square == Wide(0)) return;
    inverse_distance = Wide(1) / square_root(square);
    score = logit * inverse_distance;
    margin = hinge(delta_dist + score);
    scale = margin == Wide(0) ? Wide(0) : share;
  }
  RF_DEVICE bool active() const { return scale != Wide(0) || scale != scale; }
  // d loss / d mu_c and d loss / d W_w from one coordinate of W_w - W_c and mu_c.
  RF_DEVICE Wide to_centroid(Wide normal) const { return scale * normal * inverse_distance; }
  RF_DEVICE Wide to_weight(Wide normal, Wide mu) const {
    return scale * inverse_distance * (mu - score * normal * inverse_distance);
  }
  RF_DEVICE Wide to_bias() const { return scale * inverse_distance; }
};

// loss and terms from the sums over rows of (compactness, alignment, margin, regularization).
template <class Wide>
RF_DEVICE void write_terms(const Loss<Wide>& a, int32_t rows, const Wide (&sum)[4]) {
  const Wide present = Wide(rows > 0 ? rows : 1);
  const Wide compactness = sum[0] / present, alignment = sum[1] / present;
  const Wide variance = a.input_noise.data ? (compactness + alignment) / 2 : compactness;
  const Wide margin = sum[2] / present, regularization = sum[3] / present;
  *a.loss = a.alpha * variance + a.beta * margin + a.gamma * regularization;
  a.terms[0] = variance, a.terms[1] = margin, a.terms[2] = regularization;
  a.terms[3] = compactness, a.terms[4] = alignment;
}

// function(T(), std::integral_constant<int, norm>()) for features of a dtype, whose sums are in Wide, and norm 1 or 2.
template <class Wide, class Function>
cudaError_t for_loss(Dtype dtype, int64_t norm, const Function& function) {
  cudaError_t error = cudaSuccess;
  visit_features<Wide>(dtype, [&](auto feature) {
    error = norm == 1 ? function(feature, std::integral_constant<int, 1>())
                      : function(feature, std::integral_constant<int, 2>());
  });
  return error;
}

// function(Wide()) for features of a dtype.
template <class Function>
cudaError_t for_wide(Dtype features, const Function& function) {
  return features == Dtype::float64 ? function(double()) : function(float());
}

}  // namespace robustfast::cuda
