// The loss of large problems, in five launches beside the sort of the labels if that does not fit one block:
//   prepare    rows of the batch, squared norms of the classifier's rows
//   centroids  mu_c, m_c, the state, the regularization of each row
//   margin     the best classes for each row, by matrix products
//   variance   distances, pulls and their sums
//   finish     the margin's boundaries, all that a row gives to terms and gradients
#pragma once

#include "cuda/pack.cuh"
#include "cuda/rows.cuh"

namespace robustfast::cuda {

// What the kernels leave one another. Between centroids and variance, boundary_grad holds mu.
template <class Wide>
struct Workspace {
  Rows rows;
  int64_t margin_blocks;
  Wide* partial;                  // (places, dim): sums of the items of rows with several, see Item::place
  Wide* squares;                  // (max_items, 2): squared hinges of each item's samples
  Wide *norm, *gain, *own_logit;  // (capacity): ||m_c||, d m_c / d mu_c, W_c . mu_c + b_c
  Wide* square;                   // (num_classes): ||W_i||^2
  Wide* best_score;               // (splits, rows rounded up to tiles): of a part of the classes, for each row
  int32_t* best_index;
  Wide* row_terms;  // (4, capacity): compactness, alignment, margin, regularization

  void place(Arena& arena, const Loss<Wide>& a);
};

// The tiles of the margin's matrix products: classes of the batch by classes of the classifier.
template <class Wide>
struct MarginTile {
  static constexpr int rows = sizeof(Wide) == 4 ? 64 : 32, columns = sizeof(Wide) == 4 ? 128 : 64;
};

// How the tiles are dealt to blocks: all of them to each tile of rows while there are enough.
template <class Wide>
struct MarginSplit {
  int64_t row_tiles, column_tiles, splits;

  RF_INLINE MarginSplit(int64_t present, int64_t num_classes, int64_t blocks)
      : row_tiles((present + MarginTile<Wide>::rows - 1) / MarginTile<Wide>::rows),
        column_tiles((num_classes + MarginTile<Wide>::columns - 1) / MarginTile<Wide>::columns),
        splits(row_tiles > 0 && row_tiles < blocks ? blocks / row_tiles : 1) {
    if (splits > column_tiles) splits = column_tiles;
  }
  // Where the best of a row within a split stands.
  RF_INLINE int64_t place(int64_t split, int64_t row) const { return split * row_tiles * MarginTile<Wide>::rows + row; }
};

// total[d] = the sum of a row's parts, in order. Every thread of the block takes its columns.
template <class Wide>
RF_DEVICE void add_parts(const Item& item, const Wide* partial, int64_t dim, Wide* total) {
  const int32_t parts = item.parts();
  for (int64_t d = threadIdx.x; d < dim; d += blockDim.x) {
    Wide sum = 0;
#pragma unroll 4
    for (int32_t part = 0; part < parts; ++part) sum += partial[item.place(part) * dim + d];
    total[d] = sum;
  }
}

template <class Wide>
cudaError_t centroids(const Loss<Wide>& a, const Workspace<Wide>& w, Dtype features, int64_t norm, cudaStream_t stream);
template <class Wide>
cudaError_t margin(const Loss<Wide>& a, const Workspace<Wide>& w, cudaStream_t stream);
template <class Wide>
cudaError_t variance(const Loss<Wide>& a, const Workspace<Wide>& w, Dtype features, int64_t norm, cudaStream_t stream);
template <class Wide>
cudaError_t finish(const Loss<Wide>& a, const Workspace<Wide>& w, int64_t norm, cudaStream_t stream);

template <class Wide>
cudaError_t variance_backward(const LossGrads<Wide>& a, Dtype features, int64_t norm, cudaStream_t stream);
template <class Wide>
size_t margin_backward_scratch(const LossGrads<Wide>& a);
template <class Wide>
cudaError_t margin_backward(const LossGrads<Wide>& a, void* scratch, cudaStream_t stream);

// Squared norms of the classifier's rows [first, first + step, ...), one per warp that calls it.
template <class Wide>
RF_DEVICE void squared_norms(const Matrix& weight, int64_t num_classes, int64_t dim, int64_t first, int64_t step,
                             Wide* square) {
  for (int64_t i = first; i < num_classes; i += step) {
    Wide sum = 0;
#pragma unroll 4
    for (int64_t d = lane_id(); d < dim; d += 32) {
      const Wide value = element<Wide>(weight, i, d);
      sum += value * value;
    }
    sum = lanes_sum(sum);
    if (lane_id() == 0) square[i] = sum;
  }
}

}  // namespace robustfast::cuda
