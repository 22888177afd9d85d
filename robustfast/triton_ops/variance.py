"""Variance: compactness (and alignment) = (1/P) sum_c (1/n_c) sum_{y_i=c} max(||f_i - m_c||_p - delta_v, 0)^2.

One program takes one class, or one chunk of a class with many samples. It makes the centroid, holds it in registers,
and passes over the samples once: their distances, hinges, and the sum of pulls that the centroid's gradient needs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from robustfast.triton_ops.centroids import centroids_of, chunk_of
from robustfast.triton_ops.grouping import PRESENT, run_of_row
from robustfast.triton_ops.rows import (
    direction,
    load_row,
    load_samples,
    norm_of,
    quotient_or_zero,
    scalar,
)


@triton.jit
def pull_samples(x, stride_n, stride_d, sample, valid, d, dim, center, delta_var, weight, NORM: tl.constexpr):
    """(pull of each sample, sum of squared hinges, sum of pulls times directions); ``weight`` = s 2 / (P n_c)."""
    residual = load_samples(x, stride_n, stride_d, sample, valid, d, dim, center.dtype) - center[None, :]
    norm = norm_of(residual, 1, NORM)
    hinge = tl.where(valid & ((norm <= delta_var) == 0), norm - delta_var, 0.0)  # nan passes
    pull = weight * hinge
    if NORM == 2:
        pull = quotient_or_zero(pull, norm)
    return pull, tl.sum(hinge * hinge), tl.sum(pull[:, None] * direction(residual, NORM), axis=0)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """x in the matrix units' dtype, kept finite."""
    if dtype == tl.float16:
        x = tl.where(tl.abs(x) > 65504.0, tl.where(x > 0, 65504.0, -65504.0), x)
    return x.to(dtype)


@triton.jit(do_not_specialize=["num_samples", "num_rows", "num_chunks"])
def variance_kernel(
    f, f_n, f_d, g, g_n, g_d,  # (N, D), strides
    order, index, classes, sums, centroids, seen,
    weight, w_k, w_d, bias,  # (K, D), (K,)
    pull, tables, low, own,  # (2, N), (3, R, D), (R, D) in the matrix units' dtype, (R,)
    row_terms, pulls, chunk_terms,  # (4, R), (chunks, D), (2, chunks)
    num_samples, dim, num_rows, num_chunks,
    delta_var: tl.float64, alpha: tl.float64, momentum: tl.float64,
    NORM: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Programs 0..R-1 take the classes with short runs, the others the chunks of long runs.

    Writes pull, the tables' center, mu (where boundary_grad will be), sum of pulls (where center_grad will be), and the
    terms of each row; for the margin, mu in its dtype and mu . W_c + b_c.
    """
    WIDE: tl.constexpr = tables.dtype.element_ty
    pid = tl.program_id(0)
    present = tl.load(index + PRESENT)
    number = pid - num_rows
    if pid < num_rows:
        row = tl.where(pid < present, pid, -1)
        run_begin, run_end = run_of_row(index, tl.maximum(row, 0), num_chunks)
        begin, end = run_begin, run_end
        if run_end - run_begin > CHUNK:
            row = -1
    else:
        row, run_begin, run_end, begin, end = chunk_of(index, number, num_chunks, CHUNK)
    if row < 0:
        return

    d = tl.arange(0, BLOCK_D)
    label = tl.load(classes + row)
    mu, center = centroids_of(
        f, f_n, f_d, order, sums, centroids, seen, label, run_begin, run_end, d, dim, momentum, CHUNK, BLOCK_N, BLOCK_D
    )
    at = row.to(tl.int64) * dim + d
    table = tl.cast(num_rows, tl.int64) * dim
    if begin == run_begin:
        tl.store(tables + at, center, mask=d < dim)
        tl.store(tables + 2 * table + at, mu, mask=d < dim)
        rounded = round_to(mu, low.dtype.element_ty)
        tl.store(low + at, rounded, mask=d < dim)
        logit = tl.sum(rounded.to(WIDE) * load_row(weight, label, w_k, w_d, d, dim, WIDE))
        if bias is not None:
            logit += tl.load(bias + label).to(WIDE)
        tl.store(own + row, logit)

    share = 1 / (present.to(WIDE) * (run_end - run_begin).to(WIDE))
    views: tl.constexpr = 1 if g is None else 2
    strength = scalar(alpha, WIDE) * (2 // views) * share
    delta = scalar(delta_var, WIDE)
    compact = tl.zeros((), WIDE)
    align = tl.zeros((), WIDE)
    pulled = tl.zeros((BLOCK_D,), WIDE)
    for p0 in range(begin, end, BLOCK_N):
        p = p0 + tl.arange(0, BLOCK_N)
        valid = p < end
        sample = tl.load(order + p, mask=valid, other=0)
        pull_f, square, sum_f = pull_samples(f, f_n, f_d, sample, valid, d, dim, center, delta, strength, NORM)
        compact += square
        pulled += sum_f
        tl.store(pull + sample, pull_f, mask=valid)
        pull_g = tl.zeros_like(pull_f)
        if g is not None:
            pull_g, square, sum_g = pull_samples(g, g_n, g_d, sample, valid, d, dim, center, delta, strength, NORM)
            align += square
            pulled += sum_g
        tl.store(pull + num_samples + sample, pull_g, mask=valid)

    if pid < num_rows:
        tl.store(tables + table + at, pulled, mask=d < dim)
        tl.store(row_terms + row, compact)
        tl.store(row_terms + num_rows + row, align)
    else:
        tl.store(pulls + number.to(tl.int64) * dim + d, pulled, mask=d < dim)
        tl.store(chunk_terms + number, compact)
        tl.store(chunk_terms + num_chunks + number, align)


@triton.jit
def add_chunk_terms(chunk_terms, run_begin, count, CHUNK: tl.constexpr):
    """The squared hinges of a long run, its chunks' added in order."""
    total = tl.zeros((), chunk_terms.dtype.element_ty)
    number = tl.cdiv(2 * run_begin, CHUNK)
    for chunk in range(number, number + tl.cdiv(count, CHUNK)):
        total += tl.load(chunk_terms + chunk)
    return total


@triton.jit
def feature_gradients(
    d_f, d_g, f, f_n, f_d, g, g_n, g_d, slot, pull, tables, grad_loss, sample, num_samples, dim, num_rows,
    NORM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """df_i = grad_loss (pull direction(f_i - center) + center_grad), dg_i without center_grad; 0 for ignored ones."""
    d = tl.arange(0, BLOCK_D)
    inside = sample < num_samples
    row = tl.load(slot + sample, mask=inside, other=-1)
    counted = row >= 0
    center = load_samples(tables, dim, 1, row, counted, d, dim, tables.dtype.element_ty)
    at = sample.to(tl.int64)[:, None] * dim + d[None, :]
    mask = inside[:, None] & (d < dim)[None, :]
    if d_f is not None:
        grad = pull_back(f, f_n, f_d, pull, center, grad_loss, sample, counted, d, dim, NORM)
        table = tables + tl.cast(num_rows, tl.int64) * dim
        grad += grad_loss * load_samples(table, dim, 1, row, counted, d, dim, grad.dtype)
        tl.store(d_f + at, grad, mask=mask)
    if d_g is not None:
        grad = pull_back(g, g_n, g_d, pull + num_samples, center, grad_loss, sample, counted, d, dim, NORM)
        tl.store(d_g + at, grad, mask=mask)


@triton.jit
def pull_back(x, stride_n, stride_d, pull, center, grad_loss, sample, counted, d, dim, NORM: tl.constexpr):
    residual = load_samples(x, stride_n, stride_d, sample, counted, d, dim, center.dtype) - center
    strength = grad_loss * tl.load(pull + sample, mask=counted, other=0)
    return strength[:, None] * direction(residual, NORM)
