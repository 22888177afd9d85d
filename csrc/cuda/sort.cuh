// A stable radix sort of entries by class, in tiles of one block, and the tables of rows and chunks after it.
#pragma once

#include "cuda/block.cuh"
#include "cuda/groups.cuh"

namespace robustfast::cuda {

constexpr int group_threads = 1024, group_warps = group_threads / 32;
constexpr int group_per_thread = 8, group_tile = group_threads * group_per_thread;
constexpr int digits = 256;  // of a pass of the sort
constexpr size_t count_shared = group_warps * digits * sizeof(uint32_t);
constexpr size_t group_shared = count_shared + 2 * group_tile * sizeof(uint32_t);

inline int sort_passes(int64_t num_classes) {
  int passes = 1;
  while (num_classes >> (8 * passes)) ++passes;
  return passes;
}

// The position in its tile of a thread's k-th key: a warp's keys are neighbours, for a stable order.
RF_DEVICE int tile_position(int k) { return warp_id() * 32 * group_per_thread + k * 32 + lane_id(); }

// rank[k]: the keys of the tile with the same digit that come before this thread's k-th. Returns how many keys of the
// tile have the digit threadIdx.x. `counter` is (warps, digits) in shared memory.
RF_DEVICE uint32_t rank_tile(const uint32_t (&key)[group_per_thread], int count, int shift, uint32_t* counter,
                             uint32_t (&rank)[group_per_thread]) {
  RF_UNROLL
  for (int e = 0; e < group_warps * digits; e += group_threads) counter[e + int(threadIdx.x)] = 0;
  unsigned peers[group_per_thread];
  RF_UNROLL
  for (int k = 0; k < group_per_thread; ++k) {
    peers[k] =
        __match_any_sync(all_lanes, tile_position(k) < count ? key[k] >> shift & (digits - 1) : uint32_t(digits));
  }
  __syncthreads();
  uint32_t* mine = counter + warp_id() * digits;
  RF_UNROLL
  for (int k = 0; k < group_per_thread; ++k) {
    const bool valid = tile_position(k) < count;
    const uint32_t digit = key[k] >> shift & (digits - 1);
    const unsigned before = peers[k] & ((1u << lane_id()) - 1);
    const uint32_t earlier = valid ? mine[digit] : 0;
    __syncwarp();
    if (valid && before == 0) mine[digit] = earlier + __popc(peers[k]);
    __syncwarp();
    rank[k] = earlier + __popc(before);
  }
  __syncthreads();
  uint32_t total = 0;
  if (threadIdx.x < digits) {
    uint32_t of_warp[group_warps];
    RF_UNROLL
    for (int w = 0; w < group_warps; ++w) of_warp[w] = counter[w * digits + threadIdx.x];
    RF_UNROLL
    for (int w = 0; w < group_warps; ++w) {
      counter[w * digits + threadIdx.x] = total;
      total += of_warp[w];
    }
  }
  __syncthreads();
  RF_UNROLL
  for (int k = 0; k < group_per_thread; ++k) {
    if (tile_position(k) < count) rank[k] += mine[key[k] >> shift & (digits - 1)];
  }
  __syncthreads();
  return total;
}

// Heads of rows in the high half, of chunks in the low one.
RF_DEVICE uint64_t heads_at(const uint32_t* keys, int64_t j, const Groups& groups) {
  if (keys[j] >= uint32_t(groups.num_classes)) return 0;
  const bool row = j == 0 || keys[j - 1] != keys[j];
  return uint64_t(row) << 32 | uint64_t(row || (j & (groups.chunk_size - 1)) == 0);
}

// The heads at a warp's k-th 32 positions of a tile, as bits, and how many there are.
struct Heads {
  unsigned row, chunk;

  RF_DEVICE Heads(const uint32_t* keys, int64_t first, int count, int k, const Groups& groups) {
    const uint64_t here = tile_position(k) < count ? heads_at(keys, first + tile_position(k), groups) : 0;
    row = __ballot_sync(all_lanes, here >> 32 != 0), chunk = __ballot_sync(all_lanes, here != 0);
  }
  RF_DEVICE uint64_t among(unsigned lanes) const {
    return uint64_t(__popc(row & lanes)) << 32 | uint64_t(__popc(chunk & lanes));
  }
};

// Rows and chunks that begin at positions [first, first + count) of sorted `keys`, of which `before` began earlier.
RF_DEVICE void assign_rows(const uint32_t* keys, const int32_t* order, int64_t first, int count, uint64_t before,
                           const Groups& groups) {
  uint64_t of_warp = 0, total;
  RF_UNROLL
  for (int k = 0; k < group_per_thread; ++k) of_warp += Heads(keys, first, count, k, groups).among(all_lanes);
  uint64_t heads = before + block_scan(lane_id() == 31 ? of_warp : 0, total);
#pragma unroll 1
  for (int k = 0; k < group_per_thread; ++k) {
    const Heads here(keys, first, count, k, groups);
    const uint64_t up_to = heads + here.among(all_lanes >> (31 - lane_id()));
    heads += here.among(all_lanes);
    if (tile_position(k) >= count) continue;
    const int64_t j = first + tile_position(k);
    const bool counted = keys[j] < uint32_t(groups.num_classes);
    const int32_t row = int32_t(up_to >> 32) - 1, chunk = int32_t(up_to) - 1;
    if (here.row >> lane_id() & 1) {
      groups.begin[row] = int32_t(j);
      groups.first_chunk[row] = chunk;
      groups.classes[row] = int32_t(keys[j]);
    }
    if (here.chunk >> lane_id() & 1) {
      groups.chunk_begin[chunk] = int32_t(j);
      groups.chunk_row[chunk] = row;
    }
    if (groups.slot) groups.slot[order[j]] = !counted ? -1 : groups.slot_is_class ? int32_t(keys[j]) : row;
    if (counted ? j + 1 == groups.n || keys[j + 1] >= uint32_t(groups.num_classes) : j == 0) {
      *groups.totals = {row + 1, chunk + 1};
      groups.begin[row + 1] = groups.chunk_begin[chunk + 1] = int32_t(j) + int32_t(counted);
      groups.first_chunk[row + 1] = chunk + 1;
    }
  }
}

// What stands in the tables before rows are assigned; thread t of `threads`.
RF_DEVICE void clear_rows(const Groups& groups, int64_t t, int64_t threads) {
  for (int64_t row = t; row < groups.rows; row += threads) {
    groups.classes[row] = -1;
    groups.arrived[row] = 0;
    if (groups.winner) groups.winner[row] = -1;
  }
  if (t == 0) *groups.finished = 0;
}

// All of it for at most group_tile entries, by one block.
template <class Classes>
RF_DEVICE void group_in_block(const Classes& classes, const Groups& groups) {
  uint32_t* counter = reinterpret_cast<uint32_t*>(shared_memory());
  uint32_t* keys = counter + count_shared / sizeof(uint32_t);
  int32_t* order = reinterpret_cast<int32_t*>(keys + group_tile);
  const int count = int(groups.n);
  uint32_t key[group_per_thread];
  int32_t entry[group_per_thread];
  classes.load([](int k) { return tile_position(k); }, count, key);
  RF_UNROLL
  for (int k = 0; k < group_per_thread; ++k) entry[k] = tile_position(k);
  clear_rows(groups, threadIdx.x, group_threads);
  for (int shift = 0; shift == 0 || groups.num_classes >> shift; shift += 8) {
    if (shift > 0) {
      RF_UNROLL
      for (int k = 0; k < group_per_thread; ++k) {
        key[k] = tile_position(k) < count ? keys[tile_position(k)] : 0;
        entry[k] = tile_position(k) < count ? order[tile_position(k)] : 0;
      }
    }
    uint32_t rank[group_per_thread], all;
    const uint32_t of_digit = rank_tile(key, count, shift, counter, rank);
    const uint32_t first = block_scan(of_digit, all);
    if (threadIdx.x < digits) counter[threadIdx.x] = first;
    __syncthreads();
    RF_UNROLL
    for (int k = 0; k < group_per_thread; ++k) {
      if (tile_position(k) >= count) continue;
      const uint32_t position = counter[key[k] >> shift & (digits - 1)] + rank[k];
      keys[position] = key[k];
      order[position] = entry[k];
    }
    __syncthreads();
  }
  for (int i = int(threadIdx.x); i < count; i += group_threads) groups.order[i] = order[i];
  assign_rows(keys, order, 0, count, 0, groups);
}

}  // namespace robustfast::cuda
