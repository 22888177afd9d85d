// The noise on the CPU, op by op; docs/ops.md says what they compute.
#pragma once

#include "common/noise.h"

namespace robustfast {

void add_noise(const Noise& noise, const Samples& samples, Matrix input, Output noisy);
void add_noise_backward(const Noise& noise, const Samples& samples, Matrix grad, Matrix input, Output grad_input);

// Gaussian noise. mean and pixel_std have one number per channel.
void noisy_pair(const Noise& noise, const Samples& samples, Matrix images, const float* mean, const float* pixel_std,
                Output clean, Output noisy);
void noisy_pair_backward(const Noise& noise, const Samples& samples, Matrix grad_clean, Matrix grad_noisy,
                         Matrix images, const float* pixel_std, Output grad_images);

// words (quads, 4)
void philox_words(const int64_t* seed, int64_t sample_id, int64_t draw, int64_t quads, int64_t* words);

}  // namespace robustfast
