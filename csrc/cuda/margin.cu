// The margin's winners: for each class c of the batch the class i with the highest
//   score = ((W_i - W_c) . mu_c + b_i - b_c) / ||W_i - W_c||,   ||W_i - W_c||^2 = ||W_i||^2 + ||W_c||^2 - 2 W_i . W_c.
//
// Both products come from one pass over W, tile by tile, and scores never leave the registers. float32 sums use the
// matrix units with bfloat16 operands: a number is the sum of two of them, high and low, and of the product of two
// numbers only low times low is left out, 2^-17 of it; a bfloat16 W is its own high part. Where W_i and W_c are so
// close that their squared distance cancels, the pair is compared directly, coordinate by coordinate: so equal rows,
// between which there is no boundary, are told from close ones exactly. The winner's own boundary is computed directly
// anyhow (finish.cu), so products only select.
#include "cuda/large.cuh"

namespace robustfast::cuda {
namespace {

constexpr int margin_threads = 256;

// Of ||W_i||^2 + ||W_c||^2: less is compared directly. Matrix units cut off what float32 would round, some 1e-5 of a
// long product.
template <class Wide>
constexpr Wide cancelled = Wide(1) / 32;

// One side of a score: a class of the batch.
template <class Wide>
struct RowSide {
  Wide own_logit, square;

  RF_DEVICE RowSide(const Loss<Wide>& a, const Workspace<Wide>& w, int64_t row, int64_t present)
      : own_logit(row < present ? w.own_logit[row] : Wide(0)),
        square(row < present ? w.square[a.classes[row]] : Wide(0)) {}
};

// The other: a class of the classifier.
template <class Wide, class W>
struct ColumnSide {
  Wide bias, square;

  RF_DEVICE ColumnSide(const Loss<Wide>& a, const Workspace<Wide>& w, int64_t i)
      : bias(i < a.num_classes && a.bias.data ? element<Wide>(a.bias, i, 0) : Wide(0)),
        square(i < a.num_classes ? w.square[i] : Wide(0)) {}
};

// The score of a pair from W_i . mu_c and W_i . W_c; false if it has to be computed directly.
template <class Wide, class W>
RF_DEVICE bool score_of(const RowSide<Wide>& row, const ColumnSide<Wide, W>& column, Wide logit, Wide product,
                        Wide& score) {
  const Wide sum = row.square + column.square, square = sum - 2 * product;
  if (square <= cancelled<Wide> * sum) return false;
  score = (logit + column.bias - row.own_logit) / square_root(square);
  return true;
}

// The same from the rows of W, by a whole warp; false if they are equal.
template <class Wide, class W>
RF_DEVICE bool score_directly(const Loss<Wide>& a, int64_t row, int64_t i, Wide& score) {
  const int64_t c = a.classes[row];
  const W *other = row_of<W>(a.weight, i), *own = row_of<W>(a.weight, c);
  const Wide* mu = a.boundary_grad + row * a.dim;
  Wide logit = 0, square = 0;
#pragma unroll 1
  for (int64_t d = lane_id(); d < a.dim; d += 32) {
    const Wide normal = Wide(to_float(other[d])) - Wide(to_float(own[d]));
    logit += normal * mu[d];
    square += normal * normal;
  }
  logit = lanes_sum(logit), square = lanes_sum(square);
  if (a.bias.data) logit += element<Wide>(a.bias, i, 0) - element<Wide>(a.bias, c, 0);
  score = logit / square_root(square);
  return square != Wide(0);
}

// A thread's sums of a tile: pair e is that of row row_of_pair(e) and column column_of_pair(e) of the tile.
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
RF_DEVICE void consider_tile(const Loss<Wide>& a, const Workspace<Wide>& w, int64_t first_row, int64_t first_column,
                             const Logit& logit, const Product& product, Best<Wide> (&best)[Layout::rows]) {
  const int64_t present = w.rows.totals->rows;
  const int thread = int(threadIdx.x);
  uint32_t direct = 0;  // pairs that are left
  RF_UNROLL
  for (int k = 0; k < Layout::columns; ++k) {
    const int64_t i = first_column + Layout::column(thread, k);
    const ColumnSide<Wide, W> column(a, w, i);
    RF_UNROLL
    for (int r = 0; r < Layout::rows; ++r) {
      const int64_t row = first_row + Layout::row(thread, r);
      if (row >= present || i >= a.num_classes || i == a.classes[row]) continue;
      Wide score;
      if (score_of(RowSide<Wide>(a, w, row, present), column, logit(r, k), product(r, k), score)) {
        best[r].consider(score, int32_t(i));
      } else {
        direct |= 1u << (r * Layout::columns + k);
      }
    }
  }
  while (const unsigned lanes = __ballot_sync(all_lanes, direct != 0)) {
    const int lane = __ffs(lanes) - 1, pair = __ffs(__shfl_sync(all_lanes, direct, lane)) - 1;
    const int other = thread - lane_id() + lane, r = pair / Layout::columns;
    const int64_t i = first_column + Layout::column(other, pair % Layout::columns);
    Wide score;
    const bool differs = score_directly<Wide, W>(a, first_row + Layout::row(other, r), i, score);
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

constexpr int depth = 32, pitch = depth + 8;  // columns of a step; of a row in shared memory, so that banks differ

// The operands of one step in shared memory: 64 rows of mu, 64 of W_c, 128 of W_i.
struct Stage {
  static constexpr int mu = 0, own = 64, other = 128, rows = 256;
};

// What a thread loads of a step: eight columns of a row of each.
template <class W>
struct Slices {
  Pack<float, 8> mu;
  Pack<W, 8> weight[3];  // of W_c and of two rows of W

  static RF_DEVICE int row() { return int(threadIdx.x) / 4; }
  static RF_DEVICE int column() { return int(threadIdx.x) % 4 * 8; }

  template <class T>
  static RF_DEVICE Pack<T, 8> load(const T* row, int64_t column, int64_t dim, bool whole) {
    if (whole) return load_pack<8>(row, column, dim);
    Pack<T, 8> pack = {};
    RF_UNROLL
    for (int k = 0; k < 8; ++k) {
      if (column + k < dim) pack.value[k] = row[column + k];
    }
    return pack;
  }

  RF_DEVICE void load(const float* mu_row, const W* const (&weight_row)[3], int64_t step, int64_t dim, bool whole) {
    const int64_t at = step + column();
    mu = load(mu_row, at, mu_row ? dim : 0, whole);
    RF_UNROLL
    for (int s = 0; s < 3; ++s) weight[s] = load(weight_row[s], at, weight_row[s] ? dim : 0, whole);
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
      store16(low + row * pitch + column(), parts[1]);
    }
    store16(high + row * pitch + column(), parts[0]);
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
      load_matrices(a[m], tile + row * pitch + k + lane_id() / 16 * 8);
    }
  }
  static RF_DEVICE void load_columns(const uint16_t* tile, int k, uint32_t (&b)[4][2]) {
    RF_UNROLL
    for (int n = 0; n < 4; n += 2) {
      const int row = Stage::other + warp_id() % 4 * 32 + n * 8 + lane_id() % 8 + lane_id() / 16 * 8;
      uint32_t both[4];
      load_matrices(both, tile + row * pitch + k + lane_id() / 8 % 2 * 8);
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
constexpr int stage_size = (Stage::rows + (is_split<W> ? Stage::rows : Stage::own)) * pitch;

// The best of each row of a tile, over its columns in one split.
template <class W>
RF_DEVICE void search(const Loss<float>& a, const Workspace<float>& w, int64_t first_row, int64_t first_tile,
                      int64_t end_tile, bool whole, Best<float> (&best)[Fragments::rows]) {
  uint16_t* const memory = reinterpret_cast<uint16_t*>(shared_memory());
  const int64_t row = first_row + Slices<W>::row();
  const bool present = row < w.rows.totals->rows;
  const float* mu = present ? a.boundary_grad + row * a.dim : nullptr;
  const W* weight[3] = {present ? row_of<W>(a.weight, a.classes[row]) : nullptr, nullptr, nullptr};
  int stage = 0;
  for (int64_t tile = first_tile; tile < end_tile; ++tile) {
    const int64_t first_column = tile * MarginTile<float>::columns;
    RF_UNROLL
    for (int s = 0; s < 2; ++s) {
      const int64_t i = first_column + s * 64 + Slices<W>::row();
      weight[1 + s] = i < a.num_classes ? row_of<W>(a.weight, i) : nullptr;
    }
    Products<is_split<W>> sums;
    Slices<W> slices;
    slices.load(mu, weight, 0, a.dim, whole);
    for (int64_t step = 0; step < a.dim; step += depth) {
      // The other stage may still be read; this one was left before the last barrier.
      uint16_t *high = memory + stage * stage_size<W>, *low = high + Stage::rows * pitch;
      slices.store(high, low);
      __syncthreads();
      if (step + depth < a.dim) slices.load(mu, weight, step + depth, a.dim, whole);
      sums.add_step(high, low);
      stage = 1 - stage;
    }
    const auto at = [](const float (&sum)[2][4][4], int r, int k) { return sum[r / 2][k / 2][r % 2 * 2 + k % 2]; };
    consider_tile<Fragments, W>(
        a, w, first_row, first_column, [&](int r, int k) { return at(sums.logit, r, k); },
        [&](int r, int k) { return at(sums.product, r, k); }, best);
  }
}

// Of each of the tile's rows the best that the block's threads know; `lanes` neighbours share the rows of a thread, and
// so do `sharing` warps.
template <class Layout, int lanes, int sharing, class Wide>
RF_DEVICE void write_best(const Workspace<Wide>& w, int64_t place, Best<Wide> (&best)[Layout::rows]) {
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
  w.best_score[place + threadIdx.x] = mine.score;
  w.best_index[place + threadIdx.x] = mine.winner;
}

// float64: tiles of 32 by 64 pairs, 16 columns a step, plain multiplications.
template <class W>
RF_DEVICE void search(const Loss<double>& a, const Workspace<double>& w, int64_t first_row, int64_t first_tile,
                      int64_t end_tile, bool, Best<double> (&best)[Squares::rows]) {
  constexpr int depth = 16, rows = MarginTile<double>::rows, columns = MarginTile<double>::columns;
  __shared__ double mu[rows][depth + 1], own[rows][depth + 1], other[columns][depth + 1];
  const int64_t present = w.rows.totals->rows;
  const int thread = int(threadIdx.x);
  for (int64_t tile = first_tile; tile < end_tile; ++tile) {
    const int64_t first_column = tile * columns;
    double logit[Squares::rows][Squares::columns] = {}, product[Squares::rows][Squares::columns] = {};
    for (int64_t step = 0; step < a.dim; step += depth) {
      __syncthreads();
      const int64_t d = step + thread % depth;
      for (int r = thread / depth; r < columns; r += margin_threads / depth) {
        const int64_t row = first_row + r, i = first_column + r;
        other[r][thread % depth] = i < a.num_classes && d < a.dim ? double(to_float(row_of<W>(a.weight, i)[d])) : 0;
        if (r >= rows) continue;
        const bool there = row < present && d < a.dim;
        mu[r][thread % depth] = there ? a.boundary_grad[row * a.dim + d] : 0;
        own[r][thread % depth] = there ? double(to_float(row_of<W>(a.weight, a.classes[row])[d])) : 0;
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
        a, w, first_row, first_column, [&](int r, int k) { return logit[r][k]; },
        [&](int r, int k) { return product[r][k]; }, best);
  }
}

template <class W, class Wide>
__global__ void __launch_bounds__(margin_threads, 1)
    margin_kernel(const Loss<Wide> a, const Workspace<Wide> w, bool whole) {
  using Layout = std::conditional_t<sizeof(Wide) == 4, Fragments, Squares>;
  const MarginSplit<Wide> split(w.rows.totals->rows, a.num_classes, gridDim.x);
  for (int64_t work = blockIdx.x; work < split.row_tiles * split.splits; work += gridDim.x) {
    const int64_t part = work / split.row_tiles, first_row = work % split.row_tiles * MarginTile<Wide>::rows;
    Best<Wide> best[Layout::rows];
    RF_UNROLL
    for (int r = 0; r < Layout::rows; ++r) best[r] = Best<Wide>::none();
    search<W>(a, w, first_row, part * split.column_tiles / split.splits, (part + 1) * split.column_tiles / split.splits,
              whole, best);
    write_best<Layout, (sizeof(Wide) == 4 ? 4 : 16), (sizeof(Wide) == 4 ? 4 : 1)>(w, split.place(part, first_row),
                                                                                  best);
  }
}

// The sum of what boundaries give to one row of the classifier's gradient; entries as in BoundaryClasses.
template <class Wide>
struct WeightSum {
  const LossGrads<Wide>& a;
  const Rows& rows;

  RF_DEVICE Wide operator()(const Item& item, int64_t d) const {
    Wide sum = 0;
#pragma unroll 4
    for (int32_t j = item.begin; j < item.end; ++j) {
      const int64_t entry = rows.order[j], row = entry < a.capacity ? entry : entry - a.capacity;
      const Wide value = d < a.dim ? a.boundary_grad[row * a.dim + d] : a.boundary_bias[row];
      sum += entry < a.capacity ? value : -value;
    }
    return sum;
  }
};

// One block per item; rows of the gradient that no boundary touches are zero already. Column `dim` is the bias.
template <class Wide>
__global__ void __launch_bounds__(margin_threads, 4)
    margin_backward_kernel(const LossGrads<Wide> a, const Rows rows, Wide* partial) {
  if (int64_t(blockIdx.x) >= rows.totals->items) return;
  const Item item(rows, blockIdx.x);
  const WeightSum<Wide> weight_sum{a, rows};
  const int32_t parts = item.parts();
  if (parts > 1) {
    for (int64_t d = threadIdx.x; d <= a.dim; d += margin_threads) {
      partial[item.place() * (a.dim + 1) + d] = weight_sum(item, d);
    }
    if (!last_to_arrive(rows.arrived + item.row, unsigned(parts))) return;
  }
  const Wide grad_loss = *a.grad_loss;
  const int64_t i = rows.classes[item.row];
  for (int64_t d = threadIdx.x; d <= a.dim; d += margin_threads) {
    Wide sum = 0;
    if (parts == 1) sum = weight_sum(item, d);
    for (int32_t part = 0; parts > 1 && part < parts; ++part) sum += partial[item.place(part) * (a.dim + 1) + d];
    if (d < a.dim) {
      if (a.grad_weight.data) set_element(a.grad_weight, i * a.dim + d, grad_loss * sum);
    } else if (a.grad_bias.data) {
      set_element(a.grad_bias, i, grad_loss * sum);
    }
  }
}

template <class Wide>
struct BackwardMemory {
  Rows rows;
  Wide* partial;
  void* sort;

  BackwardMemory(Arena& arena, const LossGrads<Wide>& a) {
    rows = {
        .n = 2 * a.capacity, .capacity = 2 * a.capacity, .num_classes = a.num_classes, .chunk = 64, .slot = nullptr};
    rows.classes = arena.take<int32_t>(rows.capacity);
    rows.place(arena);
    partial = arena.take<Wide>(2 * (rows.n / rows.chunk + 1) * (a.dim + 1));
    sort = arena.take<unsigned char>(int64_t(sort_scratch(rows.n)));
  }
};

}  // namespace

template <class Wide>
cudaError_t margin(const Loss<Wide>& a, const Workspace<Wide>& w, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  visit(a.weight.dtype, [&](auto weight) {
    using W = decltype(weight);
    const size_t shared = sizeof(Wide) == 4 ? 2 * stage_size<W> * sizeof(uint16_t) : 0;
    const bool whole = a.dim % 8 == 0 && whole_packs(a.weight, a.dim, sizeof(W));
    error = launch(margin_kernel<W, Wide>, unsigned(w.margin_blocks), margin_threads, shared, stream, a, w, whole);
  });
  return error;
}
template cudaError_t margin(const Loss<float>&, const Workspace<float>&, cudaStream_t);
template cudaError_t margin(const Loss<double>&, const Workspace<double>&, cudaStream_t);

template <class Wide>
size_t margin_backward_scratch(const LossGrads<Wide>& a) {
  Arena arena(nullptr);
  BackwardMemory<Wide>(arena, a);
  return arena.used();
}
template size_t margin_backward_scratch(const LossGrads<float>&);
template size_t margin_backward_scratch(const LossGrads<double>&);

template <class Wide>
cudaError_t margin_backward(const LossGrads<Wide>& a, void* scratch, cudaStream_t stream) {
  Arena arena(scratch);
  const BackwardMemory<Wide> memory(arena, a);
  const BoundaryClasses classes{a.classes, a.winner, a.capacity, a.num_classes};
  cudaError_t error = group_boundaries(classes, memory.rows, memory.sort, stream);
  if (error != cudaSuccess) return error;
  return launch(margin_backward_kernel<Wide>, unsigned(memory.rows.max_items()), margin_threads, 0, stream, a,
                memory.rows, memory.partial);
}
template cudaError_t margin_backward(const LossGrads<float>&, void*, cudaStream_t);
template cudaError_t margin_backward(const LossGrads<double>&, void*, cudaStream_t);

}  // namespace robustfast::cuda
