// A thread's share of a row: neighbouring elements, in 16-byte accesses where the row allows them.
#pragma once

#include "cuda/loss.cuh"

namespace robustfast::cuda {

template <class T, int count>
struct alignas(16) Pack {
  static_assert(count * sizeof(T) % 16 == 0, "a pack is a number of 16-byte words");
  static constexpr int words = count * sizeof(T) / 16;
  T value[count];
};

// Elements of T in 16 bytes: the width of what a thread takes of a row of features.
template <class T>
constexpr int pack_size = 16 / sizeof(T);

// Whether the rows of a matrix can be read and written in packs. One without data is no obstacle.
inline bool whole_packs(const Matrix& matrix, int64_t dim, int64_t element_bytes) {
  const int64_t count = 16 / element_bytes;
  return !matrix.data ||
         (dim % count == 0 && matrix.stride % count == 0 && reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0);
}

// Elements [column, column + count) of a row of `dim`, zeros behind its end.
template <int count, class T>
RF_DEVICE Pack<T, count> load_pack(const T* row, int64_t column, int64_t dim, bool whole) {
  Pack<T, count> pack;
  if (whole && column < dim) {
    Vector16 word[Pack<T, count>::words];
    RF_UNROLL
    for (int w = 0; w < Pack<T, count>::words; ++w) word[w] = load16(row + column + w * pack_size<T>);
    memcpy(&pack, word, sizeof(pack));
  } else {
    RF_UNROLL
    for (int k = 0; k < count; ++k) pack.value[k] = column + k < dim ? row[column + k] : T{};
  }
  return pack;
}

template <int count, class T>
RF_DEVICE void store_pack(T* row, int64_t column, int64_t dim, bool whole, const Pack<T, count>& pack) {
  if (whole) {
    Vector16 word[Pack<T, count>::words];
    memcpy(word, &pack, sizeof(pack));
    RF_UNROLL
    for (int w = 0; w < Pack<T, count>::words; ++w) store16_once(row + column + w * pack_size<T>, word[w]);
  } else {
    RF_UNROLL
    for (int k = 0; k < count; ++k) {
      if (column + k < dim) row[column + k] = pack.value[k];
    }
  }
}

// How the threads of a block share rows: teams of neighbouring threads, a power of two of them, one row each.
struct Teams {
  int size, count;  // threads of a team, teams of a block

  // Teams as wide as a row of `packs`, within a block of `threads`.
  RF_INLINE Teams(int64_t packs, int threads) : size(threads) {
    while (size > 1 && size / 2 >= packs) size /= 2;
    count = threads / size;
  }
  RF_DEVICE int team() const { return int(threadIdx.x) / size; }
  RF_DEVICE int rank() const { return int(threadIdx.x) % size; }
};

}  // namespace robustfast::cuda
