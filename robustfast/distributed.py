"""Batches of several ranks as one batch: the loss of the whole, whatever its split over processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class GatherRows(torch.autograd.Function):
    """All ranks' rows, this rank's among them; backward returns this rank's part of the gradient times the ranks.

    Every rank computes the same loss of the same global batch, so its gradient is already complete; the factor makes
    DistributedDataParallel's mean over ranks the gradient of that one loss.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Any) -> Tensor:
        world, ctx.rank, ctx.size = dist.get_world_size(group), dist.get_rank(group), rows.shape[0]
        ctx.world = world
        gathered = rows.new_empty((world * rows.shape[0], *rows.shape[1:]))
        dist.all_gather_into_tensor(gathered, rows.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.rank * ctx.size : (ctx.rank + 1) * ctx.size] * ctx.world, None


def gather_batch(
    input: Tensor, input_noise: Tensor | None, target: Tensor, group: Any
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The global batch of ranks whose batches have one size, as in training with ``drop_last``."""
    noise = None if input_noise is None else GatherRows.apply(input_noise, group)
    return GatherRows.apply(input, group), noise, GatherRows.apply(target, group)
