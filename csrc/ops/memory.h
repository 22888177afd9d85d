// Large new tensors on the CPU.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace robustfast {

// Asks for huge pages under a large new tensor: with small ones the system spends longer clearing and mapping pages
// than the kernels spend filling them. Only a wish: where it is not granted nothing is lost.
inline const torch::stable::Tensor& with_huge_pages(const torch::stable::Tensor& tensor) {
#if defined(__linux__)
  constexpr size_t large = 4 << 20, page = 4096;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t size = tensor.numel() * tensor.element_size(), first = (begin + page - 1) / page * page;
  if (size >= large) madvise(reinterpret_cast<void*>(first), (begin + size - first) / page * page, MADV_HUGEPAGE);
#endif
  return tensor;
}

}  // namespace robustfast
