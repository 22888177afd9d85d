"""Samples that are spread over ranks, brought together: their labels checked, an error of one rank an error of all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from robustfast import checks, collectives
from robustfast.reference import readable


class Ranks(NamedTuple):
    """Those whose batches count as one, and how they exchange what they have."""

    group: Any
    exchange: str  # "sums" or "gather"
    max_batch: int | None = None  # of a rank


ALONE = Ranks(None, "gather")


class Batch(NamedTuple):
    """The batches of all ranks one after the other, each filled up to the same length with ignored samples."""

    tensors: tuple[Tensor, Tensor | None, Tensor]  # input, input_noise, target
    mine: slice  # this rank's samples


def gather_batch(
    input: Tensor, input_noise: Tensor | None, target: Tensor, ranks: Ranks, num_classes: int, ignore_index: int
) -> Batch:
    """The samples of all ranks, in one collective after a small one that tells whether anything is wrong.

    Without a ``max_batch`` the host waits for the size of the largest batch; with one it waits for nothing on a GPU. Of
    a rank alone they are its samples as they are.
    """
    n, group = input.shape[0], ranks.group
    if group is None:
        checks.labels(target, num_classes, ignore_index)
        return Batch((input, input_noise, target.long()), slice(0, n))
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
