"""Variance: compactness (and alignment) = (1/P) sum_c (1/n_c) sum_{y_i=c} max(||f_i - m_c||_p - delta_v, 0)^2.

One program takes one class, or one chunk of a class with many samples. It makes the centroid, holds it in registers,
and passes over the samples once: lengths of residuals, hinges, and the pull_sum that the centroid's gradient needs.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from robustfast import checks
from robustfast.triton_ops.centroids import add_chunks, blend, sum_row
from robustfast.triton_ops.device import RowTile, row_tile
from robustfast.triton_ops.elements import direction, length_of, load_rows, load_table_rows, quotient_or_zero, scalar
from robustfast.triton_ops.groups import PRESENT, first_chunk, samples_of, samples_of_chunk


class Chunks(NamedTuple):
    """What the chunks of long classes have to add up, by the chunk's place, wide."""

    sums: Tensor  # (places, D) of clean features
    pull_sums: Tensor  # (places, D)
    terms: Tensor  # (2, places) squared hinges, clean and noisy

    @classmethod
    def of(cls, like: Tensor, places: int, dim: int) -> Chunks:
        return cls(like.new_empty((places, dim)), like.new_empty((places, dim)), like.new_empty((2, places)))


class Given(NamedTuple):
    """Centroids from elsewhere, with a row for each class."""

    centroid: Tensor  # (K, D)
    sample_share: Tensor  # (K,)


def samples_tile(input: Tensor, family: str) -> RowTile:
    """A tile of samples about a centroid."""
    wide = checks.wide_dtype(input)
    return row_tile(input.shape[1], wide.itemsize, family, 16, kib=16 * 4 // min(4, input.dtype.itemsize))


@triton.jit
def pull_samples(x, sample, valid, d, dim, centroid, delta_var, weight, NORM: tl.constexpr):
    """(pull of each sample, sum of squared hinges, pull_sum); ``weight`` = 2 view_weight sample_share."""
    residual = load_rows(x, sample, valid, d, dim, centroid.dtype) - centroid[None, :]
    length = length_of(residual, 1, NORM)
    hinge = tl.where(valid & ((length <= delta_var) == 0), length - delta_var, 0.0)  # nan passes
    pull = weight * hinge
    if NORM == 2:
        pull = quotient_or_zero(pull, length)
    return pull, tl.sum(hinge * hinge), tl.sum(pull[:, None] * direction(residual, NORM), axis=0)


@triton.jit
def pull_class(
    f, g, order, pull, begin, end, centroid, n, d, dim, delta_var, alpha, sample_share, NORM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(pull_sum, squared hinges of the clean view, of the noisy one) of sorted positions begin..end-1; writes pull."""
    WIDE: tl.constexpr = centroid.dtype
    VIEWS: tl.constexpr = 1 if g is None else 2
    weight = scalar(alpha, WIDE) * (2 // VIEWS) * sample_share
    delta = scalar(delta_var, WIDE)
    pull_sum = tl.zeros((BLOCK_D,), WIDE)
    compact = tl.zeros((), WIDE)
    align = tl.zeros((), WIDE)
    for p0 in range(begin, end, BLOCK_N):
        p = p0 + tl.arange(0, BLOCK_N)
        valid = p < end
        sample = tl.load(order + p, mask=valid, other=0)
        pull_f, squares, sum_f = pull_samples(f, sample, valid, d, dim, centroid, delta, weight, NORM)
        compact += squares
        pull_sum += sum_f
        tl.store(pull + sample, pull_f, mask=valid)
        pull_g = tl.zeros_like(pull_f)
        if g is not None:
            pull_g, squares, sum_g = pull_samples(g, sample, valid, d, dim, centroid, delta, weight, NORM)
            align += squares
            pull_sum += sum_g
        tl.store(pull + n + sample, pull_g, mask=valid)
    return pull_sum, compact, align


@triton.jit(do_not_specialize=["n", "rows", "places", "chunk"])
def variance_kernel(
    f, g, groups, state, given, chunks, tables, classes, pull, row_terms, n, dim, rows, places, chunk,
    delta_var: tl.float64, alpha: tl.float64, momentum: tl.float64,
    NORM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Programs 0..R-1 take the classes of few samples, the others the chunks of long ones.

    Writes pull, the table of centroids, mu (where boundary_grad will be), pull_sum (where mu_grad will be), and the
    squared hinges of each row's two views. Where centroids are ``given`` it writes none, and no mu.
    """
    WIDE: tl.constexpr = tables.dtype.element_ty
    pid = tl.program_id(0)
    present = tl.load(groups.counters + PRESENT)
    place = pid - rows
    if pid < rows:
        row = tl.where(pid < present, pid, -1)
        row_begin, row_end = samples_of(groups, tl.maximum(row, 0))
        begin, end = row_begin, row_end
        if row_end - row_begin > chunk:
            row = -1
    else:
        row, row_begin, row_end, begin, end = samples_of_chunk(groups, place, chunk)
    if row < 0:
        return

    d = tl.arange(0, BLOCK_D)
    label = tl.load(classes + row)
    count = row_end - row_begin
    at = row.to(tl.int64) * dim + d
    table = tl.cast(rows, tl.int64) * dim
    if given is None:
        total = sum_row(f, groups.order, chunks.sums, row_begin, count, chunk, d, dim, WIDE, BLOCK_N, BLOCK_D)
        mu = total / count.to(WIDE)
        centroid = blend(mu, state, label, d, dim, momentum)
        sample_share = 1 / (present.to(WIDE) * count.to(WIDE))
        if begin == row_begin:
            tl.store(tables + at, centroid, mask=d < dim)
            tl.store(tables + 2 * table + at, mu, mask=d < dim)
    else:
        centroid = tl.load(given.centroid + label.to(tl.int64) * dim + d, mask=d < dim, other=0)
        sample_share = tl.load(given.sample_share + label)
    pull_sum, compact, align = pull_class(
        f, g, groups.order, pull, begin, end, centroid, n, d, dim, delta_var, alpha, sample_share,
        NORM, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    if pid < rows:
        tl.store(tables + table + at, pull_sum, mask=d < dim)
        tl.store(row_terms + row, compact)
        tl.store(row_terms + rows + row, align)
    else:
        tl.store(chunks.pull_sums + place.to(tl.int64) * dim + d, pull_sum, mask=d < dim)
        tl.store(chunks.terms + place, compact)
        tl.store(chunks.terms + places + place, align)


@triton.jit
def row_pulls(chunks, tables, row_terms, row, begin, count, rows, places, chunk, d, dim, BLOCK_D: tl.constexpr):
    """(pull_sum, squared hinges of the clean view, of the noisy one) of a row, as `variance_kernel` left them."""
    if count > chunk:
        pull_sum = add_chunks(chunks.pull_sums, begin, count, chunk, d, dim, BLOCK_D)
        compact = add_chunk_terms(chunks.terms, begin, count, chunk)
        align = add_chunk_terms(chunks.terms + places, begin, count, chunk)
    else:
        at = (tl.cast(rows, tl.int64) + row) * dim + d
        pull_sum = tl.load(tables + at, mask=d < dim, other=0)
        compact = tl.load(row_terms + row)
        align = tl.load(row_terms + rows + row)
    return pull_sum, compact, align


@triton.jit(do_not_specialize=["rows", "places", "chunk"])
def class_pulls_kernel(
    groups, given, chunks, tables, classes, row_terms, pull_sums, dim, rows, places, chunk, BLOCK_D: tl.constexpr
):
    """The pull_sum of one class, in its row of pull_sums (K, D), and its share of the terms in place of its squares."""
    row = tl.program_id(0)
    if row < tl.load(groups.counters + PRESENT):
        d = tl.arange(0, BLOCK_D)
        label = tl.load(classes + row)
        begin, end = samples_of(groups, row)
        pull_sum, compact, align = row_pulls(
            chunks, tables, row_terms, row, begin, end - begin, rows, places, chunk, d, dim, BLOCK_D
        )
        tl.store(pull_sums + label.to(tl.int64) * dim + d, pull_sum, mask=d < dim)
        sample_share = tl.load(given.sample_share + label)
        tl.store(row_terms + row, sample_share * compact)
        tl.store(row_terms + rows + row, sample_share * align)


@triton.jit
def add_chunk_terms(terms, begin, count, chunk):
    """The squared hinges of a long class, its chunks' added in order."""
    total = tl.zeros((), terms.dtype.element_ty)
    first = first_chunk(begin, chunk)
    for place in range(first, first + tl.cdiv(count, chunk)):
        total += tl.load(terms + place)
    return total


@triton.jit
def variance_backward(
    grad_input, grad_input_noise, f, g, slot, pull, tables, grad_loss, sample, n, dim, rows,
    NORM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """df_i = grad_loss (pull direction(f_i - m_c) + mu_grad), dg_i without mu_grad; 0 for ignored samples."""
    d = tl.arange(0, BLOCK_D)
    row = tl.load(slot + sample, mask=sample < n, other=-1)
    counted = row >= 0
    centroid = load_table_rows(tables, row, counted, d, dim)
    at = sample.to(tl.int64)[:, None] * dim + d[None, :]
    mask = (sample < n)[:, None] & (d < dim)[None, :]
    if grad_input is not None:
        grad = pull_gradient(f, pull, centroid, grad_loss, sample, counted, d, dim, NORM)
        mu_grad = load_table_rows(tables + tl.cast(rows, tl.int64) * dim, row, counted, d, dim)
        tl.store(grad_input + at, grad + grad_loss * mu_grad, mask=mask)
    if grad_input_noise is not None:
        grad = pull_gradient(g, pull + n, centroid, grad_loss, sample, counted, d, dim, NORM)
        tl.store(grad_input_noise + at, grad, mask=mask)


@triton.jit
def pull_gradient(x, pull, centroid, grad_loss, sample, counted, d, dim, NORM: tl.constexpr):
    """grad_loss pull direction(x_i - m_c) of each sample."""
    residual = load_rows(x, sample, counted, d, dim, centroid.dtype) - centroid
    weight = grad_loss * tl.load(pull + sample, mask=counted, other=0)
    return weight[:, None] * direction(residual, NORM)
