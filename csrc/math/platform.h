// What lets g++ and nvcc compile the same arithmetic.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define RF_INLINE __host__ __device__ __forceinline__
#else
#define RF_INLINE inline __attribute__((always_inline))
#endif
