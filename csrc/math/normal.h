// Random words to numbers: Box and Muller's normals, and uniforms. No branches, so that a loop over them vectorises.
// The coefficients are minimax fits, in float32; errors are relative.
#pragma once

#include <cmath>

#include "math/half.h"
#include "math/philox.h"

namespace robustfast {

struct Pair {
  float first, second;
};

// -ln(u), normal u > 0; exactly 0 at 1, and relatively accurate near it. ln(1 + z) = z + z^2 P(z), error 3e-8.
RF_INLINE float minus_log(float u) {
  const uint32_t sqrt_half = 0x3f3504f3;
  const uint32_t scaled = bit_cast<uint32_t>(u) - sqrt_half;  // u = 2^exponent (1 + z), 1 + z in [sqrt(1/2), sqrt(2))
  const float exponent = float(int32_t(scaled) >> 23);
  const float z = bit_cast<float>((scaled & 0x7fffff) + sqrt_half) - 1.0f;
  float p = 0x1.6fcd44p-4f;
  p = p * z - 0x1.27766ap-3f;
  p = p * z + 0x1.30d15cp-3f;
  p = p * z - 0x1.52fb0ap-3f;
  p = p * z + 0x1.98da1ep-3f;
  p = p * z - 0x1.0006c6p-2f;
  p = p * z + 0x1.5556e8p-2f;
  p = p * z - 0x1.fffff4p-2f;
  return -(p * (z * z) + z) - exponent * 0x1.62e430p-1f;
}

// sin(2 pi r), |r| <= 1/4: error 5e-9; on a GPU its own sine, error 2^-21 absolute.
RF_INLINE float sin_turns(float r) {
#if defined(__CUDA_ARCH__)
  return __sinf(6.283185307f * r);
#else
  const float square = r * r;
  float p = 39.710918103812375f;
  p = p * square - 76.57499217700891f;
  p = p * square + 81.60223124253571f;
  p = p * square - 41.341677478389755f;
  p = p * square + 6.283185273790805f;
  return p * r;
#endif
}

RF_INLINE float root(float x) {
#if defined(__CUDA_ARCH__)
  float value;  // relative error 2^-23
  asm("sqrt.approx.f32 %0, %1;" : "=f"(value) : "f"(x));
  return value;
#else
  return sqrtf(x);
#endif
}

// sqrt(-2 ln u) (cos 2 pi v, sin 2 pi v), u = ((w0 >> 8) + 1) 2^-24, v = (w1 >> 8) 2^-24; within 1.2e-6 of that.
RF_INLINE Pair box_muller(uint32_t w0, uint32_t w1) {
  const float radius = root(2.0f * minus_log(float(int32_t(w0 >> 8) + 1) * 0x1p-24f));
  // v = half / 2 + r modulo 1, half = 0 or 1, |r| <= 1/4: no rounding, and half a turn changes both signs.
  const float r = float(int32_t((w1 & 0xffffff00u) << 1)) * 0x1p-33f;
  const uint32_t sign = (w1 + 0x40000000u) & 0x80000000u;
  const float signed_radius = bit_cast<float>(bit_cast<uint32_t>(radius) ^ sign);
  return {signed_radius * sin_turns(0.25f - fabsf(r)), signed_radius * sin_turns(r)};
}

// Two uniforms on (-1, 1): 2 ((w >> 8) + 0.5) 2^-24 - 1, without rounding.
RF_INLINE float uniform(uint32_t word) { return (float(int32_t(word >> 8) - 0x800000) + 0.5f) * 0x1p-23f; }

RF_INLINE Pair uniform_pair(uint32_t w0, uint32_t w1) { return {uniform(w0), uniform(w1)}; }

}  // namespace robustfast
