// Products of many rows with many rows, in whole numbers of 16 bits, in tiles whose sums the registers hold. No include
// guard: kernels include this once for each instruction set, after cpu/sums.h.

namespace robustfast {
namespace RF_ISA {

using Pair = int32_t;  // two neighbouring columns of a row, 16 bits each

struct Tile {
  typedef Pair Vector __attribute__((vector_size(RF_VECTOR_BYTES), aligned(alignof(Pair)), may_alias));
  static constexpr int lanes = RF_VECTOR_BYTES / sizeof(Pair);
  // As many sums as the registers hold beside a pair of the panel's columns and one factor.
  static constexpr int rows = RF_VECTOR_BYTES == 64 ? 8 : RF_VECTOR_BYTES == 32 ? 6 : 4;
  static constexpr int vectors = RF_VECTOR_BYTES == 64 ? 3 : 2;
  static constexpr int columns = vectors * lanes;
  static constexpr int64_t size = rows * columns;
  // A block of tiles is multiplied with a group of panels, `depth` pairs at a time: that much of a panel stays in the
  // first cache while the tiles go by, that much of the block and all sums in the second.
  static constexpr int tiles_of_block = 96 / rows, panels_of_group = 192 / columns;
  static constexpr int64_t depth = 24576 / (columns * sizeof(Pair));
};

// sums += the products of a pair of columns of one row with those of several.
template <bool vnni>
RF_INLINE void add_products(Tile::Vector& sums, Tile::Vector factor, Tile::Vector column) {
#if RF_VECTOR_BYTES == 64
  if constexpr (vnni) {  // in one instruction, for which no kernel is compiled
    asm("vpdpwssd %2, %1, %0" : "+v"(sums) : "v"(factor), "v"(column));
  } else {
    sums += Tile::Vector(_mm512_madd_epi16(__m512i(factor), __m512i(column)));
  }
#elif RF_VECTOR_BYTES == 32
  sums += Tile::Vector(_mm256_madd_epi16(__m256i(factor), __m256i(column)));
#elif defined(__SSE2__)
  sums += Tile::Vector(_mm_madd_epi16(__m128i(factor), __m128i(column)));
#else
  sums += (factor << 16 >> 16) * (column << 16 >> 16) + (factor >> 16) * (column >> 16);
#endif
}

template <bool vnni>
void multiply_by(const Pair* left, const Pair* panel, int64_t depth, int32_t* out, const Pair* ahead) {
  using Vector = Tile::Vector;
  constexpr int rows = Tile::rows, vectors = Tile::vectors, columns = Tile::columns;
  // Vector by vector, never as an array: an array whose address is taken is kept in memory.
  Vector sums[rows][vectors];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < vectors; ++v) sums[r][v] = *reinterpret_cast<Vector*>(out + r * columns + v * Tile::lanes);
  }
  for (int64_t d = 0; d < depth; ++d) {
    __builtin_prefetch(left + (depth + d) * rows);
    __builtin_prefetch(ahead + d * (columns / Tile::tiles_of_block), 0, 2);
    Vector column[vectors];
#pragma GCC unroll 3
    for (int v = 0; v < vectors; ++v) {
      column[v] = *reinterpret_cast<const Vector*>(panel + d * columns + v * Tile::lanes);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const Vector factor = left[d * rows + r] + Vector{};
#pragma GCC unroll 3
      for (int v = 0; v < vectors; ++v) add_products<vnni>(sums[r][v], factor, column[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < vectors; ++v) *reinterpret_cast<Vector*>(out + r * columns + v * Tile::lanes) = sums[r][v];
  }
}

// out[r][i] += sum over the columns of `depth` pairs d of left[d][r] * panel[d][i]. Meanwhile what follows `left`, the
// next tile, and what is `ahead` of the panel come nearer; nothing need be there.
inline void multiply(const Pair* left, const Pair* panel, int64_t depth, int32_t* out, const Pair* ahead) {
  if (RF_VECTOR_BYTES == 64 && has_vnni()) return multiply_by<true>(left, panel, depth, out, ahead);
  multiply_by<false>(left, panel, depth, out, ahead);
}

template <class F, class T>
F square_distance(const T* x, const F* origin, int64_t dim) {
  return sum_over<T, F>(dim,
                        [&]<class Value>(int64_t d, Sums<Value>& sums) RF_TARGET_LAMBDA {
                          const Value value = load<Value>(x + d) - load<Value>(origin + d);
                          sums.first += value * value;
                        })
      .first;
}

// What stands in the products for a row x, taken from an origin: x = scale * q + e with whole numbers q.
template <class F>
struct Quantized {
  F scale, square;  // ||x||^2
  F norm, error;    // ||x|| + ||e||, ||e||, or more
};

// Writes the q of x - origin to `pairs`. ||q|| < 2^15: so no q leaves its 16 bits, and no sum of products its 32, by
// Cauchy-Schwarz. A row whose norm is not finite has zeros and an error that is not. `slack` and `tiny` bound what sums
// of squares miss, as a part of them and where squares are too small for F.
template <class F, class T>
RF_NOINLINE Quantized<F> quantize(const T* x, const F* origin, int64_t dim, F slack, F tiny, Pair* pairs) {
  int16_t* const q = reinterpret_cast<int16_t*>(pairs);
  if (dim % 2) q[dim] = 0;
  const F square = square_distance(x, origin, dim), norm = std::sqrt(square + tiny) * (F(1) + slack);
  if (!(norm < std::numeric_limits<F>::infinity())) {
    std::fill_n(q, dim, int16_t(0));
    return {F(0), square, norm, norm};
  }
  const F limit = F(32760) - std::sqrt(F(dim)) / F(2);  // rounding adds up to 1/2 to each q
  const F scale = norm / limit, inverse = limit / norm;
  constexpr F shift = F(1.5) / std::numeric_limits<F>::epsilon();  // what is added to it becomes a whole number
  F error = 0;
#pragma omp simd reduction(+ : error)
  for (int64_t d = 0; d < dim; ++d) {
    const F value = F(to_float(x[d])) - origin[d], whole = (value * inverse + shift) - shift;
    const F rest = value - scale * whole;
    q[d] = int16_t(int32_t(whole));
    error += rest * rest;
  }
  error = std::sqrt(error + tiny) * (F(1) + slack) + F(2) * std::numeric_limits<F>::epsilon() * norm;
  return {scale, square, norm + error, error};
}

// `count` rows of `pairs` pairs, `stride` apart, as `multiply` reads them: pair after pair of all rows.
template <int count>
void interleave(const Pair* rows, int64_t stride, int64_t pairs, Pair* packed) {
  constexpr int64_t block = 16;  // pairs that stay in the first cache while all rows are written to them
  for (int64_t begin = 0; begin < pairs; begin += block) {
    const int64_t end = std::min(begin + block, pairs);
    for (int r = 0; r < count; ++r) {
      for (int64_t d = begin; d < end; ++d) packed[d * count + r] = rows[r * stride + d];
    }
  }
}

// Rows in tiles, as `multiply` reads them: Tile::depth pairs of all tiles follow one another, then the next pairs.
struct PackedRows {
  int64_t pairs, tiles;
  Lines<Pair> data;

  PackedRows(int64_t rows, int64_t pairs)
      : pairs(pairs), tiles((rows + Tile::rows - 1) / Tile::rows), data(lines<Pair>(tiles * Tile::rows * pairs)) {}

  // Pairs of a tile from d on, d a multiple of Tile::depth.
  Pair* slice(int64_t tile, int64_t d) const {
    return data[0].values + (d * tiles + tile * std::min(Tile::depth, pairs - d)) * Tile::rows;
  }

  // From Tile::rows rows.
  void pack(int64_t tile, const Pair* rows) {
    for (int64_t d = 0; d < pairs; d += Tile::depth) {
      interleave<Tile::rows>(rows + d, pairs, std::min(Tile::depth, pairs - d), slice(tile, d));
    }
  }
};

}  // namespace RF_ISA
}  // namespace robustfast
