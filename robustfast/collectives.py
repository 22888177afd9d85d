"""The collectives of a step: plain, synchronous, by one name in every version of PyTorch.

A group of None is this rank alone: its collectives give what they were given.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor


def size(group: Any) -> int:
    return 1 if group is None else dist.get_world_size(group)


def rank(group: Any) -> int:
    return 0 if group is None else dist.get_rank(group)


def all_gather(mine: Tensor, group: Any) -> Tensor:
    """(w * n, ...) of all ranks' (n, ...), in the order of the ranks."""
    if group is None:
        return mine
    result = mine.new_empty((size(group) * mine.shape[0], *mine.shape[1:]))
    newer = getattr(dist, "all_gather_single", None)  # PyTorch 2.13 warns of the old name
    (newer or dist.all_gather_into_tensor)(result, mine.contiguous(), group=group)
    return result


def reduce_scatter(whole: Tensor, group: Any) -> Tensor:
    """(n, ...): this rank's part of the sum of all ranks' (w * n, ...)."""
    if group is None:
        return whole
    result = whole.new_empty((whole.shape[0] // size(group), *whole.shape[1:]))
    newer = getattr(dist, "reduce_scatter_single", None)
    (newer or dist.reduce_scatter_tensor)(result, whole.contiguous(), group=group)
    return result


def all_reduce(tensor: Tensor, op: str, group: Any) -> Tensor:
    """``tensor``, which now holds the SUM, MAX or MIN over the ranks."""
    if group is not None:
        dist.all_reduce(tensor, getattr(dist.ReduceOp, op), group=group)
    return tensor
