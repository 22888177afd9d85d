// The noise ops' results and layouts, for the bindings of every device.
#pragma once

#include <algorithm>
#include <array>
#include <optional>

#include "common/noise.h"
#include "ops/memory.h"
#include "ops/tensors.h"

namespace robustfast {

// torch.empty_like(tensor, dtype=dtype), which keeps the memory format.
inline Tensor empty_like(const Tensor& tensor, std::optional<ScalarType> dtype) {
  using torch::stable::detail::from;
  std::array<StableIValue, 6> stack{from(tensor),       from(dtype),        from(std::nullopt),
                                    from(std::nullopt), from(std::nullopt), from(std::nullopt)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION));
  const Tensor made = torch::stable::detail::to<Tensor>(stack[0]);
  return made.is_cpu() ? recycled(made) : made;
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

// A result of the op, and what a kernel writes for it: the same, unless a kernel does not know its layout.
struct Result {
  Tensor tensor, written;

  Result(const Tensor& like, ScalarType dtype)
      : tensor(empty_like(like, dtype)),
        written(layout(tensor) == Layout::other ? torch::stable::new_empty(like, like.sizes(), dtype) : tensor) {}

  Output output() const { return {written.mutable_data_ptr(), dtype_of(written), written.stride(0)}; }

  // An argument of the kernel, in the layout of what it writes.
  Tensor match(const Tensor& argument) const {
    if (layout(argument) == layout(written)) return argument;
    Tensor copy = empty_like(written, argument.scalar_type());
    return torch::stable::copy_(copy, argument);
  }

  // `by_channel`: dimension 1 counts channels; else a sample in row-major order is all one plane.
  Samples samples(bool by_channel) const {
    if (written.numel() == 0) return {0, 0, 1, false};
    const bool channels_last = layout(written) == Layout::channels_last;
    const int64_t count = written.size(0), channels = by_channel || channels_last ? written.size(1) : 1;
    return {count, channels, written.numel() / (count * channels), channels_last};
  }

  Tensor finish() { return written.get() == tensor.get() ? tensor : torch::stable::copy_(tensor, written); }
};

}  // namespace robustfast
