// Hands out parts of one piece of memory; with none, counts what would be needed.
#pragma once

#include <cstddef>
#include <cstdint>

namespace robustfast::cuda {

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

}  // namespace robustfast::cuda
