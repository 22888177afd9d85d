// What noise kernels are told, on every device: which numbers are added to a batch, and to what range.
#pragma once

#include <stdexcept>
#include <type_traits>

#include "common/matrix.h"
#include "common/normal.h"

namespace robustfast {

enum class Distribution : int64_t { gaussian, uniform };  // numbered as DISTRIBUTIONS in robustfast/ops.py

template <Distribution distribution>
using DistributionConstant = std::integral_constant<Distribution, distribution>;

// function(DistributionConstant<distribution>()); an unknown one is an error.
template <class Function>
auto visit(Distribution distribution, const Function& function) {
  switch (distribution) {
    case Distribution::gaussian:
      return function(DistributionConstant<Distribution::gaussian>());
    case Distribution::uniform:
      return function(DistributionConstant<Distribution::uniform>());
  }
  throw std::invalid_argument("robustfast: there is no such distribution of noise");
}

// Two numbers of a distribution from two words, times the scale; `Functions` as in box_muller.
template <Distribution distribution, class Functions>
RF_INLINE Pair transform(uint32_t w0, uint32_t w1, float scale) {
  if constexpr (distribution == Distribution::gaussian) {
    return box_muller<Functions>(w0, w1, scale);
  } else {
    static_assert(distribution == Distribution::uniform);
    return uniform_pair(w0, w1, scale);
  }
}

// A value of an image, where bytes stand for 0 to 1.
template <class Wide, class T>
RF_INLINE Wide pixel(T x) {
  return Wide(to_float(x));
}
template <class Wide>
RF_INLINE Wide pixel(uint8_t x) {
  return Wide(x) * (Wide(1) / 255);
}

// `scales`, `draws` and `sample_ids` have a number for each sample (of stride 0 one for all), or are null.
struct Noise {
  Distribution distribution;
  const int64_t* seed;
  float scale;  // std or epsilon
  Matrix scales;
  int64_t draw;
  Matrix draws;
  Matrix sample_ids;  // null: 0, 1, 2, ...
  double low, high;   // the sum is clipped to this range
};

// What distinguishes the noise of one sample.
struct SampleNoise {
  uint64_t sample_id;
  uint32_t draw;
  float scale;
};

RF_INLINE SampleNoise of_sample(const Noise& noise, int64_t sample) {
  return {uint64_t(noise.sample_ids ? *noise.sample_ids.row<int64_t>(sample) : sample),
          uint32_t(noise.draws ? *noise.draws.row<int64_t>(sample) : noise.draw),
          noise.scales ? *noise.scales.row<float>(sample) : noise.scale};
}

// Samples of `channels` planes of `plane` elements: one plane after the other, or (channels last) interleaved. Either
// way samples are dense, each a row of the kernel's matrices, and noise follows the order of the planes.
struct Samples {
  int64_t count, channels, plane;
  bool channels_last;
};

}  // namespace robustfast
