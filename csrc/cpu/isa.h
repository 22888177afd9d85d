// The instruction sets that the CPU kernels are compiled for, and which of them runs.
#pragma once

namespace robustfast {

enum class Isa { baseline, avx2, avx512 };

// The best one this processor has, or a lesser one named in the environment variable ROBUSTFAST_CPU_ISA.
Isa active_isa();
const char* name(Isa isa);

}  // namespace robustfast

#if defined(__x86_64__)
#define RF_DISPATCH(function, ...)            \
  switch (active_isa()) {                     \
    case Isa::avx512:                         \
      return avx512::function(__VA_ARGS__);   \
    case Isa::avx2:                           \
      return avx2::function(__VA_ARGS__);     \
    default:                                  \
      return baseline::function(__VA_ARGS__); \
  }
#else
#define RF_DISPATCH(function, ...) return baseline::function(__VA_ARGS__)
#endif
