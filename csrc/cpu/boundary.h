// The boundary between two classes and what it is made of, for the kernels of the margin. No include guard: each of
// them includes this once for each instruction set, after cpu/sums.h.

namespace robustfast {
namespace RF_ISA {

// An integer of the size of F, so that loops over both vectorise.
template <class F>
using IntegerOf = std::conditional_t<sizeof(F) == 8, int64_t, int32_t>;

template <class T, class F>
void widen(const T* x, int64_t dim, F* wide) {
  for (int64_t d = 0; d < dim; ++d) wide[d] = F(to_float(x[d]));
}

template <class F>
F bias_at(const ClassifierRows& rows, int64_t row) {
  if (!rows.bias) return F(0);
  return visit(rows.bias.dtype, [&](auto zero) { return F(to_float(*rows.bias.row<decltype(zero)>(rows.at(row)))); });
}

// ((W_i - W_c) . mu_c + b_i - b_c) / ||W_i - W_c||, and that distance: 0 where the rows are equal.
template <class F>
struct Boundary {
  F score, distance;
};

// (W_i - W_c) . mu_c and ||W_i - W_c||^2, of W_i and W_c times `scale`; not scaled, as they are.
template <bool scaled, class T, class F>
Sums<F> boundary_sums(const T* w_i, const F* w_c, const F* mu, int64_t dim, F scale) {
  return sum_over<T, F>(dim, [&]<class Value>(int64_t d, Sums<Value>& sums) RF_TARGET_LAMBDA {
    Value difference = load<Value>(w_i + d) - load<Value>(w_c + d);
    if constexpr (scaled) difference *= scale;
    sums.first += difference * load<Value>(mu + d);
    sums.second += difference * difference;
  });
}

// Squares left the range of F: all is scaled by a power of two.
template <class T, class F>
Boundary<F> scaled_boundary(const T* w_i, const F* w_c, const F* mu, F bias_difference, int64_t dim) {
  IntegerOf<F> bits = 0;  // of the largest difference: numbers that are not negative are in the order of their bits
#pragma omp simd reduction(max : bits)
  for (int64_t d = 0; d < dim; ++d) {
    bits = std::max(bits, bit_cast<IntegerOf<F> >(std::abs(F(to_float(w_i[d])) - w_c[d])));
  }
  const F largest = bit_cast<F>(bits);
  if (largest == F(0)) return {F(0), F(0)};
  constexpr int most = std::numeric_limits<F>::max_exponent - 2;  // so that the scale itself is a normal number
  const F scale = std::ldexp(F(1), std::clamp(-std::ilogb(largest), -most, most));
  const auto [logit, square] = boundary_sums<true>(w_i, w_c, mu, dim, scale);
  const F distance = std::sqrt(square);
  return {(logit + bias_difference * scale) / distance, distance / scale};
}

template <class T, class F>
Boundary<F> boundary(const T* w_i, const F* w_c, const F* mu, F bias_difference, int64_t dim) {
  using Limits = std::numeric_limits<F>;
  const auto [logit, square] = boundary_sums<false>(w_i, w_c, mu, dim, F(1));
  // Smaller sums of squares have lost digits. nan is what it is.
  if (square <= F(dim) * (Limits::min() / Limits::epsilon()) || square > Limits::max()) {
    return scaled_boundary(w_i, w_c, mu, bias_difference, dim);
  }
  const F distance = std::sqrt(square);
  return {(logit + bias_difference) / distance, distance};
}

}  // namespace RF_ISA
}  // namespace robustfast
