"""The steps of the loss, one by one, for those who put collectives between them.

In plain PyTorch, forward only, with the gradients as tables: what backend "reference" takes, and what the kernels' ops
of the same names (:mod:`robustfast.ops`) are checked against. Tables have a row for each class of a batch, or for each
class that there is, and are float32, float64 for float64 features. docs/ops.md has the equations.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from robustfast import checks, reference
from robustfast.backends import ops
from robustfast.reference import Settings, length


def of(backend: str) -> Any:
    """What has the steps of a backend: functions with the signatures of this module's."""
    return sys.modules[__name__] if backend == "reference" else ops(backend)


def class_sums(input: Tensor, target: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """(R, D + 1) for R = ``num_classes`` rows: the sum of each class's features, and their number n_c."""
    checks.labels(target, num_classes, ignore_index)
    f = input.to(checks.wide_dtype(input))
    counted = torch.cat((f, f.new_ones(f.shape[0], 1)), 1)
    row = torch.where(target == ignore_index, num_classes, target.long())
    return f.new_zeros(num_classes + 1, counted.shape[1]).index_add_(0, row, counted)[:-1]


def class_pulls(
    input: Tensor,
    input_noise: Tensor | None,
    target: Tensor,
    centroid: Tensor,
    sample_share: Tensor,
    settings: Sequence[float],
    scheduled: Tensor | None,
    norm: int,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The samples' hinges about their centroids (R, D), each weighted by its class's ``sample_share`` (R,).

    Returns:
        slot (N,) int32, the row of a sample, -1 for an ignored one; pull (2, N); pull_sum (R, D); and (2,), the shares
        of compactness and alignment, sum_i sample_share h_i^2 of the clean and of the noisy view.
    """
    s = as_settings(settings, scheduled)
    ignored = target == ignore_index
    row = target.long().masked_fill(ignored, 0)
    share = sample_share[row].masked_fill(ignored, 0)
    pull, pull_sum = centroid.new_zeros(2, row.shape[0]), torch.zeros_like(centroid)
    squares = [pull_sum.new_zeros(())] * 2
    views = [input] if input_noise is None else [input, input_noise]
    for view, features in enumerate(views):
        residual = (features.to(centroid.dtype) - centroid[row]).masked_fill(ignored.unsqueeze(1), 0)
        lengths = length(residual, norm)
        hinge = torch.relu(lengths - s.delta_var)
        squares[view] = (share * hinge.square()).sum()
        pull[view] = (2 * s.alpha / len(views)) * share * hinge
        if norm == 2:
            pull[view] *= inverse(lengths)
        pull_sum.index_add_(0, row, pull[view].unsqueeze(1) * direction(residual, norm))
    return row.masked_fill(ignored, -1).int(), pull, pull_sum, torch.stack(squares)


def margin_search(
    mu: Tensor,
    weight_c: Tensor | None,
    bias_c: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    classes: Tensor | None = None,
    present: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The best score (R,) of each row of mu (R, D) with a class of ``weight`` (K, D), and that class's row there.

    ``weight_c`` (R, D) and ``bias_c`` are those of the classes of mu; rows of ``weight`` equal to them are passed over.
    The winner is int32, the lowest on ties, and -1 with the score -inf where there is none. ``weight`` may hold some of
    the classes only.

    Without ``weight_c`` the rows' classes are rows of ``weight``, ``classes`` (R,) of them, for the first ``present``
    rows (all, if it is not given). With it ``classes`` spares kernels the search of a class's own row: -1 where
    ``weight`` does not have it.
    """
    if weight_c is None:
        assert classes is not None
        rows = torch.arange(len(mu), device=mu.device)
        known = classes if present is None else torch.where(rows < present, classes, 0)
        weight_c, bias_c = reference.rows_of(weight, bias, known.long())
    score, winner = reference.margin_search(mu, *(_like(mu, t) for t in (weight_c, bias_c, weight, bias)))
    return score, winner.int()


def finish(
    mu: Tensor,
    centroid: Tensor,
    pull_sum: Tensor,
    counts: Tensor,
    tau: Tensor,
    weight_c: Tensor,
    bias_c: Tensor | None,
    weight_w: Tensor,
    bias_w: Tensor | None,
    winner: Tensor,
    settings: Sequence[float],
    scheduled: Tensor | None,
    norm: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What comes once the winner of each row's margin is known: all tables (R, D), but for counts, tau and winner (R,).

    ``weight_w`` and ``bias_w`` are the rows of the winners: any row where ``winner`` is -1.

    Returns:
        mu_grad (R, D), boundary_grad (R, D), boundary_bias (R,), winner (R,) with -1 where the margin has no gradient,
        and (2,), margin and regularization. Rows without samples are 0.
    """
    s = as_settings(settings, scheduled)
    taken = counts > 0
    class_share = taken.to(mu.dtype) / taken.sum().clamp(min=1)
    between = reference.boundary(mu, *(_like(mu, t) for t in (weight_c, bias_c, weight_w, bias_w)))
    excess = torch.relu(s.delta_dist + between.score)
    active = taken & (winner >= 0) & between.exists & (excess != 0)
    inverse_distance = inverse(between.distance)
    normal = between.normal * inverse_distance.unsqueeze(1)
    beta_share = (s.beta * class_share).masked_fill(~active, 0)
    lengths = length(centroid, norm)
    shrink = s.gamma * class_share * (inverse(lengths) if norm == 2 else 1)
    centroid_grad = shrink.unsqueeze(1) * direction(centroid, norm) - pull_sum
    mu_grad = tau.unsqueeze(1) * centroid_grad + beta_share.unsqueeze(1) * normal
    boundary_bias = beta_share * inverse_distance * between.scale
    boundary_grad = boundary_bias.unsqueeze(1) * (mu - between.score.unsqueeze(1) * normal)
    terms = torch.stack(
        [(class_share * of_row).masked_fill(~rows, 0).sum() for of_row, rows in ((excess, active), (lengths, taken))]
    )
    return (
        (mu_grad / counts.clamp(min=1).unsqueeze(1)).masked_fill(~taken.unsqueeze(1), 0),
        boundary_grad.masked_fill(~active.unsqueeze(1), 0),
        boundary_bias,
        winner.masked_fill(~active, -1),
        terms,
    )


def discriminative_loss_backward(
    grad_loss: Tensor,
    input: Tensor,
    input_noise: Tensor | None,
    slot: Tensor,
    pull: Tensor,
    tables: Tensor,
    classes: Tensor,
    boundary_bias: Tensor,
    num_classes: int,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype,
    norm: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The gradients of input, input_noise, weight and bias from the tables (3, R, D); (0,) where not wanted."""
    centroid, mu_grad, boundary_grad = tables
    ignored, row = slot < 0, slot.long().clamp(min=0)

    def of_samples(features: Tensor, view: int) -> Tensor:
        grad = pull[view].unsqueeze(1) * direction(features.to(centroid.dtype) - centroid[row], norm)
        grad = grad if view == 1 else grad + mu_grad[row]
        return (grad_loss * grad).masked_fill(ignored.unsqueeze(1), 0)

    def of_classes(table: Tensor) -> Tensor:
        active = classes[1] >= 0
        own, winner = classes.long().masked_fill(~active, 0)
        per_row = grad_loss * table.masked_fill(~active.view(-1, *[1] * (table.dim() - 1)), 0)
        return (
            per_row.new_zeros(num_classes, *table.shape[1:]).index_add_(0, winner, per_row).index_add_(0, own, -per_row)
        )

    parts: list[tuple[Any, torch.dtype]] = [
        (lambda: of_samples(input, 0), input.dtype),
        (lambda: of_samples(input if input_noise is None else input_noise, 1), input.dtype),
        (lambda: of_classes(boundary_grad), weight_dtype),
        (lambda: of_classes(boundary_bias), bias_dtype),
    ]
    return tuple(
        part().to(dtype) if want else input.new_empty(0, dtype=dtype)
        for (part, dtype), want in zip(parts, wanted, strict=True)
    )


def momentum_centroids(mu: Tensor, previous: Tensor, known: Tensor, momentum: Any) -> tuple[Tensor, Tensor]:
    """m_c (R, D), and tau (R,) = dm_c/dmu_c, of rows whose state is ``previous`` (R, D) where it is ``known`` (R,)."""
    tau = torch.where(known, 1 - momentum, mu.new_ones(mu.shape[0]))
    m_c = tau.unsqueeze(1) * mu + momentum * previous
    return torch.where(known.unsqueeze(1), m_c, mu), tau


def total(s: Any, squares: Tensor, of_rows: Tensor, views: int) -> tuple[Tensor, Tensor]:
    """The loss, and the terms (5,), from (compactness, alignment) and from finish's (margin, regularization)."""
    (compactness, alignment), (margin, regularization) = squares, of_rows
    variance = compactness if views == 1 else (compactness + alignment) / 2
    loss = s.alpha * variance + s.beta * margin + s.gamma * regularization
    terms = torch.stack((variance, margin, regularization, compactness, alignment))
    # No second name for it: compiled by PyTorch up to 2.11, a Function whose output has two has gradients of 0.
    return loss if loss.dtype == terms.dtype else loss.to(terms.dtype), terms


def as_settings(settings: Sequence[float], scheduled: Tensor | None) -> Any:
    """Settings of numbers, or of 0-d tensors where those come as a tensor."""
    return Settings(*(settings if scheduled is None else scheduled.unbind()))


def inverse(lengths: Tensor) -> Tensor:
    """1 / length, 0 at 0."""
    return (lengths != 0) / lengths.masked_fill(lengths == 0, 1)


def direction(r: Tensor, norm: int) -> Tensor:
    """d||r||_p / dr, but for 1 / ||r||_2."""
    return r if norm == 2 else r.sign()


def _like(mu: Tensor, tensor: Any) -> Any:
    return None if tensor is None else tensor.to(mu.dtype)
