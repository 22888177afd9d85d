// The boundary between a class c and another one i: distances, scores, and what the winner's gives to loss and
// gradients.
#pragma once

#include "common/loss.h"
#include "cuda/block.cuh"

namespace robustfast::cuda {

RF_DEVICE float square_root(float x) { return sqrtf(x); }
RF_DEVICE double square_root(double x) { return sqrt(x); }

template <int norm, class F>
RF_DEVICE F length_of(F terms) {
  return norm == 1 ? terms : square_root(terms);
}

// Takes the best that lane `lane ^ mask` knows into account.
template <class Wide>
RF_DEVICE void consider_lane(Best<Wide>& best, int mask) {
  const Wide score = __shfl_xor_sync(all_lanes, best.score, mask);
  best.consider(score, __shfl_xor_sync(all_lanes, best.winner, mask));
}

// What squares of distances are trusted: within these bounds no term that counts was too small or too large for Wide.
// Others are taken again, of differences times a power of two.
template <class Wide>
struct Trusted {
  static constexpr bool narrow = sizeof(Wide) == 4;
  static constexpr Wide low = narrow ? Wide(0x1p-100) : Wide(0x1p-900);
  static constexpr Wide high = narrow ? Wide(0x1p120) : Wide(0x1p1000);
  static constexpr Wide up = narrow ? Wide(0x1p100) : Wide(0x1p700);
  static constexpr Wide down = narrow ? Wide(0x1p-80) : Wide(0x1p-600);
};

// A pair of classes: (W_i - W_c) . mu_c + b_i - b_c and ||(W_i - W_c) times||^2.
template <class Wide>
struct Pair {
  Wide logit, square, times = 1;

  // sums(times, logit, square) gives both, without the bias, and is called by all threads that share the pair.
  template <class Sums>
  RF_DEVICE Pair(Wide bias_difference, const Sums& sums) {
    sums(times, logit, square);
    if (!(square >= Trusted<Wide>::low && square <= Trusted<Wide>::high)) {
      Wide again;
      times = square < Trusted<Wide>::low ? Trusted<Wide>::up : Trusted<Wide>::down;
      sums(times, again, square);
    }
    logit += bias_difference;
  }

  RF_DEVICE bool exists() const { return square != Wide(0); }
  RF_DEVICE Wide score() const { return logit / square_root(square) * times; }
  RF_DEVICE Wide inverse_distance() const { return Wide(1) / square_root(square) * times; }
};

// The boundary with the winner. `beta_share` is beta / P where the margin has a gradient.
template <class Wide>
struct Boundary {
  Wide margin = 0, beta_share = 0, score = 0, inverse_distance = 0;

  RF_DEVICE Boundary(const Pair<Wide>& pair, bool exists, Wide delta_dist, Wide share) {
    if (!exists || !pair.exists()) return;
    inverse_distance = pair.inverse_distance();
    score = pair.logit * inverse_distance;
    margin = hinge(delta_dist + score);
    beta_share = margin == Wide(0) ? Wide(0) : share;
  }
  RF_DEVICE bool active() const { return beta_share != Wide(0) || beta_share != beta_share; }
  // d loss / d mu_c and d loss / d W_w from one coordinate of W_w - W_c and mu_c.
  RF_DEVICE Wide mu_grad(Wide normal) const { return beta_share * normal * inverse_distance; }
  RF_DEVICE Wide boundary_grad(Wide normal, Wide mu) const {
    return beta_share * inverse_distance * (mu - score * normal * inverse_distance);
  }
  RF_DEVICE Wide boundary_bias() const { return beta_share * inverse_distance; }
};

}  // namespace robustfast::cuda
