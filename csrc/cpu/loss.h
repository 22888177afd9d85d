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

// Fills slot (n,) with the samples' labels, -1 for ignored ones. Throws std::out_of_range for a label outside
// [0, num_classes).
void slots_of_labels(Matrix target, int64_t n, int64_t num_classes, int64_t ignore_index, int32_t* slot);
// Gives each class of the batch a row: `slot` becomes that of labels' rows, classes (rows,) their classes.
Groups group(int64_t n, int64_t num_classes, int64_t rows, int32_t* slot, int32_t* classes);
Groups group_by_slot(const int32_t* slot, int64_t n, int64_t rows);

// The samples of a batch.
struct Features {
  int64_t n, dim;
  const Groups* groups;
  Matrix input, input_noise;
};

// sums (rows, dim + 1): of a class's clean features, and n_c; rows without samples are left as they are.
template <class Wide>
void class_sums(const Features& features, Wide* sums);

// The hinges about given centroids. Rows without samples, and what is not there in `pull`, are left as they are.
template <class Wide>
struct ClassPulls {
  Features features;
  int64_t norm;
  Wide delta_var, view_weight;
  const Wide* centroid;      // (rows, dim)
  const Wide* sample_share;  // (rows,): 1/(P n_c)
  Wide* pull;                // (2, n)
  Wide* pull_sum;            // (rows, dim)
};

// Adds compactness and alignment to `terms`, class_term::count of them.
template <class Wide>
void class_pulls(const ClassPulls<Wide>& pulls, Wide* terms);

// mu_c, m_c and the state.
template <class Wide>
struct Centroids {
  Features features;
  Wide momentum;
  bool update_state;
  Wide* centroids;         // (num_classes, dim)
  bool* seen;              // (num_classes,)
  const int32_t* classes;  // (rows,)
  Wide *mu, *centroid;     // (rows, dim)
  Wide* tau;               // (rows,)
};

// Centroids, and the hinges about them as class_pulls has them: at once, since a class's features are in the cache
// then.
template <class Wide>
void variance(const Centroids<Wide>& centroids, const ClassPulls<Wide>& pulls, Wide* terms);

// For each row's class c, the class i whose boundary with c scores highest, the lowest on ties, and its score; -1 and
// -inf where no row of the weight differs from c's. mu (rows, dim), own: W_c and b_c, weight (num_classes, dim), bias
// (num_classes,) or null, score and winner (rows,).
template <class Wide>
void margin_search(const Wide* mu, const ClassifierRows& own, const Matrix& weight, const Matrix& bias, int64_t rows,
                   int64_t dim, int64_t num_classes, Wide* score, int32_t* winner);

// Regularization and margin, row by row, with what they give to the tables. Rows without samples get zeros.
template <class Wide>
struct Finish {
  SettingsOf<Wide> settings;
  int64_t norm, rows, dim, present;  // P
  ClassifierRows own, other;         // W_c and b_c, W_w and b_w
  const Wide* counts;                // (rows,): n_c
  const Wide* tau;                   // (rows,)
  const Wide* centroid;              // (rows, dim)
  Wide* mu_grad;                     // (rows, dim); holds pull_sum before
  Wide* boundary_grad;               // (rows, dim); holds mu before
  Wide* boundary_bias;               // (rows,)
  int32_t* winner;                   // (rows,): of the search; -1 where there is none, then also where the hinge is 0
};

// Adds margin and regularization to `terms`, class_term::count of them.
template <class Wide>
void finish(const Finish<Wide>& finish, Wide* terms);

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
