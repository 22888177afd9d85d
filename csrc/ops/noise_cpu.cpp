// The noise ops on the CPU.
#include "cpu/noise.h"
#include "ops/memory.h"
#include "ops/noise.h"

namespace robustfast {
namespace {

struct Cpu {
  static constexpr auto* add_noise = robustfast::add_noise;
  static constexpr auto* add_noise_backward = robustfast::add_noise_backward;
  static constexpr auto* noisy_pair = robustfast::noisy_pair;
  static constexpr auto* noisy_pair_backward = robustfast::noisy_pair_backward;
  static constexpr auto* philox_words = robustfast::philox_words;

  explicit Cpu(const Tensor&) {}
  static Tensor fresh(const Tensor& made) { return with_huge_pages(made); }

  template <class Kernel, class... Arguments>
  void operator()(Kernel* kernel, const Arguments&... arguments) const {
    kernel(arguments...);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(robustfast, CPU, m) { NoiseOps<Cpu>::implement(m); }

}  // namespace robustfast
