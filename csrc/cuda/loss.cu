// The loss and its backward as a whole: which kernels run, and the memory that they share.
#include "cuda/large.cuh"
#include "cuda/small.cuh"

namespace robustfast::cuda {
namespace {

int multiprocessors() {
  int device = 0, count = 1;
  if (cudaGetDevice(&device) == cudaSuccess) cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// Rows are cut where a block would otherwise work longer than others on one.
int32_t chunk_size(int64_t n) { return n <= 1 << 16 ? 64 : 256; }

// The sort of the labels, if it fits the first block, beside the squared norms of the classifier's rows.
template <class Wide>
__global__ void __launch_bounds__(group_threads, 1)
    prepare_kernel(const Loss<Wide> a, const Workspace<Wide> w, bool sorts) {
  if (sorts && blockIdx.x == 0) {
    group_in_block(SampleClasses{a.target, a.num_classes, a.ignore_index}, w.rows);
  } else {
    const int64_t block = int64_t(blockIdx.x) - sorts, warps = group_threads / 32;
    squared_norms(a.weight, a.num_classes, a.dim, block * warps + warp_id(), (gridDim.x - sorts) * warps, w.square);
  }
}

template <class Wide>
cudaError_t prepare(const Loss<Wide>& a, const Workspace<Wide>& w, void* sort, cudaStream_t stream) {
  const bool sorts = a.n <= group_tile;
  const int64_t warps = group_threads / 32, most = 2 * multiprocessors();
  const int64_t blocks = (a.num_classes + warps - 1) / warps;
  const cudaError_t error = launch(prepare_kernel<Wide>, unsigned((blocks < most ? blocks : most) + sorts),
                                   group_threads, sorts ? group_shared : 0, stream, a, w, sorts);
  if (sorts || error != cudaSuccess) return error;
  return group_samples(SampleClasses{a.target, a.num_classes, a.ignore_index}, w.rows, sort, stream);
}

// A small problem's backward looks at every row for every class.
bool small_backward(const LossBackwardParams& p) {
  const int64_t rows = p.n < p.num_classes ? p.n : p.num_classes;
  return rows * p.num_classes * (p.dim + 1) <= 1 << 20 && p.n * p.dim <= 1 << 17;
}

size_t size_of(Dtype floating) { return floating == Dtype::float64 ? 8 : floating == Dtype::float32 ? 4 : 2; }
size_t wide_size(Dtype features) { return features == Dtype::float64 ? 8 : 4; }

template <class Wide>
cudaError_t large_loss(const LossParams& p, void* scratch, cudaStream_t stream) {
  const Loss<Wide> a(p);
  Arena arena(scratch);
  Workspace<Wide> w;
  w.place(arena, a);
  void* const sort = arena.take<unsigned char>(int64_t(sort_scratch(a.n)));
  cudaError_t error = prepare(a, w, sort, stream);
  if (error == cudaSuccess) error = centroids(a, w, p.input.dtype, p.norm, stream);
  if (error == cudaSuccess) error = margin(a, w, stream);
  if (error == cudaSuccess) error = variance(a, w, p.input.dtype, p.norm, stream);
  if (error == cudaSuccess) error = finish(a, w, p.norm, stream);
  return error;
}

template <class Wide>
cudaError_t large_backward(const LossBackwardParams& p, void* scratch, cudaStream_t stream) {
  const LossGrads<Wide> a(p);
  cudaError_t error = cudaSuccess;
  if (p.grad_input || p.grad_input_noise) error = variance_backward(a, p.input.dtype, p.norm, stream);
  const auto clear = [&](const Output& grad, int64_t elements) {
    if (error != cudaSuccess || !grad.data) return;
    error = cudaMemsetAsync(grad.data, 0, size_t(elements) * size_of(grad.dtype), stream);
  };
  clear(p.grad_weight, p.num_classes * p.dim);
  clear(p.grad_bias, p.num_classes);
  if (error != cudaSuccess || p.n == 0 || !(p.grad_weight.data || p.grad_bias.data)) return error;
  return margin_backward(a, scratch, stream);
}

}  // namespace

template <class Wide>
void Workspace<Wide>::place(Arena& arena, const Loss<Wide>& a) {
  rows = {.n = a.n,
          .capacity = a.capacity,
          .num_classes = a.num_classes,
          .chunk = chunk_size(a.n),
          .classes = a.classes,
          .slot = a.slot,
          .winner = a.winner};
  rows.place(arena);
  margin_blocks = multiprocessors();
  const int64_t places = 2 * (a.n / rows.chunk + 1), tile = MarginTile<Wide>::rows;
  const int64_t bests = (margin_blocks + (a.capacity + tile - 1) / tile) * tile;
  partial = arena.take<Wide>(places * a.dim);
  squares = arena.take<Wide>(2 * rows.max_items());
  norm = arena.take<Wide>(a.capacity);
  gain = arena.take<Wide>(a.capacity);
  own_logit = arena.take<Wide>(a.capacity);
  square = arena.take<Wide>(a.num_classes);
  best_score = arena.take<Wide>(bests);
  best_index = arena.take<int32_t>(bests);
  row_terms = arena.take<Wide>(4 * a.capacity);
}

size_t discriminative_loss_scratch(const LossParams& p) {
  if (p.n == 0 || small_fits(p.n, p.dim, p.num_classes, wide_size(p.input.dtype))) return 0;
  Arena arena(nullptr);
  for_wide(p.input.dtype, [&]<class Wide>(Wide) {
    Workspace<Wide>().place(arena, Loss<Wide>(p));
    return cudaSuccess;
  });
  return arena.used() + sort_scratch(p.n);
}

cudaError_t discriminative_loss(const LossParams& p, void* scratch, cudaStream_t stream) {
  if (p.n > INT32_MAX || p.num_classes >= INT32_MAX) return cudaErrorInvalidValue;
  if (p.n == 0) {
    const cudaError_t error = cudaMemsetAsync(p.loss, 0, wide_size(p.input.dtype), stream);
    return error == cudaSuccess ? cudaMemsetAsync(p.terms, 0, 5 * wide_size(p.input.dtype), stream) : error;
  }
  if (small_fits(p.n, p.dim, p.num_classes, wide_size(p.input.dtype))) return small_loss(p, stream);
  return for_wide(p.input.dtype, [&]<class Wide>(Wide) { return large_loss<Wide>(p, scratch, stream); });
}

size_t discriminative_loss_backward_scratch(const LossBackwardParams& p) {
  if (small_backward(p) || !(p.grad_weight.data || p.grad_bias.data)) return 0;
  size_t bytes = 0;
  for_wide(p.input.dtype, [&]<class Wide>(Wide) {
    bytes = margin_backward_scratch(LossGrads<Wide>(p));
    return cudaSuccess;
  });
  return bytes;
}

cudaError_t discriminative_loss_backward(const LossBackwardParams& p, void* scratch, cudaStream_t stream) {
  if (small_backward(p)) return small_loss_backward(p, stream);
  return for_wide(p.input.dtype, [&]<class Wide>(Wide) { return large_backward<Wide>(p, scratch, stream); });
}

}  // namespace robustfast::cuda
