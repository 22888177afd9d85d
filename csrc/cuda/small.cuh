// The whole loss in one block, for problems where launches cost more than the work; the rest of the launchers ask fits.
#pragma once

#include "cuda/kernels.h"

namespace robustfast::cuda {

bool small_fits(int64_t n, int64_t dim, int64_t num_classes, size_t wide_bytes);
cudaError_t small_loss(const LossParams& params, cudaStream_t stream);
cudaError_t small_loss_backward(const LossBackwardParams& params, cudaStream_t stream);

}  // namespace robustfast::cuda
