// For each class c of the batch the class i whose boundary with it scores highest:
//   score = ((W_i - W_c) . mu_c + b_i - b_c) / ||W_i - W_c||
// Ties go to the lowest i; a pair of equal rows of W has no boundary.
#pragma once

#include <limits>

#include "common/matrix.h"
#include "cuda/arena.h"
#include "cuda/boundary.cuh"
#include "cuda/elements.cuh"
#include "cuda/kernels.h"

namespace robustfast::cuda {

// Tiles of the matrix products: classes of the batch by classes of the classifier. A row's columns are parts of as many
// threads.
template <class Wide>
struct MarginTile {
  static constexpr int rows = sizeof(Wide) == 4 ? 64 : 32, columns = sizeof(Wide) == 4 ? 128 : 64, parts = 16;
};

// What is left of a row's pairs in a part of one split: the best, and the highest score of the others.
template <class Wide>
struct Candidates {
  Best<Wide> best;
  Wide others;
};

// What products multiply in place of mu.
template <class Wide>
using LowOf = std::conditional_t<sizeof(Wide) == 4, bfloat16, Wide>;

// Of ||W_i||^2 + ||W_c||^2: pairs whose squared distance is less are compared directly.
template <class Wide>
constexpr Wide close_part = Wide(1) / 8;

// How wrong the products of two rows are at most, as a part of the lengths' product. Matrix units align 8 or 16
// products and the sum so far to the largest of them and cut off what is below 2^-24 of it, and the last place of the
// new sum: in all 22 units of 2^-24 for 16 columns on an A100, 11 on an H100. No sum on the way exceeds the lengths'
// product. Where W is in two parts there are three products, without that of the low parts and what two parts leave of
// a float32.
template <class Wide>
RF_INLINE Wide product_error(int64_t dim, Dtype weight) {
  if constexpr (sizeof(Wide) == 4) {
    const Wide steps = Wide(dim / 16 + 1) * Wide(24 * 0x1p-24);
    return weight == Dtype::bfloat16 ? steps : 3 * steps + Wide(3 * 0x1p-18);
  } else {
    return Wide(dim + 64) * Wide(0x1p-52);
  }
}

template <class Wide>
struct MarginSearch {
  Matrix weight, bias;     // (K, D), (K,) or none
  const Wide* mu;          // (rows, D)
  ClassifierRows own;      // W_c and b_c of each row, in the dtype of weight
  const int32_t* present;  // the rows there are; all of them where it is null
  int64_t dim, num_classes, rows;
  // To be there before: ||W_i||^2 (squared_norms), and what set_row writes.
  Wide* square;                  // (K)
  LowOf<Wide>* low;              // (rows, D): mu_c, rounded; none for float64
  Wide *own_logit, *own_square;  // (rows): W_c . low + b_c, ||W_c||^2
  Wide* slack;                   // (rows): how far two scores of the row may be from where they stand
  Wide* score;                   // (rows): results, of the winner
  int32_t* winner;               // (rows): -1 where there is no boundary
  int64_t blocks;                // of the search, whose splits of the classes leave their candidates
  Wide error;                    // of products, as a part of the lengths' product
  Candidates<Wide>* candidates;

  void place(Arena& arena);

  RF_DEVICE int64_t used() const { return present ? *present : rows; }
  RF_DEVICE Wide own_bias(int64_t row) const { return own.bias.data ? element<Wide>(own.bias, own.at(row)) : Wide(0); }
  RF_DEVICE const LowOf<Wide>* low_row(int64_t row) const {
    if constexpr (sizeof(Wide) == 4) {
      return low + row * dim;
    } else {
      return mu + row * dim;
    }
  }
  RF_DEVICE void set_row(int64_t row, const Wide* sums) const;
};

// What a row's slack and sides are made of, added up over its coordinates.
namespace row_sum {
enum { logit, own_square, mu_square, rounding, count };
}

// Adds a coordinate of W_c and mu_c; returns what stands for the latter in products.
template <class Wide, int size>
RF_DEVICE LowOf<Wide> add_coordinate(Wide own, Wide mu, Wide (&sums)[size]) {
  const LowOf<Wide> low = from_float<LowOf<Wide>>(mu);
  const Wide taken = Wide(to_float(low)), left = mu - taken;
  sums[row_sum::logit] += own * taken;
  sums[row_sum::own_square] += own * own;
  sums[row_sum::mu_square] += mu * mu;
  sums[row_sum::rounding] += left * left;
  return low;
}

// Norms in the middle of Wide's range, of W's rows; sums of two of them are trusted if these are.
template <class Wide>
RF_DEVICE bool is_trusted(Wide square, Wide low) {
  return square >= low && square <= Trusted<Wide>::high / 2;
}

// A score changes by ||mu - low|| at most. Between rows that are not close, (||W_i|| + ||W_c||) / distance is at most 4
// and ||W_c|| / distance at most 3, by which errors of products and of biases enter: b_i is a score times the distance,
// and products. Squares may have lost all that is below the range of Wide. The slack is nan or infinite where mu is.
template <class Wide>
RF_DEVICE void MarginSearch<Wide>::set_row(int64_t row, const Wide* sums) const {
  const Wide logit = sums[row_sum::logit] + own_bias(row), square = sums[row_sum::own_square];
  const Wide lost = Wide(4 * dim + 16) * std::numeric_limits<Wide>::min();
  const Wide rounding = square_root(sums[row_sum::rounding] + lost),
             length = square_root(sums[row_sum::mu_square] + lost);
  const Wide wrong = rounding + error * (5 * length + fabs(logit) / square_root(square));
  own_logit[row] = logit, own_square[row] = square;
  slack[row] = is_trusted(square, Trusted<Wide>::low) ? 2 * wrong : Wide(0);  // else no product counts
}

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
