// Random words to numbers: Box and Muller's normals, and uniforms. No branches, so that a loop over them vectorises.
#pragma once

#include <cmath>

#include "common/half.h"
#include "common/philox.h"

namespace robustfast {

struct Pair {
  float first, second;
};

// What the transform takes of the elementary functions, by minimax polynomials in float32.
struct Polynomials {
  // -ln(n 2^-24) for whole n in [1, 2^24]; exactly 0 at the end, and relatively accurate near it.
  // ln(1 + z) = z + z^2 P(z), error 3e-8.
  static RF_INLINE float minus_log(float n) {
    const uint32_t sqrt_half = 0x3f3504f3;
    // n 2^-24 = 2^exponent (1 + z), 1 + z in [sqrt(1/2), sqrt(2)); the exponent stays where a float has it.
    const uint32_t scaled = bit_cast<uint32_t>(n) - sqrt_half - (24u << 23);
    const float exponent = float(int32_t(scaled & 0xff800000));
    const float z = bit_cast<float>((scaled & 0x7fffff) + sqrt_half) - 1.0f;
    float p = 0x1.6fcd44p-4f;
    p = p * z - 0x1.27766ap-3f;
    p = p * z + 0x1.30d15cp-3f;
    p = p * z - 0x1.52fb0ap-3f;
    p = p * z + 0x1.98da1ep-3f;
    p = p * z - 0x1.0006c6p-2f;
    p = p * z + 0x1.5556e8p-2f;
    p = p * z - 0x1.fffff4p-2f;
    return -(p * (z * z) + z) - exponent * 0x1.62e430p-24f;
  }

  // scale sqrt(-2 ln(n 2^-24))
  static RF_INLINE float radius(float n, float scale) { return sqrtf(minus_log(n)) * (1.41421356f * scale); }

  // cos and sin of pi r, |r| <= 1/2: errors 6e-8 and 8e-9 absolute.
  static RF_INLINE Pair cos_sin(float r) {
    const float square = r * r;
    float c = 0x1.c02a34p-3f;
    c = c * square - 0x1.54dca0p+0f;
    c = c * square + 0x1.03bc26p+2f;
    c = c * square - 0x1.3bd39cp+2f;
    c = c * square + 0x1.fffffep-1f;
    float s = 0x1.3911f8p-4f;
    s = s * square - 0x1.31fbf0p-1f;
    s = s * square + 0x1.466504p+1f;
    s = s * square - 0x1.4abba2p+2f;
    s = s * square + 0x1.921fb4p+1f;
    return {c, s * r};
  }
};

// scale sqrt(-2 ln u) (cos 2 pi v, sin 2 pi v), u = ((w0 >> 8) + 1) 2^-24, v = (w1 >> 8) 2^-24; within 1.4e-6 scale of
// that by the functions above.
template <class Functions>
RF_INLINE Pair box_muller(uint32_t w0, uint32_t w1, float scale) {
  const float radius = Functions::radius(float(int32_t(w0 >> 8) + 1), scale);
  // 2 v = half + 1/2 - r, half = 0 or 1, |r| <= 1/2, without rounding. Half a turn changes both signs, a quarter makes
  // cosines of sines. The bits of 3/2 - r are those of w1, between 1 and 2.
  const float signed_radius = bit_cast<float>(bit_cast<uint32_t>(radius) ^ (w1 & 0x80000000u));
  const Pair turned = Functions::cos_sin(1.5f - bit_cast<float>((w1 >> 8 & 0x7fffff) | 0x3f800000));
  return {signed_radius * turned.second, signed_radius * turned.first};
}

// Two uniforms on (-1, 1): 2 ((w >> 8) + 0.5) 2^-24 - 1, without rounding.
RF_INLINE float uniform(uint32_t word) { return (float(int32_t(word >> 8) - 0x800000) + 0.5f) * 0x1p-23f; }

RF_INLINE Pair uniform_pair(uint32_t w0, uint32_t w1, float scale) {
  return {scale * uniform(w0), scale * uniform(w1)};
}

}  // namespace robustfast
