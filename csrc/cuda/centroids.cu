// mu_c = (1/n_c) sum of a class's features and m_c = mu_c or (1 - rho) mu_c + rho m_prev_c, the state after the step,
// and what else depends on them alone. One block per chunk of a row; memory-bound on the features, which it reads once.
#include "cuda/boundary.cuh"
#include "cuda/large.cuh"

namespace robustfast::cuda {
namespace {

constexpr int centroids_threads = 256;

// sum[d] = the features' sum over the chunk's samples.
template <class T, int count, class Wide>
RF_DEVICE void sum_chunk(const Loss<Wide>& a, const Workspace<Wide>& w, const Chunk& chunk, Wide* sum) {
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
        const T* row = a.input.template row<T>(w.groups.order[at < chunk.end ? at : j]);
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

// From the sum in `mu` to the rest of the row.
template <int norm, int count, class Wide>
RF_DEVICE void finish_centroid(const Loss<Wide>& a, const Workspace<Wide>& w, const Chunk& chunk, Wide* mu) {
  const int64_t c = a.classes[chunk.row], first = int64_t(threadIdx.x) * count, step = centroids_threads * count;
  const bool seen = a.seen[c];
  const Wide samples = Wide(chunk.count());
  Wide *centroid = a.centroid + chunk.row * a.dim, *state = a.centroids + c * a.dim;
  Wide sums[3] = {0, 0, 0};  // terms of ||m_c||, W_c . mu_c, coordinates that are not finite
#pragma unroll 1
  for (int64_t d = first; d < a.dim; d += step) {
    auto mean = load_pack<count>(mu, d, a.dim), blended = load_pack<count>(state, d, a.dim);
    const auto own = load_elements<Wide, count>(a.weight, c, d);
    RF_UNROLL
    for (int k = 0; k < count; ++k) {
      mean.value[k] /= samples;
      blended.value[k] = momentum_centroid(mean.value[k], blended.value[k], seen, a.momentum);
      sums[0] += norm_term<norm>(blended.value[k]);
      sums[1] += own.value[k] * mean.value[k];
      sums[2] += Wide(!is_finite(blended.value[k]));
    }
    store_pack<Reuse::soon>(mu, d, a.dim, mean);
    store_pack<Reuse::soon>(centroid, d, a.dim, blended);
  }
  block_sum(sums);
  const bool writes = a.update_state && sums[2] == Wide(0);
  if (writes) {
    for (int64_t d = first; d < a.dim; d += step) {
      store_pack<Reuse::soon>(state, d, a.dim, load_pack<count>(centroid, d, a.dim));
    }
  }
  if (threadIdx.x != 0) return;
  w.length[chunk.row] = length_of<norm>(sums[0]);
  w.tau[chunk.row] = momentum_tau(seen, a.momentum);
  w.search.own_logit[chunk.row] = sums[1] + (a.bias.data ? element<Wide>(a.bias, c) : Wide(0));
  if (writes) a.seen[c] = true;
}

template <class T, int norm, int count, class Wide>
__global__ void __launch_bounds__(centroids_threads, sizeof(Wide) == 4 ? 3 : 2)
    centroids_kernel(const Loss<Wide> a, const Workspace<Wide> w) {
  if (int64_t(blockIdx.x) >= w.groups.totals->chunks) return;
  const Chunk chunk(w.groups, blockIdx.x);
  Wide* mu = a.boundary_grad + chunk.row * a.dim;
  sum_chunk<T, count>(a, w, chunk, chunk.of_row() > 1 ? w.partial + chunk.place() * a.dim : mu);
  if (chunk.of_row() > 1) {
    if (!last_to_arrive(w.groups.arrived + chunk.row, unsigned(chunk.of_row()))) return;
    add_chunks(chunk, w.partial, a.dim, mu);
  }
  __syncthreads();
  w.quads ? finish_centroid<norm, quad>(a, w, chunk, mu) : finish_centroid<norm, 1>(a, w, chunk, mu);
}

}  // namespace

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
