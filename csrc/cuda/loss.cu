// The loss and its backward as a whole: which kernels run, and the memory that they share.
#include "cuda/large.cuh"
#include "cuda/small.cuh"
#include "cuda/sort.cuh"

namespace robustfast::cuda {
namespace {

// Rows are cut where a block would otherwise work longer than others on one.
int32_t chunk_size(int64_t n) { return n <= 1 << 16 ? 64 : 256; }

// The sort of the labels, if it fits the first block, beside the squared norms of the classifier's rows.
template <class Wide>
__global__ void __launch_bounds__(group_threads, 1)
    prepare_kernel(const Loss<Wide> a, const Workspace<Wide> w, bool sorts) {
  if (sorts && blockIdx.x == 0) {
    group_in_block(SampleClasses{a.target, a.num_classes, a.ignore_index}, w.groups);
  } else {
    const int64_t block = int64_t(blockIdx.x) - sorts, blocks = gridDim.x - sorts, warps = group_threads / 32;
    squared_norms(w.search, block * warps + warp_id(), blocks * warps);
  }
}

template <class Wide>
cudaError_t prepare(const Loss<Wide>& a, const Workspace<Wide>& w, void* sort, cudaStream_t stream) {
  const bool sorts = a.n <= group_tile;
  const int64_t warps = group_threads / 32, most = 2 * w.search.blocks;
  const int64_t blocks = (a.num_classes + warps - 1) / warps;
  const cudaError_t error = launch(prepare_kernel<Wide>, unsigned((blocks < most ? blocks : most) + sorts),
                                   group_threads, sorts ? group_shared : 0, stream, a, w, sorts);
  if (sorts || error != cudaSuccess) return error;
  return group_samples(SampleClasses{a.target, a.num_classes, a.ignore_index}, w.groups, sort, stream);
}

// A small problem's backward looks at every row for every class.
bool small_backward(const LossBackwardParams& p) {
  return p.rows * p.num_classes * (p.dim + 1) <= 1 << 20 && p.n * p.dim <= 1 << 17;
}

size_t size_of(Dtype floating) {
  return visit(floating, [](auto zero) { return sizeof(zero); });
}
size_t wide_size(Dtype features) { return features == Dtype::float64 ? 8 : 4; }

// Throws where a kernel would meet a dtype that it does not know.
void check_dtypes(const LossParams& p) {
  for (Dtype dtype : {p.input.dtype, p.input_noise.dtype, p.weight.dtype, p.bias.dtype}) size_of(dtype);
  visit_label(p.target.dtype, [](auto) {});
}

template <class Wide>
cudaError_t large_loss(const LossParams& p, void* scratch, cudaStream_t stream) {
  const Loss<Wide> a(p);
  Arena arena(scratch);
  Workspace<Wide> w;
  w.place(arena, a);
  void* const sort = arena.take<unsigned char>(int64_t(sort_scratch(a.n)));
  cudaError_t error = prepare(a, w, sort, stream);
  if (error == cudaSuccess) error = centroids(a, w, p.input.dtype, p.norm, stream);
  if (error == cudaSuccess) error = margin_search(w.search, stream);
  if (error == cudaSuccess) error = variance(a, w, p.input.dtype, p.norm, stream);
  if (error == cudaSuccess) error = finish(a, w, p.norm, stream);
  return error;
}

template <class Wide>
cudaError_t large_backward(const LossBackwardParams& p, void* scratch, cudaStream_t stream) {
  const LossBackward<Wide> a(p);
  cudaError_t error = cudaSuccess;
  if (a.wants_features() && p.n > 0) error = variance_backward(a, p.input.dtype, p.norm, stream);
  const auto clear_grad = [&](const Output& grad, int64_t elements) {
    if (error != cudaSuccess || !grad.data) return;
    error = clear(grad.data, size_t(elements) * size_of(grad.dtype), stream);
  };
  clear_grad(p.grad_weight, p.num_classes * p.dim);
  clear_grad(p.grad_bias, p.num_classes);
  if (error != cudaSuccess || p.rows == 0 || !a.wants_classifier()) return error;
  return margin_backward(a, scratch, stream);
}

}  // namespace

template <class Wide>
void Workspace<Wide>::place_sums(Arena& arena, const Loss<Wide>& a) {
  groups = {.n = a.n,
            .rows = a.rows,
            .num_classes = a.num_classes,
            .chunk_size = chunk_size(a.n),
            .classes = a.classes,
            .slot = a.slot};
  groups.place(arena);
  partial = arena.take<Wide>(2 * (a.n / groups.chunk_size + 1) * a.dim);
  squares = arena.take<Wide>(2 * groups.max_chunks());
}
template void Workspace<float>::place_sums(Arena&, const Loss<float>&);
template void Workspace<double>::place_sums(Arena&, const Loss<double>&);

template <class Wide>
void Workspace<Wide>::place(Arena& arena, const Loss<Wide>& a) {
  place_sums(arena, a);
  groups.winner = a.winner;
  search.weight = a.weight, search.bias = a.bias, search.mu = a.boundary_grad;
  search.own = {a.weight, a.bias, a.classes}, search.present = &groups.totals->present;
  search.dim = a.dim, search.num_classes = a.num_classes, search.rows = a.rows;
  search.winner = a.winner;
  search.place(arena);
  quads = whole_quads(a.weight, a.dim) && reinterpret_cast<uintptr_t>(a.centroids) % 16 == 0;
  counts = arena.take<Wide>(a.rows);
  length = arena.take<Wide>(a.rows);
  tau = arena.take<Wide>(a.rows);
  row_terms = arena.take<Wide>(class_term::count * a.rows);
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
  check_dtypes(p);
  if (p.n > INT32_MAX || p.num_classes >= INT32_MAX) return cudaErrorInvalidValue;
  if (p.n == 0) {
    const cudaError_t error = clear(p.loss, wide_size(p.input.dtype), stream);
    return error == cudaSuccess ? clear(p.terms, num_terms * wide_size(p.input.dtype), stream) : error;
  }
  if (!p.input_noise) {  // the noisy view's pulls: nobody reads them, but results are to be the same in every run
    const size_t bytes = size_t(p.n) * wide_size(p.input.dtype);
    const cudaError_t error = clear(static_cast<unsigned char*>(p.pull) + bytes, bytes, stream);
    if (error != cudaSuccess) return error;
  }
  if (small_fits(p.n, p.dim, p.num_classes, wide_size(p.input.dtype))) return small_loss(p, stream);
  return for_wide(p.input.dtype, [&]<class Wide>(Wide) { return large_loss<Wide>(p, scratch, stream); });
}

size_t discriminative_loss_backward_scratch(const LossBackwardParams& p) {
  if (small_backward(p) || !(p.grad_weight.data || p.grad_bias.data)) return 0;
  size_t bytes = 0;
  for_wide(p.input.dtype, [&]<class Wide>(Wide) {
    bytes = margin_backward_scratch(LossBackward<Wide>(p));
    return cudaSuccess;
  });
  return bytes;
}

cudaError_t discriminative_loss_backward(const LossBackwardParams& p, void* scratch, cudaStream_t stream) {
  if (small_backward(p)) return small_loss_backward(p, stream);
  return for_wide(p.input.dtype, [&]<class Wide>(Wide) { return large_backward<Wide>(p, scratch, stream); });
}

}  // namespace robustfast::cuda
