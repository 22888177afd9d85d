// What is left once distances and candidates for the margin are known: the margin itself, from the two rows of W that
// won, and all that a row gives to terms and gradients. One block per row.
#include "cuda/large.cuh"

namespace robustfast::cuda {
namespace {

constexpr int finish_threads = 256;

// A row's sums from those of its items, in order: squared hinges, and in center_grad what pulls give to m_c.
template <class Wide>
RF_DEVICE void add_items(const Loss<Wide>& a, const Workspace<Wide>& w, int64_t row, Wide (&squares)[2]) {
  const int64_t first = w.rows.row_item[row], items = w.rows.row_item[row + 1] - first;
  for (int64_t index = first; index < first + items; ++index) {
    squares[0] += w.squares[2 * index];
    squares[1] += w.squares[2 * index + 1];
  }
  if (items > 1) add_parts(Item(w.rows, first), w.partial, a.dim, a.center_grad + row * a.dim);
}

// The best class over all splits, -1 if there is no boundary; called by a whole warp.
template <class Wide>
RF_DEVICE int32_t merge_best(const Workspace<Wide>& w, int64_t num_classes, int64_t row) {
  const MarginSplit<Wide> split(w.rows.totals->rows, num_classes, w.margin_blocks);
  Best<Wide> best = Best<Wide>::none();
  for (int64_t s = lane_id(); s < split.splits; s += 32) {
    best.consider(w.best_score[split.place(s, row)], w.best_index[split.place(s, row)]);
  }
  for (int mask = 16; mask > 0; mask /= 2) consider_lane(best, mask);
  return best.score == Wide(-INFINITY) ? -1 : best.winner;
}

// The margin of a row of class c with batch centroid `mu`: its winner, and the boundary computed directly from the two
// rows of W. All threads of the block call it.
template <class Wide>
RF_DEVICE Boundary<Wide> settle_margin(const Loss<Wide>& a, const Workspace<Wide>& w, int64_t row, int64_t c,
                                       const Wide* mu, int32_t& winner) {
  __shared__ int32_t best;
  if (warp_id() == 0) {
    const int32_t merged = merge_best(w, a.num_classes, row);
    if (lane_id() == 0) best = merged;
  }
  __syncthreads();
  winner = best;
  Wide sums[2] = {0, 0};  // (W_w - W_c) . mu_c, ||W_w - W_c||^2
  if (winner >= 0) {
#pragma unroll 1
    for (int64_t d = threadIdx.x; d < a.dim; d += blockDim.x) {
      const Wide normal = element<Wide>(a.weight, winner, d) - element<Wide>(a.weight, c, d);
      sums[0] += normal * mu[d];
      sums[1] += normal * normal;
    }
  }
  block_sum(sums);
  if (a.bias.data && winner >= 0) sums[0] += element<Wide>(a.bias, winner, 0) - element<Wide>(a.bias, c, 0);
  const Wide share = a.beta / Wide(w.rows.totals->rows);
  return Boundary<Wide>(sums[0], sums[1], winner >= 0, a.delta_dist, share);
}

// The margin of a row and its gradients; `sum` becomes center_grad, mu boundary_grad.
template <int norm, class Wide>
RF_DEVICE void finish_row(const Loss<Wide>& a, const Workspace<Wide>& w, int64_t row, Wide (&squares)[2]) {
  const int64_t c = a.classes[row];
  Wide *sum = a.center_grad + row * a.dim, *mu = a.boundary_grad + row * a.dim;
  const Wide* center = a.center + row * a.dim;
  int32_t winner;
  const Boundary<Wide> boundary = settle_margin(a, w, row, c, mu, winner);
  if (!boundary.active()) winner = -1;
  const Wide count = Wide(w.rows.begin[row + 1] - w.rows.begin[row]), gain = w.gain[row];
  const Wide pull_to_zero = a.gamma / Wide(w.rows.totals->rows) * inverse_length<norm>(w.norm[row]);
#pragma unroll 1
  for (int64_t d = threadIdx.x; d < a.dim; d += finish_threads) {
    Wide to_centroid = gain * (sum[d] + pull_to_zero * direction<norm>(center[d])), to_weight = 0;
    if (winner >= 0) {
      const Wide normal = element<Wide>(a.weight, winner, d) - element<Wide>(a.weight, c, d);
      to_centroid += boundary.to_centroid(normal);
      to_weight = boundary.to_weight(normal, mu[d]);
    }
    sum[d] = to_centroid / count;
    mu[d] = to_weight;
  }
  if (threadIdx.x != 0) return;
  a.winner[row] = winner;
  a.boundary_bias[row] = boundary.to_bias();
  const Wide terms[4] = {squares[0] / count, squares[1] / count, boundary.margin, w.norm[row]};
  RF_UNROLL
  for (int term = 0; term < 4; ++term) w.row_terms[term * a.capacity + row] = terms[term];
}

template <class Wide>
RF_DEVICE void sum_rows(const Loss<Wide>& a, const Workspace<Wide>& w) {
  const int32_t rows = w.rows.totals->rows;
  Wide sum[4] = {0, 0, 0, 0};
  RF_UNROLL
  for (int term = 0; term < 4; ++term) {
    for (int32_t row = int32_t(threadIdx.x); row < rows; row += finish_threads) {
      sum[term] += w.row_terms[term * a.capacity + row];
    }
  }
  block_sum(sum);
  if (threadIdx.x == 0) write_terms(a, rows, sum);
}

template <int norm, class Wide>
__global__ void __launch_bounds__(finish_threads) finish_kernel(const Loss<Wide> a, const Workspace<Wide> w) {
  const int32_t rows = w.rows.totals->rows;
  if (rows == 0 && blockIdx.x == 0) return sum_rows(a, w);
  if (int64_t(blockIdx.x) >= rows) return;
  Wide squares[2] = {0, 0};
  add_items(a, w, blockIdx.x, squares);
  finish_row<norm>(a, w, blockIdx.x, squares);
  if (last_to_arrive(w.rows.finished, unsigned(rows))) sum_rows(a, w);
}

}  // namespace

template <class Wide>
cudaError_t finish(const Loss<Wide>& a, const Workspace<Wide>& w, int64_t norm, cudaStream_t stream) {
  const auto kernel = norm == 1 ? finish_kernel<1, Wide> : finish_kernel<2, Wide>;
  return launch(kernel, unsigned(a.capacity), finish_threads, 0, stream, a, w);
}
template cudaError_t finish(const Loss<float>&, const Workspace<float>&, int64_t, cudaStream_t);
template cudaError_t finish(const Loss<double>&, const Workspace<double>&, int64_t, cudaStream_t);

}  // namespace robustfast::cuda
