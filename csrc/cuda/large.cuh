// The loss of large problems, in six launches beside the sort of the labels if that does not fit one block:
//   prepare        rows of the batch, squared norms of the classifier's rows
//   centroids      mu_c, m_c, the state, the regularization of each row
//   margin_search  the winner of each row, in two: by matrix products, and from what these leave
//   variance       lengths, pulls and their sums
//   finish         the margin's boundaries, all that a row gives to terms and gradients
#pragma once

#include "cuda/groups.cuh"
#include "cuda/margin_search.cuh"
#include "cuda/pack.cuh"

namespace robustfast::cuda {

// What the kernels leave one another. Between centroids and finish, boundary_grad holds mu.
template <class Wide>
struct Workspace {
  Groups groups;
  MarginSearch<Wide> search;
  bool quads;                   // rows of W and of the state are made of fours
  Wide* partial;                // (places, dim): sums of the chunks of rows with several, see Chunk::place
  Wide* squares;                // (max_chunks, 2): squared hinges of each chunk's samples
  Wide *counts, *length, *tau;  // (rows): n_c, ||m_c||, d m_c / d mu_c
  Wide* row_terms;              // (class_term::count, rows)

  void place_sums(Arena& arena, const Loss<Wide>& a);  // groups, partial, squares: what a step of its own takes
  void place(Arena& arena, const Loss<Wide>& a);
};

// A step of its own over the samples, grouped by class: its arguments and what its scratch holds.
template <class Wide>
struct StepMemory {
  Loss<Wide> a;
  Workspace<Wide> w;
  void* sort;

  StepMemory(const LossParams& p, Arena& arena) : a(p) {
    a.classes = arena.take<int32_t>(a.rows);
    w.place_sums(arena, a);
    w.groups.slot_is_class = true;
    sort = arena.take<unsigned char>(int64_t(sort_scratch(a.n)));
  }

  cudaError_t group(cudaStream_t stream) const {
    return group_samples(SampleClasses{a.target, a.num_classes, a.ignore_index}, w.groups, sort, stream);
  }
};

template <template <class> class Memory>
size_t step_scratch(const LossParams& p) {
  Arena arena(nullptr);
  for_wide(p.input.dtype, [&]<class Wide>(Wide) {
    Memory<Wide>(p, arena);
    return cudaSuccess;
  });
  return arena.used();
}

// total[d] = the sum of a row's chunks, in order. Every thread of the block takes its columns.
template <class Wide>
RF_DEVICE void add_chunks(const Chunk& chunk, const Wide* partial, int64_t dim, Wide* total) {
  const int32_t chunks = chunk.of_row();
  for (int64_t d = threadIdx.x; d < dim; d += blockDim.x) {
    Wide sum = 0;
#pragma unroll 4
    for (int32_t k = 0; k < chunks; ++k) sum += partial[chunk.place(k) * dim + d];
    total[d] = sum;
  }
}

template <class Wide>
cudaError_t centroids(const Loss<Wide>& a, const Workspace<Wide>& w, Dtype features, int64_t norm, cudaStream_t stream);
template <class Wide>
cudaError_t variance(const Loss<Wide>& a, const Workspace<Wide>& w, Dtype features, int64_t norm, cudaStream_t stream);
template <class Wide>
cudaError_t finish(const Loss<Wide>& a, const Workspace<Wide>& w, int64_t norm, cudaStream_t stream);

template <class Wide>
cudaError_t variance_backward(const LossBackward<Wide>& a, Dtype features, int64_t norm, cudaStream_t stream);
template <class Wide>
size_t margin_backward_scratch(const LossBackward<Wide>& a);
template <class Wide>
cudaError_t margin_backward(const LossBackward<Wide>& a, void* scratch, cudaStream_t stream);

}  // namespace robustfast::cuda
