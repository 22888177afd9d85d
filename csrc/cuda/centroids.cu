// mu_c = (1/n_c) sum of a class's features and m_c = mu_c or (1 - rho) mu_c + rho m_prev_c, the state after the step,
// and what else depends on them alone. One block per chunk of a row; memory-bound on the features, which it reads once.
#include "cuda/boundary.cuh"
#include "cuda/large.cuh"

namespace robustfast::cuda {
namespace {

constexpr int centroids_threads = 256;

// sum[d] = the features' sum over the chunk's samples.
template <class T, int count, class Wide>
RF_DEVICE void sum_chunk(const Loss<Wide>& a, const Groups& groups, const Chunk& chunk, Wide* sum) {
  constexpr int batch = 4;
  const Teams teams(a.dim / count, centroids_threads);
  for (int64_t first = 0; first < a.dim; first += int64_t(teams.size) * count) {
    const int64_t column = first + int64_t(teams.rank()) * count;
    Pack<Wide, count> total = {};
    for (int32_t j = chunk.begin + teams.team(); j < chunk.end; j += batch * teams.count) {
      Pack<T, count> x[batch];
      RF_UNROLL
      for (int b = 0; b < batch; ++b) {
        const int32_t at = j + b * teams.count;
        const T* row = a.input.template row<T>(groups.order[at < chunk.end ? at : j]);
        x[b] = load_pack<count>(row, column, at < chunk.end ? a.dim : 0);
      }
      RF_UNROLL
      for (int b = 0; b < batch; ++b) {
        RF_UNROLL
        for (int k = 0; k < count; ++k) total.value[k] += Wide(to_float(x[b].value[k]));
      }
    }
    teams.sum_across<centroids_threads>(total);
    if (teams.team() == 0) store_pack<Reuse::soon>(sum, column, a.dim, total);
  }
}

// The sum over the chunk's row in `sum`; true in the one block that has it.
template <class T, int count, class Wide>
RF_DEVICE bool sum_row(const Loss<Wide>& a, const Workspace<Wide>& w, const Chunk& chunk, Wide* sum) {
  const bool whole = chunk.of_row() == 1;
  sum_chunk<T, count>(a, w.groups, chunk, whole ? sum : w.partial + chunk.place() * a.dim);
  if (!whole) {
    if (!last_to_arrive(w.groups.arrived + chunk.row, unsigned(chunk.of_row()))) return false;
    add_chunks(chunk, w.partial, a.dim, sum);
  }
  __syncthreads();
  return true;
}

// From the sum in `mu` to the rest of the row.
template <int norm, int count, class Wide>
RF_DEVICE void finish_centroid(const Loss<Wide>& a, const Workspace<Wide>& w, const Chunk& chunk, Wide* mu) {
  const int64_t c = a.classes[chunk.row], first = int64_t(threadIdx.x) * count, step = centroids_threads * count;
  const bool seen = a.seen[c];
  const Wide samples = Wide(chunk.count());
  Wide *centroid = a.centroid + chunk.row * a.dim, *state = a.centroids + c * a.dim;
  constexpr int length = row_sum::count, infinite = length + 1;
  Wide sums[infinite + 1] = {};  // what the search takes; terms of ||m_c||; coordinates of it that are not finite
  LowOf<Wide>* low = sizeof(Wide) == 4 ? w.search.low + chunk.row * a.dim : nullptr;
#pragma unroll 1
  for (int64_t d = first; d < a.dim; d += step) {
    auto mean = load_pack<count>(mu, d, a.dim), m_c = load_pack<count>(state, d, a.dim);
    const auto own = load_elements<Wide, count>(a.weight, c, d);
    Pack<LowOf<Wide>, count> rounded;
    RF_UNROLL
    for (int k = 0; k < count; ++k) {
      mean.value[k] /= samples;
      m_c.value[k] = momentum_centroid(mean.value[k], m_c.value[k], seen, a.momentum);
      sums[length] += norm_term<norm>(m_c.value[k]);
      sums[infinite] += Wide(!is_finite(m_c.value[k]));
      rounded.value[k] = add_coordinate(own.value[k], mean.value[k], sums);
    }
    if (low) store_pack<Reuse::soon>(low, d, a.dim, rounded);
    store_pack<Reuse::soon>(mu, d, a.dim, mean);
    store_pack<Reuse::soon>(centroid, d, a.dim, m_c);
  }
  block_sum(sums);
  const bool writes = a.update_state && sums[infinite] == Wide(0);
  if (writes) {
    for (int64_t d = first; d < a.dim; d += step) {
      store_pack<Reuse::soon>(state, d, a.dim, load_pack<count>(centroid, d, a.dim));
    }
  }
  if (threadIdx.x != 0) return;
  w.counts[chunk.row] = samples;
  w.length[chunk.row] = length_of<norm>(sums[length]);
  w.tau[chunk.row] = momentum_tau(seen, a.momentum);
  w.search.set_row(chunk.row, sums);
  if (writes) a.seen[c] = true;
}

template <class T, int norm, int count, class Wide>
__global__ void __launch_bounds__(centroids_threads, sizeof(Wide) == 4 ? 3 : 2)
    centroids_kernel(const Loss<Wide> a, const Workspace<Wide> w) {
  if (int64_t(blockIdx.x) >= w.groups.totals->chunks) return;
  const Chunk chunk(w.groups, blockIdx.x);
  Wide* mu = a.boundary_grad + chunk.row * a.dim;
  if (!sum_row<T, count>(a, w, chunk, mu)) return;
  w.quads ? finish_centroid<norm, quad>(a, w, chunk, mu) : finish_centroid<norm, 1>(a, w, chunk, mu);
}

// The step alone: rows of dim + 1, which are those of classes; packs are not aligned there, so sums come by way of mu.
template <class T, int count, class Wide>
__global__ void __launch_bounds__(centroids_threads, sizeof(Wide) == 4 ? 3 : 2)
    class_sums_kernel(const Loss<Wide> a, const Workspace<Wide> w, Wide* mu, Wide* sums) {
  if (int64_t(blockIdx.x) >= w.groups.totals->chunks) return;
  const Chunk chunk(w.groups, blockIdx.x);
  mu += chunk.row * a.dim;
  if (!sum_row<T, count>(a, w, chunk, mu)) return;
  sums += a.classes[chunk.row] * (a.dim + 1);
  for (int64_t d = threadIdx.x; d <= a.dim; d += centroids_threads) sums[d] = d < a.dim ? mu[d] : Wide(chunk.count());
}

template <class Wide>
struct SumsMemory : StepMemory<Wide> {
  Wide* mu;  // (rows, dim)

  SumsMemory(const LossParams& p, Arena& arena) : StepMemory<Wide>(p, arena) {
    mu = arena.take<Wide>(this->a.rows * this->a.dim);
  }
};

}  // namespace

size_t class_sums_scratch(const LossParams& p) { return step_scratch<SumsMemory>(p); }

cudaError_t class_sums(const LossParams& p, void* sums, void* scratch, cudaStream_t stream) {
  return for_wide(p.input.dtype, [&]<class Wide>(Wide) {
    const size_t bytes = size_t(p.num_classes) * size_t(p.dim + 1) * sizeof(Wide);
    cudaError_t error = clear(sums, bytes, stream);
    if (error != cudaSuccess || p.n == 0) return error;
    Arena arena(scratch);
    const SumsMemory<Wide> m(p, arena);
    error = m.group(stream);
    if (error != cudaSuccess) return error;
    visit_features<Wide>(p.input.dtype, [&](auto feature) {
      using T = decltype(feature);
      error = for_packs<T>(whole_packs(p.input, p.dim, sizeof(T)), [&](auto count) {
        return launch(class_sums_kernel<T, count(), Wide>, unsigned(m.w.groups.max_chunks()), centroids_threads, 0,
                      stream, m.a, m.w, m.mu, static_cast<Wide*>(sums));
      });
    });
    return error;
  });
}

template <class Wide>
cudaError_t centroids(const Loss<Wide>& a, const Workspace<Wide>& w, Dtype features, int64_t norm,
                      cudaStream_t stream) {
  return for_loss<Wide>(features, norm, [&](auto feature, auto p) {
    using T = decltype(feature);
    return for_packs<T>(whole_packs(a.input, a.dim, sizeof(T)), [&](auto count) {
      return launch(centroids_kernel<T, p(), count(), Wide>, unsigned(w.groups.max_chunks()), centroids_threads, 0,
                    stream, a, w);
    });
  });
}
template cudaError_t centroids(const Loss<float>&, const Workspace<float>&, Dtype, int64_t, cudaStream_t);
template cudaError_t centroids(const Loss<double>&, const Workspace<double>&, Dtype, int64_t, cudaStream_t);

}  // namespace robustfast::cuda
