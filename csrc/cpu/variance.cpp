// Centroids, variance and regularization of a batch in one pass over its classes: the second look at a class's features
// finds them in the cache.
#ifndef RF_ISA

#define RF_KERNEL "cpu/variance.cpp"
#include "common/loss.h"
#include "cpu/loss.h"
//
#include "cpu/each_isa.h"

namespace robustfast {

template <class Wide>
void variance(const Loss<Wide>& loss, Wide* terms) {
  RF_DISPATCH(variance, loss, terms);
}
template void variance(const Loss<float>&, float*);
template void variance(const Loss<double>&, double*);

template <class Wide>
void variance_backward(const LossGrads<Wide>& grads, bool noisy, void* grad) {
  RF_DISPATCH(variance_backward, grads, noisy, grad);
}
template void variance_backward(const LossGrads<float>&, bool, void*);
template void variance_backward(const LossGrads<double>&, bool, void*);

}  // namespace robustfast

#else

namespace robustfast {
namespace RF_ISA {

// A class with more samples than this is split into segments, which threads share and whose sums are added in order:
// results do not depend on the number of threads.
constexpr int64_t segment_size = 128;
constexpr int64_t parallel_elements = 32768;  // less is not worth waking a thread

struct Segment {
  int64_t row, begin, end;  // of the row's samples, as positions in Groups::order
  bool whole;               // the class has no other
};

template <class T, class Wide>
void add_row(const T* x, int64_t dim, Wide* sum) {
  for (int64_t d = 0; d < dim; ++d) sum[d] += Wide(to_float(x[d]));
}

template <int norm, class T, class Wide>
Wide length(const T* x, const Wide* center, int64_t dim) {
  Wide total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t d = 0; d < dim; ++d) total += norm_term<norm>(Wide(to_float(x[d])) - center[d]);
  return norm == 1 ? total : std::sqrt(total);
}

template <int norm, class Wide>
Wide length(const Wide* x, int64_t dim) {
  Wide total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t d = 0; d < dim; ++d) total += norm_term<norm>(x[d]);
  return norm == 1 ? total : std::sqrt(total);
}

template <int norm, class T, class Wide>
void subtract_direction(const T* x, const Wide* center, int64_t dim, Wide factor, Wide* sum) {
  for (int64_t d = 0; d < dim; ++d) sum[d] -= factor * direction<norm>(Wide(to_float(x[d])) - center[d]);
}

// One class after the other; `terms` of a segment are its parts of (compactness, alignment, regularization).
template <class T, int norm, class Wide>
struct ClassPass {
  const Loss<Wide>& loss;
  const Groups& groups;
  Wide present;  // P
  Wide weight;   // of compactness and of alignment in the loss

  explicit ClassPass(const Loss<Wide>& loss)
      : loss(loss),
        groups(*loss.groups),
        present(Wide(groups.rows())),
        weight(Wide(loss.settings.alpha / (loss.input_noise ? 2 : 1))) {}

  Wide* at(Wide* table, int64_t row) const { return table + row * loss.dim; }
  int64_t state_row(int64_t row) const { return loss.classes[row] * loss.dim; }

  void add_features(const Segment& segment, Wide* sum) const {
    std::fill(sum, sum + loss.dim, Wide(0));
    for (int64_t k = segment.begin; k < segment.end; ++k)
      add_row(loss.input.template row<T>(groups.order[k]), loss.dim, sum);
  }

  // From the sum of the features in its place, mu_c; from that m_c; both tables' rows are complete then.
  void finish_centroid(int64_t row) const {
    const Wide share = Wide(1) / Wide(groups.count(row)), momentum = Wide(loss.settings.momentum);
    const Wide* previous = loss.centroids + state_row(row);
    const bool seen = loss.seen[loss.classes[row]];
    Wide *mu = at(loss.boundary_grad, row), *center = at(loss.center, row);
    for (int64_t d = 0; d < loss.dim; ++d) {
      mu[d] *= share;
      center[d] = momentum_centroid(mu[d], previous[d], seen, momentum);
    }
  }

  // Pulls the segment's samples to the centroid; `sum` gets what comes back to the centroid of it.
  void pull_features(const Segment& segment, Wide* sum, Wide* terms) const {
    const Wide* center = at(loss.center, segment.row);
    const Wide share = Wide(1) / (Wide(groups.count(segment.row)) * present), delta = Wide(loss.settings.delta_var);
    const Matrix views[] = {loss.input, loss.input_noise};
    std::fill(sum, sum + loss.dim, Wide(0));
    for (int view = 0; view < 2; ++view) {
      Wide squares = 0;
      for (int64_t k = segment.begin; views[view] && k < segment.end; ++k) {
        const int64_t i = groups.order[k];
        const T* x = views[view].template row<T>(i);
        const Wide distance = length<norm>(x, center, loss.dim), excess = hinge(distance - delta);
        const Wide factor = pull<norm>(distance, delta, weight * share);
        squares += excess * excess;
        loss.pull[view * loss.n + i] = factor;
        if (factor != 0) subtract_direction<norm>(x, center, loss.dim, factor, sum);
      }
      terms[view] = squares * share;
    }
  }

  // Adds the pull of the regularization to that of the variance, carries both back to mu_c, and writes the state.
  void finish_gradient(int64_t row, Wide* terms) const {
    const int64_t dim = loss.dim;
    bool& seen = loss.seen[loss.classes[row]];
    const Wide* center = at(loss.center, row);
    const Wide size = length<norm>(center, dim), gain = momentum_gain(seen, Wide(loss.settings.momentum));
    const Wide factor = Wide(loss.settings.gamma) / present * slope<norm>(size);
    Wide* grad = at(loss.center_grad, row);
    for (int64_t d = 0; d < dim; ++d) grad[d] = gain * (grad[d] + factor * direction<norm>(center[d]));
    terms[2] = size / present;

    if (!loss.update_state) return;
    Wide poison = 0;  // becomes nan where a value is not finite
#pragma omp simd reduction(+ : poison)
    for (int64_t d = 0; d < dim; ++d) poison += center[d] * Wide(0);
    if (poison != 0) return;
    std::copy(center, center + dim, loss.centroids + state_row(row));
    seen = true;
  }
};

inline std::vector<Segment> split(const Groups& groups) {
  std::vector<Segment> segments;
  for (int64_t row = 0; row < groups.rows(); ++row) {
    const int64_t begin = groups.begin[row], end = groups.begin[row + 1];
    for (int64_t k = begin; k < end; k += segment_size) {
      segments.push_back({row, k, std::min(k + segment_size, end), end - begin <= segment_size});
    }
  }
  return segments;
}

// Adds up `partial` (dim and then 3 terms a segment) over the segments of each split class into its row of `table`.
template <class Wide, class Finish>
void combine(const std::vector<Segment>& segments, const std::vector<Wide>& partial, int64_t dim, Wide* table,
             Finish finish) {
  for (size_t s = 0; s < segments.size(); ++s) {
    if (segments[s].whole) continue;
    const int64_t row = segments[s].row;
    Wide* sum = table + row * dim;
    if (s == 0 || segments[s - 1].row != row) std::fill(sum, sum + dim, Wide(0));
    add_row(&partial[s * dim], dim, sum);
    if (s + 1 == segments.size() || segments[s + 1].row != row) finish(row, s);
  }
}

template <class T, int norm, class Wide>
void variance_of(const Loss<Wide>& loss, Wide* terms) {
  const ClassPass<T, norm, Wide> pass(loss);
  const std::vector<Segment> segments = split(*loss.groups);
  const int64_t count = segments.size(), dim = loss.dim;
  const bool any_split = count > loss.groups->rows();
  std::vector<Wide> partial(any_split ? count * dim : 0), parts(3 * count, Wide(0));
  const int64_t grain =
      std::max<int64_t>(1, parallel_elements / std::max<int64_t>(1, loss.n * dim / std::max<int64_t>(1, count)));

  parallel_for(0, count, grain, [&](int64_t from, int64_t to) {
    for (int64_t s = from; s < to; ++s) {
      const Segment& segment = segments[s];
      const int64_t row = segment.row;
      pass.add_features(segment, segment.whole ? pass.at(loss.boundary_grad, row) : &partial[s * dim]);
      if (!segment.whole) continue;
      pass.finish_centroid(row);
      pass.pull_features(segment, pass.at(loss.center_grad, row), &parts[3 * s]);
      pass.finish_gradient(row, &parts[3 * s]);
    }
  });
  if (any_split) {
    combine(segments, partial, dim, loss.boundary_grad, [&](int64_t row, int64_t) { pass.finish_centroid(row); });
    parallel_for(0, count, 1, [&](int64_t from, int64_t to) {
      for (int64_t s = from; s < to; ++s) {
        if (!segments[s].whole) pass.pull_features(segments[s], &partial[s * dim], &parts[3 * s]);
      }
    });
    combine(segments, partial, dim, loss.center_grad,
            [&](int64_t row, int64_t s) { pass.finish_gradient(row, &parts[3 * s]); });
  }
  std::fill(terms, terms + 3, Wide(0));
  for (int64_t s = 0; s < count; ++s) {
    for (int k = 0; k < 3; ++k) terms[k] += parts[3 * s + k];
  }
}

template <class Wide>
void variance(const Loss<Wide>& loss, Wide* terms) {
  visit_features<Wide>(loss.input.dtype, [&](auto type) {
    using T = decltype(type);
    loss.norm == 1 ? variance_of<T, 1>(loss, terms) : variance_of<T, 2>(loss, terms);
  });
}

// grad = factor * direction(x - center) (+ grad_loss * center_grad)
template <int norm, class T, class Wide>
void pull_back(const T* x, const Wide* center, const Wide* center_grad, int64_t dim, Wide factor, Wide grad_loss,
               T* grad) {
  if (center_grad == nullptr) {
    for (int64_t d = 0; d < dim; ++d) {
      grad[d] = from_float<T>(factor * direction<norm>(Wide(to_float(x[d])) - center[d]));
    }
    return;
  }
  for (int64_t d = 0; d < dim; ++d) {
    const Wide own = factor * direction<norm>(Wide(to_float(x[d])) - center[d]);
    grad[d] = from_float<T>(own + grad_loss * center_grad[d]);
  }
}

template <class T, int norm, class Wide>
void variance_backward_of(const LossGrads<Wide>& grads, bool noisy, T* grad) {
  const int64_t dim = grads.dim, counted = grads.groups->order.size();
  const Matrix& view = noisy ? grads.input_noise : grads.input;
  const Wide* pulls = grads.pull + (noisy ? grads.n : 0);
  const int64_t grain = std::max<int64_t>(1, parallel_elements / std::max<int64_t>(1, dim));
  // In order of class, so that the rows of the tables stay in the cache.
  parallel_for(0, counted, grain, [&](int64_t from, int64_t to) {
    for (int64_t k = from; k < to; ++k) {
      const int64_t i = grads.groups->order[k], row = grads.slot[i];
      pull_back<norm>(view.template row<T>(i), grads.center + row * dim,
                      noisy ? nullptr : grads.center_grad + row * dim, dim, grads.grad_loss * pulls[i], grads.grad_loss,
                      grad + i * dim);
    }
  });
  for (int64_t i = 0; counted < grads.n && i < grads.n; ++i) {
    if (grads.slot[i] < 0) std::fill(grad + i * dim, grad + (i + 1) * dim, T{});
  }
}

template <class Wide>
void variance_backward(const LossGrads<Wide>& grads, bool noisy, void* grad) {
  visit_features<Wide>(grads.input.dtype, [&](auto type) {
    using T = decltype(type);
    T* typed = static_cast<T*>(grad);
    grads.norm == 1 ? variance_backward_of<T, 1>(grads, noisy, typed) : variance_backward_of<T, 2>(grads, noisy, typed);
  });
}

}  // namespace RF_ISA
}  // namespace robustfast

#endif
