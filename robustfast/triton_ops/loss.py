"""The loss as a few launches: groups, sums, variance, search (three), finish; two where the problem is small; and one
backward. See docs/ops.md.

Everything that depends on the data stays on the device: a step can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from robustfast import ops
from robustfast.checks import wide_dtype
from robustfast.triton_ops.centroids import blend, sum_chunks, sum_samples
from robustfast.triton_ops.device import cdiv, kind_of, launch, next_power_of_2, processor, row_tile
from robustfast.triton_ops.elements import classifier, matrix, unit_rows
from robustfast.triton_ops.finish import add_terms, finish_kernel, finish_row
from robustfast.triton_ops.groups import ONE_PROGRAM, PRESENT, chunk_places, chunk_size, group, samples_of
from robustfast.triton_ops.margin import margin_backward
from robustfast.triton_ops.search import NO_SCORE, NOBODY, margin_search, scan
from robustfast.triton_ops.variance import Chunks, pull_class, samples_tile, variance_backward, variance_kernel

DENSE = 2048  # up to here every row of dW has a program; above, dW is filled and the rows that matter are written


class State(NamedTuple):
    centroids: Tensor  # (K, D) wide
    seen: Tensor  # (K,) bool


class Results(NamedTuple):
    """What the forward gives, see docs/ops.md."""

    loss: Tensor
    terms: Tensor
    slot: Tensor
    pull: Tensor
    tables: Tensor
    classes: Tensor
    boundary_bias: Tensor


def discriminative_loss(
    input: Tensor, input_noise: Tensor | None, target: Tensor, weight: Tensor, bias: Tensor | None, centroids: Tensor,
    seen: Tensor, settings: list[float], scheduled: Tensor | None, norm: int, update_state: bool, ignore_index: int,
) -> Results:  # fmt: skip
    delta_var, delta_dist, alpha, beta, gamma, momentum = settings if scheduled is None else scheduled.tolist()
    (n, dim), num_classes, wide = input.shape, weight.shape[0], wide_dtype(input)
    rows = min(n, num_classes)
    w = classifier(unit_rows(weight), bias)
    results = Results(*ops.discriminative_loss(input, input_noise, target, weight))
    if n == 0:
        results.loss.zero_(), results.terms.zero_()
        return results

    groups = group(target, results.slot, results.pull, results.classes, num_classes, ignore_index)
    f, g, state = matrix(input), matrix(input_noise), State(centroids, seen)
    kind = kind_of(input, input_noise, *w, centroids, seen, groups.order.dtype, dim)
    row_terms = results.loss.new_empty((len(results.terms) - 1, rows))  # all but the variance
    finish = {"NORM": norm, "VIEWS": 1 if input_noise is None else 2, "UPDATE": update_state, "BLOCK": 256}
    family = processor(input.device).family
    if is_small(n, dim, num_classes):
        tile = row_tile(dim, wide.itemsize, family, 16)
        launch(
            step_kernel, (rows,), kind,
            f, g, groups, state, w, results, row_terms, n, dim, num_classes, rows,
            delta_var, delta_dist, alpha, beta, gamma, momentum,
            BLOCK_N=tile.block_n, BLOCK_D=tile.block_d, **finish, **tile.options,
        )  # fmt: skip
        return results
    places, chunk = chunk_places(n), chunk_size(n)
    chunks = Chunks.of(row_terms, places, dim)
    sum_chunks(input, groups, chunks.sums, kind, family)
    tile = samples_tile(input, family)
    launch(
        variance_kernel, (rows + places,), kind,
        f, g, groups, state, None, chunks, results.tables, results.classes, results.pull, row_terms, n, dim, rows,
        places, chunk, delta_var, alpha, momentum,
        NORM=norm, BLOCK_N=tile.block_n, BLOCK_D=tile.block_d, **tile.options,
    )  # fmt: skip
    mu, classes = results.tables[2], results.classes[0]
    _, winner = margin_search(mu, None, None, w.data, w.bias, classes, groups.counters)
    tile = row_tile(dim, wide.itemsize, family, 1, least_warps=4)
    launch(
        finish_kernel, (rows,), kind,
        groups, state, w, winner, chunks, results, row_terms, dim, rows, places, chunk,
        delta_dist, alpha, beta, gamma, momentum,
        BLOCK_D=tile.block_d, **finish, **tile.options,
    )  # fmt: skip
    return results


def is_small(n: int, dim: int, num_classes: int) -> bool:
    """Whether one program a class, which also looks at every row of W, is done before further launches would be.

    A guess to be measured: 2^17 elements are 32 tiles of 16 KiB.
    """
    return n <= ONE_PROGRAM and max(n, num_classes) * dim <= 2**17 and min(n, num_classes) * num_classes * dim <= 2**24


@triton.jit(do_not_specialize=["n", "num_classes", "rows"])
def step_kernel(
    f, g, groups, state, classifier, results, row_terms, n, dim, num_classes, rows,
    delta_var: tl.float64, delta_dist: tl.float64, alpha: tl.float64, beta: tl.float64, gamma: tl.float64,
    momentum: tl.float64,
    NORM: tl.constexpr, VIEWS: tl.constexpr, UPDATE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """All that follows the grouping, one class each. The last program through adds the terms."""
    WIDE: tl.constexpr = results.tables.dtype.element_ty
    row = tl.program_id(0)
    present = tl.load(groups.counters + PRESENT)
    if row >= tl.maximum(present, 1):
        return
    if row < present:
        d = tl.arange(0, BLOCK_D)
        label = tl.load(results.classes + row)
        begin, end = samples_of(groups, row)
        count = end - begin
        mu = sum_samples(f, groups.order, begin, end, d, dim, WIDE, BLOCK_N, BLOCK_D) / count.to(WIDE)
        centroid = blend(mu, state, label, d, dim, momentum)
        tl.store(results.tables + row.to(tl.int64) * dim + d, centroid, mask=d < dim)
        sample_share = 1 / (present.to(WIDE) * count.to(WIDE))
        pull_sum, compact, align = pull_class(
            f, g, groups.order, results.pull, begin, end, centroid, n, d, dim, delta_var, alpha, sample_share,
            NORM, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        none = tl.full((), NO_SCORE, WIDE)
        nobody = tl.full((), NOBODY, tl.int32)
        _, winner = scan(
            classifier, label, classifier, mu, label, 0, num_classes, none, nobody, d, dim, BLOCK_N, BLOCK_D
        )
        winner = tl.where(winner == NOBODY, -1, winner)
        finish_row(
            row, label, count, present, mu, centroid, pull_sum, compact, align, winner, state, classifier,
            results, row_terms, d, dim, rows, delta_dist, beta, gamma, momentum, NORM, UPDATE,
        )  # fmt: skip
    add_terms(groups, results, row_terms, present, rows, alpha, beta, gamma, VIEWS, BLOCK)


def discriminative_loss_backward(
    grad_loss: Tensor, input: Tensor, input_noise: Tensor | None, slot: Tensor, pull: Tensor, tables: Tensor,
    classes: Tensor, boundary_bias: Tensor, num_classes: int, weight_dtype: torch.dtype, bias_dtype: torch.dtype,
    norm: int, wanted: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    n, dim = input.shape
    rows = classes.shape[1]
    grads = ops.gradients(input, num_classes, weight_dtype, bias_dtype, wanted)
    dense = num_classes <= DENSE
    if rows == 0 or not dense:
        for grad in grads[2:]:
            grad.zero_()
    if n + rows == 0 or not any(wanted):
        return grads
    want_f, want_g, want_w, want_b = wanted
    tile = row_tile(dim, pull.itemsize, processor(input.device).family)
    slices = max(1, cdiv(dim, slice_size(dim))) if rows > 0 and (want_w or want_b) else 0
    destinations = num_classes if dense else 2 * rows
    weight_programs = slices * destinations
    sample_programs = cdiv(n, tile.block_n) if want_f or want_g else 0
    listed = classes.new_empty((max(slices, 1), rows))
    if weight_programs + sample_programs == 0:
        return grads
    kind = kind_of(grad_loss, input, input_noise, slot, pull, tables, classes, boundary_bias, *grads, *wanted)
    launch(
        backward_kernel, (weight_programs + sample_programs,), kind,
        grad_loss, matrix(input), matrix(input_noise), slot, pull, tables, classes, boundary_bias, listed,
        *(grad if want else None for grad, want in zip(grads, wanted, strict=True)),
        n, dim, rows, weight_programs, destinations,
        NORM=norm, DENSE_ROWS=dense, SLICE=slice_size(dim), BLOCK=1024, BLOCK_N=tile.block_n, BLOCK_D=tile.block_d,
        **tile.options,
    )  # fmt: skip
    return grads


def slice_size(dim: int) -> int:
    """Features of one row of dW that one program adds."""
    return min(2048, max(16, next_power_of_2(dim)))


@triton.jit(do_not_specialize=["n", "rows", "weight_programs", "destinations"])
def backward_kernel(
    grad_loss, f, g, slot, pull, tables, classes, boundary_bias, listed,
    grad_input, grad_input_noise, grad_weight, grad_bias,
    n, dim, rows, weight_programs, destinations,
    NORM: tl.constexpr, DENSE_ROWS: tl.constexpr, SLICE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """First the programs of dW and db, a row's slice each; then those of df and dg, a few samples each."""
    WIDE: tl.constexpr = tables.dtype.element_ty
    pid = tl.program_id(0)
    grad_loss_value = tl.load(grad_loss).to(WIDE)
    if pid < weight_programs:
        k = pid % destinations
        candidate = -1
        if not DENSE_ROWS:
            candidate = k - rows
            k = tl.load(classes + k)
        if k >= 0:
            margin_backward(
                grad_weight, grad_bias, tables + 2 * tl.cast(rows, tl.int64) * dim, boundary_bias, classes, listed,
                grad_loss_value, k, candidate, pid // destinations, dim, rows, min(16, max(1, 8192 // SLICE)), SLICE,
                BLOCK,
            )  # fmt: skip
    else:
        sample = (pid - weight_programs) * BLOCK_N + tl.arange(0, BLOCK_N)
        variance_backward(grad_input, grad_input_noise, f, g, slot, pull, tables, grad_loss_value, sample, n, dim, rows,
                          NORM, BLOCK_D)  # fmt: skip
