// The end of a row's search for its margin, for the kernel that finishes rows.
#pragma once

#include "cuda/large.cuh"

namespace robustfast::cuda {

// The best class over all splits, -1 if there is no boundary; called by a whole warp.
template <class Wide>
RF_DEVICE int32_t merge_best(const Workspace<Wide>& w, int64_t num_classes, int64_t row) {
  const MarginSplit<Wide> split(w.rows.totals->rows, num_classes, w.margin_blocks);
  Best<Wide> best = Best<Wide>::none();
  for (int64_t s = lane_id(); s < split.splits; s += 32) {
    best.consider(w.best_score[split.place(s, row)], w.best_index[split.place(s, row)]);
  }
  for (int mask = 16; mask > 0; mask /= 2) best.consider_lane(mask);
  return best.score == Wide(-INFINITY) ? -1 : best.index;
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

}  // namespace robustfast::cuda
