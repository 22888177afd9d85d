// The noise ops on CUDA.
#include "cuda/kernels.h"
#include "ops/device.h"
#include "ops/noise.h"

namespace robustfast {
namespace {

struct Cuda : OnDevice {
  static constexpr auto* add_noise = cuda::add_noise;
  static constexpr auto* add_noise_backward = cuda::add_noise_backward;
  static constexpr auto* noisy_pair = cuda::noisy_pair;
  static constexpr auto* noisy_pair_backward = cuda::noisy_pair_backward;
  static constexpr auto* philox_words = cuda::philox_words;

  using OnDevice::OnDevice;
  static Tensor fresh(const Tensor& made) { return made; }

  template <class Kernel, class... Arguments>
  void operator()(Kernel* kernel, const Arguments&... arguments) const {
    check(kernel(arguments..., stream()));
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(RF_CUDA_LIBRARY, RF_CUDA_KEY, m) { NoiseOps<Cuda>::implement(m); }

}  // namespace robustfast
