// The gradients of the features, one streaming pass:
//   df_i = grad_loss (pull_0i direction(f_i - m_c) + mu_grad_c),  dg_i = grad_loss pull_1i direction(g_i - m_c)
#pragma once

#include "cuda/pack.cuh"

namespace robustfast::cuda {

constexpr int variance_backward_threads = 256;

template <class T, int norm, int count, class Wide>
RF_DEVICE void variance_backward_at(const LossBackward<Wide>& a, Wide grad_loss, int64_t i, int64_t column) {
  const int64_t row = a.slot[i];
  Pack<T, count> view[2];
  Pack<Wide, count> centroid, mu_grad;
  Wide pull[2] = {0, 0};
  void* const grads[2] = {a.grad_input, a.grad_input_noise};
  if (row >= 0) {
    RF_UNROLL
    for (int v = 0; v < 2; ++v) {
      const Matrix& features = v == 0 ? a.input : a.input_noise;
      if (!grads[v]) continue;
      view[v] = load_pack<count>(features.row<T>(i), column, a.dim);
      pull[v] = grad_loss * a.pull[v * a.n + i];
    }
    centroid = load_pack<count>(a.centroid + row * a.dim, column, a.dim);
    mu_grad = load_pack<count>(a.mu_grad + row * a.dim, column, a.dim);
  }
  RF_UNROLL
  for (int v = 0; v < 2; ++v) {
    if (!grads[v]) continue;
    Pack<T, count> grad;
    RF_UNROLL
    for (int k = 0; k < count; ++k) {
      Wide value = 0;
      if (row >= 0) {
        value = pull[v] * direction<norm>(Wide(to_float(view[v].value[k])) - centroid.value[k]);
        if (v == 0) value += grad_loss * mu_grad.value[k];
      }
      grad.value[k] = from_float<T>(value);
    }
    store_pack<Reuse::never>(static_cast<T*>(grads[v]) + i * a.dim, column, a.dim, grad);
  }
}

// The part of `block`, of as many as `blocks`; every thread of them calls it.
template <class T, int norm, int count, class Wide>
RF_DEVICE void variance_backward(const LossBackward<Wide>& a, int64_t block, int64_t blocks) {
  const Wide grad_loss = *a.grad_loss;
  const Teams teams(a.dim / count, variance_backward_threads);
  for (int64_t i = block * teams.count + teams.team(); i < a.n; i += blocks * teams.count) {
    for (int64_t column = int64_t(teams.rank()) * count; column < a.dim; column += int64_t(teams.size) * count) {
      variance_backward_at<T, norm, count>(a, grad_loss, i, column);
    }
  }
}

// Blocks that give every team one sample.
inline int64_t variance_backward_blocks(int64_t n, int64_t packs) {
  const Teams teams(packs, variance_backward_threads);
  return (n + teams.count - 1) / teams.count;
}

}  // namespace robustfast::cuda
