"""The loss of a batch that is spread over ranks, each of which has the whole classifier and the whole state.

Two ways, between which :func:`choose` chooses. In "sums" the ranks add up what they know of each class, so that what
they send depends on the classes alone; in "gather" each rank gets the samples of all. All collectives are in forward.
Backward has none: a rank has the gradients of its own samples, and those of W and b complete.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from robustfast import checks, collectives, steps
from robustfast.autograd import DiscriminativeLossFunction
from robustfast.backends import ops
from robustfast.reference import readable, rows_of

EXCHANGES = ("auto", "sums", "gather")
# Operations of a search that take a device as long as a collective of a few bytes.
SPLIT_SEARCH = {"cpu": 1e7, "cuda": 1e9}


class Ranks(NamedTuple):
    """Those whose batches count as one, and how they exchange what they have."""

    group: Any
    exchange: str  # "sums" or "gather"
    max_batch: int | None = None  # of a rank


class GlobalLossFunction(DiscriminativeLossFunction):
    """(loss, terms) of the batches of all ranks.

    ``call`` is (backend, settings, norm, update_state, ignore_index, ranks). The gradients of features are multiplied
    by the number of ranks, by which DistributedDataParallel divides what it adds up.
    """

    @staticmethod
    def forward(ctx, input, input_noise, target, weight, bias, centroids, seen, scheduled, call):
        backend, settings, norm, update_state, ignore_index, ranks = call
        arguments = (input, input_noise, target, weight, bias, centroids, seen, settings, scheduled, norm)
        loss_of = by_sums if ranks.exchange == "sums" else by_gathering
        with torch.autocast(input.device.type, enabled=False):
            loss, terms, slot, pull, tables, *rest = loss_of(backend, ranks, *arguments, update_state, ignore_index)
            size = collectives.size(ranks.group)
            tables[1] *= size  # mu_grad
            saved = (slot, pull * size, tables, *rest)
        ctx.save_for_backward(input, input_noise, weight, bias, *saved)
        ctx.backward_op, ctx.norm = steps.of(backend).discriminative_loss_backward, norm
        ctx.mark_non_differentiable(terms)
        ctx.set_materialize_grads(False)  # no zeros for the gradient of the terms
        return loss, terms


def by_sums(
    backend, ranks, input, input_noise, target, weight, bias, centroids, seen, settings, scheduled, norm, update_state,
    ignore_index,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What the op discriminative_loss gives, of all ranks' samples, but slot and pull of this rank's.

    Each class has its own row of the tables, the same on every rank: all that is computed from sums over ranks.
    """
    step, s, group = steps.of(backend), steps.as_settings(settings, scheduled), ranks.group
    num_classes = weight.shape[0]
    labels, report = checked_apart(target, input_noise, num_classes, ignore_index)
    sums = step.class_sums(input, labels, num_classes, ignore_index)
    sums, report = sum_over_ranks(group, sums, report.to(sums.dtype))
    refuse(report.unbind(), target, num_classes, ignore_index)

    counts = sums[:, -1].contiguous()
    mu = sums[:, :-1] / counts.clamp(min=1).unsqueeze(1)
    taken = counts > 0
    centroid, tau = steps.momentum_centroids(mu, centroids, seen, s.momentum)
    sample_share = torch.where(taken, 1 / (taken.sum() * counts), 0)
    if update_state:
        write = taken & centroid.isfinite().all(1)
        centroids.copy_(torch.where(write.unsqueeze(1), centroid, centroids))
        seen.logical_or_(write)

    slot, pull, pull_sum, squares = step.class_pulls(
        input, input_noise, labels, centroid, sample_share, settings, scheduled, norm, ignore_index
    )
    pull_sum, squares = sum_over_ranks(group, pull_sum, squares)
    winner = search(step, group, mu, weight, bias)
    weight_w, bias_w = rows_of(weight, bias, winner.long().clamp(min=0))
    mu_grad, boundary_grad, boundary_bias, winner, of_rows = step.finish(
        mu, centroid, pull_sum, counts, tau, weight, bias, weight_w, bias_w, winner, settings, scheduled, norm
    )
    loss, terms = steps.total(s, squares, of_rows, 1 if input_noise is None else 2)
    classes = torch.stack((torch.arange(num_classes, dtype=winner.dtype, device=winner.device), winner))
    tables = torch.stack((centroid, mu_grad, boundary_grad))
    return loss, terms, slot, pull, tables, classes, boundary_bias


def search(step: Any, group: Any, mu: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The winner of each row's margin, for which the ranks share the rows where a collective takes less time."""
    num_classes, dim = weight.shape
    size = collectives.size(group)
    if size == 1 or 4 * num_classes * num_classes * dim < SPLIT_SEARCH.get(mu.device.type, 0):
        return step.margin_search(mu, weight, bias, weight, bias)[1]
    most = -(-num_classes // size)
    first = min(collectives.rank(group) * most, num_classes)
    mine = slice(first, min(first + most, num_classes))
    _, winner = step.margin_search(mu[mine], weight[mine], None if bias is None else bias[mine], weight, bias)
    filled = torch.nn.functional.pad(winner, (0, most - winner.shape[0]))
    return collectives.all_gather(filled, group)[:num_classes]


def by_gathering(
    backend, ranks, input, input_noise, target, weight, bias, centroids, seen, settings, scheduled, norm, update_state,
    ignore_index,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The same, from the samples of all ranks."""
    batch = gather_batch(input, input_noise, target, ranks, weight.shape[0], ignore_index)
    arguments = (*batch.tensors, weight, bias, centroids, seen, settings, scheduled, norm, update_state, ignore_index)
    if backend == "reference":
        loss, terms, slot, pull, *rest = by_sums(backend, Ranks(None, "sums"), *arguments)
    else:
        loss, terms, slot, pull, *rest = ops(backend).discriminative_loss(*arguments)
    return loss, terms, slot[batch.mine].clone(), pull[:, batch.mine], *rest


class Batch(NamedTuple):
    """The batches of all ranks one after the other, each filled up to the same length with ignored samples."""

    tensors: tuple[Tensor, Tensor | None, Tensor]  # input, input_noise, target
    mine: slice  # this rank's samples


def gather_batch(
    input: Tensor, input_noise: Tensor | None, target: Tensor, ranks: Ranks, num_classes: int, ignore_index: int
) -> Batch:
    """The samples of all ranks, in one collective after a small one that tells whether anything is wrong.

    Without a ``max_batch`` the host waits for the size of the largest batch; with one it waits for nothing on a GPU.
    """
    n, group = input.shape[0], ranks.group
    labels, mine = checked_apart(target, input_noise, num_classes, ignore_index)
    *report, largest = collectives.all_reduce(torch.cat((mine, mine.new_full((1,), n))), "MAX", group)
    refuse(report, target, num_classes, ignore_index)
    most = int(largest) if ranks.max_batch is None else ranks.max_batch
    stop(largest > most, ValueError, f"max_batch: expected at least the size of each rank's batch, got {most}")
    views = [input] if input_noise is None else [input, input_noise]
    columns = [torch.constant_pad_nd(labels, (0, most - n), ignore_index).unsqueeze(1)]
    columns += [torch.constant_pad_nd(view, (0, 0, 0, most - n)) for view in views]
    (target, *views), first = gather_columns(columns, group), collectives.rank(group) * most
    return Batch((views[0], None if input_noise is None else views[1], target.squeeze(1)), slice(first, first + n))


def gather_columns(columns: list[Tensor], group: Any) -> list[Tensor]:
    """All ranks' rows of tables (n, ...) of several dtypes, the widest first, in one collective of bytes."""
    parts = [column.contiguous().view(torch.uint8) for column in columns]
    widths = [part.shape[1] for part in parts]
    align = -sum(widths) % columns[0].element_size()
    gathered = collectives.all_gather(torch.constant_pad_nd(torch.cat(parts, 1), (0, align)), group)
    parts = gathered[:, : sum(widths)].split(widths, 1)
    return [part.view(column.dtype) for part, column in zip(parts, columns, strict=True)]


def sum_over_ranks(group: Any, *tensors: Tensor) -> list[Tensor]:
    """The sums of tensors of one dtype over the ranks, in one collective."""
    whole = collectives.all_reduce(torch.cat([tensor.reshape(-1) for tensor in tensors]), "SUM", group)
    parts = whole.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def checked_apart(
    target: Tensor, input_noise: Tensor | None, num_classes: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Labels int64 (N,) of which those out of range are ignored, and what all ranks have to know (3,).

    That is whether there are such labels, whether there is a noisy view, and whether there is none. A rank that raised
    its error at once would leave the others waiting for it.
    """
    wrong = checks.wrong_labels(target, num_classes, ignore_index)
    noisy = torch.full_like(wrong.any(), input_noise is not None)
    return target.long().masked_fill(wrong, ignore_index), torch.stack((wrong.any(), noisy, ~noisy)).long()


def refuse(report: Sequence[Tensor], target: Tensor, num_classes: int, ignore_index: int) -> None:
    """Errors, on every rank, of what any rank has reported."""
    wrong, noisy, clean = (of_ranks > 0 for of_ranks in report)
    if readable(target) and wrong:
        checks.labels(target, num_classes, ignore_index)  # names the label where it is this rank's
    stop(wrong, IndexError, f"target: another rank has a label outside 0..{num_classes - 1}, and names it")
    stop(noisy & clean, ValueError, "input_noise: expected a noisy view on all ranks or on none")


def stop(problem: Tensor, error: type[Exception], message: str) -> None:
    """An error where there is a problem; on a GPU, which nobody waits for, a device assertion."""
    if not readable(problem):
        torch._assert_async(~problem, message)
    elif problem:
        raise error(message)


def choose(max_batch: int | None, input: Tensor, num_classes: int, group: Any) -> str:
    """The exchange that sends fewer bytes, the same on all ranks.

    A step with n samples in each of w ranks sends, from each, (w - 1) / w of 16 K D bytes for "sums" of float32 and of
    2 w n D elements for "gather". Without ``max_batch`` the ranks tell each other their n, for which the host waits; in
    a compiled graph, where it cannot, it is "sums".
    """
    if max_batch is None:
        if torch.compiler.is_compiling():
            return "sums"
        n = torch.full((1,), input.shape[0], device=input.device)
        max_batch = int(collectives.all_reduce(n, "MAX", group))
    wide = checks.wide_dtype(input).itemsize
    fewer = 2 * wide * num_classes <= collectives.size(group) * max_batch * input.element_size()
    return "sums" if fewer else "gather"
