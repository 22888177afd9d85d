// The arguments of the loss and of its backward, typed: what the kernels take. docs/ops.md says what they hold.
#pragma once

#include "common/loss.h"
#include "cuda/elements.cuh"
#include "cuda/kernels.h"

namespace robustfast::cuda {

template <class Wide>
struct Loss : SettingsOf<Wide> {
  Matrix input, input_noise, target, weight, bias;
  int64_t n, dim, num_classes, rows;
  Wide* centroids;
  bool* seen;
  bool update_state;
  int64_t ignore_index;
  Wide *loss, *terms;
  int32_t* slot;
  Wide *pull, *centroid, *mu_grad, *boundary_grad;
  int32_t *classes, *winner;
  Wide* boundary_bias;

  explicit Loss(const LossParams& p)
      : SettingsOf<Wide>(p.settings.as<Wide>()),
        input(p.input),
        input_noise(p.input_noise),
        target(p.target),
        weight(p.weight),
        bias(p.bias),
        n(p.n),
        dim(p.dim),
        num_classes(p.num_classes),
        rows(p.n < p.num_classes ? p.n : p.num_classes),
        centroids(static_cast<Wide*>(p.centroids)),
        seen(p.seen),
        update_state(p.update_state),
        ignore_index(p.ignore_index),
        loss(static_cast<Wide*>(p.loss)),
        terms(static_cast<Wide*>(p.terms)),
        slot(p.slot),
        pull(static_cast<Wide*>(p.pull)),
        centroid(static_cast<Wide*>(p.tables)),
        mu_grad(centroid + rows * dim),
        boundary_grad(mu_grad + rows * dim),
        classes(p.classes),
        winner(classes + rows),
        boundary_bias(static_cast<Wide*>(p.boundary_bias)) {}

  // From the sums over rows; one thread calls it.
  RF_DEVICE void write_terms(int32_t present, Wide (&sum)[class_term::count]) const {
    RF_UNROLL
    for (int term = 0; term < class_term::count; ++term) sum[term] /= Wide(present > 0 ? present : 1);
    robustfast::write_terms<Wide>(*this, bool(input_noise), sum, loss, terms);
  }
};

template <class Wide>
struct LossBackward {
  const Wide* grad_loss;
  Matrix input, input_noise;
  int64_t n, dim, num_classes, rows;
  const int32_t* slot;
  const Wide *pull, *centroid, *mu_grad, *boundary_grad;
  const int32_t *classes, *winner;
  const Wide* boundary_bias;
  void *grad_input, *grad_input_noise;
  Output grad_weight, grad_bias;

  explicit LossBackward(const LossBackwardParams& p)
      : grad_loss(static_cast<const Wide*>(p.grad_loss)),
        input(p.input),
        input_noise(p.input_noise),
        n(p.n),
        dim(p.dim),
        num_classes(p.num_classes),
        rows(p.rows),
        slot(p.slot),
        pull(static_cast<const Wide*>(p.pull)),
        centroid(static_cast<const Wide*>(p.tables)),
        mu_grad(centroid + rows * dim),
        boundary_grad(mu_grad + rows * dim),
        classes(p.classes),
        winner(classes + rows),
        boundary_bias(static_cast<const Wide*>(p.boundary_bias)),
        grad_input(p.grad_input),
        grad_input_noise(p.grad_input_noise),
        grad_weight(p.grad_weight),
        grad_bias(p.grad_bias) {}

  RF_INLINE bool wants_features() const { return grad_input || grad_input_noise; }
  RF_INLINE bool wants_classifier() const { return grad_weight.data || grad_bias.data; }

  // An element of the classifier's gradient; column `dim` is the bias.
  RF_DEVICE void write_classifier(int64_t i, int64_t column, Wide value) const {
    if (column < dim) {
      if (grad_weight.data) set_element(grad_weight, i * dim + column, value);
    } else if (grad_bias.data) {
      set_element(grad_bias, i, value);
    }
  }
};

}  // namespace robustfast::cuda
