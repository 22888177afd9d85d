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
#include "cpu/loss.h"
//
#include "cpu/each_isa.h"

namespace robustfast {

template <class Wide>
void margin_search(const Wide* mu, const Matrix& weight, const Matrix& bias, const int32_t* classes, int64_t rows,
                   int64_t dim, int64_t num_classes, Wide* score, int32_t* winner) {
  RF_DISPATCH(margin_search, mu, weight, bias, classes, rows, dim, num_classes, score, winner);
}
template void margin_search(const float*, const Matrix&, const Matrix&, const int32_t*, int64_t, int64_t, int64_t,
                            float*, int32_t*);
template void margin_search(const double*, const Matrix&, const Matrix&, const int32_t*, int64_t, int64_t, int64_t,
                            double*, int32_t*);

}  // namespace robustfast

#else

#include "cpu/boundary.h"

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
};

// out[r][i] += sum over d in [begin, end) of left[r][d] * panel[d][i]
template <class F>
void multiply(const F* const* left, const F* panel, int64_t begin, int64_t end, F* out) {
  using Vector = typename Tile<F>::Vector;
  constexpr int rows = Tile<F>::rows, vectors = Tile<F>::vectors, columns = Tile<F>::columns;
  // Vector by vector, never as an array: an array whose address is taken is kept in memory.
  Vector sums[rows][vectors];
  const F* row[rows];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
    row[r] = left[r];
#pragma GCC unroll 3
    for (int v = 0; v < vectors; ++v) sums[r][v] = *reinterpret_cast<Vector*>(out + r * columns + v * Tile<F>::lanes);
  }
  for (int64_t d = begin; d < end; ++d) {
    Vector column[vectors];
#pragma GCC unroll 3
    for (int v = 0; v < vectors; ++v) {
      column[v] = *reinterpret_cast<const Vector*>(panel + d * columns + v * Tile<F>::lanes);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 3
      for (int v = 0; v < vectors; ++v) sums[r][v] += row[r][d] * column[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < vectors; ++v) *reinterpret_cast<Vector*>(out + r * columns + v * Tile<F>::lanes) = sums[r][v];
  }
}

template <class T, class F>
F dot(const T* x, const F* y, int64_t size) {
  F total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t d = 0; d < size; ++d) total += F(to_float(x[d])) * y[d];
  return total;
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

// What the bounds take of a row of W. Norms are upper bounds.
template <class F>
struct Norms {
  F square, norm, rest, bias;  // ||W_i||^2, ||W_i||, the norm of its columns from `head` on, |b_i|

  template <class T>
  static Norms of(const T* w, int64_t head, int64_t dim, F bias) {
    const F tail = square_norm<F>(w, head, dim), square = square_norm<F>(w, 0, head) + tail;
    return {square, std::sqrt(square + underflow<F>(dim)), std::sqrt(tail + underflow<F>(dim)), std::abs(bias)};
  }
};

// What the search knows of a row and its class c.
template <class F>
struct Row {
  int32_t c;
  F own_logit;  // W_c . mu_c + b_c
  F mu;         // ||mu_c||
  Norms<F> own;
};

template <class F>
struct Panel;

template <class T, class F>
struct Search {
  const F* mus;
  Matrix weights;
  const int32_t* classes;
  int64_t present, dim, num_classes;
  int64_t head;              // columns of the second product that are computed for every pair
  F slack, tiny;             // bounds of the error of a dot product, and of what is made of it here: relative, absolute
  std::vector<F> biases;     // in F; none if there is no bias
  std::vector<F> wide_rows;  // W_c in F, where W is narrower
  std::vector<Row<F> > rows;

  Search(const F* mu, const Matrix& weight, const Matrix& bias, const int32_t* classes, int64_t present, int64_t dim,
         int64_t num_classes)
      : mus(mu),
        weights(weight),
        classes(classes),
        present(present),
        dim(dim),
        num_classes(num_classes),
        head(dim < 64 ? dim : dim / 4),
        slack(F(dim + 16) * std::numeric_limits<F>::epsilon()),
        tiny(underflow<F>(dim)),
        biases(bias ? num_classes : 0),
        wide_rows(std::is_same_v<T, F> ? 0 : present * dim),
        rows(present) {
    if (bias) {
      visit(bias.dtype, [&](auto zero) {
        for (int64_t i = 0; i < num_classes; ++i) biases[i] = F(to_float(*bias.row<decltype(zero)>(i)));
      });
    }
    parallel_for(0, present, 1 + 32768 / std::max<int64_t>(1, dim), [&](int64_t from, int64_t to) {
      for (int64_t row = from; row < to; ++row) prepare(row);
    });
  }

  const T* weight(int64_t i) const { return weights.template row<T>(i); }
  F bias(int64_t i) const { return biases.empty() ? F(0) : biases[i]; }
  const F* mu(int64_t row) const { return mus + row * dim; }
  const F* wide_row(int64_t row) const {
    if constexpr (std::is_same_v<T, F>) {
      return weight(classes[row]);
    } else {
      return &wide_rows[row * dim];
    }
  }

  void prepare(int64_t row) {
    const int32_t c = classes[row];
    const T* w = weight(c);
    if constexpr (!std::is_same_v<T, F>) {
      for (int64_t d = 0; d < dim; ++d) wide_rows[row * dim + d] = F(to_float(w[d]));
    }
    rows[row] = {c, dot(w, mu(row), dim) + bias(c), std::sqrt(square_norm<F>(mu(row), 0, dim) + underflow<F>(dim)),
                 Norms<F>::of(w, head, dim, bias(c))};
  }

  // The pair's score, computed directly: what the rounding of the products hides, the difference of the rows shows.
  void look_at(int64_t row, int64_t i, Best<F>& best) const {
    const F bias_difference = bias(i) - bias(rows[row].c);
    const Boundary<F> found = boundary(weight(i), wide_row(row), mu(row), bias_difference, dim);
    if (found.distance != F(0)) best.consider(found.score, int32_t(i));  // no boundary between equal rows
  }

  void look_at_all(Best<F>* best) const {
    for (int64_t row = 0; row < present; ++row) {
      for (int64_t i = 0; i < num_classes; ++i) {
        if (i != rows[row].c) look_at(row, i, best[row]);
      }
    }
  }

  void look_in_panels(int64_t from, int64_t to, Best<F>* best) const;
  void look_at_highest(int64_t row, const Panel<F>& panel, const F* logit, Best<F>& best) const;
  std::vector<Best<F> > run() const;
};

// W_i for one panel of classes, by columns, and what bounds their scores.
template <class F>
struct Panel {
  static constexpr int columns = Tile<F>::columns;
  int64_t first;
  int size;
  std::vector<F> data;  // (dim, columns)
  F square[columns], norm[columns], rest[columns], bias[columns];

  template <class T>
  void pack(const Search<T, F>& search, int64_t at) {
    first = at;
    size = int(std::min<int64_t>(columns, search.num_classes - first));
    data.resize(search.dim * columns);
    constexpr int64_t block = 16;  // columns that stay in the first cache while all rows are written to them
    for (int64_t begin = 0; begin < search.dim; begin += block) {
      const int64_t end = std::min(begin + block, search.dim);
      for (int i = 0; i < columns; ++i) {
        const T* w = search.weight(first + std::min(i, size - 1));
        for (int64_t d = begin; d < end; ++d) data[d * columns + i] = F(to_float(w[d]));
      }
    }
    for (int i = 0; i < columns; ++i) {
      const int64_t c = first + std::min(i, size - 1);
      const Norms<F> norms = Norms<F>::of(search.weight(c), search.head, search.dim, search.bias(c));
      square[i] = norms.square;
      norm[i] = norms.norm;
      rest[i] = norms.rest;
      bias[i] = search.bias(c);
    }
  }
};

// Which pairs of one row with a panel may beat `best`: possible[i], and how many they are.
// `product` is W_i . W_c over some columns, `rest_c` the norm of W_c over the others, `rests` that of each W_i.
template <class F>
int find_possible(const Panel<F>& panel, const Row<F>& row, const F* logit, const F* product, F rest_c, const F* rests,
                  F slack, F tiny, const Best<F>& best, int8_t* possible) {
  constexpr F infinity = std::numeric_limits<F>::infinity();
  const F score = best.score;
  const bool is_nan = std::isnan(score);
  const int lower = int(std::clamp<int64_t>(best.winner - panel.first, 0, Panel<F>::columns));  // these win a tie
  int count = 0;
#pragma omp simd reduction(+ : count)
  for (int i = 0; i < Panel<F>::columns; ++i) {
    const F error = slack * (row.mu * (panel.norm[i] + row.own.norm) + std::abs(panel.bias[i]) + row.own.bias);
    const F above = logit[i] + panel.bias[i] - row.own_logit + (error + tiny);
    const F sum = panel.square[i] + row.own.square, spread = slack * sum + tiny;
    const F least = std::max(sum - F(2) * (product[i] + rests[i] * rest_c) - spread, F(0));
    const F most = std::max(sum - F(2) * (product[i] - rests[i] * rest_c) + spread, F(0));
    // The best that the pair can do is above / distance, with the distance that flatters it most.
    const F needed = score * std::sqrt(score < F(0) ? most : least);
    const bool beaten = i < lower ? above < needed : is_nan | ((above <= needed) & (needed < infinity));
    possible[i] = !beaten;
    count += possible[i];
  }
  return count;
}

template <class T, class F>
void Search<T, F>::look_at_highest(int64_t row, const Panel<F>& panel, const F* logit, Best<F>& best) const {
  int highest = -1;
  for (int i = 0; i < panel.size; ++i) {
    const bool higher = highest < 0 || logit[i] + panel.bias[i] > logit[highest] + panel.bias[highest];
    if (higher && panel.first + i != rows[row].c) highest = i;
  }
  if (highest >= 0) look_at(row, panel.first + highest, best);
}

template <class T, class F>
void Search<T, F>::look_in_panels(int64_t from, int64_t to, Best<F>* best) const {
  constexpr int tile_rows = Tile<F>::rows, columns = Tile<F>::columns;
  constexpr int few = columns / 8;
  alignas(64) F logits[tile_rows * columns], products[tile_rows * columns], none[columns] = {};
  int8_t possible[tile_rows][columns];
  Panel<F> panel;
  for (int64_t p = from; p < to; ++p) {
    panel.pack(*this, p * columns);
    for (int64_t row = 0; row < present; row += tile_rows) {
      const int size = int(std::min<int64_t>(tile_rows, present - row));
      const F *mus[tile_rows], *w[tile_rows];
      for (int r = 0; r < tile_rows; ++r) {
        mus[r] = mu(row + std::min(r, size - 1));
        w[r] = wide_row(row + std::min(r, size - 1));
      }
      std::fill(logits, logits + tile_rows * columns, F(0));
      std::fill(products, products + tile_rows * columns, F(0));
      multiply(mus, panel.data.data(), 0, dim, logits);
      multiply(w, panel.data.data(), 0, head, products);
      int count = 0;
      for (int r = 0; r < size; ++r) {
        const Row<F>& known = rows[row + r];
        // Without a good score to beat, all of the first panel would seem possible.
        if (p == from) look_at_highest(row + r, panel, logits + r * columns, best[row + r]);
        count += find_possible(panel, known, logits + r * columns, products + r * columns, known.own.rest, panel.rest,
                               slack, tiny, best[row + r], possible[r]);
      }
      const bool whole = count > few * size && head < dim;
      if (whole) multiply(w, panel.data.data(), head, dim, products);
      for (int r = 0; r < size && count > 0; ++r) {
        const Row<F>& known = rows[row + r];
        Best<F>& found = best[row + r];
        if (whole) {
          find_possible(panel, known, logits + r * columns, products + r * columns, F(0), none, slack, tiny, found,
                        possible[r]);
        }
        for (int i = 0; i < panel.size; ++i) {
          if (possible[r][i] && panel.first + i != known.c) look_at(row + r, panel.first + i, found);
        }
      }
    }
  }
}

// What the search finds for each row.
template <class T, class F>
std::vector<Best<F> > Search<T, F>::run() const {
  std::vector<Best<F> > best(present, Best<F>::none());
  if (present * num_classes <= 1024) {
    look_at_all(best.data());
    return best;
  }
  const int64_t panels = (num_classes + Tile<F>::columns - 1) / Tile<F>::columns;
  const int64_t tasks = std::min<int64_t>(panels, num_threads());
  std::vector<std::vector<Best<F> > > found(tasks, best);
  parallel_for(0, tasks, 1, [&](int64_t from, int64_t to) {
    for (int64_t t = from; t < to; ++t) {
      look_in_panels(t * panels / tasks, (t + 1) * panels / tasks, found[t].data());
    }
  });
  for (const std::vector<Best<F> >& part : found) {
    for (int64_t row = 0; row < present; ++row) best[row].consider(part[row].score, part[row].winner);
  }
  return best;
}

template <class Wide>
void margin_search(const Wide* mu, const Matrix& weight, const Matrix& bias, const int32_t* classes, int64_t rows,
                   int64_t dim, int64_t num_classes, Wide* score, int32_t* winner) {
  visit(weight.dtype, [&](auto zero) {
    const Search<decltype(zero), Wide> search(mu, weight, bias, classes, rows, dim, num_classes);
    const std::vector<Best<Wide> > best = search.run();
    for (int64_t row = 0; row < rows; ++row) {
      score[row] = best[row].score;
      winner[row] = best[row].winner;
    }
  });
}

}  // namespace RF_ISA
}  // namespace robustfast

#endif
