"""The ops in Triton, registered as ``torch.ops.robustfast_triton``; docs/ops.md is their contract.

One file per op. Importing this imports triton; TRITON_INTERPRET=1, set before, runs the kernels on the CPU.
"""

from __future__ import annotations

import functools

import torch

from robustfast import fakes
from robustfast.backends import OP_NAMES, home
from robustfast.triton_ops import loss, noise

LIBRARY = torch.library.Library("robustfast_triton", "DEF")

SETTINGS = (
    "float delta_var, float delta_dist, int norm, float alpha, float beta, float gamma, float momentum, "
    "bool update_state, int ignore_index"
)
DRAW = "Tensor seed, Tensor? sample_ids, int draw, float low, float high"
SCHEMAS = {
    "discriminative_loss": "(Tensor input, Tensor? input_noise, Tensor target, Tensor weight, Tensor? bias, "
    f"Tensor(a!) centroids, Tensor(b!) seen, {SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "discriminative_loss_backward": "(Tensor grad_loss, Tensor input, Tensor? input_noise, Tensor weight, "
    "Tensor? bias, Tensor slot, Tensor pull, Tensor tables, Tensor classes, Tensor boundary_bias, int norm, "
    "bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
    "gaussian_noise": f"(Tensor input, float std, {DRAW}) -> Tensor",
    "gaussian_noise_backward": f"(Tensor grad, Tensor input, float std, {DRAW}) -> Tensor",
    "uniform_noise": f"(Tensor input, float epsilon, {DRAW}) -> Tensor",
    "uniform_noise_backward": f"(Tensor grad, Tensor input, float epsilon, {DRAW}) -> Tensor",
    "noisy_pair": f"(Tensor images, float std, Tensor mean, Tensor pixel_std, {DRAW}, ScalarType dtype) "
    "-> (Tensor, Tensor)",
    "noisy_pair_backward": "(Tensor grad_clean, Tensor grad_noisy, Tensor images, float std, Tensor pixel_std, "
    f"{DRAW}) -> Tensor",
    "philox_words": "(Tensor seed, int sample_id, int draw, int quads) -> Tensor",
}


def on_device(launch):
    """Launch on the device of the first tensor, which need not be the current one."""

    @functools.wraps(launch)
    def run(tensor, *rest):
        if tensor.get_device() in (-1, torch.cuda.current_device()):
            return launch(tensor, *rest)
        with torch.cuda.device(tensor.device):
            return launch(tensor, *rest)

    return run


interpreting = home("triton") == "cpu"
for name in OP_NAMES:
    launcher = getattr(loss if "loss" in name else noise, name)
    LIBRARY.define(name + SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, launcher if interpreting else on_device(launcher), "CPU" if interpreting else "CUDA")
fakes.register("robustfast_triton")
