// What is summed over the features of each class: centroids, and the hinges about them. A class goes through both at
// once, so that the second look at its features finds them in the cache.
#ifndef RF_ISA

#define RF_KERNEL "cpu/variance.cpp"
#include "common/loss.h"
#include "cpu/loss.h"
//
#include "cpu/each_isa.h"

namespace robustfast {

template <class Wide>
void class_sums(const Features& features, Wide* sums) {
  RF_DISPATCH(class_sums, features, sums);
}
template void class_sums(const Features&, float*);
template void class_sums(const Features&, double*);

template <class Wide>
void class_pulls(const ClassPulls<Wide>& pulls, Wide* terms) {
  RF_DISPATCH(class_pulls, pulls, terms);
}
template void class_pulls(const ClassPulls<float>&, float*);
template void class_pulls(const ClassPulls<double>&, double*);

template <class Wide>
void variance(const Centroids<Wide>& centroids, const ClassPulls<Wide>& pulls, Wide* terms) {
  RF_DISPATCH(variance, centroids, pulls, terms);
}
template void variance(const Centroids<float>&, const ClassPulls<float>&, float*);
template void variance(const Centroids<double>&, const ClassPulls<double>&, double*);

template <class Wide>
void variance_backward(const LossBackward<Wide>& loss, int view, void* grad) {
  RF_DISPATCH(variance_backward, loss, view, grad);
}
template void variance_backward(const LossBackward<float>&, int, void*);
template void variance_backward(const LossBackward<double>&, int, void*);

}  // namespace robustfast

#else

#include "cpu/sums.h"

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
Wide length_of(const T* x, const Wide* centroid, int64_t dim) {
  const Wide total = sum_over<T, Wide>(dim, [&]<class Value>(int64_t d, Sums<Value>& sums) RF_TARGET_LAMBDA {
                       sums.first += norm_terms<norm>(load<Value>(x + d) - load<Value>(centroid + d));
                     }).first;
  return norm == 1 ? total : std::sqrt(total);
}

template <int norm, class T, class Wide>
void add_direction(const T* x, const Wide* centroid, int64_t dim, Wide pull, Wide* pull_sum) {
  for (int64_t d = 0; d < dim; ++d) pull_sum[d] += pull * direction<norm>(Wide(to_float(x[d])) - centroid[d]);
}

// A phase of a pass over the classes: add() makes a chunk's sum and its parts of the terms, finish() what is left once
// row() holds the sum over the class.

// Sums of the clean features, in rows of `stride`.
template <class T, class Wide>
struct SumPhase {
  const Features& features;
  Wide* table;
  int64_t stride;

  Wide* row(int64_t row) const { return table + row * stride; }

  RF_NOINLINE void add(const Chunk& chunk, Wide* sum, Wide*) const {
    std::fill(sum, sum + features.dim, Wide(0));
    for (int64_t k = chunk.begin; k < chunk.end; ++k) {
      add_row(features.input.template row<T>(features.groups->order[k]), features.dim, sum);
    }
  }
};

template <class T, class Wide>
struct ClassSums : SumPhase<T, Wide> {
  void finish(int64_t row) const { this->row(row)[this->features.dim] = Wide(this->features.groups->count(row)); }
};

// From the sum of the features in its place, mu_c; from that m_c; then the state.
template <class T, class Wide>
struct CentroidPhase : SumPhase<T, Wide> {
  const Centroids<Wide>& to;

  explicit CentroidPhase(const Centroids<Wide>& to) : SumPhase<T, Wide>{to.features, to.mu, to.features.dim}, to(to) {}

  RF_NOINLINE void finish(int64_t row) const {
    const int64_t dim = this->stride;
    const Wide inverse_count = Wide(1) / Wide(this->features.groups->count(row)), momentum = to.momentum;
    Wide* const previous = to.centroids + to.classes[row] * dim;
    const bool seen = to.seen[to.classes[row]];
    Wide *const mu = this->row(row), *const centroid = to.centroid + row * dim;
    for (int64_t d = 0; d < dim; ++d) {
      mu[d] *= inverse_count;
      centroid[d] = momentum_centroid(mu[d], previous[d], seen, momentum);
    }
    to.tau[row] = momentum_tau(seen, momentum);

    if (!to.update_state) return;
    // Becomes nan where a value is not finite.
    const Wide poison = sum_over<Wide, Wide>(dim, [&]<class Value>(int64_t d, Sums<Value>& sums) RF_TARGET_LAMBDA {
                          sums.first += load<Value>(centroid + d) * Wide(0);
                        }).first;
    if (poison != 0) return;
    std::copy(centroid, centroid + dim, previous);
    to.seen[to.classes[row]] = true;
  }
};

// Pulls samples to the centroid.
template <class T, int norm, class Wide>
struct PullPhase {
  const ClassPulls<Wide>& to;

  Wide* row(int64_t row) const { return to.pull_sum + row * to.features.dim; }

  RF_NOINLINE void add(const Chunk& chunk, Wide* pull_sum, Wide* terms) const {
    const int64_t dim = to.features.dim;
    const Wide* centroid = to.centroid + chunk.row * dim;
    const Wide sample_share = to.sample_share[chunk.row], delta_var = to.delta_var;
    const int32_t* const order = to.features.groups->order.data();
    const Matrix views[] = {to.features.input, to.features.input_noise};
    std::fill(pull_sum, pull_sum + dim, Wide(0));
    for (int view = 0; view < 2; ++view) {
      Wide squares = 0, *const pulls_of_view = to.pull + view * to.features.n;
      for (int64_t k = chunk.begin; views[view] && k < chunk.end; ++k) {
        const T* x = views[view].template row<T>(order[k]);
        const Wide length = length_of<norm>(x, centroid, dim), excess = hinge(length - delta_var);
        const Wide own_pull = pull<norm>(length, delta_var, to.view_weight * sample_share);
        squares += excess * excess;
        pulls_of_view[order[k]] = own_pull;
        if (own_pull != 0) add_direction<norm>(x, centroid, dim, own_pull, pull_sum);
      }
      terms[view == 0 ? class_term::compactness : class_term::alignment] = squares * sample_share;
    }
  }

  void finish(int64_t) const {}
};

RF_NOINLINE inline std::vector<Chunk> split(const Groups& groups) {
  std::vector<Chunk> chunks;
  for (int64_t row = 0; row < groups.rows(); ++row) {
    const int64_t begin = groups.begin[row], end = groups.begin[row + 1];
    for (int64_t k = begin; k < end; k += chunk_size) {
      chunks.push_back({row, k, std::min(k + chunk_size, end), end - begin <= chunk_size});
    }
  }
  return chunks;
}

// Adds up `partial` (dim a chunk) over the chunks of each split class into its row.
template <class Phase, class Wide>
RF_NOINLINE void combine(const Phase& phase, const std::vector<Chunk>& chunks, const std::vector<Wide>& partial,
                         int64_t dim) {
  for (size_t s = 0; s < chunks.size(); ++s) {
    if (chunks[s].whole) continue;
    const int64_t row = chunks[s].row;
    Wide* sum = phase.row(row);
    if (s == 0 || chunks[s - 1].row != row) std::fill(sum, sum + dim, Wide(0));
    add_row(&partial[s * dim], dim, sum);
    if (s + 1 == chunks.size() || chunks[s + 1].row != row) phase.finish(row);
  }
}

template <class Phase, class Wide>
void run_whole(const Phase& phase, const Chunk& chunk, Wide* terms) {
  phase.add(chunk, phase.row(chunk.row), terms);
  phase.finish(chunk.row);
}

template <class Phase, class Wide>
void run_split(const Phase& phase, const std::vector<Chunk>& chunks, std::vector<Wide>& partial, int64_t dim,
               std::vector<Wide>& terms) {
  parallel_for(0, int64_t(chunks.size()), 1, [&](int64_t from, int64_t to) {
    for (int64_t s = from; s < to; ++s) {
      if (!chunks[s].whole) phase.add(chunks[s], &partial[s * dim], &terms[class_term::count * s]);
    }
  });
  combine(phase, chunks, partial, dim);
}

// One phase after the other; adds their terms, class_term::count of them.
template <class Wide, class First, class... Others>
void run_phases(const Features& features, Wide* terms, const First& first, const Others&... others) {
  const std::vector<Chunk> chunks = split(*features.groups);
  const int64_t count = chunks.size(), dim = features.dim;
  const bool any_split = std::any_of(chunks.begin(), chunks.end(), [](const Chunk& chunk) { return !chunk.whole; });
  std::vector<Wide> partial(any_split ? count * dim : 0), chunk_terms(class_term::count * count, Wide(0));
  const auto terms_of = [&](int64_t chunk) { return &chunk_terms[class_term::count * chunk]; };
  const int64_t grain =
      std::max<int64_t>(1, parallel_elements / std::max<int64_t>(1, features.n * dim / std::max<int64_t>(1, count)));

  parallel_for(0, count, grain, [&](int64_t from, int64_t to) {
    for (int64_t s = from; s < to; ++s) {
      if (chunks[s].whole) {
        run_whole(first, chunks[s], terms_of(s));
        (run_whole(others, chunks[s], terms_of(s)), ...);
      } else {
        first.add(chunks[s], &partial[s * dim], terms_of(s));
      }
    }
  });
  if (any_split) {
    combine(first, chunks, partial, dim);
    (run_split(others, chunks, partial, dim, chunk_terms), ...);
  }
  for (int64_t s = 0; s < count; ++s) {
    for (int term = 0; term < class_term::count; ++term) terms[term] += terms_of(s)[term];
  }
}

template <class Wide>
void class_sums(const Features& features, Wide* sums) {
  visit_features<Wide>(features.input.dtype, [&](auto zero) {
    Wide none[class_term::count] = {};
    run_phases(features, none, ClassSums<decltype(zero), Wide>{{features, sums, features.dim + 1}});
  });
}

// function(phase) with the phase of the features' dtype and the norm.
template <class Wide, class Function>
void with_pull_phase(const ClassPulls<Wide>& pulls, const Function& function) {
  visit_features<Wide>(pulls.features.input.dtype, [&](auto zero) {
    using T = decltype(zero);
    pulls.norm == 1 ? function(zero, PullPhase<T, 1, Wide>{pulls}) : function(zero, PullPhase<T, 2, Wide>{pulls});
  });
}

template <class Wide>
void class_pulls(const ClassPulls<Wide>& pulls, Wide* terms) {
  with_pull_phase(pulls, [&](auto, const auto& phase) { run_phases(pulls.features, terms, phase); });
}

template <class Wide>
void variance(const Centroids<Wide>& centroids, const ClassPulls<Wide>& pulls, Wide* terms) {
  with_pull_phase(pulls, [&](auto zero, const auto& phase) {
    run_phases(pulls.features, terms, CentroidPhase<decltype(zero), Wide>(centroids), phase);
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
