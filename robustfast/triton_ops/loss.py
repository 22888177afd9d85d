"""The loss as a few launches: group, sums, variance, margin, finish; and one backward. See docs/ops.md.

Everything that depends on the data stays on the device: a step can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from robustfast.checks import wide_dtype
from robustfast.ops import gradients
from robustfast.triton_ops.centroids import add_chunks, sum_chunk
from robustfast.triton_ops.grouping import FINISHED, NOT_FINITE, PRESENT, group, run_of_row
from robustfast.triton_ops.margin import (
    describe_weight,
    find_winner,
    flattened,
    margin,
    margin_items,
    margin_kernel,
    margin_tiles,
    matmul_precision,
    splits_of,
    weight_gradient,
)
from robustfast.triton_ops.regularization import center_norm
from robustfast.triton_ops.rows import processor, row_tile, scalar, warps
from robustfast.triton_ops.variance import add_chunk_terms, feature_gradients, variance_kernel

DENSE = 2048  # up to here every row of dW has a program; above, dW is filled and the rows that matter are written


def discriminative_loss(
    input: Tensor, input_noise: Tensor | None, target: Tensor, weight: Tensor, bias: Tensor | None, centroids: Tensor,
    seen: Tensor, settings: list[float], scheduled: Tensor | None, norm: int, update_state: bool, ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    delta_var, delta_dist, alpha, beta, gamma, momentum = settings if scheduled is None else scheduled.tolist()
    n, dim = input.shape
    num_classes = weight.shape[0]
    rows = min(n, num_classes)
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    wide = wide_dtype(input)
    loss, terms = input.new_empty((), dtype=wide), input.new_empty(5, dtype=wide)
    slot, classes = input.new_empty(n, dtype=torch.int32), input.new_empty((2, rows), dtype=torch.int32)
    pull, tables = input.new_empty((2, n), dtype=wide), input.new_empty((3, rows, dim), dtype=wide)
    boundary_bias = input.new_empty(rows, dtype=wide)
    if n == 0:
        return loss.zero_(), terms.zero_(), slot, pull, tables, classes, boundary_bias

    groups = group(target, slot, pull, classes, num_classes, ignore_index)
    index, order, chunk, chunks = groups
    low_dtype = operand_dtype(weight.dtype, wide)
    sums, pulls = input.new_empty((2, chunks, dim), dtype=wide)
    low = input.new_empty((rows, dim), dtype=low_dtype)
    square, key = input.new_empty(num_classes, dtype=wide), classes.new_empty(num_classes)
    own, row_terms = input.new_empty(rows, dtype=wide), input.new_empty((4, rows), dtype=wide)
    chunk_terms = input.new_empty((2, chunks), dtype=wide)
    f, w = (input, *input.stride()), (weight, *weight.stride())
    g = (None, 0, 0) if input_noise is None else (input_noise, *input_noise.stride())

    sum_d, weight_k, weight_d = sums_tiles(dim)
    sum_programs = chunks * triton.cdiv(dim, sum_d)
    sums_kernel[(sum_programs + triton.cdiv(num_classes, weight_k),)](
        *f, order, index, sums, *w, bias, square, key, dim, num_classes, chunks, sum_programs,
        CHUNK=chunk, BLOCK_N=min(16, chunk), SUM_D=sum_d, BLOCK_K=weight_k, BLOCK_D=weight_d,
    )  # fmt: skip
    processors, family = processor(input.device)
    tile = row_tile(dim, wide.itemsize, chunk, kib=16 * 4 // min(4, input.dtype.itemsize))
    variance_kernel[(rows + chunks,)](
        *f, *g, order, index, classes, sums, centroids, seen, *w, bias, pull, tables, low, own, row_terms, pulls,
        chunk_terms, n, dim, rows, chunks, delta_var, alpha, momentum,
        NORM=norm, CHUNK=chunk, BLOCK_N=tile.block_n, BLOCK_D=tile.block_d,
        **warps(tile.num_warps, family, wide.itemsize),
    )  # fmt: skip
    precision = matmul_precision(family, low_dtype)
    tiles = margin_tiles(family, low_dtype, precision, dim)
    items = margin_items(tiles, rows, num_classes, processors)
    best_score = input.new_empty((items, tiles.block_c), dtype=wide)
    best_class = classes.new_empty((items, tiles.block_c))
    margin_kernel[(items,)](
        low, weight, weight.stride(0), bias, square, key, own, classes, index, best_score, best_class,
        num_classes, dim, items,
        PRECISION=precision, EVEN_D=dim % tiles.block_d == 0, FLATTEN=flattened(tiles, dim),
        BLOCK_C=tiles.block_c, BLOCK_K=tiles.block_k, BLOCK_D=tiles.block_d,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    row = row_tile(dim, wide.itemsize, 1)
    finish_kernel[(rows,)](
        index, classes, *w, bias, centroids, seen, best_score, best_class, items, pulls, chunk_terms,
        tables, boundary_bias, row_terms, loss, terms, num_classes, dim, rows, chunks,
        delta_dist, alpha, beta, gamma, momentum,
        NORM=norm, VIEWS=1 if input_noise is None else 2, UPDATE=update_state, CHUNK=chunk, BLOCK_C=tiles.block_c,
        BLOCK_K=tiles.block_k, BLOCK_D=row.block_d, BLOCK=256, **warps(max(4, row.num_warps), family, wide.itemsize),
    )  # fmt: skip
    return loss, terms, slot, pull, tables, classes, boundary_bias


def operand_dtype(weight: torch.dtype, wide: torch.dtype) -> torch.dtype:
    """What the matrix units multiply: half types as they are, all others in the dtype of the statistics."""
    return weight if weight.itemsize == 2 and wide == torch.float32 else wide


def sums_tiles(dim: int) -> tuple[int, int, int]:
    """Features of a long run's chunk that one program sums; rows of W described by one, so many features at a time."""
    return min(256, max(16, triton.next_power_of_2(dim))), 16, min(128, max(16, triton.next_power_of_2(dim)))


@triton.jit(do_not_specialize=["num_classes", "num_chunks", "sum_programs"])
def sums_kernel(
    f, f_n, f_d, order, index, sums, weight, w_k, w_d, bias, square, key, dim, num_classes, num_chunks, sum_programs,
    CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, SUM_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sums of long runs' chunks, and what the margin needs to know of W's rows."""
    pid = tl.program_id(0)
    if pid < sum_programs:
        d = pid // num_chunks * SUM_D + tl.arange(0, SUM_D)
        sum_chunk(f, f_n, f_d, order, index, sums, dim, num_chunks, pid % num_chunks, d, CHUNK, BLOCK_N, SUM_D)
    else:
        describe_weight(weight, w_k, w_d, bias, square, key, index, num_classes, dim, pid - sum_programs,
                        square.dtype.element_ty, BLOCK_K, BLOCK_D)  # fmt: skip


@triton.jit(do_not_specialize=["max_items", "num_classes", "num_rows", "num_chunks"])
def finish_kernel(
    index, classes, weight, w_k, w_d, bias, centroids, seen, best_score, best_class, max_items, pulls, chunk_terms,
    tables, boundary_bias, row_terms, loss, terms, num_classes, dim, num_rows, num_chunks,
    delta_dist: tl.float64, alpha: tl.float64, beta: tl.float64, gamma: tl.float64, momentum: tl.float64,
    NORM: tl.constexpr, VIEWS: tl.constexpr, UPDATE: tl.constexpr, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row each: margin of its winner, gradients of the tables, state. The last program through adds the terms."""
    WIDE: tl.constexpr = tables.dtype.element_ty
    row = tl.program_id(0)
    present = tl.load(index + PRESENT)
    programs = tl.maximum(present, 1)
    if row >= programs:
        return
    if row < present:
        finish_row(index, classes, weight, w_k, w_d, bias, centroids, seen, best_score, best_class, max_items, pulls,
                   chunk_terms, tables, boundary_bias, row_terms, row, present, num_classes, dim, num_rows, num_chunks,
                   delta_dist, beta, gamma, momentum,
                   NORM, UPDATE, CHUNK, BLOCK_C, BLOCK_K, BLOCK_D, BLOCK)  # fmt: skip
    tl.debug_barrier()
    if tl.atomic_add(index + FINISHED, 1) == programs - 1:
        add_terms(row_terms, loss, terms, present, num_rows, scalar(alpha, WIDE), scalar(beta, WIDE),
                  scalar(gamma, WIDE), VIEWS, BLOCK)  # fmt: skip


@triton.jit
def finish_row(
    index, classes, weight, w_k, w_d, bias, centroids, seen, best_score, best_class, max_items, pulls, chunk_terms,
    tables, boundary_bias, row_terms, row, present, num_classes, dim, num_rows, num_chunks,
    delta_dist, beta, gamma, momentum, NORM: tl.constexpr, UPDATE: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    WIDE: tl.constexpr = tables.dtype.element_ty
    d = tl.arange(0, BLOCK_D)
    label = tl.load(classes + row)
    run_begin, run_end = run_of_row(index, row, num_chunks)
    count = run_end - run_begin
    center_at = tables + row.to(tl.int64) * dim + d
    table = tl.cast(num_rows, tl.int64) * dim
    center_grad_at = center_at + table
    boundary_at = center_grad_at + table
    center = tl.load(center_at, mask=d < dim, other=0)
    mu = tl.load(boundary_at, mask=d < dim, other=0)
    if count > CHUNK:
        pulled = add_chunks(pulls, run_begin, count, d, dim, CHUNK, BLOCK_D)
        compact = add_chunk_terms(chunk_terms, run_begin, count, CHUNK)
        align = add_chunk_terms(chunk_terms + num_chunks, run_begin, count, CHUNK)
    else:
        pulled = tl.load(center_grad_at, mask=d < dim, other=0)
        compact = tl.load(row_terms + row)
        align = tl.load(row_terms + num_rows + row)

    splits, blocks = splits_of(present, max_items, num_classes, BLOCK_C, BLOCK_K)
    winner = find_winner(best_score, best_class, index, weight, w_k, w_d, bias, mu, label, row, splits, blocks,
                         num_classes, d, dim, WIDE, BLOCK_C, BLOCK_K, BLOCK)  # fmt: skip
    share = 1 / present.to(WIDE)
    hinge, boundary_grad, slope, mu_grad, active = margin(
        weight, w_k, w_d, bias, mu, label, winner, d, dim, scalar(delta_dist, WIDE), scalar(beta, WIDE) * share, WIDE
    )
    if tl.load(index + NOT_FINITE) != 0:
        hinge += float("nan")
    norm, norm_grad = center_norm(center, NORM)
    was_seen = tl.load(seen + label) != 0
    tau = tl.where(was_seen, 1 - scalar(momentum, WIDE), tl.full((), 1, WIDE))
    center_grad = (tau * (scalar(gamma, WIDE) * share * norm_grad - pulled) + mu_grad) / count.to(WIDE)

    tl.store(center_grad_at, center_grad, mask=d < dim)
    tl.store(boundary_at, boundary_grad, mask=d < dim)
    tl.store(boundary_bias + row, slope)
    tl.store(classes + num_rows + row, tl.where(active, winner, -1))
    tl.store(row_terms + row, compact / count.to(WIDE))
    tl.store(row_terms + num_rows + row, align / count.to(WIDE))
    tl.store(row_terms + 2 * num_rows + row, hinge)
    tl.store(row_terms + 3 * num_rows + row, norm)
    if UPDATE:
        finite = tl.max((center - center != 0).to(tl.int32)) == 0
        tl.store(centroids + label.to(tl.int64) * dim + d, center, mask=d < tl.where(finite, dim, 0))
        tl.store(seen + label, True, mask=finite)


@triton.jit
def add_terms(row_terms, loss, terms, present, num_rows, alpha, beta, gamma, VIEWS: tl.constexpr, BLOCK: tl.constexpr):
    """Means over the present classes of compactness, alignment, margin and regularization, and their sum."""
    classes = tl.maximum(present, 1).to(row_terms.dtype.element_ty)
    compactness = add_row_terms(row_terms, present, BLOCK) / classes
    alignment = add_row_terms(row_terms + num_rows, present, BLOCK) / classes
    margin = add_row_terms(row_terms + 2 * num_rows, present, BLOCK) / classes
    regularization = add_row_terms(row_terms + 3 * num_rows, present, BLOCK) / classes
    variance = (compactness + alignment) / VIEWS
    tl.store(loss, alpha * variance + beta * margin + gamma * regularization)
    tl.store(terms, variance)
    tl.store(terms + 1, margin)
    tl.store(terms + 2, regularization)
    tl.store(terms + 3, compactness)
    tl.store(terms + 4, alignment)


@triton.jit
def add_row_terms(row_terms, present, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), row_terms.dtype.element_ty)
    for r0 in range(0, present, BLOCK):
        r = r0 + tl.arange(0, BLOCK)
        # Other programs wrote these: past this multiprocessor's own cache.
        total += tl.load(row_terms + r, mask=r < present, other=0, cache_modifier=".cg")
    return tl.sum(total)


def discriminative_loss_backward(
    grad_loss: Tensor, input: Tensor, input_noise: Tensor | None, slot: Tensor, pull: Tensor, tables: Tensor,
    classes: Tensor, boundary_bias: Tensor, num_classes: int, weight_dtype: torch.dtype, bias_dtype: torch.dtype,
    norm: int, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    n, dim = input.shape
    rows = classes.shape[1]
    dense = num_classes <= DENSE
    want_f, want_g, want_w, want_b = wanted
    d_f, d_g, d_w, d_b = gradients(input, num_classes, weight_dtype, bias_dtype, wanted)
    if not dense or n == 0:
        d_w.zero_(), d_b.zero_()
    if n == 0 or not any(wanted):
        return d_f, d_g, d_w, d_b

    tile = row_tile(dim, pull.itemsize)
    slices = triton.cdiv(dim, slice_size(dim)) if want_w or want_b else 0
    destinations = num_classes if dense else 2 * rows
    weight_programs = slices * destinations
    sample_programs = triton.cdiv(n, tile.block_n) if want_f or want_g else 0
    listed = classes.new_empty((max(slices, 1), rows))
    g = (None, 0, 0) if input_noise is None else (input_noise, *input_noise.stride())
    backward_kernel[(weight_programs + sample_programs,)](
        grad_loss, input, *input.stride(), *g, slot, pull, tables, classes, boundary_bias, listed,
        d_f if want_f else None, d_g if want_g else None, d_w if want_w else None, d_b if want_b else None,
        n, dim, rows, weight_programs, destinations,
        NORM=norm, DENSE_ROWS=dense, SLICE=slice_size(dim), BLOCK=1024, BLOCK_N=tile.block_n, BLOCK_D=tile.block_d,
        **warps(tile.num_warps, processor(input.device).family, pull.itemsize),
    )  # fmt: skip
    return d_f, d_g, d_w, d_b


def slice_size(dim: int) -> int:
    """Features of one row of dW that one program adds."""
    return min(2048, max(16, triton.next_power_of_2(dim)))


@triton.jit(do_not_specialize=["num_samples", "num_rows", "weight_programs", "destinations"])
def backward_kernel(
    grad_loss, f, f_n, f_d, g, g_n, g_d, slot, pull, tables, classes, boundary_bias, listed, d_f, d_g, d_w, d_b,
    num_samples, dim, num_rows, weight_programs, destinations,
    NORM: tl.constexpr, DENSE_ROWS: tl.constexpr, SLICE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """First the programs of dW and db, a row's slice each; then those of df and dg, a few samples each."""
    WIDE: tl.constexpr = tables.dtype.element_ty
    pid = tl.program_id(0)
    scale = tl.load(grad_loss).to(WIDE)
    if pid < weight_programs:
        k = pid % destinations
        candidate = -1
        if not DENSE_ROWS:
            candidate = k - num_rows
            k = tl.load(classes + k)
        if k >= 0:
            weight_gradient(
                d_w, d_b, tables + 2 * tl.cast(num_rows, tl.int64) * dim, boundary_bias, classes, listed, scale, k,
                candidate, pid // destinations, dim, num_rows, min(16, max(1, 8192 // SLICE)), SLICE, BLOCK,
            )  # fmt: skip
    else:
        sample = (pid - weight_programs) * BLOCK_N + tl.arange(0, BLOCK_N)
        feature_gradients(d_f, d_g, f, f_n, f_d, g, g_n, g_d, slot, pull, tables, scale, sample, num_samples, dim,
                          num_rows, NORM, BLOCK_D)  # fmt: skip
