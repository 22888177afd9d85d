// The margin: for each class c of the batch, the class i whose boundary with c scores highest,
//   ((W_i - W_c) . mu_c + b_i - b_c) / ||W_i - W_c||.
//
// Both products, W_i . mu_c and W_i . W_c, come from one pass over W in tiles. Most pairs cannot win, and that shows
// before their distance is known: the second product is taken over the first columns only, the rest of it bounded by
// Cauchy-Schwarz, and with it the score. Pairs that can win are looked at one by one, with the distance computed
// directly. The bounds include the rounding of the products, so the winner is that of a look at every pair.
#ifndef RF_ISA

#define RF_KERNEL "cpu/margin.cpp"
#include "common/loss.h"
#include "cpu/loss.h"
//
#include "cpu/each_isa.h"

namespace robustfast {

template <class Wide>
Wide margin(const Loss<Wide>& loss) {
  RF_DISPATCH(margin, loss);
}
template float margin(const Loss<float>&);
template double margin(const Loss<double>&);

template <class Wide>
void margin_backward(const LossGrads<Wide>& grads, const Output& grad_weight, const Output& grad_bias) {
  RF_DISPATCH(margin_backward, grads, grad_weight, grad_bias);
}
template void margin_backward(const LossGrads<float>&, const Output&, const Output&);
template void margin_backward(const LossGrads<double>&, const Output&, const Output&);

}  // namespace robustfast

#else

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

template <class F>
struct Best {
  F score;
  int32_t winner;
};

// What the search knows of the class c of a row.
template <class F>
struct Own {
  int32_t c;
  F logit;         // W_c . mu_c + b_c
  F square, rest;  // ||W_c||^2, and the norm of its columns from `head` on
  F mu;            // ||mu_c||
  F bias;          // |b_c|
};

template <class F>
struct Panel;

template <class T, class F>
struct Search {
  const Loss<F>& loss;
  int64_t dim, classes, rows;
  int64_t head;              // columns of the second product that are computed for every pair
  F slack;                   // bound of the relative rounding error of a dot product, and of what is made of it here
  std::vector<F> wide_rows;  // W_c in F, where W is narrower
  std::vector<Own<F> > own;

  explicit Search(const Loss<F>& loss)
      : loss(loss),
        dim(loss.dim),
        classes(loss.num_classes),
        rows(loss.groups->rows()),
        head(dim < 64 ? dim : dim / 4),
        slack(F(dim + 16) * std::numeric_limits<F>::epsilon()),
        wide_rows(std::is_same_v<T, F> ? 0 : rows * dim),
        own(rows) {
    parallel_for(0, rows, 1 + 32768 / dim, [&](int64_t from, int64_t to) {
      for (int64_t row = from; row < to; ++row) prepare(row);
    });
  }

  const T* weight(int64_t i) const { return loss.weight.template row<T>(i); }
  F bias(int64_t i) const {
    if (!loss.bias) return F(0);
    return visit(loss.bias.dtype, [&](auto zero) { return F(to_float(*loss.bias.template row<decltype(zero)>(i))); });
  }
  const F* mu(int64_t row) const { return loss.boundary_grad + row * dim; }
  const F* wide_row(int64_t row) const {
    if constexpr (std::is_same_v<T, F>) {
      return weight(loss.classes[row]);
    } else {
      return &wide_rows[row * dim];
    }
  }

  void prepare(int64_t row) {
    const int32_t c = loss.classes[row];
    const T* w = weight(c);
    if constexpr (!std::is_same_v<T, F>) {
      for (int64_t d = 0; d < dim; ++d) wide_rows[row * dim + d] = F(to_float(w[d]));
    }
    const F tail = square_norm<F>(w, head, dim), square = square_norm<F>(w, 0, head) + tail;
    own[row] = {c,
                dot(w, mu(row), dim) + bias(c),
                square,
                std::sqrt(tail),
                std::sqrt(square_norm<F>(mu(row), 0, dim)),
                std::abs(bias(c))};
  }

  // The pair's score, computed directly: what the rounding of the products hides, the difference of the rows shows.
  void look_at(int64_t row, int64_t i, Best<F>& best) const {
    const T* w_i = weight(i);
    const F *w_c = wide_row(row), *m = mu(row);
    F logit = 0, square = 0;
#pragma omp simd reduction(+ : logit, square)
    for (int64_t d = 0; d < dim; ++d) {
      const F difference = F(to_float(w_i[d])) - w_c[d];
      logit += difference * m[d];
      square += difference * difference;
    }
    if (square == 0) return;  // no boundary between equal rows
    const F score = (logit + (bias(i) - bias(own[row].c))) / std::sqrt(square);
    if (score > best.score || std::isnan(score)) best = {score, int32_t(i)};
  }

  void look_at_all(Best<F>* best) const {
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t i = 0; i < classes && !std::isnan(best[row].score); ++i) {
        if (i != own[row].c) look_at(row, i, best[row]);
      }
    }
  }

  void look_in_panels(int64_t from, int64_t to, Best<F>* best) const;
  void look_at_highest(int64_t row, const Panel<F>& panel, const F* logit, Best<F>& best) const;
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
    size = int(std::min<int64_t>(columns, search.classes - first));
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
      const T* w = search.weight(first + std::min(i, size - 1));
      const F tail = square_norm<F>(w, search.head, search.dim);
      square[i] = square_norm<F>(w, 0, search.head) + tail;
      norm[i] = std::sqrt(square[i]);
      rest[i] = std::sqrt(tail);
      bias[i] = search.bias(first + std::min(i, size - 1));
    }
  }
};

// Which pairs of one row with a panel may score above `best`: possible[i], and how many they are.
// `product` is W_i . W_c over some columns, `rest_c` the norm of W_c over the others, `rests` that of each W_i.
template <class F>
int find_possible(const Panel<F>& panel, const Own<F>& own, const F* logit, const F* product, F rest_c, const F* rests,
                  F slack, F best, int8_t* possible) {
  const F norm_c = std::sqrt(own.square);
  int count = 0;
#pragma omp simd reduction(+ : count)
  for (int i = 0; i < Panel<F>::columns; ++i) {
    const F error = slack * (own.mu * (panel.norm[i] + norm_c) + std::abs(panel.bias[i]) + own.bias);
    const F above = logit[i] + panel.bias[i] - own.logit + error;
    const F sum = panel.square[i] + own.square;
    const F least = std::max(sum - F(2) * (product[i] + rests[i] * rest_c) - slack * sum, F(0));
    const F most = std::max(sum - F(2) * (product[i] - rests[i] * rest_c) + slack * sum, F(0));
    // The best that the pair can do is above / distance, with the distance that flatters it most.
    const F needed = best * std::sqrt(best < F(0) ? most : least);
    possible[i] = !(above <= needed);
    count += possible[i];
  }
  return count;
}

template <class T, class F>
void Search<T, F>::look_at_highest(int64_t row, const Panel<F>& panel, const F* logit, Best<F>& best) const {
  int highest = -1;
  for (int i = 0; i < panel.size; ++i) {
    const bool higher = highest < 0 || logit[i] + panel.bias[i] > logit[highest] + panel.bias[highest];
    if (higher && panel.first + i != own[row].c) highest = i;
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
    for (int64_t row = 0; row < rows; row += tile_rows) {
      const int size = int(std::min<int64_t>(tile_rows, rows - row));
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
        const Own<F>& c = own[row + r];
        // Without a good score to beat, all of the first panel would seem possible.
        if (p == from) look_at_highest(row + r, panel, logits + r * columns, best[row + r]);
        count += find_possible(panel, c, logits + r * columns, products + r * columns, c.rest, panel.rest, slack,
                               best[row + r].score, possible[r]);
      }
      const bool whole = count > few * size && head < dim;
      if (whole) multiply(w, panel.data.data(), head, dim, products);
      for (int r = 0; r < size && count > 0; ++r) {
        const Own<F>& c = own[row + r];
        Best<F>& found = best[row + r];
        if (whole) {
          find_possible(panel, c, logits + r * columns, products + r * columns, F(0), none, slack, found.score,
                        possible[r]);
        }
        for (int i = 0; i < panel.size && !std::isnan(found.score); ++i) {
          if (possible[r][i] && panel.first + i != c.c) look_at(row + r, panel.first + i, found);
        }
      }
    }
  }
}

// The winner of each row, -1 where none scores above -delta_dist.
template <class T, class F>
std::vector<Best<F> > nearest_boundaries(const Search<T, F>& search) {
  const Best<F> none = {F(-search.loss.settings.delta_dist), -1};
  std::vector<Best<F> > best(search.rows, none);
  if (search.rows * search.classes <= 1024) {
    search.look_at_all(best.data());
    return best;
  }
  const int64_t panels = (search.classes + Tile<F>::columns - 1) / Tile<F>::columns;
  const int64_t tasks = std::min<int64_t>(panels, num_threads());
  std::vector<std::vector<Best<F> > > found(tasks, best);
  parallel_for(0, tasks, 1, [&](int64_t from, int64_t to) {
    for (int64_t t = from; t < to; ++t) {
      search.look_in_panels(t * panels / tasks, (t + 1) * panels / tasks, found[t].data());
    }
  });
  for (const std::vector<Best<F> >& part : found) {
    for (int64_t row = 0; row < search.rows; ++row) {
      if (part[row].score > best[row].score || std::isnan(part[row].score)) best[row] = part[row];
    }
  }
  return best;
}

// From the winner, the gradients of beta/P * (delta_d + score): of W_i in boundary_grad, of b_i in boundary_bias, and
// that of mu_c is added to center_grad, which is then shared among the class's samples.
template <class T, class F>
void finish_row(const Search<T, F>& search, int64_t row, const Best<F>& best) {
  const Loss<F>& loss = search.loss;
  const int64_t dim = loss.dim;
  F *mu = loss.boundary_grad + row * dim, *center_grad = loss.center_grad + row * dim;
  const F share = F(1) / F(loss.groups->count(row));
  loss.winner[row] = best.winner;
  loss.boundary_bias[row] = 0;
  if (best.winner < 0) {
    for (int64_t d = 0; d < dim; ++d) center_grad[d] *= share;
    std::fill(mu, mu + dim, F(0));
    return;
  }
  const T* w_i = search.weight(best.winner);
  const F* w_c = search.wide_row(row);
  F square = 0;
#pragma omp simd reduction(+ : square)
  for (int64_t d = 0; d < dim; ++d) {
    const F difference = F(to_float(w_i[d])) - w_c[d];
    square += difference * difference;
  }
  const F inverse = F(1) / std::sqrt(square), weight = F(loss.settings.beta) / F(search.rows);
  for (int64_t d = 0; d < dim; ++d) {
    const F normal = (F(to_float(w_i[d])) - w_c[d]) * inverse;
    center_grad[d] = (center_grad[d] + weight * normal) * share;
    mu[d] = weight * inverse * (mu[d] - best.score * normal);
  }
  loss.boundary_bias[row] = weight * inverse;
}

template <class Wide>
Wide margin(const Loss<Wide>& loss) {
  Wide total = 0;
  visit(loss.weight.dtype, [&](auto type) {
    const Search<decltype(type), Wide> search(loss);
    const std::vector<Best<Wide> > best = nearest_boundaries(search);
    parallel_for(0, search.rows, 1 + 32768 / loss.dim, [&](int64_t from, int64_t to) {
      for (int64_t row = from; row < to; ++row) finish_row(search, row, best[row]);
    });
    for (const Best<Wide>& b : best) total += hinge(Wide(loss.settings.delta_dist) + b.score);
    total /= Wide(std::max<int64_t>(1, search.rows));
  });
  return total;
}

// One row's part in the gradient of one class's weight.
struct Share {
  int32_t destination, row, sign;
};

template <class F>
std::vector<Share> shares_by_class(const LossGrads<F>& grads) {
  std::vector<Share> shares;
  for (int32_t row = 0; row < grads.rows; ++row) {
    if (grads.classes[row] < 0 || grads.winner[row] < 0) continue;
    shares.push_back({grads.winner[row], row, 1});
    shares.push_back({grads.classes[row], row, -1});
  }
  std::stable_sort(shares.begin(), shares.end(),
                   [](const Share& a, const Share& b) { return a.destination < b.destination; });
  return shares;
}

template <class F>
void add_scaled(const F* x, F factor, int64_t dim, F* sum) {
  for (int64_t d = 0; d < dim; ++d) sum[d] += factor * x[d];
}

template <class T, class F>
void narrow(const F* x, int64_t dim, T* y) {
  for (int64_t d = 0; d < dim; ++d) y[d] = from_float<T>(x[d]);
}

template <class T, class F>
void weight_backward(const LossGrads<F>& grads, const std::vector<Share>& shares, T* grad) {
  const int64_t dim = grads.dim;
  parallel_for(0, grads.num_classes, 1 + 32768 / dim, [&](int64_t from, int64_t to) {
    auto share = std::lower_bound(shares.begin(), shares.end(), from,
                                  [](const Share& a, int64_t c) { return a.destination < c; });
    std::vector<F> sum(dim);
    for (int64_t c = from; c < to; ++c) {
      if (share == shares.end() || share->destination != c) {
        std::fill(grad + c * dim, grad + (c + 1) * dim, T{});
        continue;
      }
      std::fill(sum.begin(), sum.end(), F(0));
      for (; share != shares.end() && share->destination == c; ++share) {
        add_scaled(grads.boundary_grad + share->row * dim, grads.grad_loss * F(share->sign), dim, sum.data());
      }
      narrow(sum.data(), dim, grad + c * dim);
    }
  });
}

template <class T, class F>
void bias_backward(const LossGrads<F>& grads, const std::vector<Share>& shares, T* grad) {
  std::fill(grad, grad + grads.num_classes, T{});
  F sum = 0;
  for (size_t s = 0; s < shares.size(); ++s) {
    sum += grads.grad_loss * F(shares[s].sign) * grads.boundary_bias[shares[s].row];
    if (s + 1 < shares.size() && shares[s + 1].destination == shares[s].destination) continue;
    grad[shares[s].destination] = from_float<T>(sum);
    sum = 0;
  }
}

template <class Wide>
void margin_backward(const LossGrads<Wide>& grads, const Output& grad_weight, const Output& grad_bias) {
  const std::vector<Share> shares = shares_by_class(grads);
  if (grad_weight.data) {
    visit(grad_weight.dtype, [&](auto zero) { weight_backward(grads, shares, grad_weight.row<decltype(zero)>(0)); });
  }
  if (grad_bias.data) {
    visit(grad_bias.dtype, [&](auto zero) { bias_backward(grads, shares, grad_bias.row<decltype(zero)>(0)); });
  }
}

}  // namespace RF_ISA
}  // namespace robustfast

#endif
