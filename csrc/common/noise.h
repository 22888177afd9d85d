// What noise kernels are told, on every device.
#pragma once

#include <cstdint>

namespace robustfast {

enum class Distribution { gaussian, uniform };

// Samples of `channels` planes of `plane` elements: one plane after the other, or (channels last) interleaved. Either
// way samples are dense, each a row of the kernel's matrices, and noise follows the order of the planes.
struct Samples {
  int64_t count, channels, plane;
  bool channels_last;
};

}  // namespace robustfast
