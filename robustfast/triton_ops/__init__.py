"""The ops in Triton, registered as ``torch.ops.robustfast_triton``; docs/ops.md is their contract.

Importing this imports triton; TRITON_INTERPRET=1, set before, runs the kernels on the CPU.
"""

from __future__ import annotations

import functools

import torch
import triton

from robustfast.ops import OPS, STEPS, define
from robustfast.triton_ops import loss, noise, steps


def on_device(launch):
    """Launch on the device of the first tensor, which need not be the current one."""

    @functools.wraps(launch)
    def run(tensor, *rest):
        if tensor.get_device() in (-1, torch.cuda.current_device()):
            return launch(tensor, *rest)
        with torch.cuda.device(tensor.device):
            return launch(tensor, *rest)

    return run


library = define("robustfast_triton")
for name in OPS:
    launcher = getattr(steps if name in STEPS else loss if "loss" in name else noise, name)
    if triton.knobs.runtime.interpret:
        library.impl(name, launcher, "CPU")
    else:
        library.impl(name, on_device(launcher), "CUDA")
