// The loss on the CPU, op by op. Rows and tables are those of docs/ops.md; `wide` is float or double.
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

// Fills slot (n,) and classes (`capacity` of them). Throws std::out_of_range for a label outside [0, num_classes).
Groups group(Matrix target, int64_t n, int64_t num_classes, int64_t ignore_index, int64_t capacity, int32_t* slot,
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
  Wide* center;         // (rows, dim)
  Wide* center_grad;    // (rows, dim)
  Wide* boundary_grad;  // (rows, dim); holds mu_c until the margin is done
  Wide* boundary_bias;  // (rows,)
  int32_t* classes;     // (rows,)
  int32_t* winner;      // (rows,)
};

// variance: mu_c, m_c, state, pull, and in center_grad what variance and regularization add to d loss / d mu_c.
// Gives (compactness, alignment, regularization).
template <class Wide>
void variance(const Loss<Wide>& loss, Wide* terms);

// margin: winner, boundary_grad, boundary_bias; completes center_grad with its part and divides it by n_c.
// Gives the margin.
template <class Wide>
Wide margin(const Loss<Wide>& loss);

template <class Wide>
struct LossGrads {
  Wide grad_loss;
  int64_t norm, n, dim, num_classes, rows;
  const Groups* groups;
  Matrix input, input_noise;
  const Wide *pull, *center, *center_grad, *boundary_grad, *boundary_bias;
  const int32_t *slot, *classes, *winner;
};

// d loss / d input, or d input_noise where `noisy`; contiguous (n, dim), `grad` has its dtype.
template <class Wide>
void variance_backward(const LossGrads<Wide>& grads, bool noisy, void* grad);

// d loss / d weight (num_classes, dim) and d loss / d bias (num_classes,), contiguous; either may be null.
template <class Wide>
void margin_backward(const LossGrads<Wide>& grads, const Output& grad_weight, const Output& grad_bias);

}  // namespace robustfast
