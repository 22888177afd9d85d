"""Margin: (1/P) sum_c max_{i != c} max(delta_d + ((W_i - W_c) . mu_c + b_i - b_c) / ||W_i - W_c||, 0).

The search gives each class's winner; here its score and gradient are computed from the two rows of W, so that backward
touches two rows a class.
"""

from __future__ import annotations

import triton
import triton.language as tl

from robustfast.triton_ops.elements import load_bias, load_row, load_table_rows, narrow, quotient_or_zero
from robustfast.triton_ops.search import distance_of, score_of


@triton.jit
def margin(own, own_row, other, other_row, exists, mu, d, dim, delta_dist, beta_share):
    """The hinge of one class's margin, boundary_grad, boundary_bias, its gradient in mu, and whether it is active.

    Rows of two classifiers: the class's own, and the winner's, any where none ``exists``. ``beta_share`` is beta / P.
    """
    WIDE: tl.constexpr = mu.dtype
    normal = load_row(other, other_row, d, dim, WIDE) - load_row(own, own_row, d, dim, WIDE)
    logit = tl.sum(normal * mu) + (load_bias(other.bias, other_row, WIDE) - load_bias(own.bias, own_row, WIDE))
    distance = distance_of(normal, 0)
    score = score_of(logit, distance)
    hinge = tl.where(exists & ((delta_dist + score <= 0) == 0), delta_dist + score, 0.0)  # nan passes
    active = hinge != 0
    boundary_bias = tl.where(active, quotient_or_zero(beta_share, distance), 0.0)
    unit = quotient_or_zero(normal, distance)
    boundary_grad = tl.where(active, boundary_bias * (mu - score * unit), 0.0)
    return hinge, boundary_grad, boundary_bias, tl.where(active, beta_share, 0.0) * unit, active


@triton.jit
def find_rows(classes, rows, k, BLOCK: tl.constexpr):
    """The row whose class k is (-1: none), and how many rows classes below k won, and k itself."""
    own, below, count = -1, 0, 0
    for r0 in range(0, rows, BLOCK):
        r = r0 + tl.arange(0, BLOCK)
        label = tl.load(classes + r, mask=r < rows, other=-1)
        winner = tl.load(classes + rows + r, mask=r < rows, other=-1)
        own = tl.maximum(own, tl.max(tl.where(label == k, r, -1)))
        below += tl.sum(((winner >= 0) & (winner < k)).to(tl.int32))
        count += tl.sum((winner == k).to(tl.int32))
    return own, below, count


@triton.jit
def list_rows_won(winners, listed, rows, k, BLOCK: tl.constexpr):
    """The rows that class k won, in order."""
    count = 0
    for r0 in range(0, rows, BLOCK):
        r = r0 + tl.arange(0, BLOCK)
        won = (tl.load(winners + r, mask=r < rows, other=-1) == k).to(tl.int32)
        tl.store(listed + count + tl.cumsum(won) - 1, r, mask=won != 0)
        count += tl.sum(won)


@triton.jit
def margin_backward(
    grad_weight, grad_bias, boundary_grad, boundary_bias, classes, listed, grad_loss, k, candidate, slice_, dim, rows,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Slice BLOCK_D of dW_k, and db_k: the rows that k won, in order, minus the row whose class k is.

    ``candidate`` >= 0: k is the winner of that row; leave it to the row whose class k is, or to the first row it won.
    """
    WIDE: tl.constexpr = boundary_grad.dtype.element_ty
    own, below, count = find_rows(classes, rows, k, BLOCK)
    listed += slice_ * rows + below  # a place of its own for each k
    if count > 0:
        list_rows_won(classes + rows, listed, rows, k, BLOCK)
        tl.debug_barrier()
    if candidate >= 0:
        k = tl.where((own >= 0) | (tl.load(listed) != candidate), -1, k)
    if k >= 0:
        d = slice_ * BLOCK_D + tl.arange(0, BLOCK_D)
        total = tl.zeros((BLOCK_D,), WIDE)
        total_bias = tl.zeros((), WIDE)
        for i in range(0, count, BLOCK_N):
            j = i + tl.arange(0, BLOCK_N)
            valid = j < count
            row = tl.load(listed + j, mask=valid, other=0)
            total += tl.sum(load_table_rows(boundary_grad, row, valid, d, dim), axis=0)
            total_bias += tl.sum(tl.load(boundary_bias + row, mask=valid, other=0))
        if own >= 0:
            total -= tl.load(boundary_grad + own.to(tl.int64) * dim + d, mask=d < dim, other=0)
            total_bias -= tl.load(boundary_bias + own)
        if grad_weight is not None:
            total = narrow(total * grad_loss, grad_weight.dtype.element_ty)
            tl.store(grad_weight + tl.cast(k, tl.int64) * dim + d, total, mask=d < dim)
        if grad_bias is not None:
            tl.store(grad_bias + k, narrow(total_bias * grad_loss, grad_bias.dtype.element_ty), mask=slice_ == 0)
