// Regularization and margin with their gradients, from the winners that margin_search finds.
#ifndef RF_ISA

#define RF_KERNEL "cpu/margin.cpp"
#include "common/loss.h"
#include "cpu/loss.h"
//
#include "cpu/each_isa.h"

namespace robustfast {

template <class Wide>
void finish(const Finish<Wide>& to, Wide* terms) {
  RF_DISPATCH(finish, to, terms);
}
template void finish(const Finish<float>&, float*);
template void finish(const Finish<double>&, double*);

template <class Wide>
void margin_backward(const LossBackward<Wide>& loss, const Output& grad_weight, const Output& grad_bias) {
  RF_DISPATCH(margin_backward, loss, grad_weight, grad_bias);
}
template void margin_backward(const LossBackward<float>&, const Output&, const Output&);
template void margin_backward(const LossBackward<double>&, const Output&, const Output&);

}  // namespace robustfast

#else

#include "cpu/sums.h"
//
#include "cpu/boundary.h"

namespace robustfast {
namespace RF_ISA {

template <int norm, class F>
F length_of(const F* x, int64_t dim) {
  const F total = sum_over<F, F>(dim, [&]<class Value>(int64_t d, Sums<Value>& sums) RF_TARGET_LAMBDA {
                    sums.first += norm_terms<norm>(load<Value>(x + d));
                  }).first;
  return norm == 1 ? total : std::sqrt(total);
}

// Adds the pull of the regularization to that of the variance, and carries both back to mu_c. mu_grad holds the
// pull_sum. Gives ||m_c||_p.
template <int norm, class F>
F regularize_row(const F* centroid, int64_t dim, F gamma_share, F tau, F* mu_grad) {
  const F length = length_of<norm>(centroid, dim), to_zero = gamma_share * inverse_length<norm>(length);
  for (int64_t d = 0; d < dim; ++d) mu_grad[d] = tau * (to_zero * direction<norm>(centroid[d]) - mu_grad[d]);
  return length;
}

// One coordinate after the other from W_w - W_c, in both tables.
template <class T, class F>
void write_boundary(const T* w_w, const F* w_c, int64_t dim, F score, F inverse_distance, F beta_share, F sample_share,
                    F* mu_grad, F* boundary_grad) {
  for (int64_t d = 0; d < dim; ++d) {
    const F normal = (F(to_float(w_w[d])) - w_c[d]) * inverse_distance;
    mu_grad[d] = (mu_grad[d] + beta_share * normal) * sample_share;
    boundary_grad[d] = beta_share * inverse_distance * (boundary_grad[d] - score * normal);
  }
}

template <class F>
struct FinishRow {
  const Finish<F>& to;
  std::vector<F> w_c;

  explicit FinishRow(const Finish<F>& to) : to(to), w_c(to.dim) {}

  F* mu_grad(int64_t row) const { return to.mu_grad + row * to.dim; }
  F* boundary_grad(int64_t row) const { return to.boundary_grad + row * to.dim; }

  // Its part of the terms.
  void run(int64_t row, F* terms) {
    if (to.counts[row] == F(0)) return clear(row);
    const F *centroid = to.centroid + row * to.dim, gamma_share = to.settings.gamma / F(to.present), tau = to.tau[row];
    terms[class_term::regularization] =
        (to.norm == 1 ? regularize_row<1>(centroid, to.dim, gamma_share, tau, mu_grad(row))
                      : regularize_row<2>(centroid, to.dim, gamma_share, tau, mu_grad(row))) /
        F(to.present);
    terms[class_term::margin] = to.winner[row] < 0 ? F(0) : settle(row);
    if (to.winner[row] < 0) leave(row);
  }

  void clear(int64_t row) const {
    to.winner[row] = -1;
    std::fill_n(mu_grad(row), to.dim, F(0));
    leave(row);
  }

  // No boundary: mu_grad has all that there is.
  void leave(int64_t row) const {
    const F inverse_count = F(1) / std::max(F(1), to.counts[row]);
    F* const grad = mu_grad(row);
    for (int64_t d = 0; d < to.dim; ++d) grad[d] *= inverse_count;
    std::fill_n(boundary_grad(row), to.dim, F(0));
    to.boundary_bias[row] = 0;
  }

  // The boundary with the winner: its hinge, and where that has one its gradient, which mu_grad's samples share.
  F settle(int64_t row) {
    visit_features<F>(to.own.weight.dtype, [&](auto zero) {
      widen(to.own.weight.template row<decltype(zero)>(to.own.at(row)), to.dim, w_c.data());
    });
    F excess = 0;
    visit_features<F>(to.other.weight.dtype, [&](auto zero) {
      const auto* w_w = to.other.weight.template row<decltype(zero)>(to.other.at(row));
      const F bias_difference = bias_at<F>(to.other, row) - bias_at<F>(to.own, row);
      const Boundary<F> found = boundary(w_w, w_c.data(), boundary_grad(row), bias_difference, to.dim);
      excess = hinge(to.settings.delta_dist + found.score);
      if (excess == F(0)) return;
      const F inverse_distance = F(1) / found.distance, beta_share = to.settings.beta / F(to.present);
      write_boundary(w_w, w_c.data(), to.dim, found.score, inverse_distance, beta_share, F(1) / to.counts[row],
                     mu_grad(row), boundary_grad(row));
      to.boundary_bias[row] = beta_share * inverse_distance;
    });
    if (excess == F(0)) to.winner[row] = -1;
    return excess;
  }
};

inline int64_t grain(int64_t dim) { return 1 + 32768 / std::max<int64_t>(1, dim); }

template <class Wide>
void finish(const Finish<Wide>& to, Wide* terms) {
  std::vector<Wide> row_terms(class_term::count * to.rows, Wide(0));
  parallel_for(0, to.rows, grain(to.dim), [&](int64_t from, int64_t end) {
    FinishRow<Wide> finish(to);
    for (int64_t row = from; row < end; ++row) finish.run(row, &row_terms[class_term::count * row]);
  });
  for (int64_t row = 0; row < to.rows; ++row) {
    for (int term = 0; term < class_term::count; ++term) terms[term] += row_terms[class_term::count * row + term];
  }
  terms[class_term::margin] /= Wide(std::max<int64_t>(1, to.present));
}

// What one row gives to the gradient of one class.
struct Contribution {
  int32_t to, row, sign;
};

template <class F>
std::vector<Contribution> by_class(const LossBackward<F>& loss) {
  std::vector<Contribution> contributions;
  for (int32_t row = 0; row < loss.rows; ++row) {
    if (loss.classes[row] < 0 || loss.winner[row] < 0) continue;
    contributions.push_back({loss.winner[row], row, 1});
    contributions.push_back({loss.classes[row], row, -1});
  }
  std::stable_sort(contributions.begin(), contributions.end(),
                   [](const Contribution& a, const Contribution& b) { return a.to < b.to; });
  return contributions;
}

template <class F>
void add_scaled(const F* x, F scale, int64_t dim, F* sum) {
  for (int64_t d = 0; d < dim; ++d) sum[d] += scale * x[d];
}

template <class T, class F>
void narrow(const F* x, int64_t dim, T* y) {
  for (int64_t d = 0; d < dim; ++d) y[d] = from_float<T>(x[d]);
}

template <class T, class F>
void write_grad_weight(const LossBackward<F>& loss, const std::vector<Contribution>& contributions, T* grad) {
  const int64_t dim = loss.dim;
  parallel_for(0, loss.num_classes, grain(dim), [&](int64_t from, int64_t to) {
    auto next = std::lower_bound(contributions.begin(), contributions.end(), from,
                                 [](const Contribution& a, int64_t c) { return a.to < c; });
    std::vector<F> sum(dim);
    for (int64_t c = from; c < to; ++c) {
      if (next == contributions.end() || next->to != c) {
        std::fill(grad + c * dim, grad + (c + 1) * dim, T{});
        continue;
      }
      std::fill(sum.begin(), sum.end(), F(0));
      for (; next != contributions.end() && next->to == c; ++next) {
        add_scaled(loss.boundary_grad + next->row * dim, loss.grad_loss * F(next->sign), dim, sum.data());
      }
      narrow(sum.data(), dim, grad + c * dim);
    }
  });
}

template <class T, class F>
void write_grad_bias(const LossBackward<F>& loss, const std::vector<Contribution>& contributions, T* grad) {
  std::fill(grad, grad + loss.num_classes, T{});
  F sum = 0;
  for (size_t s = 0; s < contributions.size(); ++s) {
    sum += loss.grad_loss * F(contributions[s].sign) * loss.boundary_bias[contributions[s].row];
    if (s + 1 < contributions.size() && contributions[s + 1].to == contributions[s].to) continue;
    grad[contributions[s].to] = from_float<T>(sum);
    sum = 0;
  }
}

template <class Wide>
void margin_backward(const LossBackward<Wide>& loss, const Output& grad_weight, const Output& grad_bias) {
  const std::vector<Contribution> contributions = by_class(loss);
  if (grad_weight.data != nullptr) {
    visit(grad_weight.dtype,
          [&](auto zero) { write_grad_weight(loss, contributions, grad_weight.template row<decltype(zero)>(0)); });
  }
  if (grad_bias.data != nullptr) {
    visit(grad_bias.dtype,
          [&](auto zero) { write_grad_bias(loss, contributions, grad_bias.template row<decltype(zero)>(0)); });
  }
}

}  // namespace RF_ISA
}  // namespace robustfast

#endif
