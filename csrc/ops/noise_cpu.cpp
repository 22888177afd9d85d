// The noise ops on the CPU.
#include <tuple>

#include "cpu/noise.h"
#include "ops/noise.h"

namespace robustfast {
namespace {

// The noise of an op's arguments; keeps the memory of the sample ids.
struct NoiseArguments {
  std::optional<Tensor> ids;
  Noise noise;

  NoiseArguments(Distribution distribution, double scale, const Tensor& seed, const std::optional<Tensor>& sample_ids,
                 int64_t draw, double low, double high)
      : ids(sample_ids ? std::optional(torch::stable::contiguous(*sample_ids)) : std::nullopt),
        noise{distribution,
              float(scale),
              uint64_t(*data<int64_t>(seed)),
              ids ? data<int64_t>(*ids) : nullptr,
              uint32_t(draw),
              low,
              high} {}
};

template <Distribution distribution>
Tensor noisy(const Tensor& input, double scale, const Tensor& seed, const std::optional<Tensor>& sample_ids,
             int64_t draw, double low, double high) {
  const NoiseArguments arguments(distribution, scale, seed, sample_ids, draw, low, high);
  Result result(input, input.scalar_type());
  const Tensor x = result.match(input);
  add_noise(arguments.noise, result.samples(false), matrix(x), result.output());
  return result.finish();
}

template <Distribution distribution>
Tensor noisy_backward(const Tensor& grad, const Tensor& input, double scale, const Tensor& seed,
                      const std::optional<Tensor>& sample_ids, int64_t draw, double low, double high) {
  const NoiseArguments arguments(distribution, scale, seed, sample_ids, draw, low, high);
  Result result(input, input.scalar_type());
  const Tensor g = result.match(grad), x = result.match(input);
  add_noise_backward(arguments.noise, result.samples(false), matrix(g), matrix(x), result.output());
  return result.finish();
}

std::tuple<Tensor, Tensor> pair(const Tensor& images, double std, const Tensor& mean, const Tensor& pixel_std,
                                const Tensor& seed, const std::optional<Tensor>& sample_ids, int64_t draw, double low,
                                double high, ScalarType dtype) {
  const NoiseArguments arguments(Distribution::gaussian, std, seed, sample_ids, draw, low, high);
  Result clean(images, dtype), noisy(images, dtype);
  const Tensor x = clean.match(images), m = torch::stable::contiguous(mean), s = torch::stable::contiguous(pixel_std);
  noisy_pair(arguments.noise, clean.samples(true), matrix(x), data<float>(m), data<float>(s), clean.output(),
             noisy.output());
  return {clean.finish(), noisy.finish()};
}

Tensor pair_backward(const Tensor& grad_clean, const Tensor& grad_noisy, const Tensor& images, double std,
                     const Tensor& pixel_std, const Tensor& seed, const std::optional<Tensor>& sample_ids, int64_t draw,
                     double low, double high) {
  const NoiseArguments arguments(Distribution::gaussian, std, seed, sample_ids, draw, low, high);
  Result result(images, images.scalar_type());
  const Tensor x = result.match(images), clean = result.match(grad_clean), noisy = result.match(grad_noisy);
  const Tensor s = torch::stable::contiguous(pixel_std);
  noisy_pair_backward(arguments.noise, result.samples(true), matrix(clean), matrix(noisy), matrix(x), data<float>(s),
                      result.output());
  return result.finish();
}

Tensor words(const Tensor& seed, int64_t sample_id, int64_t draw, int64_t quads) {
  const Tensor result = with_huge_pages(empty({quads, 4}, ScalarType::Long, seed));
  philox_words(uint64_t(*data<int64_t>(seed)), uint64_t(sample_id), uint32_t(draw), quads, data<int64_t>(result));
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(robustfast, CPU, m) {
  m.impl("gaussian_noise", TORCH_BOX(&noisy<Distribution::gaussian>));
  m.impl("gaussian_noise_backward", TORCH_BOX(&noisy_backward<Distribution::gaussian>));
  m.impl("uniform_noise", TORCH_BOX(&noisy<Distribution::uniform>));
  m.impl("uniform_noise_backward", TORCH_BOX(&noisy_backward<Distribution::uniform>));
  m.impl("noisy_pair", TORCH_BOX(&pair));
  m.impl("noisy_pair_backward", TORCH_BOX(&pair_backward));
  m.impl("philox_words", TORCH_BOX(&words));
}

}  // namespace robustfast
