// For each class c of the batch the class i whose boundary with it scores highest:
//   score = ((W_i - W_c) . mu_c + b_i - b_c) / ||W_i - W_c||
// Ties go to the lowest i; a pair of equal rows of W has no boundary.
#pragma once

#include "common/matrix.h"
#include "cuda/arena.h"
#include "cuda/block.cuh"
#include "cuda/elements.cuh"
#include "cuda/kernels.h"

namespace robustfast::cuda {

// Tiles of the matrix products: classes of the batch by classes of the classifier.
template <class Wide>
struct MarginTile {
  static constexpr int rows = sizeof(Wide) == 4 ? 64 : 32, columns = sizeof(Wide) == 4 ? 128 : 64;
};

template <class Wide>
struct MarginSearch {
  Matrix weight, bias;     // (K, D), (K,) or none
  const Wide* mu;          // (rows, D)
  ClassifierRows own;      // W_c and b_c of each row, in the dtype of weight
  const int32_t* present;  // the rows there are; all of them where it is null
  int64_t dim, num_classes, rows;
  Wide* square;                  // (K): ||W_i||^2, to be there before (squared_norms)
  Wide *own_logit, *own_square;  // (rows): W_c . mu_c + b_c, ||W_c||^2, likewise
  Wide* score;                   // (rows): results, of the winner
  int32_t* winner;               // (rows): -1 where there is no boundary
  // Of the blocks among themselves: the best of each split of the classes, for each row of each tile; how many splits
  // of a tile are done, 0 before (clear_arrivals).
  int64_t blocks;
  Wide* best_score;
  int32_t* best_winner;
  unsigned* arrived;

  int64_t row_tiles() const { return (rows + MarginTile<Wide>::rows - 1) / MarginTile<Wide>::rows; }
  void place(Arena& arena);

  RF_DEVICE int64_t used() const { return present ? *present : rows; }
  RF_DEVICE Wide own_bias(int64_t row) const { return own.bias.data ? element<Wide>(own.bias, own.at(row)) : Wide(0); }

  RF_DEVICE void clear_arrivals(int64_t t, int64_t threads) const {
    for (int64_t tile = t; tile * MarginTile<Wide>::rows < rows; tile += threads) arrived[tile] = 0;
  }
};

template <class Wide>
cudaError_t margin_search(MarginSearch<Wide> search, cudaStream_t stream);

// square[i] for i = first, first + step, ...; a warp calls it.
template <class Wide>
RF_DEVICE void squared_norms(const MarginSearch<Wide>& search, int64_t first, int64_t step) {
  for (int64_t i = first; i < search.num_classes; i += step) {
    Wide sum = 0;
#pragma unroll 4
    for (int64_t d = lane_id(); d < search.dim; d += 32) {
      const Wide value = element<Wide>(search.weight, i, d);
      sum += value * value;
    }
    sum = lanes_sum(sum);
    if (lane_id() == 0) search.square[i] = sum;
  }
}

}  // namespace robustfast::cuda
