// The backward of small problems in one launch: the features' gradients beside the classifier's.
#include "cuda/small.cuh"
#include "cuda/variance_backward.cuh"

namespace robustfast::cuda {
namespace {

// A row of the classifier's gradient: the sum over the rows r that it wins, less its own as a class of the batch.
template <class Wide>
RF_DEVICE void margin_backward_row(const LossBackward<Wide>& a, Wide grad_loss, int64_t i) {
  for (int64_t d = lane_id(); d <= a.dim; d += 32) {  // column `dim` stands for the bias
    Wide sum = 0;
    for (int64_t row = 0; row < a.rows; ++row) {
      const int sign = a.winner[row] < 0 ? 0 : int(a.winner[row] == i) - int(a.classes[row] == i);
      if (sign != 0) sum += Wide(sign) * (d < a.dim ? a.boundary_grad[row * a.dim + d] : a.boundary_bias[row]);
    }
    a.write_classifier(i, d, grad_loss * sum);
  }
}

// Blocks below `sample_blocks` take the features' gradients, the others a row of the classifier's per warp.
template <class T, int norm, class Wide>
__global__ void __launch_bounds__(variance_backward_threads, 3)
    small_backward_kernel(const LossBackward<Wide> a, int64_t sample_blocks) {
  if (blockIdx.x < sample_blocks) {
    variance_backward<T, norm, 1>(a, blockIdx.x, sample_blocks);
  } else {
    const int64_t i = (blockIdx.x - sample_blocks) * num_warps() + warp_id();
    if (i < a.num_classes) margin_backward_row(a, *a.grad_loss, i);
  }
}

template <class T, int norm, class Wide>
cudaError_t run_backward(const LossBackward<Wide>& a, cudaStream_t stream) {
  constexpr int warps = variance_backward_threads / 32;
  const int64_t sample_blocks = a.wants_features() ? variance_backward_blocks(a.n, a.dim) : 0;
  const int64_t class_blocks = a.wants_classifier() ? (a.num_classes + warps - 1) / warps : 0;
  if (sample_blocks + class_blocks == 0) return cudaSuccess;
  return launch(small_backward_kernel<T, norm, Wide>, unsigned(sample_blocks + class_blocks), variance_backward_threads,
                0, stream, a, sample_blocks);
}

}  // namespace

cudaError_t small_loss_backward(const LossBackwardParams& params, cudaStream_t stream) {
  return for_wide(params.input.dtype, [&]<class Wide>(Wide) {
    return for_loss<Wide>(params.input.dtype, params.norm, [&](auto feature, auto norm) {
      return run_backward<decltype(feature), norm()>(LossBackward<Wide>(params), stream);
    });
  });
}

}  // namespace robustfast::cuda
