// The margin and its gradients, from the winners that margin_search finds.
#ifndef RF_ISA

#define RF_KERNEL "cpu/margin.cpp"
#include "common/loss.h"
#include "cpu/loss.h"
//
#include "cpu/each_isa.h"

namespace robustfast {

template <class Wide>
Wide margin(const Loss<Wide>& loss) {
  RF_DISPATCH(margin, loss);
}
template float margin(const Loss<float>&);
template double margin(const Loss<double>&);

template <class Wide>
void margin_backward(const LossBackward<Wide>& loss, const Output& grad_weight, const Output& grad_bias) {
  RF_DISPATCH(margin_backward, loss, grad_weight, grad_bias);
}
template void margin_backward(const LossBackward<float>&, const Output&, const Output&);
template void margin_backward(const LossBackward<double>&, const Output&, const Output&);

}  // namespace robustfast

#else

#include "cpu/boundary.h"

namespace robustfast {
namespace RF_ISA {

// From the winner, the gradients of beta/P * (delta_d + score): of W_i in boundary_grad, of b_i in boundary_bias, and
// that of mu_c is added to mu_grad, which is then shared among the class's samples.
template <class T, class F>
void finish_row(const Loss<F>& loss, int64_t row, F score, std::vector<F>& w_c) {
  const int64_t dim = loss.dim;
  const int32_t winner = loss.winner[row];
  F *mu = loss.boundary_grad + row * dim, *mu_grad = loss.mu_grad + row * dim;
  const F share = F(1) / F(loss.groups->count(row));
  if (winner < 0) {
    for (int64_t d = 0; d < dim; ++d) mu_grad[d] *= share;
    std::fill(mu, mu + dim, F(0));
    loss.boundary_bias[row] = 0;
    return;
  }
  const T *w_i = loss.weight.template row<T>(winner), *own = loss.weight.template row<T>(loss.classes[row]);
  for (int64_t d = 0; d < dim; ++d) w_c[d] = F(to_float(own[d]));
  const F inverse_distance = F(1) / boundary(w_i, w_c.data(), mu, F(0), dim).distance;
  const F class_share = F(loss.settings.beta) / F(loss.present());
  for (int64_t d = 0; d < dim; ++d) {
    const F normal = (F(to_float(w_i[d])) - w_c[d]) * inverse_distance;
    mu_grad[d] = (mu_grad[d] + class_share * normal) * share;
    mu[d] = class_share * inverse_distance * (mu[d] - score * normal);
  }
  loss.boundary_bias[row] = class_share * inverse_distance;
}

inline int64_t grain(int64_t dim) { return 1 + 32768 / std::max<int64_t>(1, dim); }

template <class Wide>
Wide margin(const Loss<Wide>& loss) {
  const int64_t present = loss.present();
  std::vector<Wide> score(present);
  margin_search(loss.boundary_grad, loss.weight, loss.bias, loss.classes, present, loss.dim, loss.num_classes,
                score.data(), loss.winner);
  Wide total = 0;
  for (int64_t row = 0; row < present; ++row) {
    const Wide excess = hinge(Wide(loss.settings.delta_dist) + score[row]);
    if (excess == Wide(0)) loss.winner[row] = -1;
    total += excess;
  }
  visit(loss.weight.dtype, [&](auto zero) {
    parallel_for(0, present, grain(loss.dim), [&](int64_t from, int64_t to) {
      std::vector<Wide> w_c(loss.dim);
      for (int64_t row = from; row < to; ++row) finish_row<decltype(zero)>(loss, row, score[row], w_c);
    });
  });
  return total / Wide(std::max<int64_t>(1, present));
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
void weight_backward(const LossBackward<F>& loss, const std::vector<Contribution>& contributions, T* grad) {
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
void bias_backward(const LossBackward<F>& loss, const std::vector<Contribution>& contributions, T* grad) {
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
          [&](auto zero) { weight_backward(loss, contributions, grad_weight.template row<decltype(zero)>(0)); });
  }
  if (grad_bias.data != nullptr) {
    visit(grad_bias.dtype,
          [&](auto zero) { bias_backward(loss, contributions, grad_bias.template row<decltype(zero)>(0)); });
  }
}

}  // namespace RF_ISA
}  // namespace robustfast

#endif
