"""Centroids: mu_c = (1/n_c) sum of the features of class c; m_c = mu_c, or (1 - rho) mu_c + rho m_prev_c once seen."""

from __future__ import annotations

import triton
import triton.language as tl

from robustfast.triton_ops.grouping import HEAD, run_of_row
from robustfast.triton_ops.rows import load_row, load_samples, scalar


@triton.jit
def chunk_of(index, number, num_chunks, CHUNK: tl.constexpr):
    """Chunk ``number`` of the long runs: its row (-1: there is none), the run, and the chunk's begin and end."""
    row = tl.load(index + HEAD + number)
    run_begin, run_end = run_of_row(index, tl.maximum(row, 0), num_chunks)
    begin = run_begin + (number - tl.cdiv(2 * run_begin, CHUNK)) * CHUNK
    return row, run_begin, run_end, begin, tl.minimum(begin + CHUNK, run_end)


@triton.jit
def sum_samples(
    x, stride_n, stride_d, order, begin, end, d, dim, WIDE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Sum of the samples at sorted positions begin..end-1, always in the same order."""
    total = tl.zeros((BLOCK_N, BLOCK_D), WIDE)
    for p0 in range(begin, end, BLOCK_N):
        p = p0 + tl.arange(0, BLOCK_N)
        sample = tl.load(order + p, mask=p < end, other=0)
        total += load_samples(x, stride_n, stride_d, sample, p < end, d, dim, WIDE)
    return tl.sum(total, axis=0)


@triton.jit
def sum_chunk(
    f, stride_n, stride_d, order, index, sums, dim, num_chunks, number, d, CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Features d of one chunk of a long run, summed into sums (chunks, D)."""
    row, _, _, begin, end = chunk_of(index, number, num_chunks, CHUNK)
    if row >= 0:
        total = sum_samples(f, stride_n, stride_d, order, begin, end, d, dim, sums.dtype.element_ty, BLOCK_N, BLOCK_D)
        tl.store(sums + number.to(tl.int64) * dim + d, total, mask=d < dim)


@triton.jit
def centroids_of(
    f, stride_n, stride_d, order, sums, centroids, seen, label, run_begin, run_end, d, dim, momentum,
    CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(mu_c, m_c) of a run, from its samples if it is short, else from the sums of its chunks in order."""
    WIDE: tl.constexpr = sums.dtype.element_ty
    count = run_end - run_begin
    if count <= CHUNK:
        total = sum_samples(f, stride_n, stride_d, order, run_begin, run_end, d, dim, WIDE, BLOCK_N, BLOCK_D)
    else:
        total = add_chunks(sums, run_begin, count, d, dim, CHUNK, BLOCK_D)
    mu = total / count.to(WIDE)
    previous = load_row(centroids, label, dim, 1, d, dim, WIDE)
    rho = scalar(momentum, WIDE)
    blended = (1 - rho) * mu + rho * previous
    return mu, tl.where(tl.load(seen + label) != 0, blended, mu)


@triton.jit
def add_chunks(partial, run_begin, count, d, dim, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr):
    """The rows of a long run's chunks in partial (chunks, D), added in order."""
    total = tl.zeros((BLOCK_D,), partial.dtype.element_ty)
    number = tl.cdiv(2 * run_begin, CHUNK)
    for chunk in range(number, number + tl.cdiv(count, CHUNK)):
        total += tl.load(partial + tl.cast(chunk, tl.int64) * dim + d, mask=d < dim, other=0)
    return total
