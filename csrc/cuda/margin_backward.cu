// The classifier's gradient: what the boundaries of the margin give to W's rows and to b. Entries are those of
// BoundaryClasses, grouped by the row of W that they go to, so that each is summed in a fixed order by one block.
#include "cuda/groups.cuh"
#include "cuda/large.cuh"

namespace robustfast::cuda {
namespace {

constexpr int margin_backward_threads = 256;

// A chunk's sum; column `dim` is the bias.
template <class Wide>
RF_DEVICE Wide chunk_sum(const LossBackward<Wide>& a, const Groups& groups, const Chunk& chunk, int64_t column) {
  Wide sum = 0;
#pragma unroll 4
  for (int32_t j = chunk.begin; j < chunk.end; ++j) {
    const int64_t entry = groups.order[j], row = entry < a.rows ? entry : entry - a.rows;
    const Wide value = column < a.dim ? a.boundary_grad[row * a.dim + column] : a.boundary_bias[row];
    sum += entry < a.rows ? value : -value;
  }
  return sum;
}

// One block per chunk; rows of the gradient that no boundary touches are zero already.
template <class Wide>
__global__ void __launch_bounds__(margin_backward_threads, 4)
    margin_backward_kernel(const LossBackward<Wide> a, const Groups groups, Wide* partial) {
  if (int64_t(blockIdx.x) >= groups.totals->chunks) return;
  const Chunk chunk(groups, blockIdx.x);
  const int32_t chunks = chunk.of_row();
  if (chunks > 1) {
    for (int64_t d = threadIdx.x; d <= a.dim; d += margin_backward_threads) {
      partial[chunk.place() * (a.dim + 1) + d] = chunk_sum(a, groups, chunk, d);
    }
    if (!last_to_arrive(groups.arrived + chunk.row, unsigned(chunks))) return;
  }
  const Wide grad_loss = *a.grad_loss;
  const int64_t i = groups.classes[chunk.row];
  for (int64_t d = threadIdx.x; d <= a.dim; d += margin_backward_threads) {
    Wide sum = 0;
    if (chunks == 1) sum = chunk_sum(a, groups, chunk, d);
    for (int32_t k = 0; chunks > 1 && k < chunks; ++k) sum += partial[chunk.place(k) * (a.dim + 1) + d];
    a.write_classifier(i, d, grad_loss * sum);
  }
}

template <class Wide>
struct BackwardMemory {
  Groups groups;
  Wide* partial;
  void* sort;

  BackwardMemory(Arena& arena, const LossBackward<Wide>& a) {
    const int64_t entries = 2 * a.rows;
    groups = {.n = entries, .rows = entries, .num_classes = a.num_classes, .chunk_size = 64, .slot = nullptr};
    groups.classes = arena.take<int32_t>(groups.rows);
    groups.place(arena);
    partial = arena.take<Wide>(2 * (groups.n / groups.chunk_size + 1) * (a.dim + 1));
    sort = arena.take<unsigned char>(int64_t(sort_scratch(groups.n)));
  }
};

}  // namespace

template <class Wide>
size_t margin_backward_scratch(const LossBackward<Wide>& a) {
  Arena arena(nullptr);
  BackwardMemory<Wide>(arena, a);
  return arena.used();
}
template size_t margin_backward_scratch(const LossBackward<float>&);
template size_t margin_backward_scratch(const LossBackward<double>&);

template <class Wide>
cudaError_t margin_backward(const LossBackward<Wide>& a, void* scratch, cudaStream_t stream) {
  Arena arena(scratch);
  const BackwardMemory<Wide> memory(arena, a);
  const BoundaryClasses classes{a.classes, a.winner, a.rows, a.num_classes};
  cudaError_t error = group_boundaries(classes, memory.groups, memory.sort, stream);
  if (error != cudaSuccess) return error;
  return launch(margin_backward_kernel<Wide>, unsigned(memory.groups.max_chunks()), margin_backward_threads, 0, stream,
                a, memory.groups, memory.partial);
}
template cudaError_t margin_backward(const LossBackward<float>&, void*, cudaStream_t);
template cudaError_t margin_backward(const LossBackward<double>&, void*, cudaStream_t);

}  // namespace robustfast::cuda
