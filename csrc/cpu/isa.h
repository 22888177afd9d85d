// The instruction sets that the CPU kernels are compiled for, and which of them runs.
#pragma once

#include <stdexcept>
#include <vector>

namespace robustfast {

enum class Isa { baseline, avx2, avx512 };

// Those that this processor has, the best one last.
const std::vector<Isa>& available_isas();
// The best one, or that named in the environment variable ROBUSTFAST_CPU_ISA. Throws std::invalid_argument where this
// processor has none of that name.
Isa active_isa();
bool has_vnni();  // the sums of products of AVX512-VNNI
const char* name(Isa isa);

}  // namespace robustfast

#if defined(__x86_64__)
#define RF_DISPATCH(function, ...)            \
  switch (active_isa()) {                     \
    case Isa::avx512:                         \
      return avx512::function(__VA_ARGS__);   \
    case Isa::avx2:                           \
      return avx2::function(__VA_ARGS__);     \
    case Isa::baseline:                       \
      return baseline::function(__VA_ARGS__); \
  }                                           \
  throw std::logic_error("robustfast: an instruction set that no kernel is compiled for")
#else
#define RF_DISPATCH(function, ...) return baseline::function(__VA_ARGS__)
#endif
