// The ops of the library `robustfast`; docs/ops.md says what they compute. CPU and CUDA implement them elsewhere.
#include <torch/csrc/stable/library.h>

#define NOISE_SETTINGS "Tensor seed, Tensor? sample_ids, int draw, float low, float high"

STABLE_TORCH_LIBRARY(robustfast, m) {
  m.def(
      "discriminative_loss(Tensor input, Tensor? input_noise, Tensor target, Tensor weight, Tensor? bias, "
      "Tensor(a!) centroids, Tensor(b!) seen, float delta_var, float delta_dist, int norm, float alpha, float beta, "
      "float gamma, float momentum, bool update_state, int ignore_index) -> (Tensor loss, Tensor terms, Tensor slot, "
      "Tensor pull, Tensor tables, Tensor classes, Tensor boundary_bias)");
  m.def(
      "discriminative_loss_backward(Tensor grad_loss, Tensor input, Tensor? input_noise, Tensor weight, Tensor? bias, "
      "Tensor slot, Tensor pull, Tensor tables, Tensor classes, Tensor boundary_bias, int norm, bool[] wanted) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def("gaussian_noise(Tensor input, float std, " NOISE_SETTINGS ") -> Tensor");
  m.def("gaussian_noise_backward(Tensor grad, Tensor input, float std, " NOISE_SETTINGS ") -> Tensor");
  m.def("uniform_noise(Tensor input, float epsilon, " NOISE_SETTINGS ") -> Tensor");
  m.def("uniform_noise_backward(Tensor grad, Tensor input, float epsilon, " NOISE_SETTINGS ") -> Tensor");
  m.def("noisy_pair(Tensor images, float std, Tensor mean, Tensor pixel_std, " NOISE_SETTINGS
        ", ScalarType dtype) "
        "-> (Tensor clean, Tensor noisy)");
  m.def(
      "noisy_pair_backward(Tensor grad_clean, Tensor grad_noisy, Tensor images, float std, Tensor "
      "pixel_std, " NOISE_SETTINGS ") -> Tensor");
  m.def("philox_words(Tensor seed, int sample_id, int draw, int quads) -> Tensor");
}
