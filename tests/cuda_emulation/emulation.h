// Runs CUDA kernels on the CPU: each thread of a block is a fiber, blocks run one after the other.
//
// Collectives are checked: a warp operation that not all 32 lanes reach, two different ones at once, or a barrier that
// never completes end the process with a message. Shared memory is poisoned before each block. Under
// ROBUSTFAST_EMULATION_ORDER=reverse threads and blocks run backwards, so that results that depend on an order differ.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cuda_runtime_api.h"

namespace emulation {

struct Index {
  unsigned x, y, z;
};

extern Index thread_index, block_index;
extern dim3 block_size, grid_size;
extern unsigned char* shared;

// Runs body(context) as every thread of every block. False if a device assertion failed.
bool run(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* context);

void barrier();
[[noreturn]] void fail_assertion(const char* message);

// Puts `bytes` (at most 16) of each lane's `value` before all lanes of the warp: lane l's at result + 16 l.
const unsigned char* exchange(const char* operation, const void* value, size_t bytes);

template <class T>
struct Lanes {
  const unsigned char* data;
  T operator[](unsigned lane) const {
    T value;
    memcpy(&value, data + 16 * lane, sizeof(T));
    return value;
  }
};

template <class T>
Lanes<T> gather(const char* operation, T value) {
  static_assert(sizeof(T) <= 16);
  return {exchange(operation, &value, sizeof(T))};
}

inline unsigned lane() { return thread_index.x % 32; }

}  // namespace emulation

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __shared__ static
#define __launch_bounds__(...)
#define threadIdx (emulation::thread_index)
#define blockIdx (emulation::block_index)
#define blockDim (emulation::block_size)
#define gridDim (emulation::grid_size)

inline void __syncthreads() { emulation::barrier(); }
inline void __syncwarp() { emulation::gather("syncwarp", 0); }
inline void __threadfence() {}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask, int = 32) {
  const auto all = emulation::gather("shfl_xor", value);
  return all[emulation::lane() ^ unsigned(mask)];
}
template <class T>
T __shfl_up_sync(unsigned, T value, unsigned delta) {
  const auto all = emulation::gather("shfl_up", value);
  return emulation::lane() < delta ? value : all[emulation::lane() - delta];
}
template <class T>
T __shfl_sync(unsigned, T value, int source) {
  const auto all = emulation::gather("shfl", value);
  return all[unsigned(source) % 32];
}
template <class T>
unsigned __match_any_sync(unsigned, T value) {
  const auto all = emulation::gather("match_any", value);
  unsigned peers = 0;
  for (unsigned l = 0; l < 32; ++l) peers |= unsigned(all[l] == value) << l;
  return peers;
}
inline unsigned __ballot_sync(unsigned, bool holds) {
  const auto all = emulation::gather("ballot", holds);
  unsigned lanes = 0;
  for (unsigned l = 0; l < 32; ++l) lanes |= unsigned(all[l]) << l;
  return lanes;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(int(x)); }
inline unsigned atomicAdd(unsigned* at, unsigned value) {
  const unsigned old = *at;
  *at += value;
  return old;
}
