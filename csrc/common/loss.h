// The loss's settings, and the arithmetic of one sample and of one class (docs/ops.md), for the CPU and CUDA kernels.
// F is float or double. Comparisons are written so that nan passes through.
#pragma once

#include "common/platform.h"

namespace robustfast {

struct Settings {
  double delta_var, delta_dist, alpha, beta, gamma, momentum;
};

template <class F>
RF_INLINE F hinge(F x) {
  return x <= F(0) ? F(0) : x;
}

template <class F>
RF_INLINE F sign(F x) {
  return F(x > F(0)) - F(x < F(0));
}

// What one coordinate of a residual adds to sum |r|^p.
template <int norm, class F>
RF_INLINE F norm_term(F residual) {
  return norm == 1 ? (residual < F(0) ? -residual : residual) : residual * residual;
}

// d ||r||_p / dr, up to the factor 1/||r||_2 for p = 2, which slope() holds.
template <int norm, class F>
RF_INLINE F direction(F residual) {
  return norm == 1 ? sign(residual) : residual;
}

template <int norm, class F>
RF_INLINE F slope(F length) {
  return norm == 1 ? F(1) : (length == F(0) ? F(0) : F(1) / length);
}

// The factor of direction(r) in the gradient of weight * max(||r|| - delta_var, 0)^2.
template <int norm, class F>
RF_INLINE F pull(F length, F delta_var, F weight) {
  return F(2) * weight * hinge(length - delta_var) * slope<norm>(length);
}

// m_c from mu_c.
template <class F>
RF_INLINE F momentum_centroid(F mu, F previous, bool seen, F momentum) {
  return seen ? (F(1) - momentum) * mu + momentum * previous : mu;
}

// d m_c / d mu_c.
template <class F>
RF_INLINE F momentum_gain(bool seen, F momentum) {
  return seen ? F(1) - momentum : F(1);
}

}  // namespace robustfast
