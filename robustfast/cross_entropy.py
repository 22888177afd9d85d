"""The cross entropy of a linear classifier in parts of the classes: the logits (N, K) never exist.

``softmax_of`` goes over the classes once and keeps, as attention does, the largest logit so far and sums relative to
it, the mean row of the weight among them, which is the features' gradient. Backward computes the logits again for the
weight's. The classes may be split over ranks (robustfast.shards): then these sums meet in forward, and backward has no
collective.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from robustfast import checks, collectives
from robustfast.autograd import once_differentiable
from robustfast.checks import wide_dtype
from robustfast.gathering import Ranks, gather_batch
from robustfast.shards import Block

LOGITS = 2**24  # that exist at a time: 64 MiB in float32


def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """``F.cross_entropy(F.linear(input, weight, bias), target)`` in memory for 2**24 logits, whatever N and K.

    PyTorch's own ``F.linear_cross_entropy`` computes it where that can (from 2.13 on, without label smoothing).

    Args:
        input: features (N, D), floating.
        weight, bias: the classifier (K, D) and (K,) or None, of any floating dtype.
        target: labels (N,), of any integer dtype but uint64.
        ignore_index: samples with this label count nowhere.
        label_smoothing: epsilon in [0, 1]; targets become (1 - epsilon) of the label and epsilon / K of every class.

    Returns:
        The mean over the samples that count, 0-d, float32 (float64 for float64 features; PyTorch's own gives the
        features' dtype); nan where none counts, as F.cross_entropy has it, with gradients 0. Once differentiable.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, device or value.
        IndexError: a label is out of range (CPU; a device assertion on a GPU).
    """
    target = checks.integer_labels(target)
    checks.linear_cross_entropy(input, weight, target, bias, label_smoothing)
    if not _torch_can(input, weight, bias, label_smoothing):
        block = Block.of(len(weight), None)
        return cross_entropy(input, target, weight, bias, block, label_smoothing, ignore_index)
    checks.labels(target, len(weight), ignore_index)
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=max(1, LOGITS // len(weight)), chunking_method=None)
    losses = F.linear_cross_entropy(
        input,
        weight,
        target.long(),
        linear_bias=bias,
        ignore_index=ignore_index,
        reduction="none",  # its mean has gradients of nan where nothing counts, and its sum can overflow in float16
        options=options,
    )
    counted = (target != ignore_index).sum()
    mean = losses.to(wide_dtype(input)).sum() / counted.clamp(min=1)
    return torch.where(counted > 0, mean, torch.nan)


def _torch_can(input: Tensor, weight: Tensor, bias: Tensor | None, label_smoothing: float) -> bool:
    one_dtype = weight.dtype == input.dtype and (bias is None or bias.dtype == input.dtype)
    return hasattr(torch.nn, "LinearCrossEntropyOptions") and label_smoothing == 0 and one_dtype


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    block: Block,
    label_smoothing: float,
    ignore_index: int,
    max_batch: int | None = None,
) -> Tensor:
    """The mean over the batches of all ranks, each with a block of the classes in ``weight`` and ``bias``."""
    return CrossEntropyFunction.apply(input, target, weight, bias, block, label_smoothing, ignore_index, max_batch)


class CrossEntropyFunction(torch.autograd.Function):
    """(1/n) sum_i (log sum_j exp(z_ij) - (1 - epsilon) z_iy - epsilon/K sum_j z_ij) over the n samples that count."""

    @staticmethod
    def forward(ctx, input, target, weight, bias, block, label_smoothing, ignore_index, max_batch):
        with torch.autocast(input.device.type, enabled=False):
            ranks = Ranks(block.group, "gather", max_batch)
            (f, _, target), _ = gather_batch(input, None, target, ranks, block.num_classes, ignore_index)
            counted = target != ignore_index
            f = f.masked_fill(~counted.unsqueeze(1), 0)
            row, mine = block.local(target)
            label = torch.where(mine & counted, row, -1)  # the row of the sample's class, -1 where it is not here
            targets = Targets(1 - label_smoothing, label_smoothing / block.num_classes)
            part = softmax_part(f, label, weight, bias, targets.every > 0)

            top = collectives.all_reduce(part.top.clone(), "MAX", block.group)
            factor = (part.top - top).exp_()
            sums = torch.stack([part.total * factor, part.own_logit, part.all_logits])
            total, own_logit, all_logits = collectives.all_reduce(sums, "SUM", block.group)
            lse = top + total.log()
            n = counted.sum()
            losses = lse - targets.own * own_logit - targets.every * all_logits

            grad_input = None
            if ctx.needs_input_grad[0]:
                grad = part.mean_weight * (factor / total).unsqueeze(1)
                if targets.every > 0:
                    grad -= targets.every * weight.sum(0, dtype=grad.dtype)
                if len(weight):
                    own = targets.own * weight[label.clamp(min=0)].to(grad.dtype)
                    grad -= own.masked_fill_((label < 0).unsqueeze(1), 0)
                grad.masked_fill_(~counted.unsqueeze(1), 0)
                grad = collectives.reduce_scatter(grad / n.clamp(min=1), block.group)
                grad_input = grad[: len(input)] * collectives.size(block.group)  # which DDP divides by
            ctx.save_for_backward(f, label, counted, lse, weight, bias, grad_input)
            ctx.targets, ctx.dtype = targets, input.dtype
            return losses.masked_fill(~counted, 0).sum() / n

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        f, label, counted, lse, weight, bias, grad_input = ctx.saved_tensors
        if grad_input is not None:
            grad_input = (grad_input * grad_loss).to(ctx.dtype)
        grad_weight = grad_bias = None
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            with torch.autocast(f.device.type, enabled=False):
                scale = grad_loss / counted.sum().clamp(min=1)
                grad_weight, grad_bias = classifier_gradient(f, label, counted, lse, weight, bias, ctx.targets, scale)
        return grad_input, None, grad_weight, grad_bias, *(None,) * 4


class Targets(NamedTuple):
    """Smoothed: what the label of a sample has, and what every class has besides."""

    own: float
    every: float


class SoftmaxPart(NamedTuple):
    """What a rank's classes give to each sample's softmax."""

    top: Tensor  # (N,) the largest logit
    total: Tensor  # (N,) sum of exp(logit - top)
    own_logit: Tensor  # (N,) of the label, 0 where another rank has it
    all_logits: Tensor  # (N,) their sum, where it is wanted
    mean_weight: Tensor  # (N, D) sum of exp(logit - top) W_j


def softmax_part(f: Tensor, label: Tensor, weight: Tensor, bias: Tensor | None, smoothed: bool) -> SoftmaxPart:
    """One look at the classes, a few at a time; what was summed before a larger logit came is scaled to that one."""
    n, dim = f.shape
    wide = wide_dtype(f)
    top = f.new_full((n,), torch.finfo(wide).min, dtype=wide)
    total, own_logit, all_logits = f.new_zeros((3, n), dtype=wide)
    mean_weight = f.new_zeros((n, dim), dtype=wide)
    for classes in parts(n, len(weight)):
        z = logits(f, weight, bias, classes)
        if smoothed:
            all_logits += z.sum(1)
        place, here = places(label, classes)
        own_logit += z.gather(1, place).squeeze(1).masked_fill_(~here, 0)
        previous, top = top, torch.maximum(top, z.amax(1))
        p = z.sub_(top.unsqueeze(1)).exp_()
        scale = (previous - top).exp_()
        total = total * scale + p.sum(1)
        mean_weight.mul_(scale.unsqueeze(1)).add_(product(p, weight[classes]))
    return SoftmaxPart(top, total, own_logit, all_logits, mean_weight)


def classifier_gradient(
    f: Tensor,
    label: Tensor,
    counted: Tensor,
    lse: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Targets,
    scale: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """``scale`` times sum_i (p_ij - targets_ij) f_i, and the same without f_i for the bias."""
    grad_weight = torch.empty_like(weight)
    grad_bias = None if bias is None else torch.empty_like(bias)
    lse = lse.masked_fill(~counted, torch.inf).unsqueeze(1)  # which makes p zero
    every = targets.every * counted.unsqueeze(1).to(lse.dtype)
    for classes in parts(len(f), len(weight)):
        grad = logits(f, weight, bias, classes).sub_(lse).exp_()
        if targets.every > 0:
            grad -= every
        place, here = places(label, classes)
        grad.scatter_add_(1, place, (-targets.own * here.to(grad.dtype)).unsqueeze(1))
        grad_weight[classes] = product(grad.T, f) * scale
        if grad_bias is not None:
            grad_bias[classes] = grad.sum(0) * scale
    return grad_weight, grad_bias


def parts(n: int, num_classes: int) -> Iterator[slice]:
    """The classes, as many at a time as there may be logits."""
    step = max(1, LOGITS // max(1, n))
    return (slice(first, min(first + step, num_classes)) for first in range(0, num_classes, step))


def logits(f: Tensor, weight: Tensor, bias: Tensor | None, classes: slice) -> Tensor:
    z = product(f, weight[classes].T)
    return z if bias is None else z.add_(bias[classes])


def places(label: Tensor, classes: slice) -> tuple[Tensor, Tensor]:
    """The column (N, 1) of each label among these classes, and whether it is there (N,); if not, column 0."""
    here = (label >= classes.start) & (label < classes.stop)
    return torch.where(here, label - classes.start, 0).unsqueeze(1), here


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, added up in float32 or float64; on a GPU by the units for b's dtype where that is a half type."""
    if b.is_cuda and b.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(a.to(b.dtype), b, out_dtype=torch.float32)
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return a.to(wide) @ b.to(wide)
