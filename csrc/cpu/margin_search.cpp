// The search of the margin: for each class c of the batch, the class i whose boundary with c scores highest,
//   ((W_i - W_c) . mu_c + b_i - b_c) / ||W_i - W_c||.
//
// Both products, W_i . mu_c and W_i . W_c, come from one pass over W in tiles, of whole numbers that stand for the
// rows: their sums are exact, and what rounding the rows to them can change is bounded by Cauchy-Schwarz. Nearly all
// pairs are ruled out by these bounds; the others are looked at one by one, from the difference of the rows. The bounds
// include the rounding of that, so the winner is that of a look at every pair.
#ifndef RF_ISA

#define RF_KERNEL "cpu/margin_search.cpp"
#include "common/loss.h"
#include "cpu/lines.h"
#include "cpu/loss.h"
//
#include "cpu/each_isa.h"

namespace robustfast {

template <class Wide>
void margin_search(const Wide* mu, const ClassifierRows& own, const Matrix& weight, const Matrix& bias, int64_t rows,
                   int64_t dim, int64_t num_classes, Wide* score, int32_t* winner) {
  RF_DISPATCH(margin_search, mu, own, weight, bias, rows, dim, num_classes, score, winner);
}
template void margin_search(const float*, const ClassifierRows&, const Matrix&, const Matrix&, int64_t, int64_t,
                            int64_t, float*, int32_t*);
template void margin_search(const double*, const ClassifierRows&, const Matrix&, const Matrix&, int64_t, int64_t,
                            int64_t, double*, int32_t*);

}  // namespace robustfast

#else

#include "cpu/sums.h"
//
#include "cpu/boundary.h"
#include "cpu/tiles.h"

namespace robustfast {
namespace RF_ISA {

// How far off the sums of products in a bound may be where products are too small for F.
template <class F>
F underflow(int64_t dim) {
  return F(4 * dim + 16) * std::numeric_limits<F>::min();
}

// What the search knows of a row and its class c.
template <class F>
struct Row {
  int32_t row = -1, c;   // row -1 fills a tile; c: OwnRows::index
  bool level;            // all its scores are 0
  Quantized<F> mu, own;  // of mu_c, W_c
  F above;               // what a pair's logit may be more than W_i . mu_c + b_i, beside what W_i adds
};

// The score that a pair has to beat. Bounds come as squares, so no root is taken.
template <class F>
struct Target {
  F sign, square;  // of the score
  F slack, tiny;

  Target(const Best<F>& best, F slack, F tiny)
      : sign(best.score < F(0) ? F(-1) : F(1)), square(best.score * best.score), slack(slack), tiny(tiny) {}

  // Whether a pair cannot win, if its logit is at most `above`, `sum` is ||W_i||^2 + ||W_c||^2, and W_i . W_c lies
  // within `rest` of `product`. Not where squares leave the range of F.
  RF_INLINE bool out_of_reach(F above, F sum, F product, F rest) const {
    // The distance that flatters the score most: the least one, or for a negative score the largest.
    const F distance = sum - F(2) * (product + sign * rest) - sign * (slack * sum + tiny);
    const F needed = sign * square * (distance < F(0) ? F(0) : distance), reached = above * std::abs(above);
    const F size = std::abs(needed) + std::abs(reached);
    constexpr F least = std::numeric_limits<F>::min() * F(1e6), infinity = std::numeric_limits<F>::infinity();
    return (size > least) & (size < infinity) & (reached < needed);
  }
};

// W_c and b_c of each row in F.
template <class F>
struct OwnRows {
  ClassifierRows rows;
  int64_t dim;

  int32_t index(int64_t row) const { return rows.index ? rows.index[row] : -1; }  // where W has it, if that is known
  F bias(int64_t row) const { return bias_at<F>(rows, row); }
  // In `space` (dim,), unless it is in F already.
  const F* weight(int64_t row, F* space) const {
    const F* found = space;
    visit_features<F>(rows.weight.dtype, [&](auto zero) {
      const auto* w_c = rows.weight.template row<decltype(zero)>(rows.at(row));
      if constexpr (std::is_same_v<decltype(zero), F>) {
        found = w_c;
      } else {
        widen(w_c, dim, space);
      }
    });
    return found;
  }
};

template <class T, class F>
struct Search {
  const F* mus;
  Matrix weights;
  int64_t present, dim, num_classes;
  F slack, tiny;          // bounds of the error of a dot product, and of what is made of it: relative, absolute
  std::vector<F> biases;  // none if there is no bias
  OwnRows<F> own;

  Search(const F* mu, const ClassifierRows& own, const Matrix& weight, const Matrix& bias, int64_t present, int64_t dim,
         int64_t num_classes)
      : mus(mu),
        weights(weight),
        present(present),
        dim(dim),
        num_classes(num_classes),
        slack(F(dim + 16) * std::numeric_limits<F>::epsilon()),
        tiny(underflow<F>(dim)),
        biases(bias ? num_classes : 0),
        own{own, dim} {
    if (!bias) return;
    visit(bias.dtype, [&](auto zero) {
      for (int64_t i = 0; i < num_classes; ++i) biases[i] = F(to_float(*bias.row<decltype(zero)>(i)));
    });
  }

  int64_t pairs() const { return (dim + 1) / 2; }
  const T* weight(int64_t i) const { return weights.template row<T>(i); }
  F bias(int64_t i) const { return biases.empty() ? F(0) : biases[i]; }
  const F* mu(int64_t row) const { return mus + row * dim; }

  // Calls body(tile, q, space) for tiles of rows, in threads; `q` is for Tile::rows rows of whole numbers, `space` for
  // one row.
  template <class Body>
  void for_tiles(int64_t tiles, const Body& body) const {
    parallel_for(0, tiles, 1 + 4096 / std::max<int64_t>(1, dim), [&](int64_t from, int64_t to) {
      const Lines<Pair> q = lines<Pair>(Tile::rows * pairs());
      std::fill_n(q[0].values, Tile::rows * pairs(), Pair(0));
      std::vector<F> space(dim);
      for (int64_t tile = from; tile < to; ++tile) body(tile, q[0].values, space.data());
    });
  }

  // The pair's score, computed directly: what the rounding of the products hides, the difference of the rows shows.
  // Whether there is a boundary: not between equal rows.
  bool look_at(int64_t row, const F* w_c, int64_t i, Best<F>& best) const {
    const F bias_difference = bias(i) - own.bias(row);
    const Boundary<F> found = boundary(weight(i), w_c, mu(row), bias_difference, dim);
    if (found.distance != F(0)) best.consider(found.score, int32_t(i));
    return found.distance != F(0);
  }

  std::vector<Best<F> > run() const;
};

template <class T, class F>
std::vector<Best<F> > look_at_all(const Search<T, F>& search) {
  std::vector<Best<F> > best(search.present, Best<F>::none());
  std::vector<F> space(search.dim);
  for (int64_t row = 0; row < search.present; ++row) {
    const F* w_c = search.own.weight(row, space.data());
    for (int64_t i = 0; i < search.num_classes; ++i) {
      if (i != search.own.index(row)) search.look_at(row, w_c, i, best[row]);
    }
  }
  return best;
}

using Indices = std::vector<int32_t>;  // of classes, or of rows

// Where a group's rows of W are taken from, since only their differences count: the median of three of them, if it is
// much nearer to these than 0. What all rows have in common would only be rounded.
template <class T, class F>
std::vector<F> origin_of(const Search<T, F>& search, const Indices& classes) {
  const int64_t dim = search.dim, size = classes.size();
  const T *const a = search.weight(classes[size / 4]), *const b = search.weight(classes[size / 2]),
                 *const c = search.weight(classes[size * 3 / 4]);
  std::vector<F> zeros(dim), median(dim);
  for (int64_t d = 0; d < dim; ++d) {
    const F x = F(to_float(a[d])), y = F(to_float(b[d])), z = F(to_float(c[d]));
    median[d] = std::max(std::min(x, y), std::min(std::max(x, y), z));
  }
  for (const T* row : {a, b, c}) {
    if (!(square_distance(row, median.data(), dim) < square_distance(row, zeros.data(), dim) / 4)) return zeros;
  }
  return median;
}

// One of some classes in no order that classes may have: parts of the golden section.
inline int64_t sample_of(int64_t s, int64_t num_classes) {
  const double turns = 0.6180339887498949 * double(s);
  return int64_t(double(num_classes) * (turns - std::floor(turns)));
}

// Centres of groups of rows of W that are narrow beside their distance, which one origin leaves far from all others:
// found among some classes, each the farthest one from those before it. Of other rows the first one alone.
template <class T, class F>
std::vector<std::vector<F> > centers_of_groups(const Search<T, F>& search) {
  constexpr int64_t samples = 64, classes_of_group = 64;
  const int64_t most = std::min<int64_t>(16, search.num_classes / classes_of_group);
  if (most < 2) return {{}};
  std::vector<std::vector<F> > centers;
  std::vector<F> nearest(samples, std::numeric_limits<F>::infinity()), radius;  // squares
  int64_t farthest = 0;
  do {
    centers.emplace_back(search.dim);
    widen(search.weight(sample_of(farthest, search.num_classes)), search.dim, centers.back().data());
    for (int64_t s = 0; s < samples; ++s) {
      const T* row = search.weight(sample_of(s, search.num_classes));
      nearest[s] = std::min(nearest[s], square_distance(row, centers.back().data(), search.dim));
    }
    farthest = std::max_element(nearest.begin(), nearest.end()) - nearest.begin();
    radius.push_back(nearest[farthest]);
    // Rows of which none is near the first one are in no such groups.
    if (centers.size() == 1 && !(*std::min_element(nearest.begin() + 1, nearest.end()) < radius[0] / 64)) break;
  } while (int64_t(centers.size()) < most);
  const F narrow = radius.back() < radius[0] / 64 ? F(4) * radius.back() : radius[0];
  centers.resize(1 + std::distance(radius.begin(), std::find_if(radius.begin(), radius.end() - 1,
                                                                [&](F square) { return square <= narrow; })));
  return centers;
}

// By the nearest of these centres: `row(i, space)` for i < count, each in the list of its centre.
template <class F, class GetRow>
std::vector<Indices> by_center(const std::vector<std::vector<F> >& centers, int64_t count, const GetRow& row) {
  std::vector<Indices> groups(centers.size());
  std::vector<int32_t> nearest(count);
  parallel_for(0, centers.size() > 1 ? count : 0, 64, [&](int64_t from, int64_t to) {
    std::vector<F> space(centers[0].size());
    for (int64_t i = from; i < to; ++i) {
      F least = std::numeric_limits<F>::infinity();
      for (size_t g = 0; g < centers.size(); ++g) {
        const F square = square_distance(row(i, space.data()), centers[g].data(), centers[g].size());
        if (square < least) nearest[i] = int32_t(g);
        least = std::min(least, square);
      }
    }
  });
  for (int64_t i = 0; i < count; ++i) groups[nearest[i]].push_back(int32_t(i));
  return groups;
}

// W_i for one panel of a group's classes, by columns, and what bounds their scores.
template <class F>
struct Panel {
  static constexpr int columns = Tile::columns;
  const int32_t* classes;
  int size;
  Lines<Pair> data;                                                  // (pairs, columns)
  F scale[columns], square[columns], norm[columns], error[columns];  // as Quantized has them
  F bias[columns], above[columns];  // b_i, and what a logit may be more than W_i . mu_c for it

  const Pair* at(int64_t d) const { return data[0].values + d * columns; }
  int32_t class_of(int i) const { return classes[std::min(i, size - 1)]; }  // the last one fills the panel

  // `space` is for (columns, pairs).
  template <class T>
  void pack(const Search<T, F>& search, const F* origin, const Indices& group, int64_t begin, Pair* space) {
    const int64_t pairs = search.pairs();
    classes = group.data() + begin;
    size = int(std::min<int64_t>(columns, group.size() - begin));
    if (!data) data = lines<Pair>(pairs * columns);
    for (int i = 0; i < columns; ++i) {
      const int64_t c = class_of(i);
      const Quantized<F> row =
          quantize(search.weight(c), origin, search.dim, search.slack, search.tiny, space + i * pairs);
      scale[i] = row.scale;
      square[i] = row.square;
      norm[i] = row.norm;
      error[i] = row.error;
      bias[i] = search.bias(c);
      above[i] = bias[i] + search.slack * std::abs(bias[i]);
    }
    interleave<columns>(space, pairs, pairs, data[0].values);
  }
};

// Which rows were found equal: those with the same number here. So a W of many equal rows has few pairs to look at.
struct Twins {
  std::vector<int32_t> of_class, of_row;

  Twins(int64_t num_classes, int64_t rows) : of_class(num_classes), of_row(rows, std::numeric_limits<int32_t>::max()) {
    for (int64_t c = 0; c < num_classes; ++c) of_class[c] = int32_t(c);
  }
  bool known(int64_t row, int64_t c) const { return of_row[row] == of_class[c]; }
  void add(int64_t row, int64_t c) { of_row[row] = of_class[c] = std::min(of_row[row], of_class[c]); }
};

// What the sum of whole numbers stands for.
template <class F>
RF_INLINE F product_of(int32_t sum, F scale, const Quantized<F>& row) {
  return F(sum) * scale * row.scale;
}

// How far off that may be.
template <class F>
RF_INLINE F error_of(F norm, F error, const Quantized<F>& row) {
  return norm * row.error + error * row.norm;
}

// Whether the pair of a row with class i of a panel may beat the target, by the sums of whole numbers for
// W_i . mu_c and W_i . W_c.
template <class F>
RF_INLINE bool can_win(const Panel<F>& panel, const Row<F>& row, const Target<F>& target, int i, int32_t logit,
                       int32_t product) {
  const F scale = panel.scale[i], norm = panel.norm[i], error = panel.error[i];
  const F above = product_of(logit, scale, row.mu) + panel.above[i] + (row.above + error_of(norm, error, row.mu));
  return !target.out_of_reach(above, panel.square[i] + row.own.square, product_of(product, scale, row.own),
                              error_of(norm, error, row.own));
}

// All rows, with mu_c packed, in tiles of rows whose classes are in one group.
template <class F>
struct PackedMus {
  std::vector<int64_t> tile_of_group;  // the first one; and behind the last group
  std::vector<Row<F> > rows;           // without what they are for a group of other classes
  PackedRows packed;

  template <class T>
  PackedMus(const Search<T, F>& search, const std::vector<Indices>& members)
      : tile_of_group(tiles_of(members)),
        rows(tile_of_group.back() * Tile::rows),
        packed(tile_of_group.back() * Tile::rows, search.pairs()) {
    for (size_t g = 0; g < members.size(); ++g) {
      for (size_t m = 0; m < members[g].size(); ++m) rows[tile_of_group[g] * Tile::rows + m].row = members[g][m];
    }
    const std::vector<F>& biases = search.biases;
    const bool level = std::all_of(biases.begin(), biases.end(), [&](F bias) { return bias == biases[0]; });
    const std::vector<F> zeros(search.dim);
    search.for_tiles(packed.tiles, [&](int64_t tile, Pair* q, F*) {
      for (int64_t r = 0; r < Tile::rows; ++r) {
        Row<F>& known = rows[tile * Tile::rows + r];
        if (known.row < 0) continue;
        const F *mu_c = search.mu(known.row), bias = search.own.bias(known.row);
        known.c = search.own.index(known.row);
        known.level =
            level && bias == search.bias(0) && std::all_of(mu_c, mu_c + search.dim, [](F x) { return x == F(0); });
        known.mu = quantize(mu_c, zeros.data(), search.dim, search.slack, search.tiny, q + r * search.pairs());
        known.mu.error += search.slack * known.mu.norm;  // the rounding of the pair's logit
      }
      packed.pack(tile, q);
    });
  }

  static std::vector<int64_t> tiles_of(const std::vector<Indices>& members) {
    std::vector<int64_t> first = {0};
    for (const Indices& rows : members) first.push_back(first.back() + (rows.size() + Tile::rows - 1) / Tile::rows);
    return first;
  }
};

// The search by bounds among one group of classes, for some neighbouring tiles of rows, the first ones after the last.
template <class T, class F>
struct BoundedSearch {
  const Search<T, F>& search;
  const PackedMus<F>& mus;
  const Indices& classes;
  int64_t first, tiles;  // of the rows
  std::vector<F> origin;
  PackedRows own;
  std::vector<Row<F> > rows;

  BoundedSearch(const Search<T, F>& search, const PackedMus<F>& mus, const Indices& classes, int64_t first,
                int64_t tiles)
      : search(search),
        mus(mus),
        classes(classes),
        first(first),
        tiles(tiles),
        origin(origin_of(search, classes)),
        own(tiles * Tile::rows, search.pairs()),
        rows(tiles * Tile::rows) {
    search.for_tiles(tiles, [&](int64_t tile, Pair* q, F* space) {
      for (int64_t r = 0; r < Tile::rows; ++r) {
        Row<F>& known = rows[tile * Tile::rows + r] = mus.rows[(first + tile) % mus.packed.tiles * Tile::rows + r];
        if (known.row >= 0) prepare(known, q + r * search.pairs(), space);
      }
      own.pack(tile, q);
    });
  }

  void prepare(Row<F>& known, Pair* q, F* space) {
    const F *mu_c = search.mu(known.row), *w_c = search.own.weight(known.row, space), bias = search.own.bias(known.row);
    known.own = quantize(w_c, origin.data(), search.dim, search.slack, search.tiny, q);
    const F logit = boundary_sums<false>(w_c, origin.data(), mu_c, search.dim, F(1)).first;
    known.above = search.slack * (known.mu.norm * known.own.norm + std::abs(bias)) + search.tiny - (logit + bias);
  }

  void run(std::vector<Best<F> >& best) const;
  void look_in_panels(int64_t from, int64_t to, Best<F>* best) const;
  void look_in_tile(int64_t tile, const Panel<F>& panel, const int32_t* logits, const int32_t* products, F* space,
                    Best<F>* best, Twins& twins) const;
  void look_at_highest(const Row<F>& known, const std::vector<Panel<F> >& panels, const int32_t* logits, F* space,
                       Best<F>& best) const;
};

// Looks at the pair with the highest logit of a row; should that be the class itself, at the next one.
template <class T, class F>
void BoundedSearch<T, F>::look_at_highest(const Row<F>& known, const std::vector<Panel<F> >& panels,
                                          const int32_t* logits, F* space, Best<F>& best) const {
  constexpr int columns = Tile::columns;
  F values[Tile::panels_of_group * columns];
  const int size = int(panels.size()) * columns;
  for (size_t p = 0; p < panels.size(); ++p) {
    const Panel<F>& panel = panels[p];
    for (int i = 0; i < columns; ++i) {
      values[p * columns + i] = product_of(logits[p * Tile::size + i], panel.scale[i], known.mu) + panel.bias[i];
    }
  }
  for (int k = 0; k < 3 && best.winner < 0; ++k) {
    F most = -std::numeric_limits<F>::infinity();
#ifndef __clang__  // which vectorises no maximum, and warns where it is asked to
#pragma omp simd reduction(max : most)
#endif
    for (int i = 0; i < size; ++i) most = std::max(most, values[i]);
    const int highest = int(std::find(values, values + size, most) - values);
    if (highest == size) return;
    const int32_t c = panels[highest / columns].class_of(highest % columns);
    if (c != known.c) search.look_at(known.row, search.own.weight(known.row, space), c, best);
    values[highest] = -std::numeric_limits<F>::infinity();
  }
}

// out(tile, panel, row, column) for tiles [tile, end_tile) of the rows, counted from `first` on.
template <class F>
void multiply_block(const PackedRows& rows, int64_t first, int64_t tile, int64_t end_tile,
                    const std::vector<Panel<F> >& panels, int32_t* out) {
  constexpr int64_t share = Tile::depth * (Tile::columns / Tile::tiles_of_block);  // of what is ahead
  std::fill(out, out + (end_tile - tile) * panels.size() * Tile::size, 0);
  for (int64_t d = 0; d < rows.pairs; d += Tile::depth) {
    const int64_t depth = std::min(Tile::depth, rows.pairs - d);
    for (size_t p = 0; p < panels.size(); ++p) {
      const Pair* ahead = p + 1 < panels.size() ? panels[p + 1].at(d) : panels[0].at(d + depth);
      for (int64_t t = tile; t < end_tile; ++t, ahead += share) {
        multiply(rows.slice((first + t) % rows.tiles, d), panels[p].at(d), depth,
                 out + ((t - tile) * panels.size() + p) * Tile::size, ahead);
      }
    }
  }
}

// Looks at the pairs of a tile's rows with a panel that can win.
template <class T, class F>
void BoundedSearch<T, F>::look_in_tile(int64_t tile, const Panel<F>& panel, const int32_t* logits,
                                       const int32_t* products, F* space, Best<F>* best, Twins& twins) const {
  constexpr int columns = Tile::columns;
  for (int r = 0; r < Tile::rows; ++r, logits += columns, products += columns) {
    const Row<F>& known = rows[tile * Tile::rows + r];
    const int32_t row = known.row;
    if (row < 0) break;
    Best<F>& found = best[row];
    const Target<F> target(found, search.slack, search.tiny);
    IntegerOf<F> possible[columns], count = 0;
#pragma omp simd reduction(+ : count)
    for (int i = 0; i < columns; ++i) {
      possible[i] = can_win(panel, known, target, i, logits[i], products[i]);
      count += possible[i];
    }
    for (int i = 0; count > 0 && i < panel.size; ++i) {
      if (!possible[i]) continue;
      --count;
      const int32_t c = panel.class_of(i);
      if (c == known.c || twins.known(row, c)) continue;
      // Where no score beats another the lowest index wins.
      if ((known.level || std::isnan(found.score)) && found.winner >= 0 && c > found.winner) continue;
      const Target<F> now(found, search.slack, search.tiny);
      if (!can_win(panel, known, now, i, logits[i], products[i])) continue;
      if (!search.look_at(row, search.own.weight(row, space), c, found)) twins.add(row, c);
    }
  }
}

template <class T, class F>
void BoundedSearch<T, F>::look_in_panels(int64_t from, int64_t to, Best<F>* best) const {
  constexpr int64_t block_size = Tile::tiles_of_block * Tile::panels_of_group * Tile::size;
  const Lines<int32_t> sums = lines<int32_t>(2 * block_size);
  int32_t *const logits = sums[0].values, *const products = logits + block_size;
  const Lines<Pair> q = lines<Pair>(Tile::columns * search.pairs());
  std::vector<F> space(search.dim);
  std::vector<Panel<F> > panels;
  Twins twins(search.num_classes, search.present);
  for (int64_t p = from; p < to; p += panels.size()) {
    panels.resize(std::min<int64_t>(Tile::panels_of_group, to - p));
    for (size_t k = 0; k < panels.size(); ++k)
      panels[k].pack(search, origin.data(), classes, (p + k) * Tile::columns, q[0].values);
    for (int64_t tile = 0; tile < tiles; tile += Tile::tiles_of_block) {
      const int64_t end_tile = std::min<int64_t>(tile + Tile::tiles_of_block, tiles);
      multiply_block(mus.packed, first, tile, end_tile, panels, logits);
      multiply_block(own, 0, tile, end_tile, panels, products);
      for (int64_t t = tile; t < end_tile; ++t) {
        const int64_t at = (t - tile) * panels.size() * Tile::size;
        // Without a good score to beat, most of the first pairs would seem possible.
        for (int r = 0; p == from && r < Tile::rows; ++r) {
          const Row<F>& known = rows[t * Tile::rows + r];
          if (known.row < 0) break;
          look_at_highest(known, panels, logits + at + r * Tile::columns, space.data(), best[known.row]);
        }
        for (size_t k = 0; k < panels.size(); ++k) {
          const int64_t of_panel = at + k * Tile::size;
          look_in_tile(t, panels[k], logits + of_panel, products + of_panel, space.data(), best, twins);
        }
      }
    }
  }
}

// Adds what there is among these classes to the best of each row.
template <class T, class F>
void BoundedSearch<T, F>::run(std::vector<Best<F> >& best) const {
  const int64_t panels = (classes.size() + Tile::columns - 1) / Tile::columns;
  const int64_t tasks = std::min<int64_t>(panels, num_threads());
  std::vector<std::vector<Best<F> > > found(tasks, best);
  parallel_for(0, tasks, 1, [&](int64_t from, int64_t to) {
    for (int64_t t = from; t < to; ++t) {
      look_in_panels(t * panels / tasks, (t + 1) * panels / tasks, found[t].data());
    }
  });
  for (const std::vector<Best<F> >& part : found) {
    for (int64_t row = 0; row < search.present; ++row) best[row].consider(part[row].score, part[row].winner);
  }
}

// What the search finds for each row.
template <class T, class F>
std::vector<Best<F> > Search<T, F>::run() const {
  if (present * num_classes <= 1024) return look_at_all(*this);
  std::vector<Best<F> > best(present, Best<F>::none());
  const std::vector<std::vector<F> > centers = centers_of_groups(*this);
  const std::vector<Indices> classes = by_center(centers, num_classes, [&](int64_t c, F*) { return weight(c); });
  const std::vector<Indices> members =
      by_center(centers, present, [&](int64_t row, F* space) { return own.weight(row, space); });
  const PackedMus<F> mus(*this, members);
  const auto look = [&](const Indices& among, int64_t first, int64_t tiles) {
    if (tiles > 0 && !among.empty()) BoundedSearch<T, F>(*this, mus, among, first, tiles).run(best);
  };
  // At first in each row's own group, whose scores differ most: those with a far group hardly do.
  const std::vector<int64_t>& tile = mus.tile_of_group;
  for (size_t g = 0; g < centers.size(); ++g) look(classes[g], tile[g], tile[g + 1] - tile[g]);
  for (size_t g = 0; g < centers.size(); ++g) look(classes[g], tile[g + 1], tile.back() - (tile[g + 1] - tile[g]));
  return best;
}

template <class Wide>
void margin_search(const Wide* mu, const ClassifierRows& own, const Matrix& weight, const Matrix& bias, int64_t rows,
                   int64_t dim, int64_t num_classes, Wide* score, int32_t* winner) {
  visit_features<Wide>(weight.dtype, [&](auto zero) {
    const Search<decltype(zero), Wide> search(mu, own, weight, bias, rows, dim, num_classes);
    const std::vector<Best<Wide> > best = search.run();
    for (int64_t row = 0; row < rows; ++row) {
      score[row] = best[row].score;
      winner[row] = best[row].score == -std::numeric_limits<Wide>::infinity() ? -1 : best[row].winner;
    }
  });
}

}  // namespace RF_ISA
}  // namespace robustfast

#endif
