// The products come from one pass over W, tile by tile, and scores never leave the registers:
//   ||W_i - W_c||^2 = ||W_i||^2 + ||W_c||^2 - 2 W_i . W_c,   (W_i - W_c) . mu_c = W_i . mu_c - W_c . mu_c
//
// float32 sums use the matrix units with bfloat16 operands: mu rounded, and a W that is not bfloat16 as the sum of two
// of them, high and low. What that and the units' own rounding may change in a score is bounded (set_row), and all
// pairs that come as close to a row's best are settled from the differences of their rows of W. So are pairs so close
// that their squared distance cancels, or whose squares leave the range of Wide: equal rows, between which there is no
// boundary, are told from close ones exactly. The winner is that of a look at every pair.
#include "cuda/boundary.cuh"
#include "cuda/margin_search.cuh"
#include "cuda/pack.cuh"

namespace robustfast::cuda {
namespace {

constexpr int margin_threads = 256;

// How the tiles are dealt to blocks: each tile of rows against parts of the classes, every block its share of them, one
// after another. All blocks are at about the same classes at a time, which the L2 then holds. Numbers of tiles have 32
// bits, which a GPU divides in a fraction of the time.
template <class Wide>
struct MarginSplit {
  using Tile = MarginTile<Wide>;
  static constexpr uint32_t most_rounds = 8;
  uint32_t row_tiles, column_tiles, splits;

  // The fewest steps that the busiest block takes, a step being a tile; of equal ones the fewest splits.
  RF_INLINE MarginSplit(int64_t present, int64_t num_classes, uint32_t blocks)
      : row_tiles(uint32_t((present + Tile::rows - 1) / Tile::rows)),
        column_tiles(uint32_t((num_classes + Tile::columns - 1) / Tile::columns)),
        splits(column_tiles > 0) {
    if (row_tiles == 0 || column_tiles == 0) return;
    const uint32_t first_round = (row_tiles + blocks - 1) / blocks;
    uint64_t fewest = uint64_t(first_round) * column_tiles;
    for (uint32_t rounds = first_round; rounds < first_round + most_rounds; ++rounds) {
      const uint32_t fit = rounds * blocks / row_tiles, parts = fit < column_tiles ? fit : column_tiles;
      const uint64_t steps = uint64_t(rounds) * ((column_tiles + parts - 1) / parts);
      if (steps < fewest) fewest = steps, splits = parts;
    }
  }
  // The first column tile of a split.
  RF_INLINE int64_t first_tile(uint32_t split) const {
    const uint32_t longer = column_tiles % splits;
    return int64_t(split) * (column_tiles / splits) + (split < longer ? split : longer);
  }
  // Where the candidates of a row stand, those of a split's part, and how many there are at most.
  RF_INLINE int64_t place(uint32_t split, int64_t row, uint32_t part) const {
    return (int64_t(split) * row_tiles * Tile::rows + row) * Tile::parts + part;
  }
  int64_t places(int64_t blocks) const {
    const int64_t dealt = row_tiles + most_rounds * blocks, there = int64_t(row_tiles) * column_tiles;
    return (dealt < there ? dealt : there) * Tile::rows * Tile::parts;
  }
};

// What a score takes from one of its sides: a row's W_c . mu_c + b_c or a column's b_i, with a squared norm. nan stands
// for a norm that is not trusted, and where there is no row or column: such pairs are left for a direct comparison.
template <class Wide>
struct Side {
  Wide logit, square;
};

template <class Wide>
RF_DEVICE Wide trusted(Wide square, Wide low) {
  return is_trusted(square, low) ? square : Wide(NAN);
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
    const Wide bias = search.bias.data ? element<Wide>(search.bias, i) : Wide(0);
    // One of -inf leaves no score that could win.
    const bool known = fabs(bias) <= Trusted<Wide>::high || bias == Wide(-INFINITY);
    column[tile % 2][t] = {bias, known ? trusted(search.square[i], Wide(0)) : Wide(NAN)};
  }
};

// A pair's score from the rows of W, `count` elements at a time, by a whole warp; false if they are equal or one.
template <class W, int count, class Wide>
RF_DEVICE bool score_directly(const MarginSearch<Wide>& search, int64_t row, int64_t i, Wide& score) {
  if (search.own.index && i == search.own.index[row]) return false;
  const W *other = search.weight.template row<W>(i), *own = search.own.weight.template row<W>(search.own.at(row));
  const Wide* mu = search.mu + row * search.dim;
  const Wide bias = (search.bias.data ? element<Wide>(search.bias, i) : Wide(0)) - search.own_bias(row);
  const Pair<Wide> pair(bias, [&](Wide times, Wide& logit, Wide& square) {
    logit = square = 0;
#pragma unroll 1
    for (int64_t d = lane_id() * count; d < search.dim; d += 32 * count) {
      const auto x = load_pack<count>(other, d, search.dim), y = load_pack<count>(own, d, search.dim);
      const auto z = load_pack<count>(mu, d, search.dim);
      RF_UNROLL
      for (int k = 0; k < count; ++k) {
        const Wide normal = Wide(to_float(x.value[k])) - Wide(to_float(y.value[k])), scaled = normal * times;
        logit += normal * z.value[k];
        square += scaled * scaled;
      }
    }
    logit = lanes_sum(logit), square = lanes_sum(square);
  });
  score = pair.score();
  return pair.exists();
}

// A thread's sums of a tile: pair (r, k) is that of row row(thread, r) and column column(part(thread), k) of the tile.
// Columns of a part ascend, here and from tile to tile.
//
// Matrix units: eight warps, 2 x 4, of 32 rows by 32 columns each, in fragments of 16 x 8.
struct Fragments {
  static constexpr int row_parts = 2, column_parts = 4, rows = 4, columns = 8;
  static RF_DEVICE int row(int thread, int r) { return thread / 128 * 32 + r * 8 + thread % 32 / 4; }
  static RF_DEVICE int part(int thread) { return thread / 32 % 4 * 4 + thread % 4; }
  static RF_DEVICE int column(int part, int k) { return part / 4 * 32 + k / 2 * 8 + part % 4 * 2 + k % 2; }
};

// Plain multiplications: 2 x 4 pairs a thread.
struct Squares {
  static constexpr int rows = 2, columns = 4;
  static RF_DEVICE int row(int thread, int r) { return thread / 16 * 2 + r; }
  static RF_DEVICE int part(int thread) { return thread % 16; }
  static RF_DEVICE int column(int part, int k) { return part + 16 * k; }
};

template <class Wide>
using LayoutOf = std::conditional_t<sizeof(Wide) == 4, Fragments, Squares>;

// Takes a tile's sums into what is left of the thread's rows. logit(r, k) and product(r, k) are those of its pairs.
template <class Layout, class W, class Wide, class Logit, class Product>
RF_DEVICE void consider_tile(const MarginSearch<Wide>& search, const Sides<Wide>& sides, int64_t first_row,
                             int64_t tile, const Logit& logit, const Product& product,
                             Candidates<Wide> (&left)[Layout::rows]) {
  const int thread = int(threadIdx.x), part = Layout::part(thread);
  const int64_t first_column = tile * MarginTile<Wide>::columns;
  const Wide close = close_part<Wide> + search.error;
  uint32_t direct = 0, there = 0;  // pairs to be compared directly, and those that there are
  RF_UNROLL
  for (int r = 0; r < Layout::rows; ++r) {
    const Side<Wide> row = sides.row[Layout::row(thread, r)];
    RF_UNROLL
    for (int k = 0; k < Layout::columns; ++k) {
      const Side<Wide> column = sides.column[tile % 2][Layout::column(part, k)];
      const Wide sum = row.square + column.square, square = sum - 2 * product(r, k);
      const bool clear = square > close * sum;
      const Wide score = over_root(logit(r, k) + column.logit - row.logit, square);
      const Wide known = clear ? score : Wide(-INFINITY);
      left[r].others = fmax(left[r].others, fmin(left[r].best.score, known));
      if (known > left[r].best.score) left[r].best = {known, int32_t(first_column) + Layout::column(part, k)};
      direct |= uint32_t(!clear) << (r * Layout::columns + k);
    }
  }
  RF_UNROLL
  for (int k = 0; k < Layout::columns; ++k) {
    there |= uint32_t(first_column + Layout::column(part, k) < search.num_classes) << k;
  }
  RF_UNROLL
  for (int r = 0; r < Layout::rows; ++r) {
    const uint32_t columns = first_row + Layout::row(thread, r) < search.used() ? there : 0;
    direct &= ~(((1u << Layout::columns) - 1) << (r * Layout::columns)) | columns << (r * Layout::columns);
  }
  while (const unsigned lanes = __ballot_sync(all_lanes, direct != 0)) {
    const int lane = __ffs(lanes) - 1, pair = __ffs(__shfl_sync(all_lanes, direct, lane)) - 1;
    const int other = thread - lane_id() + lane, r = pair / Layout::columns;
    const int64_t i = first_column + Layout::column(Layout::part(other), pair % Layout::columns);
    Wide score;
    const bool differs = score_directly<W, 1>(search, first_row + Layout::row(other, r), i, score);
    if (lane != lane_id()) continue;
    direct &= direct - 1;
    RF_UNROLL
    for (int mine = 0; mine < Layout::rows; ++mine) {
      if (!differs || mine != r) continue;
      left[mine].others = fmax(left[mine].others, fmin(left[mine].best.score, score));
      left[mine].best.consider(score, int32_t(i));
    }
  }
}

// Two bfloat16 parts of two neighbouring numbers.
RF_DEVICE void split_pair(float first, float second, uint32_t& high, uint32_t& low) {
  high = pack_bfloat16(first, second);
  low = pack_bfloat16(first - bit_cast<float>(high << 16), second - bit_cast<float>(high & 0xffff0000u));
}

constexpr int depth = 32;  // columns of a step

// The operands of one step in shared memory: 64 rows of low, 64 of W_c, 128 of W_i, of `depth` numbers each. Eight of
// them, 16 bytes, are moved at once, by eight threads in a turn that is to meet every bank once: neighbours in two rows
// where they are stored, eight rows at one column where they are loaded. So a row's eights change places with the row.
struct Stage {
  static constexpr int mu = 0, own = 64, other = 128, rows = 256;

  static RF_DEVICE int at(int row, int column) { return row * depth + (column / 8 ^ (row / 2 & 3)) * 8; }
};

// What a thread loads of a step: eight columns of a row of each. Of `whole` rows they are words which nothing looks at
// until they are stored, so that loads are on their way while the step before is multiplied.
template <class W, bool whole>
struct Slices {
  using Kept = std::conditional_t<std::is_same_v<W, double>, float, W>;
  static constexpr int words = sizeof(Pack<Kept, 8>) / 16;
  Vector16 low[1];
  Vector16 weight[3][words];  // of W_c and of two rows of W

  static RF_DEVICE int row() { return int(threadIdx.x) / 4; }
  static RF_DEVICE int column() { return int(threadIdx.x) % 4 * 8; }

  template <class To, int words, class T>
  static RF_DEVICE void load(const T* row, int64_t column, int64_t dim, Vector16 (&word)[words]) {
    Pack<To, 8> pack = {};
    if constexpr (std::is_same_v<To, T> && whole) {
      pack = load_pack<8>(row, column, dim);
    } else {
      RF_UNROLL
      for (int k = 0; k < 8; ++k) {
        if (column + k < dim) pack.value[k] = To(row[column + k]);
      }
    }
    memcpy(word, &pack, sizeof(word));
  }

  RF_DEVICE void load(const bfloat16* low_row, const W* const (&weight_row)[3], int64_t step, int64_t dim) {
    const int64_t at = step + column();
    load<bfloat16>(low_row, at, low_row ? dim : 0, low);
    RF_UNROLL
    for (int s = 0; s < 3; ++s) load<Kept>(weight_row[s], at, weight_row[s] ? dim : 0, weight[s]);
  }

  template <class T>
  static RF_DEVICE void store(const Vector16* word, int row, uint16_t* high, uint16_t* low) {
    Vector16 parts[2];
    if constexpr (std::is_same_v<T, bfloat16>) {
      parts[0] = word[0];
    } else {
      Pack<T, 8> pack;
      memcpy(&pack, word, sizeof(pack));
      RF_UNROLL
      for (int k = 0; k < 4; ++k) {
        split_pair(to_float(pack.value[2 * k]), to_float(pack.value[2 * k + 1]), parts[0].word[k], parts[1].word[k]);
      }
      store16(low + Stage::at(row, column()), parts[1]);
    }
    store16(high + Stage::at(row, column()), parts[0]);
  }

  RF_DEVICE void store(uint16_t* high_parts, uint16_t* low_parts) const {
    store<bfloat16>(low, Stage::mu + row(), high_parts, low_parts);
    store<Kept>(weight[0], Stage::own + row(), high_parts, low_parts);
    store<Kept>(weight[1], Stage::other + row(), high_parts, low_parts);
    store<Kept>(weight[2], Stage::other + 64 + row(), high_parts, low_parts);
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
// Of one of two stages; a bfloat16 W has no low parts.
template <class W>
constexpr int stage_size = (is_split<W> ? 2 : 1) * Stage::rows * depth;

// The candidates of each row of a tile, of its columns in one split.
template <class W, bool whole>
RF_DEVICE void search_tiles(const MarginSearch<float>& search, Sides<float>& sides, int64_t first_row,
                            int64_t first_tile, int64_t end_tile, Candidates<float> (&left)[Fragments::rows]) {
  uint16_t* const memory = reinterpret_cast<uint16_t*>(shared_memory());
  const int64_t row = first_row + Slices<W, whole>::row();
  const bool present = row < search.used();
  const bfloat16* low_row = present ? search.low_row(row) : nullptr;
  const W* weight[3] = {present ? search.own.weight.row<W>(search.own.at(row)) : nullptr, nullptr, nullptr};
  int stage = 0;
  for (int64_t tile = first_tile; tile < end_tile; ++tile) {
    RF_UNROLL
    for (int s = 0; s < 2; ++s) {
      const int64_t i = tile * MarginTile<float>::columns + s * 64 + Slices<W, whole>::row();
      weight[1 + s] = i < search.num_classes ? search.weight.row<W>(i) : nullptr;
    }
    Products<is_split<W>> sums;
    Slices<W, whole> slices;
    sides.load_columns(search, tile);
#pragma unroll 1
    for (int64_t next = 0; next < search.dim + depth; next += depth) {
      // The other stage may still be read; this one was left before the last barrier.
      uint16_t *high = memory + stage * stage_size<W>, *low = high + Stage::rows * depth;
      if (next > 0) {
        slices.store(high, low);
        __syncthreads();
      }
      if (next < search.dim) slices.load(low_row, weight, next, search.dim);
      if (next == 0) continue;
      sums.add_step(high, low);
      stage = 1 - stage;
    }
    const auto at = [](const float (&sum)[2][4][4], int r, int k) { return sum[r / 2][k / 2][r % 2 * 2 + k % 2]; };
    consider_tile<Fragments, W>(
        search, sides, first_row, tile, [&](int r, int k) { return at(sums.logit, r, k); },
        [&](int r, int k) { return at(sums.product, r, k); }, left);
  }
}

// float64: tiles of 32 by 64 pairs, 16 columns a step, plain multiplications.
template <class W, bool>
RF_DEVICE void search_tiles(const MarginSearch<double>& search, Sides<double>& sides, int64_t first_row,
                            int64_t first_tile, int64_t end_tile, Candidates<double> (&left)[Squares::rows]) {
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
          const double x = other[Squares::column(Squares::part(thread), c)][k];
          logit[r][c] += mu[Squares::row(thread, r)][k] * x;
          product[r][c] += own[Squares::row(thread, r)][k] * x;
        }
      }
    }
    consider_tile<Squares, W>(
        search, sides, first_row, tile, [&](int r, int k) { return logit[r][k]; },
        [&](int r, int k) { return product[r][k]; }, left);
  }
}

template <class W, bool whole, class Wide>
__global__ void __launch_bounds__(margin_threads, 1) search_kernel(const MarginSearch<Wide> search) {
  using Layout = LayoutOf<Wide>;
  __shared__ Sides<Wide> sides;
  const int thread = int(threadIdx.x);
  const MarginSplit<Wide> split(search.used(), search.num_classes, uint32_t(search.blocks));
  for (uint32_t work = blockIdx.x; work < split.row_tiles * split.splits; work += gridDim.x) {
    const uint32_t part = work / split.row_tiles;
    const int64_t first_row = int64_t(work % split.row_tiles) * MarginTile<Wide>::rows;
    Candidates<Wide> left[Layout::rows];
    RF_UNROLL
    for (int r = 0; r < Layout::rows; ++r) {
      const int64_t row = first_row + Layout::row(thread, r);
      const bool bounded = row >= search.used() || search.slack[row] < Wide(INFINITY);
      left[r] = {Best<Wide>::none(), bounded ? Wide(-INFINITY) : Wide(INFINITY)};
    }
    __syncthreads();  // of reads of other rows' sides
    sides.load_rows(search, first_row);
    search_tiles<W, whole>(search, sides, first_row, split.first_tile(part), split.first_tile(part + 1), left);
    RF_UNROLL
    for (int r = 0; r < Layout::rows; ++r) {
      const int64_t row = first_row + Layout::row(thread, r);
      search.candidates[split.place(part, row, Layout::part(thread))] = left[r];
    }
  }
}

// Parts of a row's pairs that may hold its winner, of margin_threads at a time, as bits: those of which only the best
// pair may be it, and those all of whose pairs have to be looked at.
struct OpenParts {
  unsigned pair[margin_threads / 32], all[margin_threads / 32];
};

// A row's winner, from its candidates' scores, computed from the differences of rows of W; a block takes a row.
template <class W, int count, class Wide>
__global__ void __launch_bounds__(margin_threads, 2) settle_kernel(const MarginSearch<Wide> search) {
  using Layout = LayoutOf<Wide>;
  constexpr uint32_t parts = MarginTile<Wide>::parts;
  constexpr int warps = margin_threads / 32;
  __shared__ OpenParts open;
  __shared__ Best<Wide> of_warp[warps];
  const int64_t row = blockIdx.x;
  if (row >= search.used()) return;
  const MarginSplit<Wide> split(search.used(), search.num_classes, uint32_t(search.blocks));
  const uint32_t all_parts = split.splits * parts;
  const auto candidates = [&](uint32_t part) -> const Candidates<Wide>& {
    return search.candidates[split.place(part / parts, row, part % parts)];
  };

  Wide top = -INFINITY;
  for (uint32_t p = threadIdx.x; p < all_parts; p += margin_threads) top = fmax(top, candidates(p).best.score);
  top = block_max(top);
  // Distances are wrong by up to 8 errors of products, scores by half of it.
  const Wide relative = fabs(top) < Wide(INFINITY) ? 10 * search.error * fabs(top) : Wide(0);
  const Wide least = top - search.slack[row] - relative;
  const auto may_win = [&](Wide score) { return !(score < least) && score != Wide(-INFINITY); };

  Best<Wide> best = Best<Wide>::none();
  const auto consider = [&](int64_t i) {
    Wide score;
    if (score_directly<W, count>(search, row, i, score)) best.consider(score, int32_t(i));
  };
  for (uint32_t first = 0; first < all_parts; first += margin_threads) {
    const uint32_t mine = first + threadIdx.x;
    const bool there = mine < all_parts;
    const bool all = there && may_win(candidates(mine).others);
    const bool pair = there && !all && may_win(candidates(mine).best.score);
    __syncthreads();  // of reads of the parts before
    open.pair[warp_id()] = __ballot_sync(all_lanes, pair);
    open.all[warp_id()] = __ballot_sync(all_lanes, all);
    __syncthreads();
    int turn = 0;  // warps take pairs in turn
    for (int w = 0; w < warps; ++w) {
      for (unsigned bits = open.pair[w]; bits; bits &= bits - 1) {
        if (turn++ % warps == warp_id()) consider(candidates(first + w * 32 + __ffs(bits) - 1).best.winner);
      }
      for (unsigned bits = open.all[w]; bits; bits &= bits - 1) {
        const uint32_t part = first + w * 32 + __ffs(bits) - 1;
        const int64_t begin = split.first_tile(part / parts) * Layout::columns;
        const int64_t end = split.first_tile(part / parts + 1) * Layout::columns;
        for (int64_t k = begin + warp_id(); k < end; k += warps) {
          const int64_t i = k / Layout::columns * MarginTile<Wide>::columns +
                            Layout::column(int(part % parts), int(k % Layout::columns));
          // Columns ascend: behind a score of nan no other wins.
          if (i >= search.num_classes || (best.score != best.score && i > best.winner)) break;
          consider(i);
        }
      }
    }
  }
  if (lane_id() == 0) of_warp[warp_id()] = best;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < warps; ++w) best.consider(of_warp[w].score, of_warp[w].winner);
  search.score[row] = best.score;
  search.winner[row] = best.score == Wide(-INFINITY) ? -1 : best.winner;
}

// What has to be there before the search, where no other kernel leaves it. A warp takes a row.
template <class Wide>
RF_DEVICE void set_rows(const MarginSearch<Wide>& search, int64_t first, int64_t step) {
  for (int64_t row = first; row < search.used(); row += step) {
    Wide sums[row_sum::count] = {};
    for (int64_t d = lane_id(); d < search.dim; d += 32) {
      const Wide own = element<Wide>(search.own.weight, search.own.at(row), d);
      const LowOf<Wide> low = add_coordinate(own, search.mu[row * search.dim + d], sums);
      if constexpr (sizeof(Wide) == 4) search.low[row * search.dim + d] = low;
    }
    lanes_sums(sums);
    if (lane_id() == 0) search.set_row(row, sums);
  }
}

template <class Wide>
__global__ void __launch_bounds__(margin_threads, 2) prepare_search_kernel(const MarginSearch<Wide> search) {
  const int64_t first = blockIdx.x * int64_t(num_warps()) + warp_id(), step = gridDim.x * int64_t(num_warps());
  squared_norms(search, first, step);
  set_rows(search, first, step);
}

template <class Wide>
MarginSearch<Wide> search_of(const MarginSearchParams& p, Arena& arena) {
  MarginSearch<Wide> search = {};
  search.weight = p.weight, search.bias = p.bias, search.own = p.own, search.present = p.present;
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
  error = product_error<Wide>(dim, weight.dtype);
  square = arena.take<Wide>(num_classes);
  low = arena.take<LowOf<Wide>>(sizeof(Wide) == 4 ? rows * dim : 0);
  own_logit = arena.take<Wide>(rows);
  own_square = arena.take<Wide>(rows);
  slack = arena.take<Wide>(rows);
  score = arena.take<Wide>(rows);
  candidates = arena.take<Candidates<Wide>>(MarginSplit<Wide>(rows, num_classes, uint32_t(blocks)).places(blocks));
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
    const auto kernel = whole ? search_kernel<W, sizeof(Wide) == 4, Wide> : search_kernel<W, false, Wide>;
    const cudaError_t error = launch(kernel, unsigned(search.blocks), margin_threads, shared, stream, search);
    if (error != cudaSuccess) return error;
    return launch(whole ? settle_kernel<W, 8, Wide> : settle_kernel<W, 1, Wide>, unsigned(search.rows), margin_threads,
                  0, stream, search);
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
