// The noise ops for every device, whose bindings say how to run a kernel there.
#pragma once

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>

#include "common/noise.h"
#include "ops/tensors.h"

namespace robustfast {

// torch.empty_like(tensor, dtype=dtype), which keeps the memory format.
template <class Device>
Tensor empty_like(const Tensor& tensor, std::optional<ScalarType> dtype) {
  using torch::stable::detail::from;
  std::array<StableIValue, 6> stack{from(tensor),       from(dtype),        from(std::nullopt),
                                    from(std::nullopt), from(std::nullopt), from(std::nullopt)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION));
  return Device::fresh(torch::stable::detail::to<Tensor>(stack[0]));
}

enum class Layout { row_major, channels_last, other };

// How each sample of a batch lies in memory. How they follow one another is free: one may stand for all of them.
inline Layout layout(const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  const auto dense = [&](int64_t from, int64_t step) {
    for (int64_t d = tensor.dim() - 1; d >= from; step *= sizes[d--]) {
      if (sizes[d] != 1 && strides[d] != step) return false;
    }
    return true;
  };
  if (dense(1, 1)) return Layout::row_major;
  return tensor.dim() > 2 && strides[1] == 1 && dense(2, sizes[1]) ? Layout::channels_last : Layout::other;
}

// A result of an op, and what a kernel writes for it: the same, unless a kernel does not know its layout.
template <class Device>
struct ResultOf {
  Tensor tensor, written;

  explicit ResultOf(const Tensor& tensor)
      : tensor(tensor),
        written(layout(tensor) == Layout::other ? torch::stable::new_empty(tensor, tensor.sizes()) : tensor) {}
  ResultOf(const Tensor& tensor, const ResultOf& beside)  // in that one's layout
      : tensor(tensor),
        written(layout(tensor) == layout(beside.written) ? tensor : empty_like<Device>(beside.written, std::nullopt)) {}

  Output output() const { return {written.mutable_data_ptr(), dtype_of(written), written.stride(0)}; }

  // An argument of the kernel, in the layout of what it writes.
  Tensor match(const Tensor& argument) const {
    if (layout(argument) == layout(written)) return argument;
    Tensor copy = empty_like<Device>(written, argument.scalar_type());
    return torch::stable::copy_(copy, argument);
  }

  // `by_channel`: dimension 1 counts channels; else a sample in row-major order is all one plane.
  Samples samples(bool by_channel) const {
    if (written.numel() == 0) return {0, 0, 1, false};
    const bool channels_last = layout(written) == Layout::channels_last;
    const int64_t count = written.size(0), channels = by_channel || channels_last ? written.size(1) : 1;
    return {count, channels, written.numel() / (count * channels), channels_last};
  }

  void finish() {
    if (written.get() != tensor.get()) torch::stable::copy_(tensor, written);
  }
};

// A number for each sample, or one (0-d) for all.
inline Matrix per_sample(const std::optional<Tensor>& values) {
  if (!values) return {};
  return {values->const_data_ptr(), dtype_of(*values), values->dim() == 0 ? 0 : values->stride(0)};
}

inline Noise noise_of(Distribution distribution, double scale, const std::optional<Tensor>& scales, const Tensor& seed,
                      const std::optional<Tensor>& sample_ids, int64_t draw, const std::optional<Tensor>& draws,
                      double low, double high) {
  return {distribution, data<int64_t>(seed), float(scale),           per_sample(scales),
          draw,         per_sample(draws),   per_sample(sample_ids), low,
          high};
}

// The ops of a device. `Device` is made from a tensor there, runs a kernel with arguments, names the kernels, and
// prepares new memory (`fresh`); Settings are the types of noise_of's arguments after the first.
template <class Device, class... Settings>
struct NoiseOpsOf {
  using Result = ResultOf<Device>;

  static void add_noise_out(const Tensor& input, int64_t distribution, Settings... settings, const Tensor& out) {
    const Device run(input);
    const Noise noise = noise_of(Distribution(distribution), settings...);
    Result result(out);
    const Tensor x = result.match(input);
    run(Device::add_noise, noise, result.samples(false), matrix(x), result.output());
    result.finish();
  }

  static Tensor add_noise(const Tensor& input, int64_t distribution, Settings... settings) {
    const Tensor out = empty_like<Device>(input, std::nullopt);
    add_noise_out(input, distribution, settings..., out);
    return out;
  }

  static Tensor add_noise_backward(const Tensor& grad, const Tensor& input, int64_t distribution,
                                   Settings... settings) {
    const Device run(input);
    const Noise noise = noise_of(Distribution(distribution), settings...);
    Result result(empty_like<Device>(input, std::nullopt));
    const Tensor g = result.match(grad), x = result.match(input);
    run(Device::add_noise_backward, noise, result.samples(false), matrix(g), matrix(x), result.output());
    result.finish();
    return result.tensor;
  }

  static void noisy_pair_out(const Tensor& images, const Tensor& mean, const Tensor& pixel_std, Settings... settings,
                             const Tensor& clean_out, const Tensor& noisy_out) {
    const Device run(images);
    const Noise noise = noise_of(Distribution::gaussian, settings...);
    Result clean(clean_out), noisy(noisy_out, clean);
    const Tensor x = clean.match(images), m = torch::stable::contiguous(mean), s = torch::stable::contiguous(pixel_std);
    run(Device::noisy_pair, noise, clean.samples(true), matrix(x), data<float>(m), data<float>(s), clean.output(),
        noisy.output());
    clean.finish();
    noisy.finish();
  }

  static std::tuple<Tensor, Tensor> noisy_pair(const Tensor& images, const Tensor& mean, const Tensor& pixel_std,
                                               Settings... settings, ScalarType dtype) {
    const Tensor clean = empty_like<Device>(images, dtype), noisy = empty_like<Device>(images, dtype);
    noisy_pair_out(images, mean, pixel_std, settings..., clean, noisy);
    return {clean, noisy};
  }

  static Tensor noisy_pair_backward(const Tensor& grad_clean, const Tensor& grad_noisy, const Tensor& images,
                                    const Tensor& pixel_std, Settings... settings) {
    const Device run(images);
    const Noise noise = noise_of(Distribution::gaussian, settings...);
    Result result(empty_like<Device>(images, std::nullopt));
    const Tensor x = result.match(images), clean = result.match(grad_clean), noisy = result.match(grad_noisy);
    const Tensor s = torch::stable::contiguous(pixel_std);
    run(Device::noisy_pair_backward, noise, result.samples(true), matrix(clean), matrix(noisy), matrix(x),
        data<float>(s), result.output());
    result.finish();
    return result.tensor;
  }

  static Tensor philox_words(const Tensor& seed, int64_t sample_id, int64_t draw, int64_t quads) {
    const Device run(seed);
    const Tensor words = empty({quads, 4}, ScalarType::Long, seed);
    run(Device::philox_words, data<int64_t>(seed), sample_id, draw, quads, data<int64_t>(words));
    return words;
  }

  template <class Library>
  static void implement(Library& library) {
    library.impl("add_noise", TORCH_BOX(&NoiseOpsOf::add_noise));
    library.impl("add_noise_out", TORCH_BOX(&NoiseOpsOf::add_noise_out));
    library.impl("add_noise_backward", TORCH_BOX(&NoiseOpsOf::add_noise_backward));
    library.impl("noisy_pair", TORCH_BOX(&NoiseOpsOf::noisy_pair));
    library.impl("noisy_pair_out", TORCH_BOX(&NoiseOpsOf::noisy_pair_out));
    library.impl("noisy_pair_backward", TORCH_BOX(&NoiseOpsOf::noisy_pair_backward));
    library.impl("philox_words", TORCH_BOX(&NoiseOpsOf::philox_words));
  }
};

template <class Device>
using NoiseOps = NoiseOpsOf<Device, double, const std::optional<Tensor>&, const Tensor&, const std::optional<Tensor>&,
                            int64_t, const std::optional<Tensor>&, double, double>;

}  // namespace robustfast
