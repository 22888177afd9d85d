// Entries (samples, or boundaries of the margin) grouped by class: classes become rows in ascending order, and the
// entries of a row are neighbours in `order`.
//
// They are cut into chunks wherever a multiple of `chunk_size` falls between them, so that blocks get equal work
// however the labels are skewed: at most n / chunk_size + rows chunks, and most rows are one. The sums of a row with
// several are added in order by the block that comes last.
#pragma once

#include "cuda/arena.h"
#include "cuda/elements.cuh"

namespace robustfast::cuda {

struct GroupTotals {
  int32_t present, chunks;  // P, and the chunks that the rows are cut into
};

struct Groups {
  int64_t n, rows, num_classes;
  int32_t chunk_size;                // a power of two
  int32_t *classes, *slot;           // (rows), -1 from P on; (n) the row of each entry, -1 for none, or null
  int32_t* winner = nullptr;         // (rows), set to -1 where it is given
  bool slot_is_class = false;        // slot has classes in place of rows
  int32_t *order, *begin;            // (n) entries by class; (rows + 1) each row's first position in `order`
  int32_t *chunk_begin, *chunk_row;  // (max_chunks + 1) first position, (max_chunks) row
  int32_t* first_chunk;              // (rows + 1) of each row
  unsigned *arrived, *finished;      // (rows), (1): counters of blocks, 0 between kernels
  GroupTotals* totals;

  int64_t max_chunks() const { return n / chunk_size + 1 + rows; }

  void place(Arena& arena) {
    order = arena.take<int32_t>(n);
    begin = arena.take<int32_t>(rows + 1);
    chunk_begin = arena.take<int32_t>(max_chunks() + 1);
    chunk_row = arena.take<int32_t>(max_chunks());
    first_chunk = arena.take<int32_t>(rows + 1);
    arrived = arena.take<unsigned>(rows);
    finished = arena.take<unsigned>(1);
    totals = arena.take<GroupTotals>(1);
  }
};

// Positions [begin, end) of `order`, all of one row.
struct Chunk {
  int32_t row, row_begin, row_end, begin, end, size;

  RF_DEVICE Chunk(const Groups& groups, int64_t index)
      : row(groups.chunk_row[index]),
        row_begin(groups.begin[row]),
        row_end(groups.begin[row + 1]),
        begin(groups.chunk_begin[index]),
        end(groups.chunk_begin[index + 1]),
        size(groups.chunk_size) {}

  RF_DEVICE int32_t count() const { return row_end - row_begin; }                           // of the row's entries
  RF_DEVICE int32_t of_row() const { return (row_end - 1) / size - row_begin / size + 1; }  // how many the row has
  // Where sums of the row's k-th chunk stand among those of all rows that have several: between two multiples of
  // `size` lie the first chunk of one row and a later one of another, and no third. There are 2 (n / size + 1) places.
  RF_DEVICE int64_t place(int32_t k) const { return 2 * (int64_t(row_begin / size) + k) + (k == 0); }
  RF_DEVICE int64_t place() const { return place(begin / size - row_begin / size); }
};

// The classes of entries, `count` at a time so that their loads overlap: key[k] becomes that of entry(k), and
// num_classes where entry(k) is not below n.

// The classes of samples.
struct SampleClasses {
  Matrix target;
  int64_t num_classes, ignore_index;

  template <int count, class Entry>
  RF_DEVICE void load(const Entry& entry, int64_t n, uint32_t (&key)[count]) const {
    visit_label(target.dtype, [&](auto zero) {
      decltype(zero) label[count];
      RF_UNROLL
      for (int k = 0; k < count; ++k) label[k] = *target.row<decltype(zero)>(entry(k) < n ? entry(k) : 0);
      RF_UNROLL
      for (int k = 0; k < count; ++k) {
        key[k] = uint32_t(entry(k) < n ? class_of(int64_t(label[k]), num_classes, ignore_index) : num_classes);
      }
    });
  }
};

// The rows of the classifier's gradient that boundaries give to: entry r < rows adds for the winner of row r, entry
// rows + r subtracts for its class.
struct BoundaryClasses {
  const int32_t *classes, *winner;
  int64_t rows, num_classes;

  template <int count, class Entry>
  RF_DEVICE void load(const Entry& entry, int64_t n, uint32_t (&key)[count]) const {
    int32_t wins[count], loses[count];
    RF_UNROLL
    for (int k = 0; k < count; ++k) {
      const int64_t i = entry(k) < n ? entry(k) : 0, row = i < rows ? i : i - rows;
      wins[k] = winner[row], loses[k] = classes[row];
    }
    RF_UNROLL
    for (int k = 0; k < count; ++k) {
      const bool counts = entry(k) < n && wins[k] >= 0;
      key[k] = uint32_t(!counts ? num_classes : entry(k) < rows ? wins[k] : loses[k]);
    }
  }
};

// Fill the tables, in a number of launches that n and the number of classes set.
size_t sort_scratch(int64_t n);
cudaError_t group_samples(const SampleClasses& classes, const Groups& groups, void* scratch, cudaStream_t stream);
cudaError_t group_boundaries(const BoundaryClasses& classes, const Groups& groups, void* scratch, cudaStream_t stream);

}  // namespace robustfast::cuda
