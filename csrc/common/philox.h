// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a keyed bijection of counters,
// so that any part of the noise can be computed on its own.
#pragma once

#include "common/platform.h"

namespace robustfast {

constexpr uint32_t philox_multiplier0 = 0xD2511F53, philox_multiplier1 = 0xCD9E8D57;
constexpr uint32_t philox_weyl0 = 0x9E3779B9, philox_weyl1 = 0xBB67AE85;

struct Words {
  uint32_t w0, w1, w2, w3;
};

RF_INLINE uint64_t wide_product(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint64_t product;  // nvcc takes two instructions for the C++ below
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return uint64_t(a) * b;
#endif
}

RF_INLINE Words philox4x32(Words counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = wide_product(counter.w0, philox_multiplier0);
    const uint64_t product1 = wide_product(counter.w2, philox_multiplier1);
    counter = {uint32_t(product1 >> 32) ^ counter.w1 ^ key0, uint32_t(product1),
               uint32_t(product0 >> 32) ^ counter.w3 ^ key1, uint32_t(product0)};
    key0 += philox_weyl0;
    key1 += philox_weyl1;
  }
  return counter;
}

}  // namespace robustfast
