// Labels to rows: a counting sort of the samples by class.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "cpu/loss.h"

namespace robustfast {
void slots_of_labels(Matrix target, int64_t n, int64_t num_classes, int64_t ignore_index, int32_t* slot) {
  visit_label(target.dtype, [&](auto zero) {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t label = *target.row<decltype(zero)>(i);
      const bool ignored = label == ignore_index;
      if (!ignored && (label < 0 || label >= num_classes)) {
        throw std::out_of_range("target: label " + std::to_string(label) + " at position " + std::to_string(i) +
                                " is outside 0.." + std::to_string(num_classes - 1) + " and is not ignore_index (" +
                                std::to_string(ignore_index) + ")");
      }
      slot[i] = ignored ? -1 : int32_t(label);
    }
  });
}

Groups group(int64_t n, int64_t num_classes, int64_t rows, int32_t* slot, int32_t* classes) {
  std::vector<int32_t> row_of(num_classes, -1);
  for (int64_t i = 0; i < n; ++i) {
    if (slot[i] >= 0) row_of[slot[i]] = 0;
  }
  int32_t present = 0;
  for (int64_t c = 0; c < num_classes; ++c) {
    if (row_of[c] < 0) continue;
    classes[present] = int32_t(c);
    row_of[c] = present++;
  }
  std::fill(classes + present, classes + rows, -1);
  for (int64_t i = 0; i < n; ++i) {
    if (slot[i] >= 0) slot[i] = row_of[slot[i]];
  }
  return group_by_slot(slot, n, present);
}

Groups group_by_slot(const int32_t* slot, int64_t n, int64_t rows) {
  Groups groups;
  groups.begin.assign(rows + 1, 0);
  for (int64_t i = 0; i < n; ++i) {
    if (slot[i] >= 0) ++groups.begin[slot[i] + 1];
  }
  for (int64_t row = 0; row < rows; ++row) groups.begin[row + 1] += groups.begin[row];
  groups.order.resize(groups.begin[rows]);
  std::vector<int32_t> next(groups.begin.begin(), groups.begin.end() - 1);
  for (int64_t i = 0; i < n; ++i) {
    if (slot[i] >= 0) groups.order[next[slot[i]]++] = int32_t(i);
  }
  return groups;
}

}  // namespace robustfast
