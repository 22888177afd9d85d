// Products of many rows with many rows, in tiles whose sums the registers hold. No include guard: kernels include this
// once for each instruction set.

namespace robustfast {
namespace RF_ISA {

template <class F>
struct Tile {
  typedef F Vector __attribute__((vector_size(RF_VECTOR_BYTES), aligned(alignof(F)), may_alias));
  static constexpr int lanes = RF_VECTOR_BYTES / sizeof(F);
  // As many sums as the registers hold beside a column of the panel and one factor.
  static constexpr int rows = RF_VECTOR_BYTES == 64 ? 8 : RF_VECTOR_BYTES == 32 ? 6 : 4;
  static constexpr int vectors = RF_VECTOR_BYTES == 64 ? 3 : 2;
  static constexpr int columns = vectors * lanes;
  // A block of tiles is multiplied with a group of panels, `depth` columns at a time: that much of a panel stays in the
  // first cache while the tiles go by, that much of the block and all sums in the second.
  static constexpr int tiles_of_block = 96 / rows, panels_of_group = 192 / columns;
  static constexpr int64_t depth = 24576 / (columns * sizeof(F));
};

// out[r][i] += sum over d of left[d][r] * panel[d][i]. Meanwhile what follows `left`, the next tile, and what is
// `ahead` of the panel come nearer; nothing need be there.
template <class F>
void multiply(const F* left, const F* panel, int64_t depth, F* out, const F* ahead) {
  using Vector = typename Tile<F>::Vector;
  constexpr int rows = Tile<F>::rows, vectors = Tile<F>::vectors, columns = Tile<F>::columns;
  // Vector by vector, never as an array: an array whose address is taken is kept in memory.
  Vector sums[rows][vectors];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < vectors; ++v) sums[r][v] = *reinterpret_cast<Vector*>(out + r * columns + v * Tile<F>::lanes);
  }
  for (int64_t d = 0; d < depth; ++d) {
    __builtin_prefetch(left + (depth + d) * rows);
    __builtin_prefetch(ahead + d * (columns / Tile<F>::tiles_of_block), 0, 2);
    Vector column[vectors];
#pragma GCC unroll 3
    for (int v = 0; v < vectors; ++v) {
      column[v] = *reinterpret_cast<const Vector*>(panel + d * columns + v * Tile<F>::lanes);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 3
      for (int v = 0; v < vectors; ++v) sums[r][v] += left[d * rows + r] * column[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < vectors; ++v) *reinterpret_cast<Vector*>(out + r * columns + v * Tile<F>::lanes) = sums[r][v];
  }
}

// Columns [begin, end) of `rows` rows as `multiply` reads them, row(r) giving one; the tile's other rows are 0.
template <class F, class RowOf>
void pack_tile(int rows, int64_t begin, int64_t end, const RowOf& row, F* packed) {
  for (int r = 0; r < Tile<F>::rows; ++r) {
    const F* x = r < rows ? row(r) : nullptr;
    for (int64_t d = begin; d < end; ++d) packed[(d - begin) * Tile<F>::rows + r] = x ? x[d] : F(0);
  }
}

// Rows in tiles, as `multiply` reads them: Tile::depth columns of all tiles follow one another, then the next columns.
template <class F>
struct PackedRows {
  int64_t rows, columns, tiles;
  Lines<F> data;

  PackedRows(int64_t rows, int64_t columns)
      : rows(rows),
        columns(columns),
        tiles((rows + Tile<F>::rows - 1) / Tile<F>::rows),
        data(lines<F>(tiles * Tile<F>::rows * columns)) {}

  int rows_of(int64_t tile) const { return int(std::min<int64_t>(Tile<F>::rows, rows - tile * Tile<F>::rows)); }

  // Columns of a tile from d on, d a multiple of Tile::depth.
  F* slice(int64_t tile, int64_t d) const {
    return data[0].values + (d * tiles + tile * std::min(Tile<F>::depth, columns - d)) * Tile<F>::rows;
  }

  template <class RowOf>
  void pack(int64_t tile, const RowOf& row) {
    for (int64_t d = 0; d < columns; d += Tile<F>::depth) {
      pack_tile(rows_of(tile), d, std::min(d + Tile<F>::depth, columns), row, slice(tile, d));
    }
  }
};

}  // namespace RF_ISA
}  // namespace robustfast
