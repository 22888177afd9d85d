// What a kernel sees of a tensor.
#pragma once

#include "common/dtype.h"

namespace robustfast {

// A matrix with unit stride along a row, or (rows of one element) a vector. Strides count elements.
struct Matrix {
  const void* data = nullptr;
  Dtype dtype = Dtype::float32;
  int64_t stride = 0;

  RF_INLINE explicit operator bool() const { return data != nullptr; }
  template <class T>
  RF_INLINE const T* row(int64_t i) const {
    return static_cast<const T*>(data) + i * stride;
  }
};

// The same to be written.
struct Output {
  void* data;
  Dtype dtype;
  int64_t stride;

  template <class T>
  RF_INLINE T* row(int64_t i) const {
    return static_cast<T*>(data) + i * stride;
  }
};

// Rows of a classifier, one for each row of the tables: those that `index` names, or without one all in turn.
struct ClassifierRows {
  Matrix weight, bias;  // (., D), (.,) or null
  const int32_t* index = nullptr;

  RF_INLINE int64_t at(int64_t row) const { return index ? index[row] : row; }
};

}  // namespace robustfast
