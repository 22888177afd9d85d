// Compactness and alignment: lengths, pulls and their sums, and the backward. One block per chunk of a row;
// memory-bound on the features. Items run from the last to the first, because centroids ran from the first to the last:
// the features that it read at its end may still be in the L2.
#include "cuda/boundary.cuh"
#include "cuda/large.cuh"
#include "cuda/variance_backward.cuh"

namespace robustfast::cuda {
namespace {

constexpr int variance_threads = 256;
constexpr int variance_batch = 4;  // samples that a team has in flight, from each view

// A team's samples of one batch.
struct Batch {
  int32_t sample[variance_batch];  // -1: none

  RF_DEVICE Batch(const Groups& groups, const Chunk& chunk, const Teams& teams, int32_t first) {
    RF_UNROLL
    for (int b = 0; b < variance_batch; ++b) {
      const int32_t at = first + b * teams.count + teams.team();
      sample[b] = at < chunk.end ? groups.order[at] : -1;
    }
  }
};

// One column's pack of every sample of a batch, of both views.
template <class T, int count>
struct Views {
  Pack<T, count> value[2][variance_batch];

  template <class Wide>
  RF_DEVICE Views(const Loss<Wide>& a, const Batch& batch, int64_t column) {
    RF_UNROLL
    for (int view = 0; view < 2; ++view) {
      const Matrix& features = view == 0 ? a.input : a.input_noise;
      RF_UNROLL
      for (int b = 0; b < variance_batch; ++b) {
        const bool there = batch.sample[b] >= 0 && (view == 0 || a.input_noise);
        const T* row = there ? features.row<T>(batch.sample[b]) : nullptr;
        value[view][b] = load_pack<count>(row, column, there ? a.dim : 0);
      }
    }
    recompute();
  }

  // Residuals take more registers than the packs that they come from.
  RF_DEVICE void recompute() {
    RF_UNROLL
    for (int e = 0; e < 2 * variance_batch; ++e) recompute_from(value[e / variance_batch][e % variance_batch]);
  }

  template <int norm, class Wide>
  RF_DEVICE void add_lengths(const Pack<Wide, count>& centroid, Wide (&length)[2 * variance_batch]) const {
    RF_UNROLL
    for (int e = 0; e < 2 * variance_batch; ++e) {
      RF_UNROLL
      for (int k = 0; k < count; ++k) {
        length[e] +=
            norm_term<norm>(Wide(to_float(value[e / variance_batch][e % variance_batch].value[k])) - centroid.value[k]);
      }
    }
  }

  // total += pull direction(x - m_c), for the samples that there are.
  template <int norm, class Wide>
  RF_DEVICE void add_pulls(const Pack<Wide, count>& centroid, const Wide (&pulls)[2 * variance_batch],
                           Pack<Wide, count>& total) const {
    RF_UNROLL
    for (int e = 0; e < 2 * variance_batch; ++e) {
      if (pulls[e] == Wide(0)) continue;
      RF_UNROLL
      for (int k = 0; k < count; ++k) {
        const Wide x = to_float(value[e / variance_batch][e % variance_batch].value[k]);
        total.value[k] += pulls[e] * direction<norm>(x - centroid.value[k]);
      }
    }
  }
};

// The sums in `value` become pulls, which are written; adds the squared hinges to `squares`. Eight neighbours in a team
// have the same eight sums: each takes one and tells the others, since roots and quotients cost more than that.
template <int norm, class Wide>
RF_DEVICE void settle_pulls(const Loss<Wide>& a, const Batch& batch, const Teams& teams, Wide share,
                            Wide (&value)[2 * variance_batch], Wide (&squares)[2]) {
  constexpr int all = 2 * variance_batch;
  const int own = teams.rank() % all, view = own / variance_batch;
  Wide mine = 0;
  int32_t i = -1;
  RF_UNROLL
  for (int e = 0; e < all; ++e) {
    if (e == own) mine = value[e], i = batch.sample[e % variance_batch];
  }
  const Wide length = length_of<norm>(mine), excess = hinge(length - a.delta_var);
  const bool there = i >= 0 && (view == 0 || a.input_noise);
  mine = there ? pull<norm>(length, a.delta_var, share) : Wide(0);
  if (there && teams.rank() < all) {
    a.pull[view * a.n + i] = mine;
    squares[0] += view == 0 ? excess * excess : Wide(0);
    squares[1] += view == 1 ? excess * excess : Wide(0);
  }
  RF_UNROLL
  for (int e = 0; e < all; ++e) value[e] = __shfl_sync(all_lanes, mine, lane_id() - own + e);
}

// pull_sum = the sum of pull direction(x - m_c) over the chunk, squares = sums of squared hinges (of this thread's
// samples).
// `single`: a row is one pack of each thread of a team, so that it is read once.
template <class T, int norm, int count, bool single, class Wide>
RF_DEVICE void pull_chunk(const Loss<Wide>& a, const Groups& groups, const Chunk& chunk, const Wide* centroid_row,
                          Wide share, Wide* pull_sum, Wide (&squares)[2]) {
  const Teams teams(a.dim / count, variance_threads);
  const int64_t own_column = int64_t(teams.rank()) * count, step = int64_t(teams.size) * count;
  const auto centroid_at = [&](int64_t column) { return load_pack<count>(centroid_row, column, a.dim); };
  Pack<Wide, count> total = {};
  for (int32_t first = chunk.begin; first < chunk.end; first += variance_batch * teams.count) {
    const Batch batch(groups, chunk, teams, first);
    Wide value[2 * variance_batch] = {};
    if constexpr (single) {
      const Pack<Wide, count> centroid = centroid_at(own_column);
      Views<T, count> views(a, batch, own_column);
      views.template add_lengths<norm>(centroid, value);
      teams.sum(value);
      settle_pulls<norm>(a, batch, teams, share, value, squares);
      views.recompute();
      views.template add_pulls<norm>(centroid, value, total);
    } else {
#pragma unroll 1
      for (int64_t column = own_column; column < a.dim; column += step) {
        Views<T, count>(a, batch, column).template add_lengths<norm>(centroid_at(column), value);
      }
      teams.sum(value);
      settle_pulls<norm>(a, batch, teams, share, value, squares);
#pragma unroll 1
      for (int64_t column = own_column; column < a.dim; column += step) {  // one team: nobody else has this column
        Pack<Wide, count> so_far = {};
        if (first != chunk.begin) so_far = load_pack<count>(pull_sum, column, a.dim);
        Views<T, count>(a, batch, column).template add_pulls<norm>(centroid_at(column), value, so_far);
        store_pack<Reuse::soon>(pull_sum, column, a.dim, so_far);
      }
    }
  }
  if constexpr (single) {
    teams.sum_across<variance_threads>(total);
    if (teams.team() == 0) store_pack<Reuse::soon>(pull_sum, own_column, a.dim, total);
  }
  block_sum(squares);
}

// The row's sums from those of its chunks, and the terms by the block that comes last: where no finish follows.
template <class Wide>
RF_DEVICE void add_up(const Loss<Wide>& a, const Workspace<Wide>& w, const Chunk& chunk, Wide* pull_sum) {
  if (chunk.of_row() > 1 && last_to_arrive(w.groups.arrived + chunk.row, unsigned(chunk.of_row()))) {
    add_chunks(chunk, w.partial, a.dim, pull_sum);
  }
  const int32_t chunks = w.groups.totals->chunks;
  if (!last_to_arrive(w.groups.finished, unsigned(chunks))) return;
  Wide terms[2] = {0, 0};
  for (int32_t k = int32_t(threadIdx.x); k < chunks; k += variance_threads) {
    terms[0] += w.squares[2 * k];
    terms[1] += w.squares[2 * k + 1];
  }
  block_sum(terms);
  if (threadIdx.x == 0) a.terms[0] = terms[0], a.terms[1] = terms[1];
}

// With a `sample_share` (num_classes) the step alone: tables' rows are those of classes then.
template <class T, int norm, int count, bool single, class Wide>
__global__ void __launch_bounds__(variance_threads, single || count < 8 ? 2 : 1)
    variance_kernel(const Loss<Wide> a, const Workspace<Wide> w, const Wide* sample_share) {
  const int64_t index = int64_t(w.groups.totals->chunks) - 1 - blockIdx.x;
  if (index < 0) return;
  const Chunk chunk(w.groups, index);
  const int64_t row = sample_share ? a.classes[chunk.row] : chunk.row;
  const Wide view_weight = a.view_weight(bool(a.input_noise)), of_square = sample_share ? sample_share[row] : Wide(1);
  const Wide share =
      sample_share ? view_weight * of_square : view_weight / (Wide(w.groups.totals->present) * Wide(chunk.count()));
  Wide *const pull_sum = a.mu_grad + row * a.dim, squares[2] = {0, 0};
  pull_chunk<T, norm, count, single>(a, w.groups, chunk, a.centroid + row * a.dim, share,
                                     chunk.of_row() == 1 ? pull_sum : w.partial + chunk.place() * a.dim, squares);
  if (threadIdx.x == 0) {
    w.squares[2 * index] = of_square * squares[0];
    w.squares[2 * index + 1] = of_square * squares[1];
  }
  if (sample_share) add_up(a, w, chunk, pull_sum);
}

template <class T, int norm, int count, class Wide>
__global__ void __launch_bounds__(variance_backward_threads, 3) variance_backward_kernel(const LossBackward<Wide> a) {
  variance_backward<T, norm, count>(a, blockIdx.x, gridDim.x);
}

template <class Wide>
cudaError_t run_variance(const Loss<Wide>& a, const Workspace<Wide>& w, Dtype features, int64_t norm,
                         const Wide* sample_share, cudaStream_t stream) {
  return for_loss<Wide>(features, norm, [&](auto feature, auto p) {
    using T = decltype(feature);
    const bool whole = whole_packs(a.input, a.dim, sizeof(T)) && whole_packs(a.input_noise, a.dim, sizeof(T)) &&
                       reinterpret_cast<uintptr_t>(a.centroid) % 16 == 0;
    return for_packs<T>(whole, [&](auto count) {
      const bool single = a.dim <= variance_threads * count();
      const auto kernel =
          single ? variance_kernel<T, p(), count(), true, Wide> : variance_kernel<T, p(), count(), false, Wide>;
      return launch(kernel, unsigned(w.groups.max_chunks()), variance_threads, 0, stream, a, w, sample_share);
    });
  });
}

}  // namespace

template <class Wide>
cudaError_t variance(const Loss<Wide>& a, const Workspace<Wide>& w, Dtype features, int64_t norm, cudaStream_t stream) {
  return run_variance<Wide>(a, w, features, norm, nullptr, stream);
}
template cudaError_t variance(const Loss<float>&, const Workspace<float>&, Dtype, int64_t, cudaStream_t);
template cudaError_t variance(const Loss<double>&, const Workspace<double>&, Dtype, int64_t, cudaStream_t);

size_t class_pulls_scratch(const LossParams& p) { return step_scratch<StepMemory>(p); }

cudaError_t class_pulls(const LossParams& p, const void* centroid, const void* sample_share, void* pull_sum,
                        void* scratch, cudaStream_t stream) {
  return for_wide(p.input.dtype, [&]<class Wide>(Wide) {
    cudaError_t error = clear(pull_sum, size_t(p.num_classes * p.dim) * sizeof(Wide), stream);
    if (error == cudaSuccess) error = clear(p.pull, size_t(2 * p.n) * sizeof(Wide), stream);
    if (error == cudaSuccess) error = clear(p.terms, 2 * sizeof(Wide), stream);
    if (error != cudaSuccess || p.n == 0) return error;
    Arena arena(scratch);
    StepMemory<Wide> m(p, arena);
    m.a.centroid = const_cast<Wide*>(static_cast<const Wide*>(centroid));
    m.a.mu_grad = static_cast<Wide*>(pull_sum);
    error = m.group(stream);
    if (error != cudaSuccess) return error;
    return run_variance(m.a, m.w, p.input.dtype, p.norm, static_cast<const Wide*>(sample_share), stream);
  });
}

template <class Wide>
cudaError_t variance_backward(const LossBackward<Wide>& a, Dtype features, int64_t norm, cudaStream_t stream) {
  return for_loss<Wide>(features, norm, [&](auto feature, auto p) {
    using T = decltype(feature);
    const bool whole = whole_packs(a.input, a.dim, sizeof(T)) && whole_packs(a.input_noise, a.dim, sizeof(T));
    return for_packs<T>(whole, [&](auto count) {
      const int64_t most = 1 << 20, blocks = variance_backward_blocks(a.n, a.dim / count());
      return launch(variance_backward_kernel<T, p(), count(), Wide>, unsigned(blocks < most ? blocks : most),
                    variance_backward_threads, 0, stream, a);
    });
  });
}
template cudaError_t variance_backward(const LossBackward<float>&, Dtype, int64_t, cudaStream_t);
template cudaError_t variance_backward(const LossBackward<double>&, Dtype, int64_t, cudaStream_t);

}  // namespace robustfast::cuda
