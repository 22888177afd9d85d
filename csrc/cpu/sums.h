// Sums over the coordinates of rows. No include guard: kernels include this once for each instruction set.

namespace robustfast {
namespace RF_ISA {

template <class F>
struct VectorOf {
  typedef F type __attribute__((vector_size(RF_VECTOR_BYTES)));
};

// A number, or the numbers of a whole vector.
template <class Value, class T>
RF_INLINE Value load(const T* x) {
  if constexpr (std::is_arithmetic_v<Value>) {
    return Value(to_float(*x));
  } else {
    static_assert(std::is_same_v<T, std::remove_cvref_t<decltype(Value{}[0])> >);
    Value value;
    memcpy(&value, x, sizeof(value));
    return value;
  }
}

// Half onto half.
template <class F, class Vector>
RF_INLINE F sum_of_lanes(const Vector& vector) {
  if constexpr (sizeof(Vector) == sizeof(F)) {
    return vector[0];
  } else {
    typedef F Half __attribute__((vector_size(sizeof(Vector) / 2)));
    Half low, high;
    memcpy(&low, &vector, sizeof(Half));
    memcpy(&high, reinterpret_cast<const char*>(&vector) + sizeof(Half), sizeof(Half));
    return sum_of_lanes<F>(low + high);
  }
}

// norm_term of common/loss.h, of numbers and of vectors, which no function outside of an instruction set can return.
template <int norm, class Value>
RF_INLINE Value norm_terms(Value residual) {
  return norm == 1 ? (residual < Value{} ? -residual : residual) : residual * residual;
}

template <class Value>
struct Sums {
  Value first = {}, second = {};
};

// What add(d, sums) adds for all coordinates d < dim of rows of T and F: a number's, or a vector's from d on, as the
// type of `sums` says. Four vectors go side by side, since an addition waits for the one before it. Rows of half types
// are left to the compiler, who widens them in fewer steps.
template <class T, class F, class Add>
RF_INLINE Sums<F> sum_over(int64_t dim, const Add& add) {
  if constexpr (!std::is_same_v<T, F>) {
    F first = 0, second = 0;
#pragma omp simd reduction(+ : first, second)
    for (int64_t d = 0; d < dim; ++d) {
      Sums<F> sums;
      add(d, sums);
      first += sums.first;
      second += sums.second;
    }
    return {first, second};
  } else {
    using Vector = typename VectorOf<F>::type;
    constexpr int64_t lanes = RF_VECTOR_BYTES / sizeof(F);
    Sums<Vector> a, b, c, d;
    int64_t at = 0;
    for (; at + 4 * lanes <= dim; at += 4 * lanes) {
      add(at, a);
      add(at + lanes, b);
      add(at + 2 * lanes, c);
      add(at + 3 * lanes, d);
    }
    for (; at + lanes <= dim; at += lanes) add(at, a);
    Sums<F> sums = {sum_of_lanes<F>((a.first + b.first) + (c.first + d.first)),
                    sum_of_lanes<F>((a.second + b.second) + (c.second + d.second))};
    for (; at < dim; ++at) add(at, sums);
    return sums;
  }
}

}  // namespace RF_ISA
}  // namespace robustfast
