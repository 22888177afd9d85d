// The products come from one pass over W, tile by tile, and scores never leave the registers:
//   ||W_i - W_c||^2 = ||W_i||^2 + ||W_c||^2 - 2 W_i . W_c,   (W_i - W_c) . mu_c = W_i . mu_c - W_c . mu_c
//
// float32 sums use the matrix units with bfloat16 operands: a number is the sum of two of them, high and low, and of
// the product of two numbers only low times low is left out, 2^-17 of it; a bfloat16 W is its own high part. Where W_i
// and W_c are so close that their squared distance cancels, or squares leave the range of Wide, the pair is compared
// directly, coordinate by coordinate: so equal rows, between which there is no boundary, are told from close ones
// exactly. The winner's own boundary is computed directly anyhow (finish.cu), so products only select.
#include "cuda/boundary.cuh"
#include "cuda/margin_search.cuh"
#include "cuda/pack.cuh"

namespace robustfast::cuda {
namespace {

constexpr int margin_threads = 256;

// How the tiles are dealt to blocks: each tile of rows against parts of the classes, every block its share of them, one
// after another. All blocks are at about the same classes at a time, which the L2 then holds.
template <class Wide>
struct MarginSplit {
  static constexpr int most_rounds = 8;
  int64_t row_tiles, column_tiles, splits;

  // The fewest steps that the busiest block takes, a step being a tile; of equal ones the fewest splits.
  RF_INLINE MarginSplit(int64_t present, int64_t num_classes, int64_t blocks)
      : row_tiles((present + MarginTile<Wide>::rows - 1) / MarginTile<Wide>::rows),
        column_tiles((num_classes + MarginTile<Wide>::columns - 1) / MarginTile<Wide>::columns),
        splits(1) {
    if (row_tiles == 0 || column_tiles == 0) return;
    const int64_t first_round = (row_tiles + blocks - 1) / blocks;
    int64_t fewest = first_round * column_tiles;
    for (int64_t rounds = first_round; rounds < first_round + most_rounds; ++rounds) {
      const int64_t fit = rounds * blocks / row_tiles, parts = fit < column_tiles ? fit : column_tiles;
      const int64_t steps = rounds * ((column_tiles + parts - 1) / parts);
      if (steps < fewest) fewest = steps, splits = parts;
    }
  }
  // Where the best of a row within a split stands, and how many places that takes at most.
  RF_INLINE int64_t place(int64_t split, int64_t row) const { return split * row_tiles * MarginTile<Wide>::rows + row; }
  static int64_t places(int64_t row_tiles, int64_t blocks) {
    return (row_tiles + most_rounds * blocks) * MarginTile<Wide>::rows;
  }
};

// Of ||W_i||^2 + ||W_c||^2: less is compared directly. Matrix units cut off what float32 would round, some 1e-5 of a
// long product.
template <class Wide>
constexpr Wide cancelled = Wide(1) / 32;

// What a score takes from one of its sides: a row's W_c . mu_c + b_c or a column's b_i, with a squared norm. nan stands
// for a norm that is not trusted, and where there is no row or column: such pairs are left for a direct comparison.
template <class Wide>
struct Side {
  Wide logit, square;
};

// Sums of a row's and a column's norm are trusted if these are.
template <class Wide>
RF_DEVICE Wide trusted(Wide square, Wide low) {
  return square >= low && square <= Trusted<Wide>::high / 2 ? square : Wide(NAN);
}

// The sides of a tile, in shared memory. Columns have two places, in turn, so that those of the next tile can be
// written while a slower warp still reads; barriers of the products lie between a write and its reads.
template <class Wide>
struct Sides {
  Side<Wide> row[MarginTile<Wide>::rows], column[2][MarginTile<Wide>::columns];

  RF_DEVICE void load_rows(const MarginSearch<Wide>& search, int64_t first_row) {
    const int t = int(threadIdx.x);
    if (t >= MarginTile<Wide>::rows) return;
    const int64_t r = first_row + t;
    row[t] = {Wide(0), Wide(NAN)};
    if (r >= search.used()) return;
    row[t] = {search.own_logit[r], trusted(search.own_square[r], Trusted<Wide>::low)};
  }
  RF_DEVICE void load_columns(const MarginSearch<Wide>& search, int64_t tile) {
    const int t = int(threadIdx.x);
    if (t >= MarginTile<Wide>::columns) return;
    const int64_t i = tile * MarginTile<Wide>::columns + t;
    column[tile % 2][t] = {Wide(0), Wide(NAN)};
    if (i >= search.num_classes) return;
    column[tile % 2][t] = {search.bias.data ? element<Wide>(search.bias, i) : Wide(0),
                           trusted(search.square[i], Wide(0))};
  }
};

// A pair's score from the rows of W, by a whole warp; false if they are equal or one.
template <class Wide, class W>
RF_DEVICE bool score_directly(const MarginSearch<Wide>& search, int64_t row, int64_t i, Wide& score) {
  if (search.own.index && i == search.own.index[row]) return false;
  const W *other = search.weight.template row<W>(i), *own = search.own.weight.template row<W>(search.own.at(row));
  const Wide* mu = search.mu + row * search.dim;
  const Wide bias = (search.bias.data ? element<Wide>(search.bias, i) : Wide(0)) - search.own_bias(row);
  const Pair<Wide> pair(bias, [&](Wide times, Wide& logit, Wide& square) {
    logit = square = 0;
#pragma unroll 1
    for (int64_t d = lane_id(); d < search.dim; d += 32) {
      const Wide normal = Wide(to_float(other[d])) - Wide(to_float(own[d])), scaled = normal * times;
      logit += normal * mu[d];
      square += scaled * scaled;
    }
    logit = lanes_sum(logit), square = lanes_sum(square);
  });
  score = pair.score();
  return pair.exists();
}

// A thread's sums of a tile: pair (r, k) is that of row row(thread, r) and column column(thread, k) of the tile.
// Columns ascend, here and from tile to tile.
//
// Matrix units: eight warps, 2 x 4, of 32 rows by 32 columns each, in fragments of 16 x 8.
struct Fragments {
  static constexpr int row_parts = 2, column_parts = 4, rows = 4, columns = 8;
  static RF_DEVICE int row(int thread, int r) { return thread / 128 * 32 + r * 8 + thread % 32 / 4; }
  static RF_DEVICE int column(int thread, int k) { return thread / 32 % 4 * 32 + k / 2 * 8 + thread % 4 * 2 + k % 2; }
};

// Plain multiplications: 2 x 4 pairs a thread.
struct Squares {
  static constexpr int rows = 2, columns = 4;
  static RF_DEVICE int row(int thread, int r) { return thread / 16 * 2 + r; }
  static RF_DEVICE int column(int thread, int k) { return thread % 16 + 16 * k; }
};

// Takes a tile's sums into the best of each of the thread's rows. logit(r, k) and product(r, k) are those of its pairs.
template <class Layout, class W, class Wide, class Logit, class Product>
RF_DEVICE void consider_tile(const MarginSearch<Wide>& search, const Sides<Wide>& sides, int64_t first_row,
                             int64_t tile, const Logit& logit, const Product& product,
                             Best<Wide> (&best)[Layout::rows]) {
  const int thread = int(threadIdx.x);
  const int64_t first_column = tile * MarginTile<Wide>::columns;
  uint32_t direct = 0, there = 0;  // pairs that are left, and those that there are
  RF_UNROLL
  for (int r = 0; r < Layout::rows; ++r) {
    const Side<Wide> row = sides.row[Layout::row(thread, r)];
    RF_UNROLL
    for (int k = 0; k < Layout::columns; ++k) {
      const Side<Wide> column = sides.column[tile % 2][Layout::column(thread, k)];
      const Wide sum = row.square + column.square, square = sum - 2 * product(r, k);
      const Wide score = over_root(logit(r, k) + column.logit - row.logit, square);
      // A later column has a higher index, so it has to be better; nan is better than all numbers.
      const bool clear = square > cancelled<Wide> * sum, better = !(score <= best[r].score);
      if (clear && better && best[r].score == best[r].score) {
        best[r] = {score, int32_t(first_column) + Layout::column(thread, k)};
      }
      direct |= uint32_t(!clear) << (r * Layout::columns + k);
    }
  }
  RF_UNROLL
  for (int k = 0; k < Layout::columns; ++k) {
    there |= uint32_t(first_column + Layout::column(thread, k) < search.num_classes) << k;
  }
  RF_UNROLL
  for (int r = 0; r < Layout::rows; ++r) {
    const uint32_t columns = first_row + Layout::row(thread, r) < search.used() ? there : 0;
    direct &= ~(((1u << Layout::columns) - 1) << (r * Layout::columns)) | columns << (r * Layout::columns);
  }
  while (const unsigned lanes = __ballot_sync(all_lanes, direct != 0)) {
    const int lane = __ffs(lanes) - 1, pair = __ffs(__shfl_sync(all_lanes, direct, lane)) - 1;
    const int other = thread - lane_id() + lane, r = pair / Layout::columns;
    const int64_t i = first_column + Layout::column(other, pair % Layout::columns);
    Wide score;
    const bool differs = score_directly<Wide, W>(search, first_row + Layout::row(other, r), i, score);
    if (lane != lane_id()) continue;
    direct &= direct - 1;
    RF_UNROLL
    for (int mine = 0; mine < Layout::rows; ++mine) {
      if (differs && mine == r) best[mine].consider(score, int32_t(i));
    }
  }
}

// Two bfloat16 parts of two neighbouring numbers.
RF_DEVICE void split_pair(float first, float second, uint32_t& high, uint32_t& low) {
  high = pack_bfloat16(first, second);
  low = pack_bfloat16(first - bit_cast<float>(high << 16), second - bit_cast<float>(high & 0xffff0000u));
}

constexpr int depth = 32;  // columns of a step

// The operands of one step in shared memory: 64 rows of mu, 64 of W_c, 128 of W_i, of `depth` numbers each. Eight of
// them, 16 bytes, are moved at once, by eight threads in a turn that is to meet every bank once: neighbours in two rows
// where they are stored, eight rows at one column where they are loaded. So a row's eights change places with the row.
struct Stage {
  static constexpr int mu = 0, own = 64, other = 128, rows = 256;

  static RF_DEVICE int at(int row, int column) { return row * depth + (column / 8 ^ (row / 2 & 3)) * 8; }
};

// What a thread loads of a step: eight columns of a row of each.
template <class W>
struct Slices {
  using Kept = std::conditional_t<std::is_same_v<W, double>, float, W>;
  Pack<float, 8> mu;
  Pack<Kept, 8> weight[3];  // of W_c and of two rows of W

  static RF_DEVICE int row() { return int(threadIdx.x) / 4; }
  static RF_DEVICE int column() { return int(threadIdx.x) % 4 * 8; }

  template <class To, class T>
  static RF_DEVICE Pack<To, 8> load(const T* row, int64_t column, int64_t dim, bool whole) {
    if (std::is_same_v<To, T> && whole) return load_pack<8>(reinterpret_cast<const To*>(row), column, dim);
    Pack<To, 8> pack = {};
    RF_UNROLL
    for (int k = 0; k < 8; ++k) {
      if (column + k < dim) pack.value[k] = To(row[column + k]);
    }
    return pack;
  }

  RF_DEVICE void load(const float* mu_row, const W* const (&weight_row)[3], int64_t step, int64_t dim, bool whole) {
    const int64_t at = step + column();
    mu = load<float>(mu_row, at, mu_row ? dim : 0, whole);
    RF_UNROLL
    for (int s = 0; s < 3; ++s) weight[s] = load<Kept>(weight_row[s], at, weight_row[s] ? dim : 0, whole);
  }

  template <class T>
  static RF_DEVICE void store(const Pack<T, 8>& pack, int row, uint16_t* high, uint16_t* low) {
    Vector16 parts[2];
    if constexpr (std::is_same_v<T, bfloat16>) {
      memcpy(&parts[0], &pack, sizeof(parts[0]));
    } else {
      RF_UNROLL
      for (int k = 0; k < 4; ++k) {
        split_pair(to_float(pack.value[2 * k]), to_float(pack.value[2 * k + 1]), parts[0].word[k], parts[1].word[k]);
      }
      store16(low + Stage::at(row, column()), parts[1]);
    }
    store16(high + Stage::at(row, column()), parts[0]);
  }

  RF_DEVICE void store(uint16_t* high, uint16_t* low) const {
    store(mu, Stage::mu + row(), high, low);
    store(weight[0], Stage::own + row(), high, low);
    store(weight[1], Stage::other + row(), high, low);
    store(weight[2], Stage::other + 64 + row(), high, low);
  }
};

// The sums of a warp's 32 x 32 pairs.
template <bool split>
struct Products {
  float logit[Fragments::row_parts][Fragments::column_parts][4] = {};
  float product[Fragments::row_parts][Fragments::column_parts][4] = {};

  // sum += a b for every pair of parts of the warp.
  static RF_DEVICE void multiply(const uint32_t (&a)[2][4], const uint32_t (&b)[4][2], float (&sum)[2][4][4]) {
    RF_UNROLL
    for (int m = 0; m < 2; ++m) {
      RF_UNROLL
      for (int n = 0; n < 4; ++n) multiply_add(sum[m][n], a[m], b[n]);
    }
  }
  static RF_DEVICE void load_rows(const uint16_t* tile, int first, int k, uint32_t (&a)[2][4]) {
    RF_UNROLL
    for (int m = 0; m < 2; ++m) {
      const int row = first + warp_id() / 4 * 32 + m * 16 + lane_id() % 16;
      load_matrices(a[m], tile + Stage::at(row, k + lane_id() / 16 * 8));
    }
  }
  static RF_DEVICE void load_columns(const uint16_t* tile, int k, uint32_t (&b)[4][2]) {
    RF_UNROLL
    for (int n = 0; n < 4; n += 2) {
      const int row = Stage::other + warp_id() % 4 * 32 + n * 8 + lane_id() % 8 + lane_id() / 16 * 8;
      uint32_t both[4];
      load_matrices(both, tile + Stage::at(row, k + lane_id() / 8 % 2 * 8));
      b[n][0] = both[0], b[n][1] = both[1], b[n + 1][0] = both[2], b[n + 1][1] = both[3];
    }
  }

  RF_DEVICE void add_step(const uint16_t* high, const uint16_t* low) {
    RF_UNROLL
    for (int k = 0; k < depth; k += 16) {
      uint32_t b[4][2], b_low[4][2], a[2][4];
      load_columns(high, k, b);
      if (split) load_columns(low, k, b_low);
      load_rows(low, Stage::mu, k, a);
      multiply(a, b, logit);
      load_rows(high, Stage::mu, k, a);
      multiply(a, b, logit);
      if (split) multiply(a, b_low, logit);
      load_rows(high, Stage::own, k, a);
      multiply(a, b, product);
      if (!split) continue;
      multiply(a, b_low, product);
      load_rows(low, Stage::own, k, a);
      multiply(a, b, product);
    }
  }
};

template <class W>
constexpr bool is_split = !std::is_same_v<W, bfloat16>;
// Two stages; of a bfloat16 W only mu has low parts.
template <class W>
constexpr int stage_size = (Stage::rows + (is_split<W> ? Stage::rows : Stage::own)) * depth;

// The best of each row of a tile, over its columns in one split.
template <class W>
RF_DEVICE void search_tiles(const MarginSearch<float>& search, Sides<float>& sides, int64_t first_row,
                            int64_t first_tile, int64_t end_tile, bool whole, Best<float> (&best)[Fragments::rows]) {
  uint16_t* const memory = reinterpret_cast<uint16_t*>(shared_memory());
  const int64_t row = first_row + Slices<W>::row();
  const bool present = row < search.used();
  const float* mu = present ? search.mu + row * search.dim : nullptr;
  const W* weight[3] = {present ? search.own.weight.row<W>(search.own.at(row)) : nullptr, nullptr, nullptr};
  int stage = 0;
  for (int64_t tile = first_tile; tile < end_tile; ++tile) {
    RF_UNROLL
    for (int s = 0; s < 2; ++s) {
      const int64_t i = tile * MarginTile<float>::columns + s * 64 + Slices<W>::row();
      weight[1 + s] = i < search.num_classes ? search.weight.row<W>(i) : nullptr;
    }
    Products<is_split<W>> sums;
    Slices<W> slices;
    sides.load_columns(search, tile);
#pragma unroll 1
    for (int64_t next = 0; next < search.dim + depth; next += depth) {
      // The other stage may still be read; this one was left before the last barrier.
      uint16_t *high = memory + stage * stage_size<W>, *low = high + Stage::rows * depth;
      if (next > 0) {
        slices.store(high, low);
        __syncthreads();
      }
      if (next < search.dim) slices.load(mu, weight, next, search.dim, whole);
      if (next == 0) continue;
      sums.add_step(high, low);
      stage = 1 - stage;
    }
    const auto at = [](const float (&sum)[2][4][4], int r, int k) { return sum[r / 2][k / 2][r % 2 * 2 + k % 2]; };
    consider_tile<Fragments, W>(
        search, sides, first_row, tile, [&](int r, int k) { return at(sums.logit, r, k); },
        [&](int r, int k) { return at(sums.product, r, k); }, best);
  }
}

// float64: tiles of 32 by 64 pairs, 16 columns a step, plain multiplications.
template <class W>
RF_DEVICE void search_tiles(const MarginSearch<double>& search, Sides<double>& sides, int64_t first_row,
                            int64_t first_tile, int64_t end_tile, bool, Best<double> (&best)[Squares::rows]) {
  constexpr int depth = 16, rows = MarginTile<double>::rows, columns = MarginTile<double>::columns;
  __shared__ double mu[rows][depth + 1], own[rows][depth + 1], other[columns][depth + 1];
  const int64_t present = search.used();
  const int thread = int(threadIdx.x);
  for (int64_t tile = first_tile; tile < end_tile; ++tile) {
    const int64_t first_column = tile * columns;
    sides.load_columns(search, tile);
    double logit[Squares::rows][Squares::columns] = {}, product[Squares::rows][Squares::columns] = {};
    for (int64_t step = 0; step < search.dim; step += depth) {
      __syncthreads();
      const int64_t d = step + thread % depth;
      for (int r = thread / depth; r < columns; r += margin_threads / depth) {
        const int64_t row = first_row + r, i = first_column + r;
        other[r][thread % depth] =
            i < search.num_classes && d < search.dim ? double(to_float(search.weight.row<W>(i)[d])) : 0;
        if (r >= rows) continue;
        const bool there = row < present && d < search.dim;
        mu[r][thread % depth] = there ? search.mu[row * search.dim + d] : 0;
        own[r][thread % depth] = there ? double(to_float(search.own.weight.row<W>(search.own.at(row))[d])) : 0;
      }
      __syncthreads();
#pragma unroll 4
      for (int k = 0; k < depth; ++k) {
        RF_UNROLL
        for (int e = 0; e < Squares::rows * Squares::columns; ++e) {
          const int r = e / Squares::columns, c = e % Squares::columns;
          const double x = other[Squares::column(thread, c)][k];
          logit[r][c] += mu[Squares::row(thread, r)][k] * x;
          product[r][c] += own[Squares::row(thread, r)][k] * x;
        }
      }
    }
    consider_tile<Squares, W>(
        search, sides, first_row, tile, [&](int r, int k) { return logit[r][k]; },
        [&](int r, int k) { return product[r][k]; }, best);
  }
}

// Of each of the tile's rows the best that the block's threads know; `lanes` neighbours share the rows of a thread, and
// so do `sharing` warps.
template <class Layout, int lanes, int sharing, class Wide>
RF_DEVICE void write_best(const MarginSearch<Wide>& search, int64_t place, Best<Wide> (&best)[Layout::rows]) {
  __shared__ Best<Wide> of_warp[sharing][MarginTile<Wide>::rows];
  __syncthreads();  // of an earlier call's reads
  RF_UNROLL
  for (int r = 0; r < Layout::rows; ++r) {
    for (int mask = 1; mask < lanes; mask *= 2) consider_lane(best[r], mask);
    if (lane_id() % lanes == 0) of_warp[warp_id() % sharing][Layout::row(int(threadIdx.x), r)] = best[r];
  }
  __syncthreads();
  if (threadIdx.x >= MarginTile<Wide>::rows) return;
  Best<Wide> mine = of_warp[0][threadIdx.x];
  for (int s = 1; s < sharing; ++s) mine.consider(of_warp[s][threadIdx.x].score, of_warp[s][threadIdx.x].winner);
  search.best_score[place + threadIdx.x] = mine.score;
  search.best_winner[place + threadIdx.x] = mine.winner;
}

// The results of a tile's rows, from those of all splits; a warp takes a row.
template <class Wide>
RF_DEVICE void merge_splits(const MarginSearch<Wide>& search, const MarginSplit<Wide>& split, int64_t first_row) {
  for (int64_t r = warp_id(); r < MarginTile<Wide>::rows && first_row + r < search.used(); r += num_warps()) {
    Best<Wide> best = Best<Wide>::none();
    for (int64_t s = lane_id(); s < split.splits; s += 32) {
      const int64_t place = split.place(s, first_row + r);
      best.consider(search.best_score[place], search.best_winner[place]);
    }
    for (int mask = 16; mask > 0; mask /= 2) consider_lane(best, mask);
    if (lane_id() != 0) continue;
    search.score[first_row + r] = best.score;
    search.winner[first_row + r] = best.score == Wide(-INFINITY) ? -1 : best.winner;
  }
}

template <class W, class Wide>
__global__ void __launch_bounds__(margin_threads, 1) margin_search_kernel(const MarginSearch<Wide> search, bool whole) {
  using Layout = std::conditional_t<sizeof(Wide) == 4, Fragments, Squares>;
  constexpr int lanes = sizeof(Wide) == 4 ? 4 : 16, sharing = sizeof(Wide) == 4 ? 4 : 1;
  __shared__ Sides<Wide> sides;
  const MarginSplit<Wide> split(search.used(), search.num_classes, gridDim.x);
  for (int64_t work = blockIdx.x; work < split.row_tiles * split.splits; work += gridDim.x) {
    const int64_t part = work / split.row_tiles, tile = work % split.row_tiles;
    const int64_t first_row = tile * MarginTile<Wide>::rows;
    Best<Wide> best[Layout::rows];
    RF_UNROLL
    for (int r = 0; r < Layout::rows; ++r) best[r] = Best<Wide>::none();
    sides.load_rows(search, first_row);  // nobody reads: write_best has barriers
    search_tiles<W>(search, sides, first_row, part * split.column_tiles / split.splits,
                    (part + 1) * split.column_tiles / split.splits, whole, best);
    write_best<Layout, lanes, sharing>(search, split.place(part, first_row), best);
    if (last_to_arrive(search.arrived + tile, unsigned(split.splits))) merge_splits(search, split, first_row);
  }
}

// What has to be there before the search, where no other kernel leaves it. A warp takes a row.
template <class Wide>
RF_DEVICE void own_products(const MarginSearch<Wide>& search, int64_t first, int64_t step) {
  for (int64_t row = first; row < search.rows; row += step) {
    Wide sums[2] = {0, 0};
    for (int64_t d = lane_id(); d < search.dim; d += 32) {
      const Wide own = element<Wide>(search.own.weight, search.own.at(row), d);
      sums[0] += own * search.mu[row * search.dim + d];
      sums[1] += own * own;
    }
    lanes_sums(sums);
    if (lane_id() != 0) continue;
    search.own_logit[row] = sums[0] + search.own_bias(row);
    search.own_square[row] = sums[1];
  }
}

template <class Wide>
__global__ void __launch_bounds__(margin_threads) prepare_search_kernel(const MarginSearch<Wide> search) {
  const int64_t first = blockIdx.x * int64_t(num_warps()) + warp_id(), step = gridDim.x * int64_t(num_warps());
  search.clear_arrivals(blockIdx.x * int64_t(margin_threads) + threadIdx.x, gridDim.x * int64_t(margin_threads));
  squared_norms(search, first, step);
  own_products(search, first, step);
}

template <class Wide>
MarginSearch<Wide> search_of(const MarginSearchParams& p, Arena& arena) {
  MarginSearch<Wide> search = {};
  search.weight = p.weight, search.bias = p.bias, search.own = p.own;
  search.mu = static_cast<const Wide*>(p.mu);
  search.dim = p.dim, search.num_classes = p.num_classes, search.rows = p.rows;
  search.place(arena);
  search.score = static_cast<Wide*>(p.score), search.winner = p.winner;
  return search;
}

int multiprocessors() {
  int device = 0, count = 1;
  if (cudaGetDevice(&device) == cudaSuccess) cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

}  // namespace

template <class Wide>
void MarginSearch<Wide>::place(Arena& arena) {
  blocks = multiprocessors();
  const int64_t places = MarginSplit<Wide>::places(row_tiles(), blocks);
  square = arena.take<Wide>(num_classes);
  own_logit = arena.take<Wide>(rows);
  own_square = arena.take<Wide>(rows);
  score = arena.take<Wide>(rows);
  best_score = arena.take<Wide>(places);
  best_winner = arena.take<int32_t>(places);
  arrived = arena.take<unsigned>(row_tiles());
}
template void MarginSearch<float>::place(Arena&);
template void MarginSearch<double>::place(Arena&);

template <class Wide>
cudaError_t margin_search(MarginSearch<Wide> search, cudaStream_t stream) {
  if (search.dim == 0) search.num_classes = 0;  // all rows of W are equal
  return visit(search.weight.dtype, [&](auto weight) {
    using W = decltype(weight);
    const size_t shared = sizeof(Wide) == 4 ? 2 * stage_size<W> * sizeof(uint16_t) : 0;
    const bool whole = search.dim % 8 == 0 && whole_packs(search.weight, search.dim, sizeof(W)) &&
                       whole_packs(search.own.weight, search.dim, sizeof(W)) &&
                       reinterpret_cast<uintptr_t>(search.mu) % 16 == 0;
    return launch(margin_search_kernel<W, Wide>, unsigned(search.blocks), margin_threads, shared, stream, search,
                  whole);
  });
}
template cudaError_t margin_search(MarginSearch<float>, cudaStream_t);
template cudaError_t margin_search(MarginSearch<double>, cudaStream_t);

size_t margin_search_scratch(const MarginSearchParams& p) {
  Arena arena(nullptr);
  for_wide(p.wide, [&]<class Wide>(Wide) {
    search_of<Wide>(p, arena);
    return cudaSuccess;
  });
  return arena.used();
}

cudaError_t margin_search(const MarginSearchParams& p, void* scratch, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  if (p.rows > INT32_MAX || p.num_classes >= INT32_MAX) return cudaErrorInvalidValue;
  return for_wide(p.wide, [&]<class Wide>(Wide) {
    Arena arena(scratch);
    const MarginSearch<Wide> search = search_of<Wide>(p, arena);
    const cudaError_t error =
        launch(prepare_search_kernel<Wide>, unsigned(2 * search.blocks), margin_threads, 0, stream, search);
    return error == cudaSuccess ? margin_search(search, stream) : error;
  });
}

}  // namespace robustfast::cuda
