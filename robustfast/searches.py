"""Whose search of the margin a loss takes: its backend's own, or Triton's where a table says that it is done sooner.

The loss is one op with its backend's own search. With another's it is made of its steps, which takes a little longer
for all but the search.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from robustfast import checks
from robustfast.backends import ops, why_not
from robustfast.costs import COSTS
from robustfast.reference import constant_when_compiled


class Rates(NamedTuple):
    """Seconds that two searches take for each of 4 R K D operations."""

    own: float
    triton: float


# Of backend "cuda", by the compute capability's first number and the dtype of W; where there is no entry a loss has its
# backend's own search. These are what benchmarks/roofline.py predicts for an H100, of CUDA's search in float16 at the
# least: none has been measured. benchmarks/gpu_check prints the entries that it measures.
RATES = {
    (9, torch.bfloat16): Rates(own=2.5e-15, triton=1.7e-15),
    (9, torch.float16): Rates(own=3.0e-15, triton=1.7e-15),
}
TILE = 64  # features, in whole tiles of which rows of half types have to be for Triton's rate
LAUNCHES = 2e-5  # seconds that Triton's search takes more for its launches
STEPS = 2e-4  # seconds that a loss made of its steps takes more for theirs, beside COSTS.table


def search_of(backend: str, rows: int, weight: Tensor, wide: torch.dtype, least: float = LAUNCHES) -> str:
    """The backend whose search for ``rows`` classes among those of ``weight`` saves ``least`` seconds or is its own."""
    rates = rates_of(backend, weight.dtype, weight.device)
    num_classes, dim = weight.shape
    if rates is None or wide == torch.float64 or dim % TILE:
        return backend
    return "triton" if 4 * rows * num_classes * dim * (rates.own - rates.triton) > least else backend


def is_apart(backend: str, input: Tensor, weight: Tensor) -> bool:
    """Whether the loss is done sooner by its steps, with another backend's search, than as one op."""
    if rates_of(backend, weight.dtype, weight.device) is None:
        return False  # without a look at the batch's size, for which a compiled graph would be made again
    (n, dim), wide = input.shape, checks.wide_dtype(input)
    rows = min(n, weight.shape[0])
    steps = STEPS + rows * dim * wide.itemsize * COSTS["cuda"].table
    return search_of(backend, rows, weight, wide, steps) != backend


@constant_when_compiled
def rates_of(backend: str, weight_dtype: torch.dtype, device: torch.device) -> Rates | None:
    """The table's entry, if it has one and Triton is there, whose ops are loaded then."""
    if backend != "cuda" or why_not("triton") is not None:
        return None
    rates = RATES.get((torch.cuda.get_device_capability(device)[0], weight_dtype))
    if rates is not None:
        ops("triton")
    return rates
