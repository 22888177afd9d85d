// bfloat16 and float16 as bits, and their conversions: exact to float, round to nearest even from it.
// Branch-free selects, so that a loop over elements vectorises; on a GPU its own instructions, which do the same.
#pragma once

#include <cstring>

#include "common/platform.h"

namespace robustfast {

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

template <class To, class From>
RF_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

RF_INLINE float to_float(float x) { return x; }
RF_INLINE double to_float(double x) { return x; }
RF_INLINE float to_float(bfloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

template <class T>
RF_INLINE T from_float(float x) {
  return T(x);
}
template <class T>
RF_INLINE T from_float(double x) {
  if constexpr (sizeof(T) == sizeof(double)) return T(x);
  return from_float<T>(float(x));
}

#if defined(__CUDA_ARCH__)

RF_INLINE float to_float(float16 x) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
}

template <>
RF_INLINE bfloat16 from_float<bfloat16>(float x) {
  bfloat16 value;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(value.bits) : "f"(x));
  return value;
}

template <>
RF_INLINE float16 from_float<float16>(float x) {
  float16 value;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(value.bits) : "f"(x));
  return value;
}

#else

RF_INLINE float to_float(float16 x) {
  const uint32_t magnitude = x.bits & 0x7fff;
  // Moves the exponent's bias from 15 to 127, and that of inf and nan to the top.
  const uint32_t normal = (magnitude << 13) + (magnitude < 0x7c00 ? 0x38000000u : 0x70000000u);
  // Subnormals count units of 2^-24, the last place of a float at 0.5. No float here is subnormal: none is flushed.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(0x3f000000 + magnitude) - 0.5f);
  const uint32_t bits = magnitude < 0x0400 ? subnormal : normal;
  return bit_cast<float>(bits | uint32_t(x.bits & 0x8000) << 16);
}

template <>
RF_INLINE bfloat16 from_float<bfloat16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const uint32_t quiet = bits >> 16 | 0x40;
  return {uint16_t((bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded)};
}

template <>
RF_INLINE float16 from_float<float16>(float x) {
  const uint32_t sign = bit_cast<uint32_t>(x) >> 16 & 0x8000;
  const uint32_t bits = bit_cast<uint32_t>(x) & 0x7fffffff;
  const uint32_t normal = (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13;
  // Adding 0.5 puts the units of a subnormal half, 2^-24, at the last place of the float, rounded by the addition.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(bits) + 0.5f) - 0x3f000000;
  const uint32_t finite = bits < 0x38800000 ? subnormal : normal;
  const uint32_t overflow = bits > 0x7f800000 ? 0x7e00 : 0x7c00;
  return {uint16_t(sign | (bits >= 0x477ff000 ? overflow : finite))};
}

#endif

}  // namespace robustfast
