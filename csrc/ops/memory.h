// Memory for large results on the CPU. The system clears what is new, which takes as long as the noise itself.
#pragma once

#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>

#include <cstdlib>
#include <mutex>
#include <vector>
#endif

#include <cstdint>

namespace robustfast {

#if !defined(__linux__)

inline torch::stable::Tensor with_huge_pages(const torch::stable::Tensor& tensor) { return tensor; }
inline torch::stable::Tensor recycled(const torch::stable::Tensor& tensor) { return tensor; }

#else

inline size_t bytes_of(const torch::stable::Tensor& tensor) { return tensor.numel() * tensor.element_size(); }

// Asks for huge pages under a large new tensor: with small ones the system spends longer clearing and mapping pages
// than the kernels spend filling them.
inline const torch::stable::Tensor& with_huge_pages(const torch::stable::Tensor& tensor) {
  constexpr size_t large = 4 << 20, page = 4096;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t size = bytes_of(tensor), first = (begin + page - 1) / page * page;
  // Only a wish: where it is not granted nothing is lost.
  if (size >= large) madvise(reinterpret_cast<void*>(first), (begin + size - first) / page * page, MADV_HUGEPAGE);
  return tensor;
}

// Memory of results that nobody holds any more, kept for results of the same size to come: at most
// ROBUSTFAST_CPU_CACHE_MIB of it, 512 unless that says otherwise. Nothing waits for the lock, which another thread may
// have held when the process was forked.
class FreeBlocks {
 public:
  static constexpr size_t unit = 2 << 20;  // a huge page

  // Never destroyed: tensors may outlive everything else.
  static FreeBlocks& instance() {
    static FreeBlocks* const blocks = new FreeBlocks;
    return *blocks;
  }

  // Null where there is no memory.
  void* take(size_t bytes) {
    if (const std::unique_lock lock(mutex_, std::try_to_lock); lock) {
      for (size_t i = blocks_.size(); i-- > 0;) {
        if (blocks_[i].bytes == bytes) return remove(i);
      }
    }
    void* const start = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED) return nullptr;
    madvise(start, bytes, MADV_HUGEPAGE);
    return start;
  }

  void give(void* start, size_t bytes) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock || bytes > limit_) {
      munmap(start, bytes);
      return;
    }
    while (kept_ + bytes > limit_) {
      const size_t oldest = blocks_.front().bytes;
      munmap(remove(0), oldest);
    }
    blocks_.push_back({start, bytes});
    kept_ += bytes;
  }

 private:
  struct Block {
    void* start;
    size_t bytes;
  };
  std::mutex mutex_;
  std::vector<Block> blocks_;
  size_t kept_ = 0, limit_;

  FreeBlocks() {
    const char* wanted = std::getenv("ROBUSTFAST_CPU_CACHE_MIB");
    limit_ = (wanted ? std::strtoull(wanted, nullptr, 10) : 512) << 20;
  }

  void* remove(size_t i) {
    const Block block = blocks_[i];
    blocks_.erase(blocks_.begin() + i);
    kept_ -= block.bytes;
    return block.start;
  }
};

// PyTorch has it from 2.11 on, and its headers declare it for programs that need no older one.
extern "C" AOTI_TORCH_EXPORT __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t dim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* result, int32_t layout, const uint8_t* opaque_metadata,
    int64_t opaque_metadata_size, void (*deleter)(void* data, void* context), void* context);

// A dense tensor like this new one in recycled memory, if it is so large that malloc would map memory for it alone.
inline torch::stable::Tensor recycled(const torch::stable::Tensor& tensor) {
  constexpr size_t large = 32 << 20;  // glibc keeps what is smaller, in the end
  if (bytes_of(tensor) < large || !torch_from_blob) return with_huge_pages(tensor);
  const size_t bytes = (bytes_of(tensor) + FreeBlocks::unit - 1) / FreeBlocks::unit * FreeBlocks::unit;
  void* const block = FreeBlocks::instance().take(bytes);
  if (!block) return with_huge_pages(tensor);
  const auto give = [](void* data, void* context) {
    FreeBlocks::instance().give(data, reinterpret_cast<size_t>(context));
  };
  AtenTensorHandle handle;
  const AOTITorchError error =
      torch_from_blob(block, tensor.dim(), tensor.sizes().data(), tensor.strides().data(), 0,
                      torch::stable::detail::to<int32_t>(torch::stable::detail::from(tensor.scalar_type())),
                      aoti_torch_device_type_cpu(), tensor.get_device_index(), &handle, aoti_torch_layout_strided(),
                      nullptr, 0, give, reinterpret_cast<void*>(bytes));
  if (error != AOTI_TORCH_SUCCESS) FreeBlocks::instance().give(block, bytes);
  TORCH_ERROR_CODE_CHECK(error);
  return torch::stable::Tensor(handle);
}

#endif

}  // namespace robustfast
