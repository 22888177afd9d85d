// A thread's share of a row: neighbouring elements, in 16-byte accesses where the row allows them.
#pragma once

#include "cuda/arguments.cuh"
#include "cuda/block.cuh"
#include "cuda/dispatch.cuh"

namespace robustfast::cuda {

// `count` is one, or fills 16-byte words or half of one.
template <class T, int count>
struct alignas(count == 1               ? alignof(T)
               : count * sizeof(T) < 16 ? 8
                                        : 16) Pack {
  static constexpr int words = count * sizeof(T) / 16;
  static_assert(count == 1 || count * sizeof(T) == (words > 0 ? words * 16 : 8));
  T value[count];
};

// Elements of T in 16 bytes: the width of what a thread takes of a row of features.
template <class T>
constexpr int pack_size = 16 / sizeof(T);

// Whether the rows of a matrix are made of whole packs. One without data is no obstacle.
inline bool whole_packs(const Matrix& matrix, int64_t dim, int64_t element_bytes) {
  const int64_t count = 16 / element_bytes;
  return !matrix.data ||
         (dim % count == 0 && matrix.stride % count == 0 && reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0);
}

// function(std::integral_constant<int, count>()) with packs of one element where rows are not whole.
template <class T, class Function>
cudaError_t for_packs(bool whole, const Function& function) {
  return whole ? function(std::integral_constant<int, pack_size<T>>()) : function(std::integral_constant<int, 1>());
}

// Elements [column, column + count) of a row of `dim`, a multiple of count; zeros behind its end. These are chosen by
// whole words, which are taken apart where they are used: a choice of elements would wait for the load.
template <int count, class T>
RF_DEVICE Pack<T, count> load_pack(const T* row, int64_t column, int64_t dim) {
  Pack<T, count> pack;
  if constexpr (count == 1) {
    pack.value[0] = column < dim ? row[column] : T{};
  } else if constexpr (Pack<T, count>::words == 0) {
    const uint64_t word = column < dim ? load8(row + column) : 0;
    memcpy(&pack, &word, sizeof(pack));
  } else {
    RF_UNROLL
    for (int w = 0; w < Pack<T, count>::words; ++w) {
      Vector16 word = {};
      if (column < dim) word = load16(row + column + w * pack_size<T>);
      memcpy(pack.value + w * pack_size<T>, &word, sizeof(word));
    }
  }
  return pack;
}

enum class Reuse { soon, never };

template <Reuse reuse, int count, class T>
RF_DEVICE void store_pack(T* row, int64_t column, int64_t dim, const Pack<T, count>& pack) {
  if (column >= dim) return;
  if constexpr (count == 1) {
    row[column] = pack.value[0];
  } else if constexpr (Pack<T, count>::words == 0) {
    uint64_t word;
    memcpy(&word, &pack, sizeof(word));
    store8(row + column, word);
  } else {
    Vector16 word[Pack<T, count>::words];
    memcpy(word, &pack, sizeof(pack));
    RF_UNROLL
    for (int w = 0; w < Pack<T, count>::words; ++w) {
      T* to = row + column + w * pack_size<T>;
      reuse == Reuse::never ? store16_once(to, word[w]) : store16(to, word[w]);
    }
  }
}

// What a thread takes of a row of any dtype beside tables: four elements, or one where rows are not made of fours.
constexpr int quad = 4;

inline bool whole_quads(const Matrix& matrix, int64_t dim) {
  const size_t bytes = visit(matrix.dtype, [](auto zero) { return quad * sizeof(zero); });
  return dim % quad == 0 && matrix.stride % quad == 0 &&
         reinterpret_cast<uintptr_t>(matrix.data) % (bytes < 16 ? bytes : 16) == 0;
}

// Elements [column, column + count) of row i of a matrix whose dtype only the launch knows.
template <class Wide, int count>
RF_DEVICE Pack<Wide, count> load_elements(const Matrix& matrix, int64_t i, int64_t column) {
  return visit(matrix.dtype, [&](auto zero) {
    const auto narrow = load_pack<count>(matrix.row<decltype(zero)>(i), column, column + 1);
    Pack<Wide, count> pack;
    RF_UNROLL
    for (int k = 0; k < count; ++k) pack.value[k] = Wide(to_float(narrow.value[k]));
    return pack;
  });
}

// How the threads of a block share rows: teams of neighbouring threads, a power of two of them, one row each.
struct Teams {
  int size, count;  // threads of a team, teams of a block

  // Teams as wide as a row of `packs`, but of eight threads or more, within a block of `threads`.
  RF_INLINE Teams(int64_t packs, int threads) : size(threads) {
    while (size > 8 && size / 2 >= packs) size /= 2;
    count = threads / size;
  }
  RF_DEVICE int team() const { return int(threadIdx.x) / size; }
  RF_DEVICE int rank() const { return int(threadIdx.x) % size; }

  // Sums of each of `count` values over the team, for every thread of it. All threads of the block call it.
  template <int count, class F>
  RF_DEVICE void sum(F (&value)[count]) const {
    alignas(16) __shared__ F of_warp[max_warps][count];
    if (size == 8) return lanes_sums<8>(value);
    if (size == 16) return lanes_sums<16>(value);
    lanes_sums(value);
    if (size == 32) return;
    __syncthreads();  // of an earlier call's reads
    RF_UNROLL
    for (int k = 0; k < count; ++k) {
      if (lane_id() == 0) of_warp[warp_id()][k] = value[k];
    }
    __syncthreads();
    const int first = team() * (size / 32);
    RF_UNROLL
    for (int k = 0; k < count; ++k) value[k] = of_warp[first][k];
#pragma unroll 1
    for (int w = 1; w < size / 32; ++w) {
      RF_UNROLL
      for (int k = 0; k < count; ++k) value[k] += of_warp[first + w][k];
    }
  }

  // Sums of a pack over the teams, thread by thread, for the first team. All threads of the block call it.
  template <int threads, int count, class F>
  RF_DEVICE void sum_across(Pack<F, count>& pack) const {
    if (this->count == 1) return;
    __shared__ Pack<F, count> of_thread[threads];
    __syncthreads();  // of an earlier call's reads
    of_thread[threadIdx.x] = pack;
    __syncthreads();
    if (team() != 0) return;
#pragma unroll 1
    for (int other = 1; other < this->count; ++other) {
      RF_UNROLL
      for (int k = 0; k < count; ++k) pack.value[k] += of_thread[other * size + rank()].value[k];
    }
  }
};

}  // namespace robustfast::cuda
