// What is left once distances and candidates for the margin are known: the margin itself, from the two rows of W that
// won, and all that a row gives to terms and gradients. One block per row.
#include "cuda/boundary.cuh"
#include "cuda/large.cuh"

namespace robustfast::cuda {
namespace {

constexpr int finish_threads = 256;

// A row's sums from those of its chunks, in order: squared hinges, and in mu_grad the sum of pulls.
template <class Wide>
RF_DEVICE void gather_chunks(const Loss<Wide>& a, const Workspace<Wide>& w, int64_t row, Wide (&squares)[2]) {
  const int64_t first = w.groups.first_chunk[row], chunks = w.groups.first_chunk[row + 1] - first;
  for (int64_t index = first; index < first + chunks; ++index) {
    squares[0] += w.squares[2 * index];
    squares[1] += w.squares[2 * index + 1];
  }
  if (chunks > 1) add_chunks(Chunk(w.groups, first), w.partial, a.dim, a.mu_grad + row * a.dim);
}

// The boundary of a row with its winner, computed directly from the two rows of W. All threads of the block call it.
template <int count, class Wide>
RF_DEVICE Boundary<Wide> settle_boundary(const Loss<Wide>& a, int64_t winner, int64_t c, const Wide* mu,
                                         Wide beta_share) {
  const bool exists = winner >= 0;
  const Wide bias = exists && a.bias.data ? element<Wide>(a.bias, winner) - element<Wide>(a.bias, c) : Wide(0);
  const Pair<Wide> pair(bias, [&](Wide times, Wide& logit, Wide& square) {
    Wide sums[2] = {0, 0};
#pragma unroll 1
    for (int64_t d = int64_t(threadIdx.x) * count; exists && d < a.dim; d += finish_threads * count) {
      const auto other = load_elements<Wide, count>(a.weight, winner, d),
                 own = load_elements<Wide, count>(a.weight, c, d);
      const auto mean = load_pack<count>(mu, d, a.dim);
      RF_UNROLL
      for (int k = 0; k < count; ++k) {
        const Wide normal = other.value[k] - own.value[k], scaled = normal * times;
        sums[0] += normal * mean.value[k];
        sums[1] += scaled * scaled;
      }
    }
    block_sum(sums);
    logit = sums[0], square = sums[1];
  });
  return Boundary<Wide>(pair, exists, a.delta_dist, beta_share);
}

// The margin of a row and its gradients; `pull_sum` becomes mu_grad, mu boundary_grad.
template <int norm, int count, class Wide>
RF_DEVICE void finish_row(const Loss<Wide>& a, const Workspace<Wide>& w, int64_t row, const Wide (&squares)[2]) {
  const int64_t c = a.classes[row];
  Wide *pull_sum = a.mu_grad + row * a.dim, *mu = a.boundary_grad + row * a.dim;
  const Wide* centroid = a.centroid + row * a.dim;
  const Wide present = Wide(w.groups.totals->present);
  int32_t winner = w.search.winner[row];
  const Boundary<Wide> boundary = settle_boundary<count>(a, winner, c, mu, a.beta / present);
  if (!boundary.active()) winner = -1;
  const Wide samples = Wide(w.groups.begin[row + 1] - w.groups.begin[row]), tau = w.tau[row];
  const Wide to_zero = a.gamma / present * inverse_length<norm>(w.length[row]);
#pragma unroll 1
  for (int64_t d = int64_t(threadIdx.x) * count; d < a.dim; d += finish_threads * count) {
    Pack<Wide, count> mu_grad = load_pack<count>(pull_sum, d, a.dim), boundary_grad = {};
    const auto m = load_pack<count>(centroid, d, a.dim);
    RF_UNROLL
    for (int k = 0; k < count; ++k) {
      mu_grad.value[k] = tau * (to_zero * direction<norm>(m.value[k]) - mu_grad.value[k]);
    }
    if (winner >= 0) {
      const auto other = load_elements<Wide, count>(a.weight, winner, d),
                 own = load_elements<Wide, count>(a.weight, c, d);
      const auto mean = load_pack<count>(mu, d, a.dim);
      RF_UNROLL
      for (int k = 0; k < count; ++k) {
        const Wide normal = other.value[k] - own.value[k];
        mu_grad.value[k] += boundary.mu_grad(normal);
        boundary_grad.value[k] = boundary.boundary_grad(normal, mean.value[k]);
      }
    }
    RF_UNROLL
    for (int k = 0; k < count; ++k) mu_grad.value[k] /= samples;
    store_pack<Reuse::soon>(pull_sum, d, a.dim, mu_grad);
    store_pack<Reuse::soon>(mu, d, a.dim, boundary_grad);
  }
  __syncthreads();  // all threads have read the winner of the search
  if (threadIdx.x != 0) return;
  a.winner[row] = winner;
  a.boundary_bias[row] = boundary.boundary_bias();
  const Wide terms[class_term::count] = {squares[0] / samples, squares[1] / samples, boundary.margin, w.length[row]};
  RF_UNROLL
  for (int term = 0; term < class_term::count; ++term) w.row_terms[term * a.rows + row] = terms[term];
}

template <class Wide>
RF_DEVICE void sum_rows(const Loss<Wide>& a, const Workspace<Wide>& w) {
  const int32_t present = w.groups.totals->present;
  Wide sum[class_term::count] = {};
  RF_UNROLL
  for (int term = 0; term < class_term::count; ++term) {
    for (int32_t row = int32_t(threadIdx.x); row < present; row += finish_threads) {
      sum[term] += w.row_terms[term * a.rows + row];
    }
  }
  block_sum(sum);
  if (threadIdx.x == 0) a.write_terms(present, sum);
}

template <int norm, class Wide>
__global__ void __launch_bounds__(finish_threads, sizeof(Wide) == 4 ? 4 : 2)
    finish_kernel(const Loss<Wide> a, const Workspace<Wide> w) {
  const int32_t present = w.groups.totals->present;
  if (present == 0 && blockIdx.x == 0) return sum_rows(a, w);
  if (int64_t(blockIdx.x) >= present) return;
  Wide squares[2] = {0, 0};
  gather_chunks(a, w, blockIdx.x, squares);
  w.quads ? finish_row<norm, quad>(a, w, blockIdx.x, squares) : finish_row<norm, 1>(a, w, blockIdx.x, squares);
  if (last_to_arrive(w.groups.finished, unsigned(present))) sum_rows(a, w);
}

}  // namespace

template <class Wide>
cudaError_t finish(const Loss<Wide>& a, const Workspace<Wide>& w, int64_t norm, cudaStream_t stream) {
  const auto kernel = norm == 1 ? finish_kernel<1, Wide> : finish_kernel<2, Wide>;
  return launch(kernel, unsigned(a.rows), finish_threads, 0, stream, a, w);
}
template cudaError_t finish(const Loss<float>&, const Workspace<float>&, int64_t, cudaStream_t);
template cudaError_t finish(const Loss<double>&, const Workspace<double>&, int64_t, cudaStream_t);

}  // namespace robustfast::cuda
