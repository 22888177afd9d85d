// Entries (samples, or boundaries of the margin) grouped by class: a stable radix sort, and what blocks work on after
// it.
//
// Classes become rows in ascending order. A row's entries are neighbours in `order`, and are cut into items wherever a
// multiple of `chunk` falls between them, so that blocks get equal work however the labels are skewed: at most
// n / chunk + rows items, and most rows are one item. The sums of a row with several are added in order by the block
// that comes last.
#pragma once

#include "cuda/arena.h"
#include "cuda/loss.cuh"

namespace robustfast::cuda {

struct RowTotals {
  int32_t rows, items;  // P, and the items they are cut into
};

struct Rows {
  int64_t n, capacity, num_classes;
  int32_t chunk;                   // a power of two
  int32_t *classes, *slot;         // (capacity), -1 from P on; (n) the row of each entry, -1 for none, or null
  int32_t* winner = nullptr;       // (capacity), set to -1 where it is given
  int32_t *order, *begin;          // (n) entries by class; (capacity + 1) each row's first position in `order`
  int32_t *item_begin, *item_row;  // (max_items + 1) first position, (max_items) row
  int32_t* row_item;               // (capacity + 1) first item
  unsigned *arrived, *finished;    // (capacity), (1): counters of blocks, 0 between kernels
  RowTotals* totals;

  int64_t max_items() const { return n / chunk + 1 + capacity; }

  void place(Arena& arena) {
    order = arena.take<int32_t>(n);
    begin = arena.take<int32_t>(capacity + 1);
    item_begin = arena.take<int32_t>(max_items() + 1);
    item_row = arena.take<int32_t>(max_items());
    row_item = arena.take<int32_t>(capacity + 1);
    arrived = arena.take<unsigned>(capacity);
    finished = arena.take<unsigned>(1);
    totals = arena.take<RowTotals>(1);
  }
};

// A part of one row: positions [begin, end) of `order`.
struct Item {
  int32_t row, row_begin, row_end, begin, end, chunk;

  RF_DEVICE Item(const Rows& rows, int64_t index)
      : row(rows.item_row[index]),
        row_begin(rows.begin[row]),
        row_end(rows.begin[row + 1]),
        begin(rows.item_begin[index]),
        end(rows.item_begin[index + 1]),
        chunk(rows.chunk) {}

  RF_DEVICE int32_t count() const { return row_end - row_begin; }
  RF_DEVICE int32_t parts() const { return (row_end - 1) / chunk - row_begin / chunk + 1; }
  // Where sums of part p stand among those of all rows that have several: a chunk may end in one row's first part and
  // begin in another's later one, and holds no third. There are 2 (n / chunk + 1) places.
  RF_DEVICE int64_t place(int32_t part) const { return 2 * (int64_t(row_begin / chunk) + part) + (part == 0); }
  RF_DEVICE int64_t place() const { return place(begin / chunk - row_begin / chunk); }
};

// The classes of samples.
struct SampleClasses {
  Matrix target;
  int64_t num_classes, ignore_index;
  RF_DEVICE uint32_t operator()(int64_t i) const { return uint32_t(class_of(target, i, num_classes, ignore_index)); }
};

// The rows of the classifier's gradient that boundaries give to: entry r < capacity adds for the winner of row r, entry
// capacity + r subtracts for its class.
struct BoundaryClasses {
  const int32_t *classes, *winner;
  int64_t capacity, num_classes;
  RF_DEVICE uint32_t operator()(int64_t i) const {
    const int64_t row = i < capacity ? i : i - capacity;
    if (winner[row] < 0) return uint32_t(num_classes);
    return uint32_t(i < capacity ? winner[row] : classes[row]);
  }
};

constexpr int group_threads = 1024, group_per_thread = 8, group_tile = group_threads * group_per_thread;
constexpr int digits = 256;  // of a pass of the sort
constexpr size_t count_shared = group_threads / 32 * digits * sizeof(uint32_t);
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
  for (int e = int(threadIdx.x); e < num_warps() * digits; e += group_threads) counter[e] = 0;
  __syncthreads();
  uint32_t* mine = counter + warp_id() * digits;
  RF_UNROLL
  for (int k = 0; k < group_per_thread; ++k) {
    const bool valid = tile_position(k) < count;
    const uint32_t digit = valid ? key[k] >> shift & (digits - 1) : uint32_t(digits);
    const unsigned peers = __match_any_sync(all_lanes, digit);
    const unsigned before = peers & ((1u << lane_id()) - 1);
    const uint32_t earlier = valid ? mine[digit] : 0;
    __syncwarp();
    if (valid && before == 0) mine[digit] = earlier + __popc(peers);
    __syncwarp();
    rank[k] = earlier + __popc(before);
  }
  __syncthreads();
  uint32_t total = 0;
  if (threadIdx.x < digits) {
    for (int w = 0; w < num_warps(); ++w) {
      const uint32_t of_warp = counter[w * digits + threadIdx.x];
      counter[w * digits + threadIdx.x] = total;
      total += of_warp;
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

// Heads of rows in the high half, of items in the low one.
RF_DEVICE uint64_t heads_at(const uint32_t* keys, int64_t j, const Rows& rows) {
  if (keys[j] >= uint32_t(rows.num_classes)) return 0;
  const bool row = j == 0 || keys[j - 1] != keys[j];
  return uint64_t(row) << 32 | uint64_t(row || (j & (rows.chunk - 1)) == 0);
}

// Rows and items that begin at positions [first, first + count) of sorted `keys`, of which `before` began earlier.
RF_DEVICE void assign_rows(const uint32_t* keys, const int32_t* order, int64_t first, int count, uint64_t before,
                           const Rows& rows) {
  const int64_t begin = first + int(threadIdx.x) * group_per_thread;
  const int64_t end = begin + group_per_thread < first + count ? begin + group_per_thread : first + count;
  uint64_t heads = 0, total;
  for (int64_t j = begin; j < end; ++j) heads += heads_at(keys, j, rows);
  heads = before + block_scan(heads, total);
  for (int64_t j = begin; j < end; ++j) {
    const bool counted = keys[j] < uint32_t(rows.num_classes);
    const uint64_t here = heads_at(keys, j, rows);
    heads += here;
    const int32_t row = int32_t(heads >> 32) - 1, item = int32_t(heads) - 1;
    if (here >> 32) {
      rows.begin[row] = int32_t(j);
      rows.row_item[row] = item;
      rows.classes[row] = int32_t(keys[j]);
    }
    if (here) {
      rows.item_begin[item] = int32_t(j);
      rows.item_row[item] = row;
    }
    if (rows.slot) rows.slot[order[j]] = counted ? row : -1;
    if (counted ? j + 1 == rows.n || keys[j + 1] >= uint32_t(rows.num_classes) : j == 0) {
      *rows.totals = {row + 1, item + 1};
      rows.begin[row + 1] = rows.item_begin[item + 1] = int32_t(j) + int32_t(counted);
      rows.row_item[row + 1] = item + 1;
    }
  }
}

// What stands in the tables before rows are assigned; thread t of `threads`.
RF_DEVICE void clear_rows(const Rows& rows, int64_t t, int64_t threads) {
  for (int64_t row = t; row < rows.capacity; row += threads) {
    rows.classes[row] = -1;
    rows.arrived[row] = 0;
    if (rows.winner) rows.winner[row] = -1;
  }
  if (t == 0) *rows.finished = 0;
}

// All of it for at most group_tile entries, by one block.
template <class Classes>
RF_DEVICE void group_in_block(const Classes& class_of_entry, const Rows& rows) {
  uint32_t* counter = reinterpret_cast<uint32_t*>(shared_memory());
  uint32_t* keys = counter + count_shared / sizeof(uint32_t);
  int32_t* order = reinterpret_cast<int32_t*>(keys + group_tile);
  const int count = int(rows.n);
  clear_rows(rows, threadIdx.x, group_threads);
  for (int i = int(threadIdx.x); i < count; i += group_threads) {
    keys[i] = class_of_entry(i);
    order[i] = i;
  }
  for (int shift = 0; shift == 0 || rows.num_classes >> shift; shift += 8) {
    uint32_t key[group_per_thread], rank[group_per_thread];
    int32_t entry[group_per_thread];
    __syncthreads();
    RF_UNROLL
    for (int k = 0; k < group_per_thread; ++k) {
      key[k] = tile_position(k) < count ? keys[tile_position(k)] : 0;
      entry[k] = tile_position(k) < count ? order[tile_position(k)] : 0;
    }
    const uint32_t of_digit = rank_tile(key, count, shift, counter, rank);
    uint32_t all;
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
  }
  __syncthreads();
  for (int i = int(threadIdx.x); i < count; i += group_threads) rows.order[i] = order[i];
  assign_rows(keys, order, 0, count, 0, rows);
}

// The same for more entries, in a number of launches that the number of classes sets.
size_t sort_scratch(int64_t n);
cudaError_t group_samples(const SampleClasses& classes, const Rows& rows, void* scratch, cudaStream_t stream);
cudaError_t group_boundaries(const BoundaryClasses& classes, const Rows& rows, void* scratch, cudaStream_t stream);

}  // namespace robustfast::cuda
