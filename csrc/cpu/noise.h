// The noise on the CPU, op by op; docs/ops.md says what they compute.
#pragma once

#include <cstdint>

#include "common/matrix.h"
#include "common/noise.h"

namespace robustfast {

// Which numbers are added to a batch, and to what range the sum is clipped.
struct Noise {
  Distribution distribution;
  float scale;  // std or epsilon
  uint64_t seed;
  const int64_t* sample_ids;  // one per sample, or null: 0, 1, 2, ...
  uint32_t draw;
  double low, high;
};

void add_noise(const Noise& noise, const Samples& samples, Matrix input, Output noisy);
void add_noise_backward(const Noise& noise, const Samples& samples, Matrix grad, Matrix input, Output grad_input);

// mean and pixel_std have one number per channel.
void noisy_pair(const Noise& noise, const Samples& samples, Matrix images, const float* mean, const float* pixel_std,
                Output clean, Output noisy);
void noisy_pair_backward(const Noise& noise, const Samples& samples, Matrix grad_clean, Matrix grad_noisy,
                         Matrix images, const float* pixel_std, Output grad_images);

// words (quads, 4)
void philox_words(uint64_t seed, uint64_t sample_id, uint32_t draw, int64_t quads, int64_t* words);

}  // namespace robustfast
