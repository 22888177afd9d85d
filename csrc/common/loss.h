// The loss's settings, and the arithmetic of one sample and of one class (docs/ops.md), for the CPU and CUDA kernels.
// F is float or double. Comparisons are written so that nan passes through.
#pragma once

#include <cmath>

#include "common/platform.h"

namespace robustfast {

// In the order of robustfast.reference.Settings.
template <class F>
struct SettingsOf {
  F delta_var, delta_dist, alpha, beta, gamma, momentum;

  template <class To>
  RF_INLINE SettingsOf<To> as() const {
    return {To(delta_var), To(delta_dist), To(alpha), To(beta), To(gamma), To(momentum)};
  }
  RF_INLINE F view_weight(bool has_noise) const { return has_noise ? alpha / 2 : alpha; }
};
using Settings = SettingsOf<double>;
constexpr int num_settings = sizeof(Settings) / sizeof(double);

// What a class gives to the terms, in the order of all tables and sums of it: first what its samples give.
namespace class_term {
enum { compactness, alignment, of_samples, margin = of_samples, regularization, count };
}

// The terms and the loss from the means over the classes of the batch; `terms` in the order of the op's result.
constexpr int num_terms = 5;
template <class F>
RF_INLINE void write_terms(const SettingsOf<F>& s, bool has_noise, const F (&mean)[class_term::count], F* loss,
                           F* terms) {
  const F compactness = mean[class_term::compactness], alignment = mean[class_term::alignment];
  const F variance = has_noise ? (compactness + alignment) / 2 : compactness;
  const F margin = mean[class_term::margin], regularization = mean[class_term::regularization];
  *loss = s.alpha * variance + s.beta * margin + s.gamma * regularization;
  terms[0] = variance, terms[1] = margin, terms[2] = regularization;
  terms[3] = compactness, terms[4] = alignment;
}

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

// d ||r||_p / dr, up to the factor 1/||r||_2 for p = 2, which inverse_length() holds.
template <int norm, class F>
RF_INLINE F direction(F residual) {
  return norm == 1 ? sign(residual) : residual;
}

template <int norm, class F>
RF_INLINE F inverse_length(F length) {
  return norm == 1 ? F(1) : (length == F(0) ? F(0) : F(1) / length);
}

// The factor of direction(r) in the gradient of share * max(||r|| - delta_var, 0)^2.
template <int norm, class F>
RF_INLINE F pull(F length, F delta_var, F share) {
  return F(2) * share * hinge(length - delta_var) * inverse_length<norm>(length);
}

// m_c from mu_c.
template <class F>
RF_INLINE F momentum_centroid(F mu, F previous, bool seen, F momentum) {
  return seen ? (F(1) - momentum) * mu + momentum * previous : mu;
}

// tau: d m_c / d mu_c.
template <class F>
RF_INLINE F momentum_tau(bool seen, F momentum) {
  return seen ? F(1) - momentum : F(1);
}

// Where the search for a class's margin stands. nan beats all numbers, so that it reaches the loss; ties go to the
// lower index.
template <class F>
struct Best {
  F score;
  int32_t winner;  // -1: none

  static RF_INLINE Best none() { return {F(-INFINITY), -1}; }

  RF_INLINE void consider(F other, int32_t index) {
    const bool is_nan = score != score, other_is_nan = other != other;
    const bool tie = other == score || (is_nan && other_is_nan);
    if (tie ? uint32_t(index) < uint32_t(winner) : other_is_nan || (!is_nan && other > score)) {
      score = other;
      winner = index;
    }
  }
};

}  // namespace robustfast
