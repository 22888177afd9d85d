"""Centroids: mu_c = (1/n_c) sum of the features of class c; m_c = mu_c, or (1 - rho) mu_c + rho m_prev_c once seen."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from robustfast.triton_ops.device import cdiv, launch, next_power_of_2, registers
from robustfast.triton_ops.elements import load_rows, matrix, scalar
from robustfast.triton_ops.groups import PRESENT, Groups, chunk_size, first_chunk, samples_of, samples_of_chunk


def sum_chunks(input: Tensor, groups: Groups, sums: Tensor, kind: tuple, family: str) -> None:
    """Fill sums (places, D) with the sums of the chunks of long classes."""
    places, dim = sums.shape
    width = sums_width(dim)
    launch(
        sums_kernel, (places, cdiv(dim, width)), kind,
        matrix(input), groups, sums, dim, places, chunk_size(input.shape[0]), BLOCK_N=16, BLOCK_D=width,
        **registers(4, family),
    )  # fmt: skip


def sums_width(dim: int) -> int:
    """Features of a long class's chunk that one program sums."""
    return min(256, max(16, next_power_of_2(dim)))


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
def sum_row(
    x, order, partial, begin, count, chunk, d, dim, WIDE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Sum of a class's samples, or of its chunks if it is long."""
    if count <= chunk:
        total = sum_samples(x, order, begin, begin + count, d, dim, WIDE, BLOCK_N, BLOCK_D)
    else:
        total = add_chunks(partial, begin, count, chunk, d, dim, BLOCK_D)
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


@triton.jit(do_not_specialize=["chunk"])
def class_sums_kernel(f, groups, classes, chunk_sums, sums, dim, chunk, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """The sum of one class's samples and their number, in the class's row of sums (K, D + 1)."""
    WIDE: tl.constexpr = sums.dtype.element_ty
    row = tl.program_id(0)
    if row < tl.load(groups.counters + PRESENT):
        d = tl.arange(0, BLOCK_D)
        begin, end = samples_of(groups, row)
        total = sum_row(f, groups.order, chunk_sums, begin, end - begin, chunk, d, dim, WIDE, BLOCK_N, BLOCK_D)
        at = sums + tl.load(classes + row).to(tl.int64) * (dim + 1)
        tl.store(at + d, total, mask=d < dim)
        tl.store(at + dim, (end - begin).to(WIDE))
