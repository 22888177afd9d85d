// Noise is made, and used, in pieces that fit the first cache: Philox in 64-bit lanes, Box and Muller's transform, and
// the elements of the batch are three loops over a piece.
#ifndef RF_ISA

#define RF_KERNEL "cpu/noise.cpp"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <span>

#include "cpu/lines.h"
#include "cpu/noise.h"
//
#include "cpu/each_isa.h"

namespace robustfast {

void add_noise(const Noise& noise, const Samples& samples, Matrix input, Output noisy) {
  RF_DISPATCH(add_noise, noise, samples, input, noisy);
}

void add_noise_backward(const Noise& noise, const Samples& samples, Matrix grad, Matrix input, Output grad_input) {
  RF_DISPATCH(add_noise_backward, noise, samples, grad, input, grad_input);
}

void noisy_pair(const Noise& noise, const Samples& samples, Matrix images, const float* mean, const float* pixel_std,
                Output clean, Output noisy) {
  RF_DISPATCH(noisy_pair, noise, samples, images, mean, pixel_std, clean, noisy);
}

void noisy_pair_backward(const Noise& noise, const Samples& samples, Matrix grad_clean, Matrix grad_noisy,
                         Matrix images, const float* pixel_std, Output grad_images) {
  RF_DISPATCH(noisy_pair_backward, noise, samples, grad_clean, grad_noisy, images, pixel_std, grad_images);
}

void philox_words(const int64_t* seed, int64_t sample_id, int64_t draw, int64_t quads, int64_t* words) {
  RF_DISPATCH(philox_words, seed, sample_id, draw, quads, words);
}

}  // namespace robustfast

#else

namespace robustfast {
namespace RF_ISA {

constexpr int64_t granule = 32;  // quads made at a time: whole vectors on every instruction set, so that an
                                 // element's bits do not depend on where in a loop it stands
constexpr int64_t line_elements = 4 * granule;  // of noise made at a time
constexpr int64_t piece_elements = 512;         // 2 KiB of noise, and a few times that of operands
constexpr int64_t tile_elements = 16384;        // a piece whose channels must be interleaved may be as large
constexpr int64_t thread_elements = 16384;      // less is not worth waking a thread

constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// ---- words and numbers ----

// 32-bit words in the low halves of 64-bit lanes, where one instruction gives both halves of their products. What the
// high halves hold does not matter.
typedef uint64_t Lanes __attribute__((vector_size(RF_VECTOR_BYTES)));
constexpr int64_t lanes = RF_VECTOR_BYTES / 8;

// `high` moves the high halves down, `both` has the low halves of `a` below those of `b`. On x86 they are shuffles,
// since shifts wait for the unit that multiplies.
#if !defined(__x86_64__)
RF_INLINE Lanes multiply(Lanes a, Lanes b) { return (a & 0xffffffff) * b; }
RF_INLINE Lanes high(Lanes a) { return a >> 32; }
RF_INLINE Lanes both(Lanes a, Lanes b) { return (a & 0xffffffff) | b << 32; }
#elif RF_VECTOR_BYTES == 64  // masked by ones: GCC 12 warns of its own header where there is no mask
RF_INLINE Lanes multiply(Lanes a, Lanes b) { return Lanes(_mm512_maskz_mul_epu32(0xff, __m512i(a), __m512i(b))); }
RF_INLINE Lanes high(Lanes a) { return Lanes(_mm512_maskz_shuffle_epi32(0xffff, __m512i(a), _MM_PERM_DDBB)); }
RF_INLINE Lanes both(Lanes a, Lanes b) {
  return Lanes(_mm512_mask_shuffle_epi32(__m512i(a), 0xaaaa, __m512i(b), _MM_PERM_CCAA));
}
#elif RF_VECTOR_BYTES == 32
RF_INLINE Lanes multiply(Lanes a, Lanes b) { return Lanes(_mm256_mul_epu32(__m256i(a), __m256i(b))); }
RF_INLINE Lanes high(Lanes a) { return Lanes(_mm256_shuffle_epi32(__m256i(a), 0xf5)); }
RF_INLINE Lanes both(Lanes a, Lanes b) {
  return Lanes(_mm256_blend_epi32(__m256i(a), _mm256_shuffle_epi32(__m256i(b), 0xa0), 0xaa));
}
#else
RF_INLINE Lanes multiply(Lanes a, Lanes b) { return Lanes(_mm_mul_epu32(__m128i(a), __m128i(b))); }
RF_INLINE Lanes high(Lanes a) { return Lanes(_mm_shuffle_epi32(__m128i(a), 0xf5)); }
RF_INLINE Lanes both(Lanes a, Lanes b) { return (a & 0xffffffff) | b << 32; }
#endif

RF_INLINE Lanes same(uint64_t word) { return Lanes{} + word; }

// Quads are made in `ways` vectors side by side: a round waits for its products, and other vectors fill the time.
constexpr int64_t ways = RF_VECTOR_BYTES == 64 ? 4 : 2;  // what the registers hold

// The keys of Philox's rounds, as wide as the lanes: a vector of one is a load then.
struct Keys {
  uint64_t word[10][2];

  explicit Keys(uint64_t seed) {
    for (uint32_t round = 0; round < 10; ++round) {
      word[round][0] = uint32_t(seed) + round * philox_weyl0;
      word[round][1] = uint32_t(seed >> 32) + round * philox_weyl1;
    }
  }
};

// philox4x32 of common/philox.h: the words of `granule` quads in the order of elements, w0 and w2 of each quad in
// `even`, w1 and w3 in `odd`.
struct Granule {
  alignas(64) uint32_t even[2 * granule], odd[2 * granule];

  Granule(const Keys& keys, uint64_t sample_id, uint32_t draw, int64_t quad) {
    // Of the first two rounds, what only the sample decides.
    const uint64_t product1 = wide_product(sample_id >> 32, philox_multiplier1);
    const uint32_t word0 = uint32_t(product1 >> 32) ^ uint32_t(sample_id) ^ uint32_t(keys.word[0][0]);
    const uint64_t product0 = wide_product(word0, philox_multiplier0);
    const Lanes added0 = same(draw ^ uint32_t(keys.word[0][1]));
    const Lanes added1 = same(uint32_t(product1) ^ uint32_t(keys.word[1][0]));
    const Lanes added2 = same(uint32_t(product0 >> 32) ^ uint32_t(keys.word[1][1])), word3 = same(uint32_t(product0));
    Lanes lane = {};
    for (int64_t i = 0; i < lanes; ++i) lane[i] = i;
    for (int64_t q = 0; q < granule; q += ways * lanes) {
      Lanes word[4][ways];
      for (int64_t k = 0; k < ways; ++k) {
        const Lanes first = multiply(lane + same(uint32_t(quad + q + k * lanes)), same(philox_multiplier0));
        const Lanes second = multiply(high(first) ^ added0, same(philox_multiplier1));
        word[0][k] = high(second) ^ added1;
        word[1][k] = second;
        word[2][k] = first ^ added2;
        word[3][k] = word3;
      }
      for (int round = 2; round < 10; ++round) next(word, keys.word[round]);
      for (int64_t k = 0; k < ways; ++k) {
        store(both(word[0][k], word[2][k]), even + 2 * (q + k * lanes));
        store(both(word[1][k], word[3][k]), odd + 2 * (q + k * lanes));
      }
    }
  }

  // A round.
  static RF_INLINE void next(Lanes (&word)[4][ways], const uint64_t (&key)[2]) {
    Lanes product0[ways], product1[ways];
    for (int64_t k = 0; k < ways; ++k) product0[k] = multiply(word[0][k], same(philox_multiplier0));
    for (int64_t k = 0; k < ways; ++k) product1[k] = multiply(word[2][k], same(philox_multiplier1));
    for (int64_t k = 0; k < ways; ++k) {
      word[0][k] = high(product1[k]) ^ word[1][k] ^ same(key[0]);
      word[1][k] = product1[k];
      word[2][k] = high(product0[k]) ^ word[3][k] ^ same(key[1]);
      word[3][k] = product0[k];
    }
  }

  static RF_INLINE void store(Lanes words, uint32_t* to) { memcpy(to, &words, sizeof(words)); }
};

// Where the results of neighbouring elements of a sample are written, from `first` on. Their lines are fetched while
// the noise is made, which uses no memory: all at once they would be waited for.
struct Ahead {
  std::span<const Output> results;
  int64_t sample, first;

  Ahead from(int64_t element) const { return {results, sample, first + element}; }

  // Those of a granule.
  void fetch() const {
    for (const Output& to : results) {
      visit(to.dtype, [&](auto zero) {
        const auto* result = to.template row<decltype(zero)>(sample) + first;
        for (int64_t i = 0; i < line_elements; i += 64 / int64_t(sizeof(zero))) __builtin_prefetch(result + i, 1);
      });
    }
  }
};

// scale * noise of `quads` quads of a sample, and of more up to whole granules.
template <Distribution distribution>
void fill(const Keys& keys, const SampleNoise& sample, int64_t quad, int64_t quads, const Ahead& ahead,
          float* __restrict out) {
  for (int64_t q = 0; q < quads; q += granule) {
    ahead.from(4 * q).fetch();
    const Granule words(keys, sample.sample_id, sample.draw, quad + q);
    for (int64_t i = 0; i < 2 * granule; ++i) {
      const Pair pair = transform<distribution, Polynomials>(words.even[i], words.odd[i], sample.scale);
      out[4 * q + 2 * i] = pair.first;
      out[4 * q + 2 * i + 1] = pair.second;
    }
  }
}

void philox_words(const int64_t* seed, int64_t sample_id, int64_t draw, int64_t quads, int64_t* words) {
  const Keys keys(*seed);
  parallel_for(0, round_up(quads, granule) / granule, thread_elements / granule,
               [=](int64_t from, int64_t to) RF_TARGET_LAMBDA {
                 for (int64_t quad = from * granule; quad < std::min(to * granule, quads); quad += granule) {
                   const Granule made(keys, sample_id, draw, quad);
                   const int64_t pairs = 2 * std::min(granule, quads - quad);
                   for (int64_t i = 0; i < pairs; ++i) {
                     words[4 * quad + 2 * i] = made.even[i];
                     words[4 * quad + 2 * i + 1] = made.odd[i];
                   }
                 }
               });
}

// ---- pieces of the batch ----

// `count` neighbouring elements of a sample in memory, from `first` on, with their noise, and space for as many
// operands.
template <class Wide>
struct Piece {
  int64_t sample, channel, first, count;  // channel: of the first element, and of all where they are not interleaved
  const float* noise;
  Wide* space[4];
};

// How samples are cut into tiles of `channels` by `length` elements of each.
//
// Pieces of a tile are its planes, or where channels are interleaved its pixels; one piece if these are neighbours in
// memory, because a pixel has all channels. Small planes share a tile: noise is made in lines that are longer than
// they.
struct Cut {
  int64_t channels, length;
  int64_t channel_tiles, length_tiles;
  bool whole_planes, whole_pixels;

  explicit Cut(const Samples& samples) : channels(samples.channels) {
    const bool small = samples.plane <= piece_elements / 2;
    if (samples.channels_last) {
      channels = std::min(channels, small ? tile_elements / samples.plane / 16 * 16 : 64);
    } else {
      channels = std::min(channels, small ? piece_elements / samples.plane : 1);
    }
    length = std::max(piece_elements / channels / line_elements, int64_t(1)) * line_elements;
    length = small ? samples.plane : std::min(length, samples.plane);
    channel_tiles = (samples.channels + channels - 1) / channels;
    length_tiles = (samples.plane + length - 1) / length;
    whole_planes = length == samples.plane;
    whole_pixels = channels == samples.channels;
  }
  int64_t elements() const { return channels * length; }
  int64_t space() const { return round_up(elements() + line_elements + 4, 16); }  // with what `fill` makes too much
};

// Makes noise of one sample.
struct Source {
  void (*fill)(const Keys& keys, const SampleNoise& sample, int64_t quad, int64_t quads, const Ahead& ahead,
               float* out);
  const Keys& keys;
  SampleNoise sample;

  // Of `count` elements from `begin` on. Gives where in `space` they start.
  const float* elements(int64_t begin, int64_t count, const Ahead& ahead, float* space) const {
    const int64_t skip = begin % 4;
    fill(keys, sample, begin / 4, (skip + count + 3) / 4, ahead, space);
    return space + skip;
  }
};

// The noise of a tile from `channel` and, in its plane, `first` on, in the order of memory.
inline const float* fill_tile(const Source& source, const Samples& samples, const Cut& cut, int64_t channel,
                              int64_t channels, int64_t first, int64_t count, const Ahead& ahead, float* space) {
  const int64_t begin = channel * samples.plane + first;
  if (!samples.channels_last) return source.elements(begin, channels * count, ahead, space);
  float* const made = space + cut.space();
  if (cut.whole_planes) {  // which follow each other
    const float* values = source.elements(begin, channels * count, ahead, made);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t c = 0; c < channels; ++c) space[i * channels + c] = values[c * count + i];
    }
  } else {
    for (int64_t c = 0; c < channels; ++c) {
      const float* values = source.elements(begin + c * samples.plane, count, ahead.from(c * count), made);
      for (int64_t i = 0; i < count; ++i) space[i * channels + c] = values[i];
    }
  }
  return space;
}

// Calls body(piece), which writes the piece's elements of `results`, for all pieces of the batch, in threads.
template <class Wide, class Body>
void for_each_piece(const Noise& noise, const Samples& samples, std::initializer_list<Output> results,
                    const Body& body) {
  if (samples.count == 0) return;
  const Cut cut(samples);
  const auto fill_of = visit(noise.distribution, [](auto of) { return &fill<decltype(of)::value>; });
  const Keys keys(*noise.seed);
  const int64_t tiles = samples.count * cut.channel_tiles * cut.length_tiles;
  parallel_for(0, tiles, thread_elements / cut.elements() + 1, [&](int64_t from, int64_t to) {
    const auto numbers = lines<float>(2 * cut.space());
    const auto operands = lines<Wide>(4 * cut.space());
    Piece<Wide> piece;
    for (int k = 0; k < 4; ++k) piece.space[k] = operands[0].values + k * cut.space();
    for (int64_t tile = from; tile < to; ++tile) {
      const int64_t row = tile / cut.length_tiles, first = tile % cut.length_tiles * cut.length;
      piece.sample = row / cut.channel_tiles;
      piece.channel = row % cut.channel_tiles * cut.channels;
      const int64_t channels = std::min(cut.channels, samples.channels - piece.channel);
      const int64_t length = std::min(cut.length, samples.plane - first);
      int64_t pieces = channels, channel_step = 1, step = samples.plane;  // planes
      piece.first = piece.channel * samples.plane + first;
      if (samples.channels_last) {  // pixels
        pieces = cut.whole_pixels ? 1 : length, channel_step = 0, step = samples.channels;
        piece.first = first * samples.channels + piece.channel;
      }
      const bool neighbours = !samples.channels_last || cut.whole_pixels;  // in memory
      const Ahead ahead = {neighbours ? results : std::span<const Output>(), piece.sample, piece.first};
      const Source source = {fill_of, keys, of_sample(noise, piece.sample)};
      piece.noise = fill_tile(source, samples, cut, piece.channel, channels, first, length, ahead, numbers[0].values);
      piece.count = channels * length / pieces;
      for (int64_t k = 0; k < pieces; ++k) {
        body(piece);
        piece.channel += channel_step, piece.first += step, piece.noise += piece.count;
      }
    }
  });
}

// ---- operands ----

template <class T, class Wide>
void widen(const T* __restrict from, int64_t count, Wide* __restrict to) {
  for (int64_t i = 0; i < count; ++i) to[i] = pixel<Wide>(from[i]);
}

template <class T, class Wide>
void narrow(const Wide* __restrict from, int64_t count, T* __restrict to) {
  for (int64_t i = 0; i < count; ++i) to[i] = from_float<T>(from[i]);
}

template <class T>
T* elements(const Output& to, int64_t sample, int64_t first) {
  return static_cast<T*>(to.data) + sample * to.stride + first;
}

template <class Wide>
constexpr Dtype dtype_of = sizeof(Wide) == 8 ? Dtype::float64 : Dtype::float32;

// The piece's elements of a tensor: in place if they are Wide, else converted to it in `space`.
template <class Wide>
const Wide* load(const Piece<Wide>& piece, const Matrix& from, Wide* space) {
  if (from.dtype == dtype_of<Wide>) return from.row<Wide>(piece.sample) + piece.first;
  const auto convert = [&](auto zero) {
    widen(from.row<decltype(zero)>(piece.sample) + piece.first, piece.count, space);
  };
  visit_image(from.dtype, convert);
  return space;
}

// Where the piece's elements of an output are computed: in place, or in `space`, for `store`.
template <class Wide>
Wide* place(const Piece<Wide>& piece, const Output& to, Wide* space) {
  return to.dtype == dtype_of<Wide> ? elements<Wide>(to, piece.sample, piece.first) : space;
}

template <class Wide>
void store(const Piece<Wide>& piece, const Wide* values, const Output& to) {
  if (to.dtype == dtype_of<Wide>) return;
  visit(to.dtype,
        [&](auto zero) { narrow(values, piece.count, elements<decltype(zero)>(to, piece.sample, piece.first)); });
}

// ---- the ops ----

template <class Wide>
struct Clip {
  Wide low, high;

  explicit Clip(const Noise& noise) : low(Wide(noise.low)), high(Wide(noise.high)) {}
  RF_INLINE Wide operator()(Wide x) const {  // nan passes
    x = x < low ? low : x;
    return x > high ? high : x;
  }
  RF_INLINE bool passes(Wide x) const { return (low <= x) & (x <= high); }
};

template <class Wide>
void add(int64_t count, const float* __restrict noise, Clip<Wide> clip, const Wide* __restrict x,
         Wide* __restrict noisy) {
  for (int64_t i = 0; i < count; ++i) noisy[i] = clip(x[i] + Wide(noise[i]));
}

template <class Wide>
void add_backward(int64_t count, const float* __restrict noise, Clip<Wide> clip, const Wide* __restrict grad,
                  const Wide* __restrict x, Wide* __restrict grad_x) {
  for (int64_t i = 0; i < count; ++i) grad_x[i] = clip.passes(x[i] + Wide(noise[i])) ? grad[i] : Wide(0);
}

template <class Wide>
void add_noise_as(const Noise& noise, const Samples& samples, Matrix input, Output noisy) {
  for_each_piece<Wide>(noise, samples, {noisy}, [&](const Piece<Wide>& piece) {
    const Wide* x = load(piece, input, piece.space[0]);
    Wide* sum = place(piece, noisy, piece.space[1]);
    add(piece.count, piece.noise, Clip<Wide>(noise), x, sum);
    store(piece, sum, noisy);
  });
}

template <class Wide>
void add_noise_backward_as(const Noise& noise, const Samples& samples, Matrix grad, Matrix input, Output grad_input) {
  for_each_piece<Wide>(noise, samples, {grad_input}, [&](const Piece<Wide>& piece) {
    const Wide *g = load(piece, grad, piece.space[0]), *x = load(piece, input, piece.space[1]);
    Wide* grad_x = place(piece, grad_input, piece.space[2]);
    add_backward(piece.count, piece.noise, Clip<Wide>(noise), g, x, grad_x);
    store(piece, grad_x, grad_input);
  });
}

// A channel's number at every element of a piece: the same one, or where channels are interleaved each its own.
template <class Wide>
struct Same {
  Wide value;
  RF_INLINE Wide operator[](int64_t) const { return value; }
};

template <class Wide>
std::vector<Wide> interleave(const std::vector<Wide>& per_channel, const Samples& samples) {
  std::vector<Wide> each(samples.channels_last ? std::max(samples.channels, Cut(samples).elements()) : 0);
  for (size_t i = 0; i < each.size(); ++i) each[i] = per_channel[i % per_channel.size()];
  return each;
}

// The loops multiply: with divisions the op takes a fifth longer (AVX-512).
template <class Wide>
std::vector<Wide> reciprocals(const float* values, int64_t count) {
  std::vector<Wide> result(count);
  for (int64_t i = 0; i < count; ++i) result[i] = 1 / Wide(values[i]);
  return result;
}

// (x - mean) / std = x scale + shift
template <class Wide, class T, class Channel>
void normalize(int64_t count, const float* __restrict noise, Clip<Wide> clip, const T* __restrict x, Channel scale,
               Channel shift, Wide* __restrict clean, Wide* __restrict noisy) {
  for (int64_t i = 0; i < count; ++i) {
    const Wide image = pixel<Wide>(x[i]);
    clean[i] = image * scale[i] + shift[i];
    noisy[i] = clip(image + Wide(noise[i])) * scale[i] + shift[i];
  }
}

template <class Wide, class Channel>
void normalize_backward(int64_t count, const float* __restrict noise, Clip<Wide> clip,
                        const Wide* __restrict grad_clean, const Wide* __restrict grad_noisy, const Wide* __restrict x,
                        Channel scale, Wide* __restrict grad_x) {
  for (int64_t i = 0; i < count; ++i) {
    const Wide grad = clip.passes(x[i] + Wide(noise[i])) ? grad_noisy[i] : Wide(0);
    grad_x[i] = (grad_clean[i] + grad) * scale[i];
  }
}

template <class Wide>
void noisy_pair_as(const Noise& noise, const Samples& samples, Matrix images, const float* mean, const float* pixel_std,
                   Output clean, Output noisy) {
  const std::vector<Wide> scales = reciprocals<Wide>(pixel_std, samples.channels);
  std::vector<Wide> shifts(samples.channels);
  for (int64_t c = 0; c < samples.channels; ++c) shifts[c] = -Wide(mean[c]) * scales[c];
  const std::vector<Wide> each_scale = interleave(scales, samples), each_shift = interleave(shifts, samples);
  for_each_piece<Wide>(noise, samples, {clean, noisy}, [&](const Piece<Wide>& piece) {
    Wide *first = place(piece, clean, piece.space[1]), *second = place(piece, noisy, piece.space[2]);
    const auto run = [&](auto* x) {
      const auto run_with = [&](auto scale, auto shift) {
        normalize(piece.count, piece.noise, Clip<Wide>(noise), x, scale, shift, first, second);
      };
      samples.channels_last ? run_with(each_scale.data() + piece.channel, each_shift.data() + piece.channel)
                            : run_with(Same<Wide>{scales[piece.channel]}, Same<Wide>{shifts[piece.channel]});
    };
    images.dtype == Dtype::uint8 ? run(images.row<uint8_t>(piece.sample) + piece.first)
                                 : run(load(piece, images, piece.space[0]));
    store(piece, first, clean);
    store(piece, second, noisy);
  });
}

template <class Wide>
void noisy_pair_backward_as(const Noise& noise, const Samples& samples, Matrix grad_clean, Matrix grad_noisy,
                            Matrix images, const float* pixel_std, Output grad_images) {
  const std::vector<Wide> scales = reciprocals<Wide>(pixel_std, samples.channels);
  const std::vector<Wide> each_scale = interleave(scales, samples);
  for_each_piece<Wide>(noise, samples, {grad_images}, [&](const Piece<Wide>& piece) {
    const Wide *first = load(piece, grad_clean, piece.space[0]), *second = load(piece, grad_noisy, piece.space[1]);
    const Wide* x = load(piece, images, piece.space[2]);
    Wide* grad_x = place(piece, grad_images, piece.space[3]);
    const auto run = [&](auto scale) {
      normalize_backward(piece.count, piece.noise, Clip<Wide>(noise), first, second, x, scale, grad_x);
    };
    samples.channels_last ? run(each_scale.data() + piece.channel) : run(Same<Wide>{scales[piece.channel]});
    store(piece, grad_x, grad_images);
  });
}

// Arithmetic is in float, or in double where the results are.
void add_noise(const Noise& noise, const Samples& samples, Matrix input, Output noisy) {
  const auto run = noisy.dtype == Dtype::float64 ? add_noise_as<double> : add_noise_as<float>;
  run(noise, samples, input, noisy);
}

void add_noise_backward(const Noise& noise, const Samples& samples, Matrix grad, Matrix input, Output grad_input) {
  const auto run = grad_input.dtype == Dtype::float64 ? add_noise_backward_as<double> : add_noise_backward_as<float>;
  run(noise, samples, grad, input, grad_input);
}

void noisy_pair(const Noise& noise, const Samples& samples, Matrix images, const float* mean, const float* pixel_std,
                Output clean, Output noisy) {
  const auto run = clean.dtype == Dtype::float64 ? noisy_pair_as<double> : noisy_pair_as<float>;
  run(noise, samples, images, mean, pixel_std, clean, noisy);
}

void noisy_pair_backward(const Noise& noise, const Samples& samples, Matrix grad_clean, Matrix grad_noisy,
                         Matrix images, const float* pixel_std, Output grad_images) {
  const auto run = grad_clean.dtype == Dtype::float64 ? noisy_pair_backward_as<double> : noisy_pair_backward_as<float>;
  run(noise, samples, grad_clean, grad_noisy, images, pixel_std, grad_images);
}

}  // namespace RF_ISA
}  // namespace robustfast

#endif
