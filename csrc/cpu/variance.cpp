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
void variance_backward(const LossBackward<Wide>& loss, int view, void* grad) {
  RF_DISPATCH(variance_backward, loss, view, grad);
}
template void variance_backward(const LossBackward<float>&, int, void*);
template void variance_backward(const LossBackward<double>&, int, void*);

}  // namespace robustfast

#else

namespace robustfast {
namespace RF_ISA {

// A class with more samples than this is split into chunks, which threads share and whose sums are added in order:
// results do not depend on the number of threads.
constexpr int64_t chunk_size = 128;
constexpr int64_t parallel_elements = 32768;  // less is not worth waking a thread

struct Chunk {
  int64_t row, begin, end;  // of the row's samples, as positions in Groups::order
  bool whole;               // the class has no other
};

template <class T, class Wide>
void add_row(const T* x, int64_t dim, Wide* sum) {
  for (int64_t d = 0; d < dim; ++d) sum[d] += Wide(to_float(x[d]));
}

template <int norm, class T, class Wide>
Wide length(const T* x, const Wide* centroid, int64_t dim) {
  Wide total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t d = 0; d < dim; ++d) total += norm_term<norm>(Wide(to_float(x[d])) - centroid[d]);
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
void add_direction(const T* x, const Wide* centroid, int64_t dim, Wide pull, Wide* pull_sum) {
  for (int64_t d = 0; d < dim; ++d) pull_sum[d] += pull * direction<norm>(Wide(to_float(x[d])) - centroid[d]);
}

// One class after the other; `terms` of a chunk are its parts of the terms.
template <class T, int norm, class Wide>
struct ClassPass {
  const Loss<Wide>& loss;
  const Groups& groups;
  Wide present;
  Wide view_weight;

  explicit ClassPass(const Loss<Wide>& loss)
      : loss(loss),
        groups(*loss.groups),
        present(Wide(loss.present())),
        view_weight(Wide(loss.settings.alpha / (loss.input_noise ? 2 : 1))) {}

  Wide* at(Wide* table, int64_t row) const { return table + row * loss.dim; }
  int64_t state_row(int64_t row) const { return loss.classes[row] * loss.dim; }

  void add_features(const Chunk& chunk, Wide* sum) const {
    std::fill(sum, sum + loss.dim, Wide(0));
    for (int64_t k = chunk.begin; k < chunk.end; ++k)
      add_row(loss.input.template row<T>(groups.order[k]), loss.dim, sum);
  }

  // From the sum of the features in its place, mu_c; from that m_c; both tables' rows are complete then.
  void finish_centroid(int64_t row) const {
    const Wide inverse_count = Wide(1) / Wide(groups.count(row)), momentum = Wide(loss.settings.momentum);
    const Wide* previous = loss.centroids + state_row(row);
    const bool seen = loss.seen[loss.classes[row]];
    Wide *mu = at(loss.boundary_grad, row), *centroid = at(loss.centroid, row);
    for (int64_t d = 0; d < loss.dim; ++d) {
      mu[d] *= inverse_count;
      centroid[d] = momentum_centroid(mu[d], previous[d], seen, momentum);
    }
  }

  // Pulls the chunk's samples to the centroid.
  void pull_features(const Chunk& chunk, Wide* pull_sum, Wide* terms) const {
    const Wide* centroid = at(loss.centroid, chunk.row);
    const Wide sample_share = Wide(1) / (Wide(groups.count(chunk.row)) * present);
    const Wide delta_var = Wide(loss.settings.delta_var);
    const Matrix views[] = {loss.input, loss.input_noise};
    std::fill(pull_sum, pull_sum + loss.dim, Wide(0));
    for (int view = 0; view < 2; ++view) {
      Wide squares = 0;
      for (int64_t k = chunk.begin; views[view] && k < chunk.end; ++k) {
        const int64_t i = groups.order[k];
        const T* x = views[view].template row<T>(i);
        const Wide distance = length<norm>(x, centroid, loss.dim), excess = hinge(distance - delta_var);
        const Wide mine = pull<norm>(distance, delta_var, view_weight * sample_share);
        squares += excess * excess;
        loss.pull[view * loss.n + i] = mine;
        if (mine != 0) add_direction<norm>(x, centroid, loss.dim, mine, pull_sum);
      }
      terms[view == 0 ? class_term::compactness : class_term::alignment] = squares * sample_share;
    }
  }

  // Adds the pull of the regularization to that of the variance, carries both back to mu_c, and writes the state.
  // mu_grad holds the pull_sum.
  void finish_gradient(int64_t row, Wide* terms) const {
    const int64_t dim = loss.dim;
    bool& seen = loss.seen[loss.classes[row]];
    const Wide* centroid = at(loss.centroid, row);
    const Wide of_centroid = length<norm>(centroid, dim), tau = momentum_tau(seen, Wide(loss.settings.momentum));
    const Wide to_zero = Wide(loss.settings.gamma) / present * inverse_length<norm>(of_centroid);
    Wide* mu_grad = at(loss.mu_grad, row);
    for (int64_t d = 0; d < dim; ++d) mu_grad[d] = tau * (to_zero * direction<norm>(centroid[d]) - mu_grad[d]);
    terms[class_term::regularization] = of_centroid / present;

    if (!loss.update_state) return;
    Wide poison = 0;  // becomes nan where a value is not finite
#pragma omp simd reduction(+ : poison)
    for (int64_t d = 0; d < dim; ++d) poison += centroid[d] * Wide(0);
    if (poison != 0) return;
    std::copy(centroid, centroid + dim, loss.centroids + state_row(row));
    seen = true;
  }
};

inline std::vector<Chunk> split(const Groups& groups) {
  std::vector<Chunk> chunks;
  for (int64_t row = 0; row < groups.rows(); ++row) {
    const int64_t begin = groups.begin[row], end = groups.begin[row + 1];
    for (int64_t k = begin; k < end; k += chunk_size) {
      chunks.push_back({row, k, std::min(k + chunk_size, end), end - begin <= chunk_size});
    }
  }
  return chunks;
}

// Adds up `partial` (dim a chunk) over the chunks of each split class into its row of `table`.
template <class Wide, class Finish>
void combine(const std::vector<Chunk>& chunks, const std::vector<Wide>& partial, int64_t dim, Wide* table,
             Finish finish) {
  for (size_t s = 0; s < chunks.size(); ++s) {
    if (chunks[s].whole) continue;
    const int64_t row = chunks[s].row;
    Wide* sum = table + row * dim;
    if (s == 0 || chunks[s - 1].row != row) std::fill(sum, sum + dim, Wide(0));
    add_row(&partial[s * dim], dim, sum);
    if (s + 1 == chunks.size() || chunks[s + 1].row != row) finish(row, s);
  }
}

template <class T, int norm, class Wide>
void variance_of(const Loss<Wide>& loss, Wide* terms) {
  const ClassPass<T, norm, Wide> pass(loss);
  const std::vector<Chunk> chunks = split(*loss.groups);
  const int64_t count = chunks.size(), dim = loss.dim;
  const bool any_split = count > loss.present();
  std::vector<Wide> partial(any_split ? count * dim : 0), chunk_terms(class_term::count * count, Wide(0));
  const auto terms_of = [&](int64_t chunk) { return &chunk_terms[class_term::count * chunk]; };
  const int64_t grain =
      std::max<int64_t>(1, parallel_elements / std::max<int64_t>(1, loss.n * dim / std::max<int64_t>(1, count)));

  parallel_for(0, count, grain, [&](int64_t from, int64_t to) {
    for (int64_t s = from; s < to; ++s) {
      const Chunk& chunk = chunks[s];
      const int64_t row = chunk.row;
      pass.add_features(chunk, chunk.whole ? pass.at(loss.boundary_grad, row) : &partial[s * dim]);
      if (!chunk.whole) continue;
      pass.finish_centroid(row);
      pass.pull_features(chunk, pass.at(loss.mu_grad, row), terms_of(s));
      pass.finish_gradient(row, terms_of(s));
    }
  });
  if (any_split) {
    combine(chunks, partial, dim, loss.boundary_grad, [&](int64_t row, int64_t) { pass.finish_centroid(row); });
    parallel_for(0, count, 1, [&](int64_t from, int64_t to) {
      for (int64_t s = from; s < to; ++s) {
        if (!chunks[s].whole) pass.pull_features(chunks[s], &partial[s * dim], terms_of(s));
      }
    });
    combine(chunks, partial, dim, loss.mu_grad,
            [&](int64_t row, int64_t s) { pass.finish_gradient(row, terms_of(s)); });
  }
  for (int64_t s = 0; s < count; ++s) {
    for (int term = 0; term < class_term::count; ++term) terms[term] += terms_of(s)[term];
  }
}

template <class Wide>
void variance(const Loss<Wide>& loss, Wide* terms) {
  visit_features<Wide>(loss.input.dtype, [&](auto zero) {
    using T = decltype(zero);
    loss.norm == 1 ? variance_of<T, 1>(loss, terms) : variance_of<T, 2>(loss, terms);
  });
}

// grad = pull * direction(x - centroid) (+ grad_loss * mu_grad)
template <int norm, class T, class Wide>
void backward_row(const T* x, const Wide* centroid, const Wide* mu_grad, int64_t dim, Wide pull, Wide grad_loss,
                  T* grad) {
  if (mu_grad == nullptr) {
    for (int64_t d = 0; d < dim; ++d) {
      grad[d] = from_float<T>(pull * direction<norm>(Wide(to_float(x[d])) - centroid[d]));
    }
    return;
  }
  for (int64_t d = 0; d < dim; ++d) {
    const Wide own = pull * direction<norm>(Wide(to_float(x[d])) - centroid[d]);
    grad[d] = from_float<T>(own + grad_loss * mu_grad[d]);
  }
}

template <class T, int norm, class Wide>
void variance_backward_of(const LossBackward<Wide>& loss, int view, T* grad) {
  const int64_t dim = loss.dim, counted = loss.groups->order.size();
  const Matrix& features = view == 0 ? loss.input : loss.input_noise;
  const Wide* pull = loss.pull + view * loss.n;
  const int64_t grain = std::max<int64_t>(1, parallel_elements / std::max<int64_t>(1, dim));
  // In order of class, so that the rows of the tables stay in the cache.
  parallel_for(0, counted, grain, [&](int64_t from, int64_t to) {
    for (int64_t k = from; k < to; ++k) {
      const int64_t i = loss.groups->order[k], row = loss.slot[i];
      backward_row<norm>(features.template row<T>(i), loss.centroid + row * dim,
                         view == 0 ? loss.mu_grad + row * dim : nullptr, dim, loss.grad_loss * pull[i], loss.grad_loss,
                         grad + i * dim);
    }
  });
  for (int64_t i = 0; counted < loss.n && i < loss.n; ++i) {
    if (loss.slot[i] < 0) std::fill(grad + i * dim, grad + (i + 1) * dim, T{});
  }
}

template <class Wide>
void variance_backward(const LossBackward<Wide>& loss, int view, void* grad) {
  visit_features<Wide>(loss.input.dtype, [&](auto zero) {
    using T = decltype(zero);
    T* typed = static_cast<T*>(grad);
    loss.norm == 1 ? variance_backward_of<T, 1>(loss, view, typed) : variance_backward_of<T, 2>(loss, view, typed);
  });
}

}  // namespace RF_ISA
}  // namespace robustfast

#endif
