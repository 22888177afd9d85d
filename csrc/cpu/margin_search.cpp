// The search of the margin: for each class c of the batch, the class i whose boundary with c scores highest,
//   ((W_i - W_c) . mu_c + b_i - b_c) / ||W_i - W_c||.
//
// Both products, W_i . mu_c and W_i . W_c, come from one pass over W in tiles. Most pairs cannot win, and that shows
// before their distance is known: the second product is taken over the first columns only, the rest of it bounded by
// Cauchy-Schwarz, and with it the score. Pairs that can win are looked at one by one, with the distance computed
// directly. The bounds include the rounding of the products, so the winner is that of a look at every pair.
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

#include "cpu/boundary.h"
#include "cpu/tiles.h"

namespace robustfast {
namespace RF_ISA {

template <class T, class F>
F dot(const T* x, const F* y, int64_t size) {
  F first = size % 2 ? F(to_float(x[size - 1])) * y[size - 1] : F(0), second = 0;  // two sums wait for each other less
  const int64_t half = size / 2;
#pragma omp simd reduction(+ : first, second)
  for (int64_t d = 0; d < half; ++d) {
    first += F(to_float(x[d])) * y[d];
    second += F(to_float(x[half + d])) * y[half + d];
  }
  return first + second;
}

template <class F, class T>
F square_norm(const T* x, int64_t begin, int64_t end) {
  F total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t d = begin; d < end; ++d) total += F(to_float(x[d])) * F(to_float(x[d]));
  return total;
}

// How far off the sums of products in a bound may be where products are too small for F.
template <class F>
F underflow(int64_t dim) {
  return F(4 * dim + 16) * std::numeric_limits<F>::min();
}

// The second product is taken over more and more columns: for every pair up to the first of these cuts, then for those
// that still can win up to the next one.
struct Cuts {
  static constexpr int count = 3;
  int64_t at[count];

  explicit Cuts(int64_t dim) {
    const int64_t first = dim < 1024 ? 5 : 3;  // eighths; more where to look at a pair costs more than the product
    for (int k = 0; k < count; ++k) at[k] = dim < 64 ? dim : std::min(dim, dim * (first + 2 * k) / 8);
  }
};

// What the bounds take of a row of W.
template <class F>
struct Norms {
  F square, norm, bias;  // ||W_i||^2, ||W_i|| or more, |b_i|
  F rest[Cuts::count];   // the norm of the columns from each cut on, or more

  template <class T>
  static Norms of(const T* w, const Cuts& cuts, int64_t dim, F bias) {
    Norms norms;
    F square = 0;
    for (int k = Cuts::count; k-- > 0;) {
      square += square_norm<F>(w, cuts.at[k], k + 1 < Cuts::count ? cuts.at[k + 1] : dim);
      norms.rest[k] = std::sqrt(square + underflow<F>(dim));
    }
    norms.square = square + square_norm<F>(w, 0, cuts.at[0]);
    norms.norm = std::sqrt(norms.square + underflow<F>(dim));
    norms.bias = std::abs(bias);
    return norms;
  }
};

// What the search knows of a row and its class c.
template <class F>
struct Row {
  int32_t c;    // OwnRows::index
  F own_logit;  // W_c . mu_c + b_c
  F mu;         // ||mu_c||, or more
  bool level;   // all its scores are 0
  Norms<F> own;
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

// W_c and b_c of each row in F; rows that are in F already stay where they are.
template <class F>
struct OwnRows {
  ClassifierRows rows;
  int64_t dim;
  std::vector<F> wide;

  OwnRows(const ClassifierRows& rows, int64_t present, int64_t dim) : rows(rows), dim(dim) {
    visit_features<F>(rows.weight.dtype, [&](auto zero) {
      using T = decltype(zero);
      if constexpr (!std::is_same_v<T, F>) {
        wide.resize(present * dim);
        parallel_for(0, present, 1 + 32768 / std::max<int64_t>(1, dim), [&](int64_t from, int64_t to) {
          for (int64_t row = from; row < to; ++row) {
            widen(rows.weight.template row<T>(rows.at(row)), dim, &wide[row * dim]);
          }
        });
      }
    });
  }

  int32_t index(int64_t row) const { return rows.index ? rows.index[row] : -1; }  // where W has it, if that is known
  F bias(int64_t row) const { return bias_at<F>(rows, row); }
  const F* weight(int64_t row) const {
    return wide.empty() ? rows.weight.template row<F>(rows.at(row)) : &wide[row * dim];
  }
};

template <class T, class F>
struct Search {
  const F* mus;
  Matrix weights;
  int64_t present, dim, num_classes;
  Cuts cuts;
  int64_t head;           // the first cut
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
        cuts(dim),
        head(cuts.at[0]),
        slack(F(dim + 16) * std::numeric_limits<F>::epsilon()),
        tiny(underflow<F>(dim)),
        biases(bias ? num_classes : 0),
        own(own, present, dim) {
    if (!bias) return;
    visit(bias.dtype, [&](auto zero) {
      for (int64_t i = 0; i < num_classes; ++i) biases[i] = F(to_float(*bias.row<decltype(zero)>(i)));
    });
  }

  const T* weight(int64_t i) const { return weights.template row<T>(i); }
  F bias(int64_t i) const { return biases.empty() ? F(0) : biases[i]; }
  const F* mu(int64_t row) const { return mus + row * dim; }

  // The pair's score, computed directly: what the rounding of the products hides, the difference of the rows shows.
  // Whether there is a boundary: not between equal rows.
  bool look_at(int64_t row, int64_t i, Best<F>& best) const {
    const F bias_difference = bias(i) - own.bias(row);
    const Boundary<F> found = boundary(weight(i), own.weight(row), mu(row), bias_difference, dim);
    if (found.distance != F(0)) best.consider(found.score, int32_t(i));
    return found.distance != F(0);
  }

  std::vector<Best<F> > run() const;
};

template <class T, class F>
std::vector<Best<F> > look_at_all(const Search<T, F>& search) {
  std::vector<Best<F> > best(search.present, Best<F>::none());
  for (int64_t row = 0; row < search.present; ++row) {
    for (int64_t i = 0; i < search.num_classes; ++i) {
      if (i != search.own.index(row)) search.look_at(row, i, best[row]);
    }
  }
  return best;
}

// W_i for one panel of classes, by columns, and what bounds their scores.
template <class F>
struct Panel {
  static constexpr int columns = Tile<F>::columns;
  int64_t first;
  int size;
  Lines<F> data;  // (dim, columns)
  F square[columns], norm[columns], bias[columns], rest[Cuts::count][columns];

  const F* at(int64_t d) const { return data[0].values + d * columns; }

  template <class T>
  void pack(const Search<T, F>& search, int64_t begin_class) {
    first = begin_class;
    size = int(std::min<int64_t>(columns, search.num_classes - first));
    if (!data) data = lines<F>(search.dim * columns);
    F* const packed = data[0].values;
    constexpr int64_t block = 16;  // columns that stay in the first cache while all rows are written to them
    for (int64_t begin = 0; begin < search.dim; begin += block) {
      const int64_t end = std::min(begin + block, search.dim);
      for (int i = 0; i < columns; ++i) {
        const T* w = search.weight(first + std::min(i, size - 1));
        for (int64_t d = begin; d < end; ++d) packed[d * columns + i] = F(to_float(w[d]));
      }
    }
    for (int i = 0; i < columns; ++i) {
      const int64_t c = first + std::min(i, size - 1);
      const Norms<F> norms = Norms<F>::of(search.weight(c), search.cuts, search.dim, search.bias(c));
      square[i] = norms.square;
      norm[i] = norms.norm;
      for (int k = 0; k < Cuts::count; ++k) rest[k][i] = norms.rest[k];
      bias[i] = search.bias(c);
    }
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

// More than the logit of a row's pair with class i of a panel, less that of its own class.
template <class F>
RF_INLINE F bound(const Panel<F>& panel, const Row<F>& row, int i, F logit, const Target<F>& target) {
  const F error = target.slack * (row.mu * (panel.norm[i] + row.own.norm) + std::abs(panel.bias[i]) + row.own.bias);
  return logit + panel.bias[i] - row.own_logit + (error + target.tiny);
}

// Which pairs of one row with a panel may beat the target: possible[i], 0 or 1, and how many they are.
// `product` is W_i . W_c over some columns, `rest_c` the norm of W_c over the others, `rests` that of each W_i.
template <class F>
int find_possible(const Panel<F>& panel, const Row<F>& row, const Target<F>& target, const F* logit, const F* product,
                  F rest_c, const F* rests, IntegerOf<F>* possible) {
  const Target<F> t = target;
  IntegerOf<F> count = 0;
#pragma omp simd reduction(+ : count)
  for (int i = 0; i < Panel<F>::columns; ++i) {
    const F above = bound(panel, row, i, logit[i], t);
    possible[i] = !t.out_of_reach(above, panel.square[i] + row.own.square, product[i], rests[i] * rest_c);
    count += possible[i];
  }
  return int(count);
}

// The search by bounds, with what it needs of each row, packed once for all panels.
template <class T, class F>
struct BoundedSearch {
  const Search<T, F>& search;
  PackedRows<F> mu, head;  // mu_c, and W_c up to the first cut
  std::vector<Row<F> > rows;

  explicit BoundedSearch(const Search<T, F>& search)
      : search(search), mu(search.present, search.dim), head(search.present, search.head), rows(search.present) {
    const bool level =
        std::all_of(search.biases.begin(), search.biases.end(), [&](F bias) { return bias == search.biases[0]; });
    parallel_for(0, mu.tiles, 1 + 4096 / std::max<int64_t>(1, search.dim), [&](int64_t from, int64_t to) {
      for (int64_t tile = from; tile < to; ++tile) prepare(tile, level);
    });
  }

  void prepare(int64_t tile, bool level) {
    const int64_t first = tile * Tile<F>::rows, dim = search.dim;
    for (int64_t row = first; row < first + mu.rows_of(tile); ++row) {
      const F *w_c = search.own.weight(row), *mu_c = search.mu(row), bias = search.own.bias(row);
      rows[row] = {search.own.index(row), dot(w_c, mu_c, dim) + bias,
                   std::sqrt(square_norm<F>(mu_c, 0, dim) + search.tiny),
                   level && bias == search.bias(0) && std::all_of(mu_c, mu_c + dim, [](F x) { return x == F(0); }),
                   Norms<F>::of(w_c, search.cuts, dim, bias)};
    }
    mu.pack(tile, [&](int r) { return search.mu(first + r); });
    head.pack(tile, [&](int r) { return search.own.weight(first + r); });
  }

  void look_in_panels(int64_t from, int64_t to, Best<F>* best) const;
  void look_in_tile(int64_t tile, const Panel<F>& panel, const F* logits, F* products, F* rest, Best<F>* best,
                    Twins& twins) const;
  void look_at_highest(int64_t tile, const std::vector<Panel<F> >& panels, const F* logits, Best<F>* best) const;
  bool can_win(int64_t row, const Panel<F>& panel, int i, F logit, F product, const Best<F>& best) const;
};

// Looks at the pair with the highest logit of each row of a tile; should that be the class itself, at the next one.
template <class T, class F>
void BoundedSearch<T, F>::look_at_highest(int64_t tile, const std::vector<Panel<F> >& panels, const F* logits,
                                          Best<F>* best) const {
  constexpr int columns = Tile<F>::columns;
  const int64_t row = tile * Tile<F>::rows;
  for (int r = 0; r < mu.rows_of(tile); ++r) {
    int64_t highest[2] = {-1, -1};
    F most[2] = {0, 0};
    for (size_t p = 0; p < panels.size(); ++p) {
      const F* logit = logits + (p * Tile<F>::rows + r) * columns;
      for (int i = 0; i < panels[p].size; ++i) {
        const F value = logit[i] + panels[p].bias[i];
        if ((highest[1] >= 0 && !(value > most[1])) || panels[p].first + i == rows[row + r].c) continue;
        highest[1] = panels[p].first + i;
        most[1] = value;
        if (highest[0] >= 0 && !(value > most[0])) continue;
        std::swap(highest[0], highest[1]);
        std::swap(most[0], most[1]);
      }
    }
    for (int k = 0; k < 2 && highest[k] >= 0 && best[row + r].winner < 0; ++k) {
      search.look_at(row + r, highest[k], best[row + r]);
    }
  }
}

// Whether a pair can still win when its second product, so far up to the first cut, is taken up to the others.
template <class T, class F>
bool BoundedSearch<T, F>::can_win(int64_t row, const Panel<F>& panel, int i, F logit, F product,
                                  const Best<F>& best) const {
  const Row<F>& known = rows[row];
  const Target<F> target(best, search.slack, search.tiny);
  const F above = bound(panel, known, i, logit, target), sum = panel.square[i] + known.own.square;
  const T* w_i = search.weight(panel.first + i);
  const F* w_c = search.own.weight(row);
  for (int k = 1; k < Cuts::count; ++k) {
    const int64_t from = search.cuts.at[k - 1], to = search.cuts.at[k];
    product += dot(w_i + from, w_c + from, to - from);
    if (target.out_of_reach(above, sum, product, panel.rest[k][i] * known.own.rest[k])) return false;
  }
  return true;
}

// out(tile, panel, row, column) for tiles [tile, end_tile).
template <class F>
void multiply_block(const PackedRows<F>& rows, int64_t tile, int64_t end_tile, const std::vector<Panel<F> >& panels,
                    F* out) {
  constexpr int64_t tile_size = Tile<F>::rows * Tile<F>::columns;
  constexpr int64_t share = Tile<F>::depth * (Tile<F>::columns / Tile<F>::tiles_of_block);  // of what is ahead
  std::fill(out, out + (end_tile - tile) * panels.size() * tile_size, F(0));
  for (int64_t d = 0; d < rows.columns; d += Tile<F>::depth) {
    const int64_t depth = std::min(Tile<F>::depth, rows.columns - d);
    for (size_t p = 0; p < panels.size(); ++p) {
      const F* ahead = p + 1 < panels.size() ? panels[p + 1].at(d) : panels[0].at(d + depth);
      for (int64_t t = tile; t < end_tile; ++t, ahead += share) {
        F* const sums = out + ((t - tile) * panels.size() + p) * tile_size;
        multiply(rows.slice(t, d), panels[p].at(d), depth, sums, ahead);
      }
    }
  }
}

// Looks at the pairs of a tile's rows with a panel that can win. `rest` is space for (dim - head, Tile::rows).
template <class T, class F>
void BoundedSearch<T, F>::look_in_tile(int64_t tile, const Panel<F>& panel, const F* logits, F* products, F* rest,
                                       Best<F>* best, Twins& twins) const {
  constexpr int columns = Tile<F>::columns, few = columns / 5;
  static constexpr F none[columns] = {};
  const int64_t row = tile * Tile<F>::rows, begin = search.head;
  const int size = mu.rows_of(tile);
  IntegerOf<F> possible[Tile<F>::rows][columns];
  int counts[Tile<F>::rows], count = 0;
  const auto find = [&](int r, F rest_c, const F* rests) RF_TARGET_LAMBDA {
    const Target<F> target(best[row + r], search.slack, search.tiny);
    counts[r] = find_possible(panel, rows[row + r], target, logits + r * columns, products + r * columns, rest_c, rests,
                              possible[r]);
    count += counts[r];
  };
  for (int r = 0; r < size; ++r) find(r, rows[row + r].own.rest[0], panel.rest[0]);
  const bool whole = count > few * size && begin < search.dim;
  if (whole) {
    pack_tile(size, begin, search.dim, [&](int r) { return search.own.weight(row + r); }, rest);
    multiply(rest, panel.at(begin), search.dim - begin, products, rest);
  }
  for (int r = 0; r < size; ++r) {
    const Row<F>& known = rows[row + r];
    Best<F>& found = best[row + r];
    if (whole) find(r, F(0), none);
    for (int i = 0; counts[r] > 0 && i < panel.size; ++i) {
      if (!possible[r][i]) continue;
      --counts[r];
      const int64_t c = panel.first + i;
      if (c == known.c || twins.known(row + r, c)) continue;
      // Where no score beats another the lowest index wins.
      if ((known.level || std::isnan(found.score)) && found.winner >= 0 && c > found.winner) continue;
      const int at = r * columns + i;
      if (!whole && !can_win(row + r, panel, i, logits[at], products[at], found)) continue;
      if (!search.look_at(row + r, c, found)) twins.add(row + r, c);
    }
  }
}

template <class T, class F>
void BoundedSearch<T, F>::look_in_panels(int64_t from, int64_t to, Best<F>* best) const {
  using Size = Tile<F>;
  constexpr int64_t tile_size = Size::rows * Size::columns;
  constexpr int64_t block_size = Size::tiles_of_block * Size::panels_of_group * tile_size;
  const Lines<F> space = lines<F>(2 * block_size), rest = lines<F>((search.dim - search.head) * Size::rows);
  F *const logits = space[0].values, *const products = logits + block_size;
  std::vector<Panel<F> > panels;
  Twins twins(search.num_classes, search.present);
  for (int64_t p = from; p < to; p += panels.size()) {
    panels.resize(std::min<int64_t>(Size::panels_of_group, to - p));
    for (size_t k = 0; k < panels.size(); ++k) panels[k].pack(search, (p + k) * Size::columns);
    for (int64_t tile = 0; tile < mu.tiles; tile += Size::tiles_of_block) {
      const int64_t end_tile = std::min<int64_t>(tile + Size::tiles_of_block, mu.tiles);
      multiply_block(mu, tile, end_tile, panels, logits);
      multiply_block(head, tile, end_tile, panels, products);
      for (int64_t t = tile; t < end_tile; ++t) {
        const int64_t at = (t - tile) * panels.size() * tile_size;
        // Without a good score to beat, most of the first pairs would seem possible.
        if (p == from) look_at_highest(t, panels, logits + at, best);
        for (size_t k = 0; k < panels.size(); ++k) {
          look_in_tile(t, panels[k], logits + at + k * tile_size, products + at + k * tile_size, rest[0].values, best,
                       twins);
        }
      }
    }
  }
}

// What the search finds for each row.
template <class T, class F>
std::vector<Best<F> > Search<T, F>::run() const {
  if (present * num_classes <= 1024) return look_at_all(*this);
  const BoundedSearch<T, F> bounded(*this);
  std::vector<Best<F> > best(present, Best<F>::none());
  const int64_t panels = (num_classes + Tile<F>::columns - 1) / Tile<F>::columns;
  const int64_t tasks = std::min<int64_t>(panels, num_threads());
  std::vector<std::vector<Best<F> > > found(tasks, best);
  parallel_for(0, tasks, 1, [&](int64_t from, int64_t to) {
    for (int64_t t = from; t < to; ++t) {
      bounded.look_in_panels(t * panels / tasks, (t + 1) * panels / tasks, found[t].data());
    }
  });
  for (const std::vector<Best<F> >& part : found) {
    for (int64_t row = 0; row < present; ++row) best[row].consider(part[row].score, part[row].winner);
  }
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
