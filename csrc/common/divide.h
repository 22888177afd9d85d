// Division by a number that a whole launch shares: a multiplication and a shift (Granlund and Montgomery, "Division by
// invariant integers using multiplication", PLDI 1994).
#pragma once

#include "common/platform.h"

namespace robustfast {

struct Divider {
  uint32_t divisor, multiplier, shift;

  // 0 < divisor < 2^31
  explicit Divider(uint32_t divisor) : divisor(divisor), shift(0) {
    while (uint64_t(1) << shift < divisor) ++shift;
    multiplier = uint32_t(((uint64_t(1) << 32) * ((uint64_t(1) << shift) - divisor)) / divisor + 1);
  }

  // n / divisor, n < 2^31
  RF_INLINE uint32_t divide(uint32_t n) const { return (uint32_t(uint64_t(n) * multiplier >> 32) + n) >> shift; }
};

}  // namespace robustfast
