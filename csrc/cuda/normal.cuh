// Box and Muller's transform by the device's own approximations, each one instruction.
#pragma once

#include "common/normal.h"
#include "cuda/device.cuh"

namespace robustfast::cuda {

// Instead of common/normal.h's Polynomials. Normals are within 4e-6 of exact by the errors in device.cuh.
struct Approximations {
  // The device's logarithm has an absolute error, too much for a root near 0; there a series in t = 1 - u is within
  // t^4/4 of it.
  static RF_DEVICE float radius(float n, float scale) {
    const float u = n * 0x1p-24f, t = 1.0f - u;  // both exact
    const float series = t * fused(t, fused(t, -0.480898347f, -0.721347520f), -1.44269504f);
    return sqrt_approx(-(t < 0x1p-5f ? series : log2_approx(u))) * (1.17741002f * scale);
  }

  static RF_DEVICE Pair cos_sin(float r) { return {cos_approx(3.14159265f * r), sin_approx(3.14159265f * r)}; }
};

}  // namespace robustfast::cuda
