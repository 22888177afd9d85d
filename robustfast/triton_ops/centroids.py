"""Centroids: mu_c = (1/n_c) sum of the features of class c; m_c = mu_c, or (1 - rho) mu_c + rho m_prev_c once seen."""

from __future__ import annotations

import triton
import triton.language as tl

from robustfast.triton_ops.elements import load_rows, scalar
from robustfast.triton_ops.groups import first_chunk, samples_of_chunk


@triton.jit
def sum_samples(x, order, begin, end, d, dim, WIDE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Sum of the samples at sorted positions begin..end-1, always in the same order."""
    total = tl.zeros((BLOCK_N, BLOCK_D), WIDE)
    for p0 in range(begin, end, BLOCK_N):
        p = p0 + tl.arange(0, BLOCK_N)
        sample = tl.load(order + p, mask=p < end, other=0)
        total += load_rows(x, sample, p < end, d, dim, WIDE)
    return tl.sum(total, axis=0)


@triton.jit
def add_chunks(partial, begin, count, chunk, d, dim, BLOCK_D: tl.constexpr):
    """The rows of a long class's chunks in partial (places, D), added in order."""
    total = tl.zeros((BLOCK_D,), partial.dtype.element_ty)
    first = first_chunk(begin, chunk)
    for place in range(first, first + tl.cdiv(count, chunk)):
        total += tl.load(partial + tl.cast(place, tl.int64) * dim + d, mask=d < dim, other=0)
    return total


@triton.jit
def blend(mu, state, label, d, dim, momentum):
    """m_c of a class with batch centroid mu."""
    previous = tl.load(state.centroids + label.to(tl.int64) * dim + d, mask=d < dim, other=0)
    rho = scalar(momentum, mu.dtype)
    return tl.where(tl.load(state.seen + label) != 0, (1 - rho) * mu + rho * previous, mu)


@triton.jit(do_not_specialize=["places", "chunk"])
def sums_kernel(f, groups, sums, dim, places, chunk, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Features BLOCK_D of one chunk of a long class, summed into sums (places, D)."""
    place = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row, _, _, begin, end = samples_of_chunk(groups, place, chunk)
    if row >= 0:
        total = sum_samples(f, groups.order, begin, end, d, dim, sums.dtype.element_ty, BLOCK_N, BLOCK_D)
        tl.store(sums + place.to(tl.int64) * dim + d, total, mask=d < dim)
