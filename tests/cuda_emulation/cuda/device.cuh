// Stands in for csrc/cuda/device.cuh: the same functions in plain C++, for kernels that run under emulation.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <tuple>

#include "common/half.h"
#include "emulation.h"

#define RF_DEVICE inline
#define RF_UNROLL

namespace robustfast {

RF_DEVICE unsigned char* shared_memory() { return emulation::shared; }

RF_DEVICE void device_assert(bool holds, const char* message) {
  if (!holds) emulation::fail_assertion(message);
}

struct alignas(16) Vector16 {
  uint32_t word[4];
};

inline void check_alignment(const void* at, unsigned bytes = 16) {
  if (reinterpret_cast<uintptr_t>(at) % bytes) emulation::fail_assertion("a wide access is not aligned");
}
RF_DEVICE uint64_t load8(const void* from) {
  check_alignment(from, 8);
  uint64_t value;
  memcpy(&value, from, 8);
  return value;
}
RF_DEVICE void store8(void* to, uint64_t value) {
  check_alignment(to, 8);
  memcpy(to, &value, 8);
}
RF_DEVICE Vector16 load16(const void* from) {
  check_alignment(from);
  Vector16 value;
  memcpy(&value, from, 16);
  return value;
}
RF_DEVICE Vector16 load16_once(const void* from) { return load16(from); }
RF_DEVICE void store16(void* to, Vector16 value) {
  check_alignment(to);
  memcpy(to, &value, 16);
}
RF_DEVICE void store16_once(void* to, Vector16 value) { store16(to, value); }

// The device's approximations at their worst: an error of the size that the PTX manual allows, of either sign.
inline float wrong_by(float value, float error) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits % 2 ? value + error : value - error;
}
RF_DEVICE float log2_approx(float x) {
  const float value = std::log2(x);
  return wrong_by(value, 0x1p-22f * std::max(1.0f, -value));
}
RF_DEVICE float sqrt_approx(float x) { return wrong_by(std::sqrt(x), 0x1p-23f * std::sqrt(x)); }
RF_DEVICE float sin_approx(float x) { return wrong_by(std::sin(x), 4.9e-7f); }
RF_DEVICE float cos_approx(float x) { return wrong_by(std::cos(x), 4.9e-7f); }

template <class F>
RF_DEVICE F rounded_sum(F a, F b) {
  return a + b;
}
template <class F>
RF_DEVICE F fused(F a, F b, F c) {
  return std::fma(a, b, c);
}

template <class F>
RF_DEVICE F reciprocal(F x) {
  return 1 / x;
}

// The device's sequence, from an inverse root that is off by two units in the last place.
RF_DEVICE float over_root(float x, float square) {
  float inverse = 1 / std::sqrt(square);
  inverse = wrong_by(inverse, 0x1p-22f * inverse);
  const float rough = square * inverse, root = fused(fused(-rough, rough, square), 0.5f * inverse, rough);
  inverse = fused(fused(-root, inverse, 1.0f), inverse, inverse);
  const float quotient = x * inverse;
  return std::abs(quotient) < INFINITY ? fused(fused(-root, quotient, x), inverse, quotient) : quotient;
}
RF_DEVICE double over_root(double x, double square) { return x / std::sqrt(square); }

RF_DEVICE float float_of_byte(uint32_t word, int at) { return 0x1p23f + float(word >> 8 * at & 0xff); }

template <class F>
RF_DEVICE F min_nan(F a, F b) {
  return a > b ? b : a;
}
template <class F>
RF_DEVICE F max_nan(F a, F b) {
  return a < b ? b : a;
}

template <class T>
RF_DEVICE void recompute_from(T&) {}

RF_DEVICE uint32_t pack_bfloat16(float low, float high) {
  return uint32_t(from_float<bfloat16>(high).bits) << 16 | from_float<bfloat16>(low).bits;
}

// Matrix j of the four has its rows at the addresses that lanes 8 j ... 8 j + 7 give; see csrc/cuda/device.cuh. Eight
// rows are loaded in one cycle where no two of them meet the same four of the 32 banks: asserted here.
RF_DEVICE void load_matrices(uint32_t (&fragment)[4], const uint16_t* row) {
  check_alignment(row);
  const auto rows = emulation::gather("load_matrices", row);
  const unsigned lane = emulation::lane();
  unsigned banks[4] = {};
  for (unsigned l = 0; l < 32; ++l) banks[l / 8] |= 1u << reinterpret_cast<uintptr_t>(rows[l]) / 16 % 8;
  for (unsigned of_matrix : banks) {
    if (of_matrix != 0xff) emulation::fail_assertion("rows of a matrix are in the same banks");
  }
  for (unsigned j = 0; j < 4; ++j) memcpy(&fragment[j], rows[8 * j + lane / 4] + 2 * (lane % 4), 4);
}

// sum + eight products as the matrix units of an A100 add them: all aligned to the largest, of which what is below
// 2^-24 is cut off, and so is what the new sum does not hold.
inline float add_aligned(float sum, const float (&product)[8]) {
  float largest = std::abs(sum);
  double exact = sum;
  for (float x : product) largest = std::max(largest, std::abs(x)), exact += x;
  if (largest == 0 || !std::isfinite(exact)) return float(exact);
  const double unit = std::ldexp(1.0, std::ilogb(largest) - 24);
  double total = std::trunc(sum / unit);
  for (float x : product) total += std::trunc(x / unit);
  const float rounded = float(total * unit);
  return std::abs(double(rounded)) > std::abs(total * unit) ? std::nextafter(rounded, 0.0f) : rounded;
}

// PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type": A (16, 16) by rows, B (16, 8) by columns.
RF_DEVICE void multiply_add(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct A {
    uint32_t word[4];
  };
  struct B {
    uint32_t word[2];
  };
  const auto as = emulation::gather("multiply_add A", A{{a[0], a[1], a[2], a[3]}});
  A all_a[32];
  for (unsigned l = 0; l < 32; ++l) all_a[l] = as[l];
  const auto bs = emulation::gather("multiply_add B", B{{b[0], b[1]}});
  const auto half = [](uint32_t word, unsigned high) {
    return to_float(bfloat16{uint16_t(high ? word >> 16 : word & 0xffff)});
  };
  const unsigned lane = emulation::lane();
  for (unsigned c = 0; c < 4; ++c) {
    const unsigned row = lane / 4 + 8 * (c / 2), column = 2 * (lane % 4) + c % 2;
    for (unsigned first = 0; first < 16; first += 8) {
      float product[8];
      for (unsigned k = 0; k < 8; ++k) {
        const A from_a = all_a[4 * (row % 8) + k / 2];
        const B from_b = bs[4 * column + k / 2];
        product[k] = half(from_a.word[row / 8 + first / 4], k % 2) * half(from_b.word[first / 8], k % 2);
      }
      sum[c] = add_aligned(sum[c], product);
    }
  }
}

constexpr size_t most_shared_bytes = 96 * 1024;

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, unsigned block, size_t shared_bytes, cudaStream_t,
                   const Arguments&... arguments) {
  if (shared_bytes > most_shared_bytes || grid.x == 0 || grid.y > 65535) return cudaErrorInvalidValue;
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> arguments;
  } call{kernel, {arguments...}};
  const bool done = emulation::run(
      grid, block, shared_bytes,
      [](void* context) {
        Call& call = *static_cast<Call*>(context);
        std::apply(call.kernel, call.arguments);
      },
      &call);
  return done ? cudaSuccess : cudaErrorAssert;
}

}  // namespace robustfast
