// The whole loss in one block: a training step of the paper's size is launch overhead and little else.
#include "cuda/arguments.cuh"
#include "cuda/boundary.cuh"
#include "cuda/dispatch.cuh"
#include "cuda/small.cuh"

namespace robustfast::cuda {
namespace {

constexpr int small_threads = 1024;
constexpr int64_t small_samples = 512, small_classes = 512;
constexpr int64_t small_products = 1 << 17;  // R K D: beyond it one multiprocessor takes longer than more launches

// The block's shared memory; `rows` arrays have room for R rows.
template <class Wide>
struct Small {
  Wide *weight, *mu, *centroid;      // (K, D), (R, D), (R, D)
  Wide* score;                       // (R, K)
  Wide *pull, *square;               // (2, N): as in docs/ops.md, and hinge squared
  Wide* row_terms;                   // (class_term::count, R)
  Wide *length, *tau;                // (R,): ||m_c||, d m_c / d mu_c
  Boundary<Wide>* boundary;          // (R,)
  int32_t *class_of_sample, *order;  // (N,)
  int32_t* row_of_class;             // (K,)
  int32_t *count, *begin, *winner;   // (R,)

  RF_INLINE size_t place(unsigned char* memory, int64_t n, int64_t dim, int64_t num_classes, int64_t rows) {
    Wide* wide = reinterpret_cast<Wide*>(memory);
    const auto next = [&](int64_t size) {
      Wide* at = wide;
      wide += size;
      return at;
    };
    weight = next(num_classes * dim), mu = next(rows * dim), centroid = next(rows * dim),
    score = next(rows * num_classes);
    pull = next(2 * n), square = next(2 * n), row_terms = next(class_term::count * rows);
    length = next(rows), tau = next(rows);
    boundary = reinterpret_cast<Boundary<Wide>*>(next(rows * int64_t(sizeof(Boundary<Wide>) / sizeof(Wide))));
    int32_t* integer = reinterpret_cast<int32_t*>(wide);
    class_of_sample = integer, order = class_of_sample + n, row_of_class = order + n;
    count = row_of_class + num_classes, begin = count + rows, winner = begin + rows;
    return size_t(reinterpret_cast<unsigned char*>(winner + rows) - memory);
  }
};

// Rows in ascending order of class, samples of a row in the batch's order. Returns P.
template <class Wide>
RF_DEVICE int32_t group(const Loss<Wide>& a, const Small<Wide>& s) {
  const int32_t t = int32_t(threadIdx.x), n = int32_t(a.n), classes = int32_t(a.num_classes);
  if (t < classes) s.row_of_class[t] = -1;
  __syncthreads();
  const int32_t mine = t < n ? class_of(label_at(a.target, t), classes, a.ignore_index) : classes;
  if (t < n) s.class_of_sample[t] = mine;
  if (mine < classes) s.row_of_class[mine] = 0;
  __syncthreads();
  const bool there = t < classes && s.row_of_class[t] == 0;
  int32_t present;
  const int32_t row = block_scan(int32_t(there), present);
  if (there) s.row_of_class[t] = row;
  if (t >= present && t < a.rows) a.classes[t] = a.winner[t] = -1;
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
      s.tau[slot] = momentum_tau(a.seen[mine], a.momentum);
      a.classes[slot] = mine;
    }
  }
  if (t < n) a.slot[t] = slot;
  __syncthreads();
  int32_t counted;
  const int32_t begin = block_scan(t < present ? s.count[t] : 0, counted);
  if (t < present) s.begin[t] = begin;
  __syncthreads();
  if (slot >= 0) s.order[s.begin[slot] + before] = t;
  __syncthreads();
  return present;
}

template <class T, class Wide>
RF_DEVICE void centroids(const Loss<Wide>& a, const Small<Wide>& s, int32_t present) {
  const int32_t dim = int32_t(a.dim);
  for (int32_t e = int32_t(threadIdx.x); e < present * dim; e += small_threads) {
    const int32_t row = e / dim, d = e % dim, c = a.classes[row];
    const int32_t* samples = s.order + s.begin[row];
    Wide sum = 0;
    for (int32_t j = 0; j < s.count[row]; ++j) sum += Wide(to_float(a.input.template row<T>(samples[j])[d]));
    const Wide mu = sum / Wide(s.count[row]);
    s.mu[e] = mu;
    s.centroid[e] = momentum_centroid(mu, a.centroids[int64_t(c) * dim + d], a.seen[c], a.momentum);
    a.centroid[e] = s.centroid[e];
  }
  for (int32_t e = int32_t(threadIdx.x); e < int32_t(a.num_classes) * dim; e += small_threads) {
    s.weight[e] = element<Wide>(a.weight, e / dim, e % dim);
  }
  __syncthreads();
}

// The next three take one sample, row or pair each, and are called by a whole warp.

template <class T, int norm, class Wide>
RF_DEVICE void sample_variance(const Loss<Wide>& a, const Small<Wide>& s, int32_t present, int32_t i) {
  const int32_t c = s.class_of_sample[i];
  if (c == a.num_classes) return;
  const int32_t row = s.row_of_class[c];
  const Wide* centroid = s.centroid + row * a.dim;
  for (int view = 0; view < (a.input_noise ? 2 : 1); ++view) {
    const T* x = (view == 0 ? a.input : a.input_noise).template row<T>(i);
    Wide length = 0;
    for (int32_t d = lane_id(); d < a.dim; d += 32) length += norm_term<norm>(Wide(to_float(x[d])) - centroid[d]);
    length = length_of<norm>(lanes_sum(length));
    const Wide excess = hinge(length - a.delta_var);
    if (lane_id() == 0) {
      const Wide share = a.view_weight(bool(a.input_noise)) / (Wide(present) * Wide(s.count[row]));
      a.pull[view * a.n + i] = s.pull[view * a.n + i] = pull<norm>(length, a.delta_var, share);
      s.square[view * a.n + i] = excess * excess;
    }
  }
}

template <int norm, class Wide>
RF_DEVICE void row_length_and_state(const Loss<Wide>& a, const Small<Wide>& s, int32_t row) {
  const Wide* centroid = s.centroid + row * a.dim;
  Wide terms = 0;
  int32_t infinite = 0;
  for (int32_t d = lane_id(); d < a.dim; d += 32) {
    terms += norm_term<norm>(centroid[d]);
    infinite += !is_finite(centroid[d]);
  }
  terms = length_of<norm>(lanes_sum(terms));
  if (lane_id() == 0) s.length[row] = terms;
  if (lanes_sum(infinite) > 0 || !a.update_state) return;
  const int64_t c = a.classes[row];
  for (int32_t d = lane_id(); d < a.dim; d += 32) a.centroids[c * a.dim + d] = centroid[d];
  if (lane_id() == 0) a.seen[c] = true;
}

// Called by a whole warp.
template <class Wide>
RF_DEVICE Pair<Wide> compare(const Loss<Wide>& a, const Small<Wide>& s, int32_t row, int32_t i) {
  const int32_t c = a.classes[row];
  const Wide *other = s.weight + i * a.dim, *own = s.weight + c * a.dim, *mu = s.mu + row * a.dim;
  const Wide bias = a.bias.data ? element<Wide>(a.bias, i) - element<Wide>(a.bias, c) : Wide(0);
  return Pair<Wide>(bias, [&](Wide times, Wide& logit, Wide& square) {
    logit = square = 0;
    for (int32_t d = lane_id(); d < a.dim; d += 32) {
      const Wide normal = other[d] - own[d], scaled = normal * times;
      logit += normal * mu[d];
      square += scaled * scaled;
    }
    logit = lanes_sum(logit), square = lanes_sum(square);
  });
}

template <class Wide>
RF_DEVICE void pair_score(const Loss<Wide>& a, const Small<Wide>& s, int32_t row, int32_t i) {
  const Pair<Wide> pair = compare(a, s, row, i);
  if (lane_id() == 0) s.score[row * a.num_classes + i] = pair.exists() ? pair.score() : Wide(-INFINITY);
}

// What is left of a row once its samples, its length and its pairs are known; called by a whole warp.
template <class Wide>
RF_DEVICE void finish_row(const Loss<Wide>& a, const Small<Wide>& s, int32_t present, int32_t row) {
  Best<Wide> best = Best<Wide>::none();
  for (int32_t i = lane_id(); i < a.num_classes; i += 32) best.consider(s.score[row * a.num_classes + i], i);
  for (int mask = 16; mask > 0; mask /= 2) consider_lane(best, mask);
  const bool exists = best.score != Wide(-INFINITY);
  const int32_t winner = exists ? best.winner : 0;
  const Pair<Wide> pair = compare(a, s, row, winner);
  const Boundary<Wide> boundary(pair, exists, a.delta_dist, a.beta / Wide(present));
  Wide square[2] = {0, 0};
  for (int32_t j = lane_id(); j < s.count[row]; j += 32) {
    const int32_t i = s.order[s.begin[row] + j];
    square[0] += s.square[i];
    if (a.input_noise) square[1] += s.square[a.n + i];
  }
  square[0] = lanes_sum(square[0]), square[1] = lanes_sum(square[1]);
  if (lane_id() != 0) return;
  s.winner[row] = a.winner[row] = boundary.active() ? winner : -1;
  s.boundary[row] = boundary;
  a.boundary_bias[row] = boundary.boundary_bias();
  const Wide terms[class_term::count] = {square[0] / Wide(s.count[row]), square[1] / Wide(s.count[row]),
                                         boundary.margin, s.length[row]};
  for (int term = 0; term < class_term::count; ++term) s.row_terms[term * a.rows + row] = terms[term];
}

template <class T, int norm, class Wide>
RF_DEVICE void row_gradients(const Loss<Wide>& a, const Small<Wide>& s, int32_t present) {
  const int32_t dim = int32_t(a.dim);
  for (int32_t e = int32_t(threadIdx.x); e < present * dim; e += small_threads) {
    const int32_t row = e / dim, d = e % dim, c = a.classes[row], winner = s.winner[row];
    const int32_t* samples = s.order + s.begin[row];
    const Wide centroid = s.centroid[e];
    Wide sum = a.gamma / Wide(present) * inverse_length<norm>(s.length[row]) * direction<norm>(centroid);
    for (int32_t j = 0; j < s.count[row]; ++j) {
      const int32_t i = samples[j];
      sum -= s.pull[i] * direction<norm>(Wide(to_float(a.input.template row<T>(i)[d])) - centroid);
      if (!a.input_noise) continue;
      sum -= s.pull[a.n + i] * direction<norm>(Wide(to_float(a.input_noise.template row<T>(i)[d])) - centroid);
    }
    sum *= s.tau[row];
    Wide boundary_grad = 0;
    if (winner >= 0) {
      const Wide normal = s.weight[winner * dim + d] - s.weight[c * dim + d];
      sum += s.boundary[row].mu_grad(normal);
      boundary_grad = s.boundary[row].boundary_grad(normal, s.mu[e]);
    }
    a.mu_grad[e] = sum / Wide(s.count[row]);
    a.boundary_grad[e] = boundary_grad;
  }
}

template <class T, int norm, class Wide>
__global__ void __launch_bounds__(small_threads) small_kernel(const Loss<Wide> a) {
  Small<Wide> s;
  s.place(shared_memory(), a.n, a.dim, a.num_classes, a.rows);
  const int32_t present = group(a, s);
  centroids<T>(a, s, present);
  const int32_t n = int32_t(a.n), classes = int32_t(a.num_classes);
  for (int32_t work = warp_id(); work < n + present + present * classes; work += small_threads / 32) {
    const int32_t pair = work - n - present;
    if (work < n) {
      sample_variance<T, norm>(a, s, present, work);
    } else if (pair < 0) {
      row_length_and_state<norm>(a, s, work - n);
    } else {
      pair_score(a, s, pair / classes, pair % classes);
    }
  }
  __syncthreads();
  for (int32_t row = warp_id(); row < present; row += small_threads / 32) finish_row(a, s, present, row);
  __syncthreads();
  row_gradients<T, norm>(a, s, present);
  if (warp_id() == 0) {
    Wide sum[class_term::count] = {};
    for (int term = 0; term < class_term::count; ++term) {
      for (int32_t row = lane_id(); row < present; row += 32) sum[term] += s.row_terms[term * a.rows + row];
      sum[term] = lanes_sum(sum[term]);
    }
    if (lane_id() == 0) a.write_terms(present, sum);
  }
}

template <class T, int norm, class Wide>
cudaError_t run(const Loss<Wide>& a, cudaStream_t stream) {
  Small<Wide> s;
  const size_t shared = s.place(nullptr, a.n, a.dim, a.num_classes, a.rows);
  return launch(small_kernel<T, norm, Wide>, 1, small_threads, shared, stream, a);
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

}  // namespace robustfast::cuda
