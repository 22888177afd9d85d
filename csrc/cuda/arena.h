// Memory of the launchers: parts of one piece, and zeros.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace robustfast::cuda {

// Hands out parts of one piece of memory; with none, counts what would be needed.
class Arena {
 public:
  explicit Arena(void* memory) : memory_(static_cast<unsigned char*>(memory)) {}

  template <class T>
  T* take(int64_t count) {
    const size_t at = used_;
    used_ += (size_t(count) * sizeof(T) + 15) / 16 * 16;
    return memory_ ? reinterpret_cast<T*>(memory_ + at) : nullptr;
  }
  size_t used() const { return used_; }

 private:
  unsigned char* memory_;
  size_t used_ = 0;
};

// Zeros, of any number: whether a graph takes a memset of nothing is said nowhere.
inline cudaError_t clear(void* memory, size_t bytes, cudaStream_t stream) {
  return bytes == 0 ? cudaSuccess : cudaMemsetAsync(memory, 0, bytes, stream);
}

}  // namespace robustfast::cuda
