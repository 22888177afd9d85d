"""The loss of a batch that is spread over ranks, each of which has the whole classifier and the whole state.

Two ways, between which :func:`choose` chooses. In "sums" the ranks add up what they know of each class, so that what
they send depends on the classes alone; in "gather" each rank gets the samples of all. All collectives are in forward.
Backward has none: a rank has the gradients of its own samples, and those of W and b complete.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from robustfast import checks, collectives, reference, steps
from robustfast.backends import ops
from robustfast.costs import Step
from robustfast.gathering import Ranks, checked_apart, gather_batch, refuse
from robustfast.reference import readable, rows_of
from robustfast.searches import is_apart, search_of
from robustfast.shards import Block, fetch, write_block

EXCHANGES = ("auto", "sums", "gather")


class GlobalLoss(NamedTuple):
    """The loss's ops, of the batches of all ranks; of a rank alone where its search is not that of the op.

    Gradients of features are multiplied by the number of ranks, by which DistributedDataParallel divides what it adds
    up.
    """

    ranks: Ranks
    backend: str

    def discriminative_loss(self, input: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        loss_of = by_sums if self.ranks.exchange == "sums" else by_gathering
        with torch.autocast(input.device.type, enabled=False):
            loss, terms, slot, pull, tables, *rest = loss_of(self.backend, self.ranks, input, *arguments)
            size = collectives.size(self.ranks.group)
            tables[1] *= size  # mu_grad
            return loss, terms, slot, pull * size, tables, *rest

    def discriminative_loss_backward(self, *arguments: Any) -> tuple[Tensor, ...]:
        return steps.of(self.backend).discriminative_loss_backward(*arguments)


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
    row = torch.arange(num_classes, dtype=torch.int32, device=mu.device)
    winner = search(backend, group, taken, row, mu, weight, bias, weight, bias)
    weight_w, bias_w = rows_of(weight, bias, winner.long().clamp(min=0))
    mu_grad, boundary_grad, boundary_bias, winner, of_rows = step.finish(
        mu, centroid, pull_sum, counts, tau, weight, bias, weight_w, bias_w, winner, settings, scheduled, norm
    )
    loss, terms = steps.total(s, squares, of_rows, 1 if input_noise is None else 2)
    tables, classes = torch.stack((centroid, mu_grad, boundary_grad)), torch.stack((row, winner))
    return loss, terms, slot, pull, tables, classes, boundary_bias


def by_gathering(
    backend, ranks, input, input_noise, target, weight, bias, centroids, seen, settings, scheduled, norm, update_state,
    ignore_index,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The same, from the samples of all ranks: the op, or its steps where the search is shared or another backend's."""
    num_classes = weight.shape[0]
    batch = gather_batch(input, input_noise, target, ranks, num_classes, ignore_index)
    arguments = (*batch.tensors, weight, bias, centroids, seen, settings, scheduled, norm, update_state, ignore_index)
    f = batch.tensors[0]
    is_shared = Step.of(f, len(f), num_classes, collectives.size(ranks.group)).gather_shares()
    if backend == "reference" or is_shared or is_apart(backend, f, weight):
        here = Block.of(num_classes, None)  # all classes
        loss, terms, slot, pull, *rest = by_rows(backend, here, partial(search, backend, ranks.group), *arguments)
    else:
        loss, terms, slot, pull, *rest = ops(backend).discriminative_loss(*arguments)
    return loss, terms, slot[batch.mine].clone(), pull[:, batch.mine].contiguous(), *rest


def by_rows(
    backend, block, winners_of, f, g, labels, weight, bias, centroids, seen, settings, scheduled, norm, update_state,
    ignore_index,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The same, from the samples of all ranks and this rank's block of the classes.

    Tables have rows for the classes of the batch, whose parts of W, b and state are fetched. ``winners_of`` gives the
    winner, of all classes, of each row with samples: (taken, classes, mu, weight_c, bias_c, weight, bias) -> (R,).
    """
    step, s, wide = steps.of(backend), steps.as_settings(settings, scheduled), checks.wide_dtype(f)
    groups = reference.group(labels, block.num_classes, ignore_index)
    rows, counts = len(groups.classes), groups.counts.to(wide)
    row = groups.slot.masked_fill(groups.slot == rows, -1)

    bias_of = () if bias is None else (bias,)
    weight_c, previous, known, *bias_c = fetch(block, groups.classes, (weight, centroids, seen, *bias_of), wide)
    mu = step.class_sums(f, row, rows, -1)[:, :-1] / counts.clamp(min=1).unsqueeze(1)
    centroid, tau = steps.momentum_centroids(mu, previous, known > 0, s.momentum)
    if update_state:
        write_block(block, groups, centroid, centroids, seen)

    sample_share = groups.taken / (groups.present * counts.clamp(min=1))
    slot, pull, pull_sum, squares = step.class_pulls(f, g, row, centroid, sample_share, settings, scheduled, norm, -1)
    own = (weight_c, *(bias_c or (None,)))
    winner = winners_of(groups.taken, groups.classes, mu, *own, weight, bias)
    weight_w, *bias_w = fetch(block, winner, (weight, *bias_of), wide)
    mu_grad, boundary_grad, boundary_bias, winner, of_rows = step.finish(
        mu, centroid, pull_sum, counts, tau, *own, weight_w, *(bias_w or (None,)), winner, settings, scheduled, norm
    )
    loss, terms = steps.total(s, squares, of_rows, 1 if g is None else 2)
    tables, classes = torch.stack((centroid, mu_grad, boundary_grad)), torch.stack((groups.classes.int(), winner))
    return loss, terms, slot, pull, tables, classes, boundary_bias


def search(
    backend: str, group: Any, taken: Tensor, classes: Tensor, mu: Tensor, weight_c: Tensor, bias_c: Tensor | None,
    weight: Tensor, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """The winner (R,) of the margin of each row that is ``taken``; the ranks share them where that takes less time."""
    rows, present = rows_to_search(taken)
    count, size, rank = len(rows), collectives.size(group), collectives.rank(group)
    is_shared = Step.of(mu, count, len(weight), size).search_is_shared()
    share = rows
    if is_shared:  # every so manieth row, as those that are taken come first
        share = rows[rank::size]
        present = None if present is None else (present + size - 1 - rank) // size
    _, winner = best_pairs(backend, share, present, classes, mu, weight_c, bias_c, weight, bias)
    if is_shared:
        most = -(-count // size)
        winner = collectives.all_gather(torch.nn.functional.pad(winner, (0, most - len(winner))), group)
        winner = winner.view(size, most).T.reshape(-1)[:count]
    return torch.where(taken, winner.new_full((len(taken),), -1).index_copy_(0, rows, winner), -1)


def rows_to_search(taken: Tensor) -> tuple[Tensor, Tensor | None]:
    """The rows that are ``taken``; or all of them, these first, and their number, where nobody waits to see them."""
    if readable(taken):
        return taken.nonzero().squeeze(1), None
    return taken.long().argsort(descending=True, stable=True), taken.sum(dtype=torch.int32)


def best_pairs(
    backend: str, rows: Tensor, present: Tensor | None, place: Tensor, mu: Tensor, weight_c: Tensor,
    bias_c: Tensor | None, weight: Tensor, bias: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The scores and winners of some rows of the tables, the first ``present``; ``place`` (R,) is theirs in weight."""
    step = steps.of(search_of(backend, len(rows), weight, mu.dtype))
    bias_c = None if bias_c is None else bias_c[rows]
    return step.margin_search(mu[rows], weight_c[rows], bias_c, weight, bias, place[rows].int(), present)


def sum_over_ranks(group: Any, *tensors: Tensor) -> list[Tensor]:
    """The sums of tensors of one dtype over the ranks, in one collective."""
    whole = collectives.all_reduce(torch.cat([tensor.reshape(-1) for tensor in tensors]), "SUM", group)
    parts = whole.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def choose(max_batch: int | None, input: Tensor, num_classes: int, group: Any) -> str:
    """The exchange whose step is expected to take less time, the same on all ranks.

    Without ``max_batch`` the ranks tell each other the sizes of their batches, for which the host waits; in a compiled
    graph, where it cannot, it is "sums".
    """
    if max_batch is None:
        if torch.compiler.is_compiling():
            return "sums"
        n = torch.full((1,), input.shape[0], device=input.device)
        max_batch = int(collectives.all_reduce(n, "MAX", group))
    size = collectives.size(group)
    step = Step.of(input, size * max_batch, num_classes, size)
    return "sums" if step.sums() <= step.gather() else "gather"
