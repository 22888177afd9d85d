// Sums and scans over a warp and a block. Orders are fixed, so results are the same bit for bit in every run.
#pragma once

#include "cuda/device.cuh"

namespace robustfast {

constexpr unsigned all_lanes = 0xffffffffu;
constexpr int max_warps = 32;

RF_DEVICE int lane_id() { return int(threadIdx.x % 32); }
RF_DEVICE int warp_id() { return int(threadIdx.x / 32); }
RF_DEVICE int num_warps() { return int(blockDim.x / 32); }

// Sum over groups of `width` neighbouring lanes, a power of two; every lane gets it.
template <class F>
RF_DEVICE F lanes_sum(F value, int width = 32) {
  for (int step = width / 2; step > 0; step /= 2) value += __shfl_xor_sync(all_lanes, value, step);
  return value;
}

// The same of several values, whose shuffles overlap.
template <int width = 32, int count, class F>
RF_DEVICE void lanes_sums(F (&value)[count]) {
  RF_UNROLL
  for (int step = width / 2; step > 0; step /= 2) {
    RF_UNROLL
    for (int k = 0; k < count; ++k) value[k] += __shfl_xor_sync(all_lanes, value[k], step);
  }
}

// Sums over the block; every thread gets them. All threads call it.
template <int count, class F>
RF_DEVICE void block_sum(F (&value)[count]) {
  __shared__ F of_warp[count][max_warps];
  lanes_sums(value);
  __syncthreads();  // of an earlier call's reads
  if (lane_id() == 0) {
    RF_UNROLL
    for (int k = 0; k < count; ++k) of_warp[k][warp_id()] = value[k];
  }
  __syncthreads();
  RF_UNROLL
  for (int k = 0; k < count; ++k) value[k] = lane_id() < num_warps() ? of_warp[k][lane_id()] : F(0);
  lanes_sums(value);
}

// The highest of the block's values, nan only if all are; every thread gets it. All threads call it.
template <class F>
RF_DEVICE F block_max(F value) {
  __shared__ F of_warp[max_warps];
  for (int step = 16; step > 0; step /= 2) value = fmax(value, __shfl_xor_sync(all_lanes, value, step));
  __syncthreads();  // of an earlier call's reads
  if (lane_id() == 0) of_warp[warp_id()] = value;
  __syncthreads();
  for (int w = 0; w < num_warps(); ++w) value = fmax(value, of_warp[w]);
  return value;
}

// The sum over the lanes up to this one.
template <class I>
RF_DEVICE I lanes_scan(I value) {
  RF_UNROLL
  for (int step = 1; step < 32; step *= 2) {
    const I other = __shfl_up_sync(all_lanes, value, step);
    if (lane_id() >= step) value += other;
  }
  return value;
}

// The sum over the threads before this one; `total` gets that over all. All threads call it.
template <class I>
RF_DEVICE I block_scan(I value, I& total) {
  __shared__ I of_warp[max_warps];
  const I in_warp = lanes_scan(value);
  __syncthreads();  // of an earlier call's reads
  if (lane_id() == 31) of_warp[warp_id()] = in_warp;
  __syncthreads();
  const I of_warps = lanes_scan(lane_id() < num_warps() ? of_warp[lane_id()] : I(0));
  total = __shfl_sync(all_lanes, of_warps, 31);
  return __shfl_sync(all_lanes, of_warps, warp_id()) - of_warp[warp_id()] + in_warp - value;
}

// Whether this block is the last of `count` to come here, so that it sees what the others wrote. All threads call it.
RF_DEVICE bool last_to_arrive(unsigned* counter, unsigned count) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();  // of what all threads wrote: the barrier put it before
    last = atomicAdd(counter, 1) == count - 1;
    if (last) *counter = 0;
    __threadfence();
  }
  __syncthreads();
  return last;
}

}  // namespace robustfast
