// The whole loss in one block: a training step of the paper's size is launch overhead and little else.
#include "cuda/small.cuh"
#include "cuda/variance_backward.cuh"

namespace robustfast::cuda {
namespace {

constexpr int small_threads = 1024;
constexpr int64_t small_samples = 512, small_classes = 512;
constexpr int64_t small_products = 1 << 17;  // R K D: beyond it one multiprocessor takes longer than more launches

// The block's shared memory; `rows` arrays have room for R rows.
template <class Wide>
struct Small {
  Wide *weight, *mu, *center;        // (K, D), (R, D), (R, D)
  Wide* score;                       // (R, K)
  Wide *pull, *square;               // (2, N): as in docs/ops.md, and hinge squared
  Wide* row_terms;                   // (4, R): compactness, alignment, margin, regularization
  Wide *norm, *gain;                 // (R,): ||m_c||, d m_c / d mu_c
  Boundary<Wide>* boundary;          // (R,)
  int32_t *class_of_sample, *order;  // (N,)
  int32_t* row_of_class;             // (K,)
  int32_t *count, *begin, *winner;   // (R,)

  RF_INLINE size_t place(unsigned char* memory, int64_t n, int64_t dim, int64_t classes, int64_t rows) {
    Wide* wide = reinterpret_cast<Wide*>(memory);
    const auto next = [&](int64_t size) {
      Wide* at = wide;
      wide += size;
      return at;
    };
    weight = next(classes * dim), mu = next(rows * dim), center = next(rows * dim), score = next(rows * classes);
    pull = next(2 * n), square = next(2 * n), row_terms = next(4 * rows);
    norm = next(rows), gain = next(rows);
    boundary = reinterpret_cast<Boundary<Wide>*>(next(rows * int64_t(sizeof(Boundary<Wide>) / sizeof(Wide))));
    int32_t* integer = reinterpret_cast<int32_t*>(wide);
    class_of_sample = integer, order = class_of_sample + n, row_of_class = order + n;
    count = row_of_class + classes, begin = count + rows, winner = begin + rows;
    return size_t(reinterpret_cast<unsigned char*>(winner + rows) - memory);
  }
};

// Rows in ascending order of class, samples of a row in the batch's order. Returns P.
template <class Wide>
RF_DEVICE int32_t group(const Loss<Wide>& a, const Small<Wide>& s) {
  const int32_t t = int32_t(threadIdx.x), n = int32_t(a.n), classes = int32_t(a.num_classes);
  if (t < classes) s.row_of_class[t] = -1;
  __syncthreads();
  const int32_t mine = t < n ? class_of(a.target, t, classes, a.ignore_index) : classes;
  if (t < n) s.class_of_sample[t] = mine;
  if (mine < classes) s.row_of_class[mine] = 0;
  __syncthreads();
  const bool present = t < classes && s.row_of_class[t] == 0;
  int32_t rows;
  const int32_t row = block_scan(int32_t(present), rows);
  if (present) s.row_of_class[t] = row;
  if (t >= rows && t < a.capacity) a.classes[t] = a.winner[t] = -1;
  __syncthreads();
  int32_t before = 0, count = 0;
  const int32_t slot = mine < classes ? s.row_of_class[mine] : -1;
  if (slot >= 0) {
    for (int32_t j = 0; j < n; ++j) {
      const bool same = s.class_of_sample[j] == mine;
      before += same && j < t;
      count += same;
    }
    if (before == 0) {
      s.count[slot] = count;
      s.gain[slot] = momentum_tau(a.seen[mine], a.momentum);
      a.classes[slot] = mine;
    }
  }
  if (t < n) a.slot[t] = slot;
  __syncthreads();
  int32_t counted;
  const int32_t begin = block_scan(t < rows ? s.count[t] : 0, counted);
  if (t < rows) s.begin[t] = begin;
  __syncthreads();
  if (slot >= 0) s.order[s.begin[slot] + before] = t;
  __syncthreads();
  return rows;
}

template <class T, class Wide>
RF_DEVICE void centroids(const Loss<Wide>& a, const Small<Wide>& s, int32_t rows) {
  const int32_t dim = int32_t(a.dim);
  for (int32_t e = int32_t(threadIdx.x); e < rows * dim; e += small_threads) {
    const int32_t row = e / dim, d = e % dim, c = a.classes[row];
    const int32_t* samples = s.order + s.begin[row];
    Wide sum = 0;
    for (int32_t j = 0; j < s.count[row]; ++j) sum += Wide(to_float(row_of<T>(a.input, samples[j])[d]));
    const Wide mu = sum / Wide(s.count[row]);
    s.mu[e] = mu;
    s.center[e] = momentum_centroid(mu, a.centroids[int64_t(c) * dim + d], a.seen[c], a.momentum);
    a.center[e] = s.center[e];
  }
  for (int32_t e = int32_t(threadIdx.x); e < int32_t(a.num_classes) * dim; e += small_threads) {
    s.weight[e] = element<Wide>(a.weight, e / dim, e % dim);
  }
  __syncthreads();
}

// The next three take one sample, row or pair each, and are called by a whole warp.

template <class T, int norm, class Wide>
RF_DEVICE void sample_variance(const Loss<Wide>& a, const Small<Wide>& s, int32_t rows, int32_t i) {
  const int32_t c = s.class_of_sample[i];
  if (c == a.num_classes) return;
  const int32_t row = s.row_of_class[c];
  const Wide* center = s.center + row * a.dim;
  for (int view = 0; view < (a.input_noise.data ? 2 : 1); ++view) {
    const T* x = row_of<T>(view == 0 ? a.input : a.input_noise, i);
    Wide length = 0;
    for (int32_t d = lane_id(); d < a.dim; d += 32) length += norm_term<norm>(Wide(to_float(x[d])) - center[d]);
    length = length_of<norm>(lanes_sum(length));
    const Wide excess = hinge(length - a.delta_var);
    if (lane_id() == 0) {
      const Wide weight = a.share() / (Wide(rows) * Wide(s.count[row]));
      a.pull[view * a.n + i] = s.pull[view * a.n + i] = pull<norm>(length, a.delta_var, weight);
      s.square[view * a.n + i] = excess * excess;
    }
  }
}

template <int norm, class Wide>
RF_DEVICE void row_norm_and_state(const Loss<Wide>& a, const Small<Wide>& s, int32_t row) {
  const Wide* center = s.center + row * a.dim;
  Wide terms = 0;
  int32_t infinite = 0;
  for (int32_t d = lane_id(); d < a.dim; d += 32) {
    terms += norm_term<norm>(center[d]);
    infinite += !is_finite(center[d]);
  }
  terms = length_of<norm>(lanes_sum(terms));
  if (lane_id() == 0) s.norm[row] = terms;
  if (lanes_sum(infinite) > 0 || !a.update_state) return;
  const int64_t c = a.classes[row];
  for (int32_t d = lane_id(); d < a.dim; d += 32) a.centroids[c * a.dim + d] = center[d];
  if (lane_id() == 0) a.seen[c] = true;
}

template <class Wide>
struct Pair {
  Wide logit, square;
};

// (W_i - W_c) . mu_c and ||W_i - W_c||^2, directly.
template <class Wide>
RF_DEVICE Pair<Wide> compare(const Loss<Wide>& a, const Small<Wide>& s, int32_t row, int32_t i) {
  const Wide *other = s.weight + i * a.dim, *own = s.weight + a.classes[row] * a.dim, *mu = s.mu + row * a.dim;
  Pair<Wide> pair{0, 0};
  for (int32_t d = lane_id(); d < a.dim; d += 32) {
    const Wide normal = other[d] - own[d];
    pair.logit += normal * mu[d];
    pair.square += normal * normal;
  }
  pair.logit = lanes_sum(pair.logit), pair.square = lanes_sum(pair.square);
  if (a.bias.data) pair.logit += element<Wide>(a.bias, i, 0) - element<Wide>(a.bias, a.classes[row], 0);
  return pair;
}

template <class Wide>
RF_DEVICE void pair_score(const Loss<Wide>& a, const Small<Wide>& s, int32_t row, int32_t i) {
  const Pair<Wide> pair = compare(a, s, row, i);
  if (lane_id() == 0) {
    s.score[row * a.num_classes + i] = pair.square == Wide(0) ? Wide(-INFINITY) : pair.logit / square_root(pair.square);
  }
}

// What is left of a row once its samples, its norm and its pairs are known; called by a whole warp.
template <class Wide>
RF_DEVICE void finish_row(const Loss<Wide>& a, const Small<Wide>& s, int32_t rows, int32_t row) {
  Best<Wide> best = Best<Wide>::none();
  for (int32_t i = lane_id(); i < a.num_classes; i += 32) best.consider(s.score[row * a.num_classes + i], i);
  for (int mask = 16; mask > 0; mask /= 2) consider_lane(best, mask);
  const bool exists = best.score != Wide(-INFINITY);
  const int32_t winner = exists ? best.winner : 0;
  const Pair<Wide> pair = compare(a, s, row, winner);
  const Boundary<Wide> boundary(pair.logit, pair.square, exists, a.delta_dist, a.beta / Wide(rows));
  Wide square[2] = {0, 0};
  for (int32_t j = lane_id(); j < s.count[row]; j += 32) {
    const int32_t i = s.order[s.begin[row] + j];
    square[0] += s.square[i];
    if (a.input_noise.data) square[1] += s.square[a.n + i];
  }
  square[0] = lanes_sum(square[0]), square[1] = lanes_sum(square[1]);
  if (lane_id() != 0) return;
  s.winner[row] = a.winner[row] = boundary.active() ? winner : -1;
  s.boundary[row] = boundary;
  a.boundary_bias[row] = boundary.to_bias();
  const Wide terms[4] = {square[0] / Wide(s.count[row]), square[1] / Wide(s.count[row]), boundary.margin, s.norm[row]};
  for (int term = 0; term < 4; ++term) s.row_terms[term * a.capacity + row] = terms[term];
}

template <class T, int norm, class Wide>
RF_DEVICE void row_gradients(const Loss<Wide>& a, const Small<Wide>& s, int32_t rows) {
  const int32_t dim = int32_t(a.dim);
  for (int32_t e = int32_t(threadIdx.x); e < rows * dim; e += small_threads) {
    const int32_t row = e / dim, d = e % dim, c = a.classes[row], winner = s.winner[row];
    const int32_t* samples = s.order + s.begin[row];
    const Wide center = s.center[e];
    Wide sum = a.gamma / Wide(rows) * inverse_length<norm>(s.norm[row]) * direction<norm>(center);
    for (int32_t j = 0; j < s.count[row]; ++j) {
      const int32_t i = samples[j];
      sum -= s.pull[i] * direction<norm>(Wide(to_float(row_of<T>(a.input, i)[d])) - center);
      if (!a.input_noise.data) continue;
      sum -= s.pull[a.n + i] * direction<norm>(Wide(to_float(row_of<T>(a.input_noise, i)[d])) - center);
    }
    sum *= s.gain[row];
    Wide to_weight = 0;
    if (winner >= 0) {
      const Wide normal = s.weight[winner * dim + d] - s.weight[c * dim + d];
      sum += s.boundary[row].to_centroid(normal);
      to_weight = s.boundary[row].to_weight(normal, s.mu[e]);
    }
    a.center_grad[e] = sum / Wide(s.count[row]);
    a.boundary_grad[e] = to_weight;
  }
}

template <class T, int norm, class Wide>
__global__ void __launch_bounds__(small_threads) small_kernel(const Loss<Wide> a) {
  Small<Wide> s;
  s.place(shared_memory(), a.n, a.dim, a.num_classes, a.capacity);
  const int32_t rows = group(a, s);
  centroids<T>(a, s, rows);
  const int32_t n = int32_t(a.n), classes = int32_t(a.num_classes);
  for (int32_t work = warp_id(); work < n + rows + rows * classes; work += small_threads / 32) {
    const int32_t pair = work - n - rows;
    if (work < n) {
      sample_variance<T, norm>(a, s, rows, work);
    } else if (pair < 0) {
      row_norm_and_state<norm>(a, s, work - n);
    } else {
      pair_score(a, s, pair / classes, pair % classes);
    }
  }
  __syncthreads();
  for (int32_t row = warp_id(); row < rows; row += small_threads / 32) finish_row(a, s, rows, row);
  __syncthreads();
  row_gradients<T, norm>(a, s, rows);
  if (warp_id() == 0) {
    Wide sum[4] = {0, 0, 0, 0};
    for (int term = 0; term < 4; ++term) {
      for (int32_t row = lane_id(); row < rows; row += 32) sum[term] += s.row_terms[term * a.capacity + row];
      sum[term] = lanes_sum(sum[term]);
    }
    if (lane_id() == 0) write_terms(a, rows, sum);
  }
}

template <class T, int norm, class Wide>
cudaError_t run(const Loss<Wide>& a, cudaStream_t stream) {
  Small<Wide> s;
  const size_t shared = s.place(nullptr, a.n, a.dim, a.num_classes, a.capacity);
  return launch(small_kernel<T, norm, Wide>, 1, small_threads, shared, stream, a);
}

// A row of the classifier's gradient: the sum over the rows r that it wins, less its own as a class of the batch.
template <class Wide>
RF_DEVICE void weight_gradient(const LossGrads<Wide>& a, Wide grad_loss, int64_t i) {
  for (int64_t d = lane_id(); d <= a.dim; d += 32) {  // column `dim` stands for the bias
    Wide sum = 0;
    for (int64_t row = 0; row < a.capacity; ++row) {
      const int sign = a.winner[row] < 0 ? 0 : int(a.winner[row] == i) - int(a.classes[row] == i);
      if (sign != 0) sum += Wide(sign) * (d < a.dim ? a.boundary_grad[row * a.dim + d] : a.boundary_bias[row]);
    }
    if (d < a.dim) {
      if (a.grad_weight.data) set_element(a.grad_weight, i * a.dim + d, grad_loss * sum);
    } else if (a.grad_bias.data) {
      set_element(a.grad_bias, i, grad_loss * sum);
    }
  }
}

// Blocks below `sample_blocks` take the features' gradients, the others a row of the classifier's per warp.
template <class T, int norm, class Wide>
__global__ void __launch_bounds__(variance_backward_threads)
    small_backward_kernel(const LossGrads<Wide> a, int64_t sample_blocks) {
  if (blockIdx.x < sample_blocks) {
    variance_backward<T, norm, 1>(a, blockIdx.x, sample_blocks);
  } else {
    const int64_t i = (blockIdx.x - sample_blocks) * num_warps() + warp_id();
    if (i < a.num_classes) weight_gradient(a, *a.grad_loss, i);
  }
}

template <class T, int norm, class Wide>
cudaError_t run_backward(const LossGrads<Wide>& a, cudaStream_t stream) {
  constexpr int warps = variance_backward_threads / 32;
  const int64_t sample_blocks = a.grad_input || a.grad_input_noise ? variance_backward_blocks(a.n, a.dim) : 0;
  const int64_t class_blocks = a.grad_weight.data || a.grad_bias.data ? (a.num_classes + warps - 1) / warps : 0;
  if (sample_blocks + class_blocks == 0) return cudaSuccess;
  return launch(small_backward_kernel<T, norm, Wide>, unsigned(sample_blocks + class_blocks), variance_backward_threads,
                0, stream, a, sample_blocks);
}

}  // namespace

bool small_fits(int64_t n, int64_t dim, int64_t num_classes, size_t wide_bytes) {
  if (n > small_samples || num_classes > small_classes) return false;
  const int64_t rows = n < num_classes ? n : num_classes;
  if (rows * num_classes * dim > small_products || n * dim > 1 << 17) return false;
  const size_t shared = wide_bytes == sizeof(double) ? Small<double>().place(nullptr, n, dim, num_classes, rows)
                                                     : Small<float>().place(nullptr, n, dim, num_classes, rows);
  return shared <= most_shared_bytes;
}

cudaError_t small_loss(const LossParams& params, cudaStream_t stream) {
  return for_wide(params.input.dtype, [&]<class Wide>(Wide) {
    return for_loss<Wide>(params.input.dtype, params.norm, [&](auto feature, auto norm) {
      return run<decltype(feature), norm()>(Loss<Wide>(params), stream);
    });
  });
}

cudaError_t small_loss_backward(const LossBackwardParams& params, cudaStream_t stream) {
  return for_wide(params.input.dtype, [&]<class Wide>(Wide) {
    return for_loss<Wide>(params.input.dtype, params.norm, [&](auto feature, auto norm) {
      return run_backward<decltype(feature), norm()>(LossGrads<Wide>(params), stream);
    });
  });
}

}  // namespace robustfast::cuda
