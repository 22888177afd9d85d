// The loss on the CPU, step by step. Rows and tables are those of docs/ops.md; Wide is float or double.
#pragma once

#include <cstdint>
#include <vector>

#include "common/loss.h"
#include "common/matrix.h"

namespace robustfast {

// The samples of a batch by class: rows in ascending order of class, samples of a row in the batch's order.
struct Groups {
  std::vector<int32_t> order;  // the samples, row after row; ignored ones are left out
  std::vector<int32_t> begin;  // of each row in `order`, and the end of the last
  int64_t rows() const { return int64_t(begin.size()) - 1; }
  int64_t count(int64_t row) const { return begin[row + 1] - begin[row]; }
};

// Fills slot (n,) and classes (rows,); gives the classes present. Throws std::out_of_range for a label outside
// [0, num_classes).
Groups group(Matrix target, int64_t n, int64_t num_classes, int64_t ignore_index, int64_t rows, int32_t* slot,
             int32_t* classes);
Groups group_by_slot(const int32_t* slot, int64_t n, int64_t rows);

template <class Wide>
struct Loss {
  Settings settings;
  int64_t norm;
  bool update_state;
  int64_t n, dim, num_classes;
  const Groups* groups;
  Matrix input, input_noise, weight, bias;
  Wide* centroids;
  bool* seen;
  Wide* pull;           // (2, n)
  Wide* centroid;       // (rows, dim)
  Wide* mu_grad;        // (rows, dim)
  Wide* boundary_grad;  // (rows, dim); holds mu_c until the margin is done
  Wide* boundary_bias;  // (rows,)
  int32_t* classes;     // (rows,)
  int32_t* winner;      // (rows,)

  int64_t present() const { return groups->rows(); }
};

// variance: mu_c, m_c, state, pull, and in mu_grad what variance and regularization add to d loss / d mu_c.
// Adds its parts to the terms of all classes, class_term::count of them.
template <class Wide>
void variance(const Loss<Wide>& loss, Wide* terms);

// For each row's class c, the class i whose boundary with c scores highest, the lowest on ties, and its score; -1 and
// -inf where no row of the weight differs from c's. mu (rows, dim), weight (num_classes, dim), bias (num_classes,) or
// null, classes, score and winner (rows,).
template <class Wide>
void margin_search(const Wide* mu, const Matrix& weight, const Matrix& bias, const int32_t* classes, int64_t rows,
                   int64_t dim, int64_t num_classes, Wide* score, int32_t* winner);

// margin: winner, boundary_grad, boundary_bias; completes mu_grad with its part and divides it by n_c.
// Gives the margin.
template <class Wide>
Wide margin(const Loss<Wide>& loss);

template <class Wide>
struct LossBackward {
  Wide grad_loss;
  int64_t norm, n, dim, num_classes, rows;
  const Groups* groups;
  Matrix input, input_noise;
  const Wide *pull, *centroid, *mu_grad, *boundary_grad, *boundary_bias;
  const int32_t *slot, *classes, *winner;
};

// d loss / d input (view 0) or d input_noise (view 1); contiguous (n, dim), `grad` has its dtype.
template <class Wide>
void variance_backward(const LossBackward<Wide>& loss, int view, void* grad);

// d loss / d weight (num_classes, dim) and d loss / d bias (num_classes,), contiguous; nothing where data is null.
template <class Wide>
void margin_backward(const LossBackward<Wide>& loss, const Output& grad_weight, const Output& grad_bias);

}  // namespace robustfast
