// The sort for any number of entries: count the digits of each tile, scan the counts, move the entries.
#include "cuda/sort.cuh"

namespace robustfast::cuda {
namespace {

RF_DEVICE int tile_count(int64_t n) {
  const int64_t left = n - int64_t(blockIdx.x) * group_tile;
  return int(left < group_tile ? left : group_tile);
}

template <class Classes>
__global__ void __launch_bounds__(group_threads, 1) group_in_block_kernel(const Classes classes, const Groups groups) {
  group_in_block(classes, groups);
}

template <class Classes>
__global__ void __launch_bounds__(group_threads, 1)
    keys_kernel(const Classes classes, const Groups groups, uint32_t* keys, int32_t* order) {
  const int64_t first = int64_t(blockIdx.x) * group_tile;
  const auto entry = [&](int k) { return first + tile_position(k); };
  uint32_t key[group_per_thread];
  classes.load(entry, groups.n, key);
  clear_rows(groups, int64_t(blockIdx.x) * group_threads + threadIdx.x, int64_t(gridDim.x) * group_threads);
  RF_UNROLL
  for (int k = 0; k < group_per_thread; ++k) {
    if (entry(k) >= groups.n) continue;
    keys[entry(k)] = key[k];
    order[entry(k)] = int32_t(entry(k));
  }
}

RF_DEVICE void load_tile(const uint32_t* keys, int64_t n, uint32_t (&key)[group_per_thread]) {
  RF_UNROLL
  for (int k = 0; k < group_per_thread; ++k) {
    const int64_t i = int64_t(blockIdx.x) * group_tile + tile_position(k);
    key[k] = i < n ? keys[i] : 0;
  }
}

// counts (digits, tiles)
__global__ void __launch_bounds__(group_threads, 1)
    count_kernel(const uint32_t* keys, int64_t n, int shift, uint32_t* counts) {
  uint32_t key[group_per_thread], rank[group_per_thread];
  load_tile(keys, n, key);
  const uint32_t of_digit = rank_tile(key, tile_count(n), shift, reinterpret_cast<uint32_t*>(shared_memory()), rank);
  if (threadIdx.x < digits) counts[int64_t(threadIdx.x) * gridDim.x + blockIdx.x] = of_digit;
}

// Each value becomes the sum of those before it; one block.
template <class I>
__global__ void __launch_bounds__(group_threads, 1) scan_kernel(I* values, int64_t size) {
  I before = 0;
  for (int64_t first = 0; first < size; first += group_tile) {
    const int64_t begin = first + int64_t(threadIdx.x) * group_per_thread;
    I value[group_per_thread], sum = 0, total;
    RF_UNROLL
    for (int k = 0; k < group_per_thread; ++k) sum += value[k] = begin + k < size ? values[begin + k] : I(0);
    I at = before + block_scan(sum, total);
    before += total;
    RF_UNROLL
    for (int k = 0; k < group_per_thread; ++k) {
      if (begin + k < size) values[begin + k] = at;
      at += value[k];
    }
  }
}

__global__ void __launch_bounds__(group_threads, 1)
    scatter_kernel(const uint32_t* keys, const int32_t* order, int64_t n, int shift, const uint32_t* positions,
                   uint32_t* keys_out, int32_t* order_out) {
  uint32_t key[group_per_thread], rank[group_per_thread];
  load_tile(keys, n, key);
  rank_tile(key, tile_count(n), shift, reinterpret_cast<uint32_t*>(shared_memory()), rank);
  RF_UNROLL
  for (int k = 0; k < group_per_thread; ++k) {
    if (tile_position(k) >= tile_count(n)) continue;
    const uint32_t digit = key[k] >> shift & (digits - 1);
    const int64_t position = int64_t(positions[int64_t(digit) * gridDim.x + blockIdx.x]) + rank[k];
    keys_out[position] = key[k];
    order_out[position] = order[int64_t(blockIdx.x) * group_tile + tile_position(k)];
  }
}

__global__ void __launch_bounds__(group_threads, 1)
    heads_kernel(const uint32_t* keys, const Groups groups, uint64_t* heads) {
  uint64_t mine = 0, total;
  for (int e = int(threadIdx.x); e < tile_count(groups.n); e += group_threads) {
    mine += heads_at(keys, int64_t(blockIdx.x) * group_tile + e, groups);
  }
  block_scan(mine, total);
  if (threadIdx.x == 0) heads[blockIdx.x] = total;
}

__global__ void __launch_bounds__(group_threads, 1)
    assign_kernel(const uint32_t* keys, const Groups groups, const uint64_t* heads_before) {
  assign_rows(keys, groups.order, int64_t(blockIdx.x) * group_tile, tile_count(groups.n), heads_before[blockIdx.x],
              groups);
}

struct Sort {
  uint32_t *keys[2], *counts;
  int32_t* order;
  uint64_t* heads;

  Sort(Arena& arena, int64_t n) {
    const int64_t tiles = (n + group_tile - 1) / group_tile;
    for (uint32_t*& k : keys) k = arena.take<uint32_t>(n);
    order = arena.take<int32_t>(n);
    counts = arena.take<uint32_t>(tiles * digits);
    heads = arena.take<uint64_t>(tiles);
  }
};

template <class Classes>
cudaError_t group(const Classes& classes, const Groups& groups, void* scratch, cudaStream_t stream) {
  if (groups.n <= group_tile) {
    return launch(group_in_block_kernel<Classes>, 1, group_threads, group_shared, stream, classes, groups);
  }
  Arena arena(scratch);
  Sort sort(arena, groups.n);
  const unsigned tiles = unsigned((groups.n + group_tile - 1) / group_tile);
  const int passes = sort_passes(groups.num_classes);
  // The last pass writes to groups.order.
  int32_t* order[2] = {passes % 2 ? sort.order : groups.order, passes % 2 ? groups.order : sort.order};
  cudaError_t error =
      launch(keys_kernel<Classes>, tiles, group_threads, 0, stream, classes, groups, sort.keys[0], order[0]);
  for (int pass = 0; pass < passes && error == cudaSuccess; ++pass) {
    const int from = pass % 2, to = 1 - from;
    error = launch(count_kernel, tiles, group_threads, count_shared, stream, sort.keys[from], groups.n, 8 * pass,
                   sort.counts);
    if (error != cudaSuccess) break;
    error = launch(scan_kernel<uint32_t>, 1, group_threads, 0, stream, sort.counts, int64_t(tiles) * digits);
    if (error != cudaSuccess) break;
    error = launch(scatter_kernel, tiles, group_threads, count_shared, stream, sort.keys[from], order[from], groups.n,
                   8 * pass, sort.counts, sort.keys[to], order[to]);
  }
  const uint32_t* sorted = sort.keys[passes % 2];
  if (error == cudaSuccess) error = launch(heads_kernel, tiles, group_threads, 0, stream, sorted, groups, sort.heads);
  if (error == cudaSuccess) {
    error = launch(scan_kernel<uint64_t>, 1, group_threads, 0, stream, sort.heads, int64_t(tiles));
  }
  if (error == cudaSuccess) error = launch(assign_kernel, tiles, group_threads, 0, stream, sorted, groups, sort.heads);
  return error;
}

}  // namespace

size_t sort_scratch(int64_t n) {
  Arena arena(nullptr);
  if (n > group_tile) Sort(arena, n);
  return arena.used();
}

cudaError_t group_samples(const SampleClasses& classes, const Groups& groups, void* scratch, cudaStream_t stream) {
  return group(classes, groups, scratch, stream);
}
cudaError_t group_boundaries(const BoundaryClasses& classes, const Groups& groups, void* scratch, cudaStream_t stream) {
  return group(classes, groups, scratch, stream);
}

}  // namespace robustfast::cuda
