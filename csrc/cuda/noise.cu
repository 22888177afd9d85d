// The noise: Philox, Box and Muller's transform, clip and normalisation in registers between one read and one write of
// each element. A thread takes the elements of whole Philox counters, which are neighbours in a plane; where channels
// are interleaved it takes the same pixels of all three. Bound by memory, closely followed by integer arithmetic.
#include <type_traits>

#include "common/divide.h"
#include "cuda/device.cuh"
#include "cuda/kernels.h"
#include "cuda/normal.cuh"

namespace robustfast::cuda {
namespace {

constexpr int noise_threads = 256;
constexpr int64_t max_groups = int64_t(1) << 30;  // what indices of 32 bits count, and threads past the end

// ---- what is computed of an element ----

template <class Wide>
struct Clip {
  Wide low, high;
  RF_DEVICE Wide operator()(Wide x) const { return min_nan(max_nan(x, low), high); }  // nan passes
  RF_DEVICE bool passes(Wide x) const { return low <= x && x <= high; }
};

// An op: from the noise (of which distribution) and the inputs of an element to its outputs. `Channel` is what it knows
// of a channel.
template <class F, Distribution of>
struct Add {
  using Wide = F;
  static constexpr Distribution distribution = of;
  static constexpr int inputs = 1, outputs = 1;
  Clip<Wide> clip;

  struct Channel {};
  RF_DEVICE Channel channel(int64_t) const { return {}; }
  RF_DEVICE void operator()(Channel, Wide noise, const Wide (&in)[inputs], Wide (&out)[outputs]) const {
    out[0] = clip(rounded_sum(in[0], noise));
  }
};

template <class F, Distribution of>
struct AddBackward {
  using Wide = F;
  static constexpr Distribution distribution = of;
  static constexpr int inputs = 2, outputs = 1;  // grad, input
  Clip<Wide> clip;

  struct Channel {};
  RF_DEVICE Channel channel(int64_t) const { return {}; }
  RF_DEVICE void operator()(Channel, Wide noise, const Wide (&in)[inputs], Wide (&out)[outputs]) const {
    out[0] = clip.passes(rounded_sum(in[1], noise)) ? in[0] : Wide(0);
  }
};

template <class F>
struct NormalizedPair {
  using Wide = F;
  static constexpr Distribution distribution = Distribution::gaussian;
  static constexpr int inputs = 1, outputs = 2;  // images; clean, noisy
  Clip<Wide> clip;
  const float *mean, *pixel_std;

  struct Channel {  // (x - mean) / std = x scale + shift
    Wide scale, shift;
  };
  RF_DEVICE Channel channel(int64_t c) const {
    const Wide scale = reciprocal(Wide(pixel_std[c]));
    return {scale, -Wide(mean[c]) * scale};
  }
  RF_DEVICE void operator()(Channel c, Wide noise, const Wide (&in)[inputs], Wide (&out)[outputs]) const {
    out[0] = fused(in[0], c.scale, c.shift);
    out[1] = fused(clip(rounded_sum(in[0], noise)), c.scale, c.shift);
  }
};

template <class F>
struct NormalizedPairBackward {
  using Wide = F;
  static constexpr Distribution distribution = Distribution::gaussian;
  static constexpr int inputs = 3, outputs = 1;  // grad_clean, grad_noisy, images
  Clip<Wide> clip;
  const float* pixel_std;

  struct Channel {
    Wide scale;
  };
  RF_DEVICE Channel channel(int64_t c) const { return {reciprocal(Wide(pixel_std[c]))}; }
  RF_DEVICE void operator()(Channel c, Wide noise, const Wide (&in)[inputs], Wide (&out)[outputs]) const {
    out[0] = (in[0] + (clip.passes(rounded_sum(in[2], noise)) ? in[1] : Wide(0))) * c.scale;
  }
};

// ---- the noise of an element ----

// Four numbers, times the scale: those of elements 4 quad ... 4 quad + 3 of a sample.
template <Distribution distribution>
RF_DEVICE void quad_noise(uint64_t seed, const SampleNoise& sample, uint32_t quad, float (&value)[4]) {
  const Words words = philox4x32({quad, uint32_t(sample.sample_id), uint32_t(sample.sample_id >> 32), sample.draw},
                                 uint32_t(seed), uint32_t(seed >> 32));
  const Pair first = transform<distribution, Approximations>(words.w0, words.w1, sample.scale);
  const Pair second = transform<distribution, Approximations>(words.w2, words.w3, sample.scale);
  value[0] = first.first, value[1] = first.second, value[2] = second.first, value[3] = second.second;
}

// ---- operands ----

template <class Op>
struct Operands {
  Matrix in[Op::inputs];
  Output out[Op::outputs];
};

// `count` neighbouring elements, in the widest accesses that divide them.
template <class T, int count>
struct Elements {
  static constexpr int bytes = count * sizeof(T), width = bytes % 16 == 0 ? 16 : bytes % 8 == 0 ? 8 : 4;
  using Word = std::conditional_t<width == 16, Vector16, std::conditional_t<width == 8, uint64_t, uint32_t>>;
  static constexpr int words = bytes / width;
  T value[count];

  RF_DEVICE void load(const T* from) {
    Word word[words];
    RF_UNROLL
    for (int w = 0; w < words; ++w) {
      if constexpr (width == 16) {
        word[w] = load16_once(from + w * (16 / sizeof(T)));
      } else {
        word[w] = reinterpret_cast<const Word*>(from)[w];
      }
    }
    memcpy(value, word, bytes);
  }

  RF_DEVICE void store(T* to) const {
    static_assert(width == 16, "outputs are written 16 bytes at a time");
    Word word[words];
    memcpy(word, value, bytes);
    RF_UNROLL
    for (int w = 0; w < words; ++w) store16_once(to + w * (16 / sizeof(T)), word[w]);
  }

  template <class Wide>
  RF_DEVICE Wide widened(int at) const {
    if constexpr (std::is_same_v<T, uint8_t> && std::is_same_v<Wide, float>) {
      uint32_t word;
      memcpy(&word, value + at / 4 * 4, 4);
      // float_of_byte(x) is 2^23 + x, and what is taken off is exact: x / 255 is rounded once. Conversions are slower.
      return fused(float_of_byte(word, at % 4), 1.0f / 255, -0x1p23f * (1.0f / 255));
    } else {
      return pixel<Wide>(value[at]);
    }
  }
};

// ---- whole groups: every operand dense and aligned ----

// Neighbours of a channel that a thread takes: a whole number of quads, and of 16-byte words of the output.
template <class Out>
constexpr int group_size = 16 / sizeof(Out) > 4 ? 16 / sizeof(Out) : 4;

// Groups that a thread takes, a block's width apart: they share what Philox makes of the key.
template <class Out, int interleaved>
constexpr int group_rounds = interleaved == 1 && sizeof(Out) < 8 ? 16 / group_size<Out> : 1;

// The groups of a batch, in the order of memory: `of_plane` of them in each plane, or in each `interleaved` planes, of
// which a sample has `planes`.
struct Groups {
  uint32_t count;
  Divider of_plane, planes;
};

// A group's sample, its channel (the first one) and the first of its quads in that.
struct Place {
  SampleNoise sample;
  uint32_t channel, quad;
};

template <int size, int interleaved>
RF_DEVICE Place place_of(uint32_t group, const Groups& groups, const Noise& noise) {
  const uint32_t plane = groups.of_plane.divide(group), sample = groups.planes.divide(plane);
  const uint32_t channel = (plane - sample * groups.planes.divisor) * interleaved;  // 0 where they are interleaved
  return {of_sample(noise, sample), channel, (group - plane * groups.of_plane.divisor) * (size / 4)};
}

template <class Op, class In, class Out, int interleaved>
RF_DEVICE void compute_group(const Op& op, uint64_t seed, const Place& place, uint32_t quads_of_plane,
                             const Elements<In, interleaved * group_size<Out>> (&in)[Op::inputs],
                             Elements<Out, interleaved * group_size<Out>> (&out)[Op::outputs]) {
  using Wide = typename Op::Wide;
  RF_UNROLL
  for (int c = 0; c < interleaved; ++c) {
    const typename Op::Channel channel = op.channel(place.channel + c);
    const uint32_t first_quad = (place.channel + c) * quads_of_plane + place.quad;
    RF_UNROLL
    for (int quad = 0; quad < group_size<Out> / 4; ++quad) {
      float values[4];
      quad_noise<Op::distribution>(seed, place.sample, first_quad + quad, values);
      RF_UNROLL
      for (int k = 0; k < 4; ++k) {
        const int at = (4 * quad + k) * interleaved + c;
        Wide from[Op::inputs], to[Op::outputs];
        RF_UNROLL
        for (int i = 0; i < Op::inputs; ++i) from[i] = in[i].template widened<Wide>(at);
        op(channel, Wide(values[k]), from, to);
        RF_UNROLL
        for (int o = 0; o < Op::outputs; ++o) out[o].value[at] = from_float<Out>(to[o]);
      }
    }
  }
}

template <class Op, class In, class Out, int interleaved>
__global__ void __launch_bounds__(noise_threads, interleaved == 1 && sizeof(typename Op::Wide) == 4 ? 3 : 2)
    groups_kernel(const Op op, const Noise noise, const Operands<Op> operands, const Groups groups) {
  constexpr int size = group_size<Out>, count = interleaved * size, rounds = group_rounds<Out, interleaved>;
  const uint64_t seed = uint64_t(*noise.seed);
  const uint32_t begin = blockIdx.x * (noise_threads * rounds) + threadIdx.x;
  uint32_t group[rounds];
  Place places[rounds];
  Elements<In, count> in[rounds][Op::inputs];
  RF_UNROLL
  for (int r = 0; r < rounds; ++r) {  // past the end the last group is computed again, so that nothing branches
    const uint32_t wanted = begin + r * noise_threads;
    group[r] = wanted < groups.count ? wanted : groups.count - 1;
    places[r] = place_of<size, interleaved>(group[r], groups, noise);
    RF_UNROLL
    for (int k = 0; k < Op::inputs; ++k) {
      in[r][k].load(static_cast<const In*>(operands.in[k].data) + int64_t(group[r]) * count);
    }
  }
  Elements<Out, count> out[rounds][Op::outputs];
  RF_UNROLL
  for (int r = 0; r < rounds; ++r) {
    compute_group<Op, In, Out, interleaved>(op, seed, places[r], groups.of_plane.divisor * (size / 4), in[r], out[r]);
  }
  RF_UNROLL
  for (int r = 0; r < rounds; ++r) {
    if (begin + r * noise_threads >= groups.count) return;
    RF_UNROLL
    for (int o = 0; o < Op::outputs; ++o) {
      out[r][o].store(static_cast<Out*>(operands.out[o].data) + int64_t(group[r]) * count);
    }
  }
}

// ---- any shape, alignment and dtypes: a thread takes one quad, element by element ----

template <class Wide>
RF_DEVICE Wide load_any(const Matrix& from, int64_t at) {
  return visit_image(from.dtype, [&](auto zero) { return pixel<Wide>(from.row<decltype(zero)>(0)[at]); });
}

template <class Wide>
RF_DEVICE void store_any(const Output& to, int64_t at, Wide value) {
  visit(to.dtype, [&](auto zero) { to.row<decltype(zero)>(0)[at] = from_float<decltype(zero)>(value); });
}

template <class Op>
__global__ void __launch_bounds__(noise_threads, 3)
    quads_kernel(const Op op, const Noise noise, const Samples samples, const Operands<Op> operands) {
  using Wide = typename Op::Wide;
  const int64_t size = samples.channels * samples.plane, quads = (size + 3) / 4;  // of a sample
  const int64_t thread = int64_t(blockIdx.x) * noise_threads + threadIdx.x;
  const int64_t sample = thread / quads, quad = thread - sample * quads;
  if (sample >= samples.count) return;
  float values[4];
  quad_noise<Op::distribution>(uint64_t(*noise.seed), of_sample(noise, sample), uint32_t(quad), values);
  RF_UNROLL
  for (int k = 0; k < 4; ++k) {
    const int64_t e = 4 * quad + k;
    if (e >= size) return;
    const int64_t channel = e / samples.plane;
    const int64_t at = samples.channels_last ? e % samples.plane * samples.channels + channel : e;
    Wide from[Op::inputs], to[Op::outputs];
    RF_UNROLL
    for (int i = 0; i < Op::inputs; ++i) {
      from[i] = load_any<Wide>(operands.in[i], sample * operands.in[i].stride + at);
    }
    op(op.channel(channel), Wide(values[k]), from, to);
    RF_UNROLL
    for (int o = 0; o < Op::outputs; ++o) store_any(operands.out[o], sample * operands.out[o].stride + at, to[o]);
  }
}

__global__ void __launch_bounds__(noise_threads)
    words_kernel(const int64_t* seed, int64_t sample_id, int64_t draw, int64_t quads, int64_t* words) {
  const int64_t quad = int64_t(blockIdx.x) * noise_threads + threadIdx.x;
  if (quad >= quads) return;
  const uint64_t key = uint64_t(*seed), id = uint64_t(sample_id);
  const Words made = philox4x32({uint32_t(quad), uint32_t(id), uint32_t(id >> 32), uint32_t(draw)}, uint32_t(key),
                                uint32_t(key >> 32));
  words[4 * quad] = made.w0, words[4 * quad + 1] = made.w1;
  words[4 * quad + 2] = made.w2, words[4 * quad + 3] = made.w3;
}

// ---- launches ----

// Whether an operand is one dense, aligned piece of memory.
bool whole(const void* data, int64_t stride, const Samples& s) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && (stride == s.channels * s.plane || s.count == 1);
}

template <class Op>
bool are(const Operands<Op>& operands, Dtype in, Dtype out, const Samples& s) {
  for (const Matrix& m : operands.in) {
    if (m.dtype != in || !whole(m.data, m.stride, s)) return false;
  }
  for (const Output& o : operands.out) {
    if (o.dtype != out || !whole(o.data, o.stride, s)) return false;
  }
  return true;
}

unsigned blocks_of(int64_t threads) { return unsigned((threads + noise_threads - 1) / noise_threads); }

template <class Op, class In, class Out, int interleaved>
cudaError_t launch_groups(const Op& op, const Noise& noise, const Samples& s, const Operands<Op>& operands,
                          cudaStream_t stream) {
  const Divider of_plane{uint32_t(s.plane / group_size<Out>)}, planes{uint32_t(s.channels / interleaved)};
  const Groups groups{uint32_t(s.count * planes.divisor * of_plane.divisor), of_plane, planes};
  const int64_t threads = (int64_t(groups.count) + group_rounds<Out, interleaved> - 1) / group_rounds<Out, interleaved>;
  return launch(groups_kernel<Op, In, Out, interleaved>, blocks_of(threads), noise_threads, 0, stream, op, noise,
                operands, groups);
}

// Runs the op on whole groups if its operands are In and Out and their layout allows that; false if not.
template <class In, class Out, class Op>
bool try_groups(Dtype in, Dtype out, const Op& op, const Noise& noise, const Samples& s, const Operands<Op>& operands,
                cudaStream_t stream, cudaError_t& error) {
  const int64_t interleaved = s.channels_last ? s.channels : 1;
  if (!are(operands, in, out, s) || s.plane % group_size<Out> != 0) return false;
  if (s.count * s.channels * (s.plane / group_size<Out>) > max_groups) return false;
  if (interleaved == 1) {
    error = launch_groups<Op, In, Out, 1>(op, noise, s, operands, stream);
  } else if (interleaved == 3) {
    error = launch_groups<Op, In, Out, 3>(op, noise, s, operands, stream);
  } else {
    return false;
  }
  return true;
}

template <class Op>
cudaError_t launch_quads(const Op& op, const Noise& noise, const Samples& s, const Operands<Op>& operands,
                         cudaStream_t stream) {
  return launch(quads_kernel<Op>, blocks_of(s.count * ((s.channels * s.plane + 3) / 4)), noise_threads, 0, stream, op,
                noise, s, operands);
}

// Operands of one dtype, of which Wide is the sum's; anything else goes element by element.
template <class Op>
cudaError_t run_same(const Op& op, const Noise& noise, const Samples& s, const Operands<Op>& operands,
                     cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  bool done = false;
  const Dtype dtype = operands.out[0].dtype;
  visit(dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (std::is_same_v<WideOf<T>, typename Op::Wide>) {
      done = try_groups<T, T>(dtype, dtype, op, noise, s, operands, stream, error);
    }
  });
  return done ? error : launch_quads(op, noise, s, operands, stream);
}

template <class Wide>
Clip<Wide> clip_of(const Noise& noise) {
  return {Wide(noise.low), Wide(noise.high)};
}

bool empty(const Samples& s) { return s.count * s.channels * s.plane == 0; }

// function(Wide()): double where the result is.
template <class Function>
cudaError_t for_result(Dtype dtype, const Function& function) {
  return dtype == Dtype::float64 ? function(double()) : function(float());
}

}  // namespace

cudaError_t add_noise(const Noise& noise, const Samples& samples, Matrix input, Output noisy, cudaStream_t stream) {
  if (empty(samples)) return cudaSuccess;
  return for_result(noisy.dtype, [&]<class Wide>(Wide) {
    const auto run = [&](auto op) {
      return run_same(op, noise, samples, Operands<decltype(op)>{{input}, {noisy}}, stream);
    };
    const auto clip = clip_of<Wide>(noise);
    return visit(noise.distribution, [&](auto of) { return run(Add<Wide, decltype(of)::value>{clip}); });
  });
}

cudaError_t add_noise_backward(const Noise& noise, const Samples& samples, Matrix grad, Matrix input, Output grad_input,
                               cudaStream_t stream) {
  if (empty(samples)) return cudaSuccess;
  return for_result(grad_input.dtype, [&]<class Wide>(Wide) {
    const auto run = [&](auto op) {
      return run_same(op, noise, samples, Operands<decltype(op)>{{grad, input}, {grad_input}}, stream);
    };
    const auto clip = clip_of<Wide>(noise);
    return visit(noise.distribution, [&](auto of) { return run(AddBackward<Wide, decltype(of)::value>{clip}); });
  });
}

cudaError_t noisy_pair(const Noise& noise, const Samples& samples, Matrix images, const float* mean,
                       const float* pixel_std, Output clean, Output noisy, cudaStream_t stream) {
  if (empty(samples)) return cudaSuccess;
  return for_result(clean.dtype, [&]<class Wide>(Wide) {
    using Op = NormalizedPair<Wide>;
    const Op op{clip_of<Wide>(noise), mean, pixel_std};
    const Operands<Op> operands = {{images}, {clean, noisy}};
    cudaError_t error = cudaSuccess;
    bool done = false;
    visit_features<Wide>(clean.dtype, [&](auto element) {
      using Out = decltype(element);
      done = try_groups<uint8_t, Out>(Dtype::uint8, clean.dtype, op, noise, samples, operands, stream, error);
      if constexpr (sizeof(Out) == 2) {
        if (!done)
          done = try_groups<float, Out>(Dtype::float32, clean.dtype, op, noise, samples, operands, stream, error);
      }
    });
    return done ? error : run_same(op, noise, samples, operands, stream);
  });
}

cudaError_t noisy_pair_backward(const Noise& noise, const Samples& samples, Matrix grad_clean, Matrix grad_noisy,
                                Matrix images, const float* pixel_std, Output grad_images, cudaStream_t stream) {
  if (empty(samples)) return cudaSuccess;
  return for_result(grad_clean.dtype, [&]<class Wide>(Wide) {
    using Op = NormalizedPairBackward<Wide>;
    const Operands<Op> operands = {{grad_clean, grad_noisy, images}, {grad_images}};
    return run_same(Op{clip_of<Wide>(noise), pixel_std}, noise, samples, operands, stream);
  });
}

cudaError_t philox_words(const int64_t* seed, int64_t sample_id, int64_t draw, int64_t quads, int64_t* words,
                         cudaStream_t stream) {
  if (quads == 0) return cudaSuccess;
  return launch(words_kernel, blocks_of(quads), noise_threads, 0, stream, seed, sample_id, draw, quads, words);
}

}  // namespace robustfast::cuda
