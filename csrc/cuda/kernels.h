// The CUDA kernels' launchers: plain pointers, sizes, strides in elements and a stream of the current device, no
// PyTorch. docs/ops.md says what the ops compute; outputs are contiguous.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "common/loss.h"
#include "common/matrix.h"
#include "common/noise.h"

namespace robustfast::cuda {

struct LossParams {
  Matrix input, input_noise, target, weight, bias;  // input_noise and bias may be null
  int64_t n, dim, num_classes;
  void* centroids;
  bool* seen;
  Settings settings;
  int64_t norm;
  bool update_state;
  int64_t ignore_index;
  void *loss, *terms;
  int32_t* slot;
  void *pull, *tables;
  int32_t* classes;
  void* boundary_bias;
};

struct LossBackwardParams {
  const void* grad_loss;
  Matrix input, input_noise;
  int64_t n, dim, num_classes, rows;
  const int32_t* slot;
  const void *pull, *tables;
  const int32_t* classes;
  const void* boundary_bias;
  int64_t norm;
  void *grad_input, *grad_input_noise;  // null where not wanted
  Output grad_weight, grad_bias;
};

// `scratch` holds as many bytes as the function of the same parameters says, aligned to 16; nobody reads it afterwards.
// Small problems need none.
size_t discriminative_loss_scratch(const LossParams& params);
cudaError_t discriminative_loss(const LossParams& params, void* scratch, cudaStream_t stream);

size_t discriminative_loss_backward_scratch(const LossBackwardParams& params);
cudaError_t discriminative_loss_backward(const LossBackwardParams& params, void* scratch, cudaStream_t stream);

// The steps of the loss. class_sums and class_pulls take of LossParams what they have in common with the whole loss:
// features, labels, sizes, settings, slot, pull and terms; num_classes is the number of rows.
size_t class_sums_scratch(const LossParams& params);
cudaError_t class_sums(const LossParams& params, void* sums, void* scratch, cudaStream_t stream);

size_t class_pulls_scratch(const LossParams& params);
cudaError_t class_pulls(const LossParams& params, const void* centroid, const void* sample_share, void* pull_sum,
                        void* scratch, cudaStream_t stream);

struct MarginSearchParams {
  Dtype wide;
  const void* mu;
  ClassifierRows own;      // in the dtype of weight
  const int32_t* present;  // of the rows, those that are searched for; all where it is null
  Matrix weight, bias;
  int64_t rows, dim, num_classes;
  void* score;
  int32_t* winner;
};

size_t margin_search_scratch(const MarginSearchParams& params);
cudaError_t margin_search(const MarginSearchParams& params, void* scratch, cudaStream_t stream);

struct FinishParams {
  Dtype wide;
  Settings settings;
  int64_t norm, rows, dim;
  ClassifierRows own, other;
  const void *counts, *tau, *centroid;
  void *mu_grad, *boundary_grad;  // hold pull_sum and mu before
  void* boundary_bias;
  int32_t* winner;  // of the search before
  void* terms;      // (2,): margin, regularization
};

size_t finish_scratch(const FinishParams& params);
cudaError_t finish(const FinishParams& params, void* scratch, cudaStream_t stream);

// The noise, as in cpu/noise.h.
cudaError_t add_noise(const Noise& noise, const Samples& samples, Matrix input, Output noisy, cudaStream_t stream);
cudaError_t add_noise_backward(const Noise& noise, const Samples& samples, Matrix grad, Matrix input, Output grad_input,
                               cudaStream_t stream);
cudaError_t noisy_pair(const Noise& noise, const Samples& samples, Matrix images, const float* mean,
                       const float* pixel_std, Output clean, Output noisy, cudaStream_t stream);
cudaError_t noisy_pair_backward(const Noise& noise, const Samples& samples, Matrix grad_clean, Matrix grad_noisy,
                                Matrix images, const float* pixel_std, Output grad_images, cudaStream_t stream);
cudaError_t philox_words(const int64_t* seed, int64_t sample_id, int64_t draw, int64_t quads, int64_t* words,
                         cudaStream_t stream);

}  // namespace robustfast::cuda
