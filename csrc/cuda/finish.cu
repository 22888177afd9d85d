// What is left once pulls and winners are known: the margin itself, from the rows of W of each class and of its winner,
// and all that a row gives to terms and gradients. One block per row.
#include "cuda/boundary.cuh"
#include "cuda/large.cuh"

namespace robustfast::cuda {
namespace {

constexpr int finish_threads = 256;

// A row's sums from those of its chunks, in order: squared hinges, and in mu_grad the sum of pulls.
template <class Wide>
RF_DEVICE void gather_chunks(const Loss<Wide>& a, const Workspace<Wide>& w, int64_t row, Wide (&squares)[2]) {
  const int64_t first = w.groups.first_chunk[row], chunks = w.groups.first_chunk[row + 1] - first;
  for (int64_t index = first; index < first + chunks; ++index) {
    squares[0] += w.squares[2 * index];
    squares[1] += w.squares[2 * index + 1];
  }
  if (chunks > 1) add_chunks(Chunk(w.groups, first), w.partial, a.dim, a.mu_grad + row * a.dim);
}

// What finish takes of a table's row, and where its tables are.
template <class Wide>
struct Rows {
  Wide delta_dist, beta, gamma;
  int64_t dim;
  bool quads;                 // all rows are made of fours
  ClassifierRows own, other;  // W_c and b_c, W_w and b_w
  const Wide *counts, *tau, *centroid;
  Wide *mu_grad, *boundary_grad, *boundary_bias;
  int32_t* winner;
};

// The boundary of a row with its winner, computed directly from the two rows of W. All threads of the block call it.
template <int count, class Wide>
RF_DEVICE Boundary<Wide> settle_boundary(const Rows<Wide>& r, int64_t row, bool exists, Wide beta_share) {
  const auto bias = [&](const ClassifierRows& of) {
    return exists && of.bias.data ? element<Wide>(of.bias, of.at(row)) : Wide(0);
  };
  const Wide* const mu = r.boundary_grad + row * r.dim;
  const Pair<Wide> pair(bias(r.other) - bias(r.own), [&](Wide times, Wide& logit, Wide& square) {
    Wide sums[2] = {0, 0};
#pragma unroll 1
    for (int64_t d = int64_t(threadIdx.x) * count; exists && d < r.dim; d += finish_threads * count) {
      const auto other = load_elements<Wide, count>(r.other.weight, r.other.at(row), d),
                 own = load_elements<Wide, count>(r.own.weight, r.own.at(row), d);
      const auto mean = load_pack<count>(mu, d, r.dim);
      RF_UNROLL
      for (int k = 0; k < count; ++k) {
        const Wide normal = other.value[k] - own.value[k], scaled = normal * times;
        sums[0] += normal * mean.value[k];
        sums[1] += scaled * scaled;
      }
    }
    block_sum(sums);
    logit = sums[0], square = sums[1];
  });
  return Boundary<Wide>(pair, exists, r.delta_dist, beta_share);
}

// The margin of a row and its gradients: pull_sum becomes mu_grad, mu boundary_grad. Every thread gets the hinge.
template <int norm, int count, class Wide>
RF_DEVICE Wide finish_row(const Rows<Wide>& r, int64_t row, Wide present, Wide length) {
  Wide *pull_sum = r.mu_grad + row * r.dim, *mu = r.boundary_grad + row * r.dim;
  const Wide *centroid = r.centroid + row * r.dim, samples = r.counts[row], tau = r.tau[row];
  const int32_t winner = r.winner[row];
  const Boundary<Wide> boundary = settle_boundary<count>(r, row, winner >= 0, r.beta / present);
  const bool active = boundary.active();
  const Wide to_zero = r.gamma / present * inverse_length<norm>(length);
#pragma unroll 1
  for (int64_t d = int64_t(threadIdx.x) * count; d < r.dim; d += finish_threads * count) {
    Pack<Wide, count> mu_grad = load_pack<count>(pull_sum, d, r.dim), boundary_grad = {};
    const auto m = load_pack<count>(centroid, d, r.dim);
    RF_UNROLL
    for (int k = 0; k < count; ++k) {
      mu_grad.value[k] = tau * (to_zero * direction<norm>(m.value[k]) - mu_grad.value[k]);
    }
    if (active) {
      const auto other = load_elements<Wide, count>(r.other.weight, r.other.at(row), d),
                 own = load_elements<Wide, count>(r.own.weight, r.own.at(row), d);
      const auto mean = load_pack<count>(mu, d, r.dim);
      RF_UNROLL
      for (int k = 0; k < count; ++k) {
        const Wide normal = other.value[k] - own.value[k];
        mu_grad.value[k] += boundary.mu_grad(normal);
        boundary_grad.value[k] = boundary.boundary_grad(normal, mean.value[k]);
      }
    }
    RF_UNROLL
    for (int k = 0; k < count; ++k) mu_grad.value[k] /= samples;
    store_pack<Reuse::soon>(pull_sum, d, r.dim, mu_grad);
    store_pack<Reuse::soon>(mu, d, r.dim, boundary_grad);
  }
  __syncthreads();  // all threads have read the winner of the search
  if (threadIdx.x == 0) {
    if (!active) r.winner[row] = -1;
    r.boundary_bias[row] = boundary.boundary_bias();
  }
  return boundary.margin;
}

template <int norm, class Wide>
RF_DEVICE Wide finish_row(const Rows<Wide>& r, int64_t row, Wide present, Wide length) {
  return r.quads ? finish_row<norm, quad>(r, row, present, length) : finish_row<norm, 1>(r, row, present, length);
}

template <class Wide>
RF_DEVICE void sum_rows(const Loss<Wide>& a, const Workspace<Wide>& w) {
  const int32_t present = w.groups.totals->present;
  Wide sum[class_term::count] = {};
  RF_UNROLL
  for (int term = 0; term < class_term::count; ++term) {
    for (int32_t row = int32_t(threadIdx.x); row < present; row += finish_threads) {
      sum[term] += w.row_terms[term * a.rows + row];
    }
  }
  block_sum(sum);
  if (threadIdx.x == 0) a.write_terms(present, sum);
}

template <int norm, class Wide>
__global__ void __launch_bounds__(finish_threads, sizeof(Wide) == 4 ? 4 : 2)
    finish_kernel(const Loss<Wide> a, const Workspace<Wide> w, const Rows<Wide> rows) {
  const int32_t present = w.groups.totals->present;
  if (present == 0 && blockIdx.x == 0) return sum_rows(a, w);
  const int64_t row = blockIdx.x;
  if (row >= present) return;
  Wide squares[2] = {0, 0};
  gather_chunks(a, w, row, squares);
  const Wide samples = rows.counts[row], length = w.length[row];
  const Wide margin = finish_row<norm>(rows, row, Wide(present), length);
  if (threadIdx.x == 0) {
    const Wide terms[class_term::count] = {squares[0] / samples, squares[1] / samples, margin, length};
    RF_UNROLL
    for (int term = 0; term < class_term::count; ++term) w.row_terms[term * a.rows + row] = terms[term];
  }
  if (last_to_arrive(w.groups.finished, unsigned(present))) sum_rows(a, w);
}

// What the blocks of the step alone leave one another.
template <class Wide>
struct FinishMemory {
  int32_t* present;
  unsigned* finished;
  Wide* row_terms;  // (rows, 2): margin, regularization

  FinishMemory(Arena& arena, int64_t rows)
      : present(arena.take<int32_t>(1)), finished(arena.take<unsigned>(1)), row_terms(arena.take<Wide>(2 * rows)) {}
};

template <class Wide>
__global__ void __launch_bounds__(finish_threads) count_kernel(const Wide* counts, int64_t rows, FinishMemory<Wide> m) {
  int32_t count[1] = {0};
  for (int64_t row = threadIdx.x; row < rows; row += finish_threads) count[0] += counts[row] > Wide(0);
  block_sum(count);
  if (threadIdx.x == 0) *m.present = count[0], *m.finished = 0;
}

// The step alone, one block per row.
template <int norm, class Wide>
__global__ void __launch_bounds__(finish_threads, sizeof(Wide) == 4 ? 4 : 2)
    finish_step_kernel(const Rows<Wide> r, const FinishMemory<Wide> m, Wide* terms) {
  const int64_t row = blockIdx.x;
  const Wide present = Wide(*m.present);
  Wide length[1] = {0}, margin = 0;
  if (r.counts[row] > Wide(0)) {
    for (int64_t d = threadIdx.x; d < r.dim; d += finish_threads)
      length[0] += norm_term<norm>(r.centroid[row * r.dim + d]);
    block_sum(length);
    length[0] = length_of<norm>(length[0]);
    margin = finish_row<norm>(r, row, present, length[0]);
  } else {
    for (int64_t d = threadIdx.x; d < r.dim; d += finish_threads) {
      r.mu_grad[row * r.dim + d] = r.boundary_grad[row * r.dim + d] = 0;
    }
    if (threadIdx.x == 0) r.winner[row] = -1, r.boundary_bias[row] = 0;
  }
  if (threadIdx.x == 0) m.row_terms[2 * row] = margin, m.row_terms[2 * row + 1] = length[0];
  if (!last_to_arrive(m.finished, gridDim.x)) return;
  Wide sums[2] = {0, 0};
  for (int64_t k = threadIdx.x; k < gridDim.x; k += finish_threads) {
    sums[0] += m.row_terms[2 * k];
    sums[1] += m.row_terms[2 * k + 1];
  }
  block_sum(sums);
  const Wide classes = present > Wide(0) ? present : Wide(1);
  if (threadIdx.x == 0) terms[0] = sums[0] / classes, terms[1] = sums[1] / classes;
}

}  // namespace

template <class Wide>
cudaError_t finish(const Loss<Wide>& a, const Workspace<Wide>& w, int64_t norm, cudaStream_t stream) {
  const Rows<Wide> rows = {
      .delta_dist = a.delta_dist,
      .beta = a.beta,
      .gamma = a.gamma,
      .dim = a.dim,
      .quads = w.quads,
      .own = w.search.own,
      .other = {a.weight, a.bias, a.winner},
      .counts = w.counts,
      .tau = w.tau,
      .centroid = a.centroid,
      .mu_grad = a.mu_grad,
      .boundary_grad = a.boundary_grad,
      .boundary_bias = a.boundary_bias,
      .winner = a.winner,
  };
  const auto kernel = norm == 1 ? finish_kernel<1, Wide> : finish_kernel<2, Wide>;
  return launch(kernel, unsigned(a.rows), finish_threads, 0, stream, a, w, rows);
}
template cudaError_t finish(const Loss<float>&, const Workspace<float>&, int64_t, cudaStream_t);
template cudaError_t finish(const Loss<double>&, const Workspace<double>&, int64_t, cudaStream_t);

size_t finish_scratch(const FinishParams& p) {
  Arena arena(nullptr);
  for_wide(p.wide, [&]<class Wide>(Wide) {
    FinishMemory<Wide>(arena, p.rows);
    return cudaSuccess;
  });
  return arena.used();
}

cudaError_t finish(const FinishParams& p, void* scratch, cudaStream_t stream) {
  return for_wide(p.wide, [&]<class Wide>(Wide) {
    if (p.rows == 0) return clear(p.terms, 2 * sizeof(Wide), stream);
    if (p.rows > INT32_MAX) return cudaErrorInvalidValue;
    Arena arena(scratch);
    const FinishMemory<Wide> memory(arena, p.rows);
    const Rows<Wide> rows = {
        .delta_dist = Wide(p.settings.delta_dist),
        .beta = Wide(p.settings.beta),
        .gamma = Wide(p.settings.gamma),
        .dim = p.dim,
        .quads = whole_quads(p.own.weight, p.dim) && whole_quads(p.other.weight, p.dim) &&
                 reinterpret_cast<uintptr_t>(p.centroid) % 16 == 0,
        .own = p.own,
        .other = p.other,
        .counts = static_cast<const Wide*>(p.counts),
        .tau = static_cast<const Wide*>(p.tau),
        .centroid = static_cast<const Wide*>(p.centroid),
        .mu_grad = static_cast<Wide*>(p.mu_grad),
        .boundary_grad = static_cast<Wide*>(p.boundary_grad),
        .boundary_bias = static_cast<Wide*>(p.boundary_bias),
        .winner = p.winner,
    };
    const cudaError_t error = launch(count_kernel<Wide>, 1, finish_threads, 0, stream, rows.counts, p.rows, memory);
    if (error != cudaSuccess) return error;
    const auto kernel = p.norm == 1 ? finish_step_kernel<1, Wide> : finish_step_kernel<2, Wide>;
    return launch(kernel, unsigned(p.rows), finish_threads, 0, stream, rows, memory, static_cast<Wide*>(p.terms));
  });
}

}  // namespace robustfast::cuda
