"""Finish: what comes once a row's winner is known. Its boundary, what the row gives to tables and terms, the state."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from robustfast.triton_ops.elements import scalar
from robustfast.triton_ops.groups import FINISHED, PRESENT, samples_of
from robustfast.triton_ops.margin import margin
from robustfast.triton_ops.regularization import centroid_length
from robustfast.triton_ops.variance import row_pulls


class Given(NamedTuple):
    """Rows of tables from elsewhere, (R, D) or (R,), all wide but the winner."""

    mu: Tensor
    centroid: Tensor
    pull_sum: Tensor
    counts: Tensor
    tau: Tensor
    winner: Tensor


class RowResults(NamedTuple):
    """Of the step alone, see docs/ops.md."""

    mu_grad: Tensor
    boundary_grad: Tensor
    boundary_bias: Tensor
    winner: Tensor


@triton.jit(do_not_specialize=["rows", "places", "chunk"])
def finish_kernel(
    groups, state, classifier, winners, chunks, results, row_terms, dim, rows, places, chunk,
    delta_dist: tl.float64, alpha: tl.float64, beta: tl.float64, gamma: tl.float64, momentum: tl.float64,
    NORM: tl.constexpr, VIEWS: tl.constexpr, UPDATE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row each: margin of its winner, gradients of the tables, state. The last program through adds the terms."""
    row = tl.program_id(0)
    present = tl.load(groups.counters + PRESENT)
    if row >= tl.maximum(present, 1):
        return
    if row < present:
        d = tl.arange(0, BLOCK_D)
        label = tl.load(results.classes + row)
        begin, end = samples_of(groups, row)
        count = end - begin
        at = results.tables + row.to(tl.int64) * dim + d
        centroid = tl.load(at, mask=d < dim, other=0)
        mu = tl.load(at + 2 * tl.cast(rows, tl.int64) * dim, mask=d < dim, other=0)
        pull_sum, compact, align = row_pulls(
            chunks, results.tables, row_terms, row, begin, count, rows, places, chunk, d, dim, BLOCK_D
        )
        finish_row(
            row, label, count, present, mu, centroid, pull_sum, compact, align, tl.load(winners + row), state,
            classifier, results, row_terms, d, dim, rows, delta_dist, beta, gamma, momentum, NORM, UPDATE,
        )  # fmt: skip
    add_terms(groups, results, row_terms, present, rows, alpha, beta, gamma, VIEWS, BLOCK)


@triton.jit
def finish_row(
    row, label, count, present, mu, centroid, pull_sum, compact, align, winner, state, classifier, results, row_terms,
    d, dim, rows, delta_dist, beta, gamma, momentum, NORM: tl.constexpr, UPDATE: tl.constexpr,
):  # fmt: skip
    """The gradients of one row's tables, its terms, and its class's state."""
    WIDE: tl.constexpr = mu.dtype
    tau = tl.where(tl.load(state.seen + label) != 0, 1 - scalar(momentum, WIDE), scalar(1.0, WIDE))
    mu_grad, boundary_grad, boundary_bias, active, hinge, length = row_gradients(
        classifier, label, classifier, tl.where(winner < 0, label, winner), winner >= 0, mu, centroid, pull_sum, tau,
        count.to(WIDE), present.to(WIDE), d, dim, delta_dist, beta, gamma, NORM,
    )  # fmt: skip
    at = results.tables + row.to(tl.int64) * dim + d
    table = tl.cast(rows, tl.int64) * dim
    tl.store(at + table, mu_grad, mask=d < dim)
    tl.store(at + 2 * table, boundary_grad, mask=d < dim)
    tl.store(results.boundary_bias + row, boundary_bias)
    tl.store(results.classes + rows + row, tl.where(active, winner, -1))
    tl.store(row_terms + row, compact / count.to(WIDE))
    tl.store(row_terms + rows + row, align / count.to(WIDE))
    tl.store(row_terms + 2 * rows + row, hinge)
    tl.store(row_terms + 3 * rows + row, length)
    if UPDATE:
        finite = tl.max((centroid - centroid != 0).to(tl.int32)) == 0
        tl.store(state.centroids + label.to(tl.int64) * dim + d, centroid, mask=d < tl.where(finite, dim, 0))
        tl.store(state.seen + label, True, mask=finite)


@triton.jit
def row_gradients(
    own, own_row, other, other_row, exists, mu, centroid, pull_sum, tau, count, present, d, dim, delta_dist, beta,
    gamma, NORM: tl.constexpr,
):  # fmt: skip
    """(mu_grad, boundary_grad, boundary_bias, whether the margin is active, its hinge, ||m_c||) of one row."""
    WIDE: tl.constexpr = mu.dtype
    class_share = 1 / present
    hinge, boundary_grad, boundary_bias, margin_grad, active = margin(
        own, own_row, other, other_row, exists, mu, d, dim, scalar(delta_dist, WIDE), scalar(beta, WIDE) * class_share
    )
    length, length_grad = centroid_length(centroid, NORM)
    mu_grad = (tau * (scalar(gamma, WIDE) * class_share * length_grad - pull_sum) + margin_grad) / count
    return mu_grad, boundary_grad, boundary_bias, active, hinge, length


@triton.jit(do_not_specialize=["rows"])
def finish_step_kernel(
    given, own, other, present, results, row_terms, rows, dim, delta_dist: tl.float64, beta: tl.float64,
    gamma: tl.float64, NORM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One row each, from tables that are given, with rows of their own for W_c, b_c and W_w, b_w."""
    WIDE: tl.constexpr = given.mu.dtype.element_ty
    row = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    at = row.to(tl.int64) * dim + d
    count = tl.load(given.counts + row)
    mu_grad, boundary_grad = tl.zeros((BLOCK_D,), WIDE), tl.zeros((BLOCK_D,), WIDE)
    boundary_bias, hinge, length = tl.zeros((), WIDE), tl.zeros((), WIDE), tl.zeros((), WIDE)
    winner = tl.full((), -1, tl.int32)
    if count > 0:
        winner = tl.load(given.winner + row)
        mu_grad, boundary_grad, boundary_bias, active, hinge, length = row_gradients(
            own, row, other, row, winner >= 0, tl.load(given.mu + at, mask=d < dim, other=0),
            tl.load(given.centroid + at, mask=d < dim, other=0), tl.load(given.pull_sum + at, mask=d < dim, other=0),
            tl.load(given.tau + row), count, tl.load(present).to(WIDE), d, dim, delta_dist, beta, gamma, NORM,
        )  # fmt: skip
        winner = tl.where(active, winner, -1)
    tl.store(results.mu_grad + at, mu_grad, mask=d < dim)
    tl.store(results.boundary_grad + at, boundary_grad, mask=d < dim)
    tl.store(results.boundary_bias + row, boundary_bias)
    tl.store(results.winner + row, winner)
    tl.store(row_terms + row, hinge)
    tl.store(row_terms + rows + row, length)


@triton.jit
def add_terms(groups, results, row_terms, present, rows, alpha, beta, gamma, VIEWS: tl.constexpr, BLOCK: tl.constexpr):
    """The terms, means over the classes of the batch, and the loss: by the last program."""
    WIDE: tl.constexpr = row_terms.dtype.element_ty
    programs = tl.maximum(present, 1)
    tl.debug_barrier()
    if tl.atomic_add(groups.counters + FINISHED, 1) == programs - 1:
        classes = programs.to(WIDE)
        compactness = add_row_terms(row_terms, present, BLOCK) / classes
        alignment = add_row_terms(row_terms + rows, present, BLOCK) / classes
        margin_ = add_row_terms(row_terms + 2 * rows, present, BLOCK) / classes
        regularization = add_row_terms(row_terms + 3 * rows, present, BLOCK) / classes
        variance = (compactness + alignment) / VIEWS
        loss = scalar(alpha, WIDE) * variance + scalar(beta, WIDE) * margin_ + scalar(gamma, WIDE) * regularization
        tl.store(results.loss, loss)
        tl.store(results.terms, variance)
        tl.store(results.terms + 1, margin_)
        tl.store(results.terms + 2, regularization)
        tl.store(results.terms + 3, compactness)
        tl.store(results.terms + 4, alignment)


@triton.jit
def add_row_terms(row_terms, present, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), row_terms.dtype.element_ty)
    for r0 in range(0, present, BLOCK):
        r = r0 + tl.arange(0, BLOCK)
        # Other programs wrote these: past this multiprocessor's own cache.
        total += tl.load(row_terms + r, mask=r < present, other=0, cache_modifier=".cg")
    return tl.sum(total)
