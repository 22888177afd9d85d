"""The steps of the loss alone: the launches of kernels that the whole loss is made of, with rows that are given.

Tables have a row for each class that there is; the samples are grouped as in the whole loss, by the classes that they
have, so that no kernel looks at the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robustfast import ops
from robustfast.checks import wide_dtype
from robustfast.triton_ops.centroids import class_sums_kernel, sum_chunks
from robustfast.triton_ops.device import kind_of, launch, processor, row_tile
from robustfast.triton_ops.elements import classifier, matrix, unit_rows
from robustfast.triton_ops.finish import Given as Rows
from robustfast.triton_ops.finish import RowResults, finish_step_kernel
from robustfast.triton_ops.groups import chunk_places, chunk_size, group
from robustfast.triton_ops.search import margin_search
from robustfast.triton_ops.variance import Chunks, Given, class_pulls_kernel, samples_tile, variance_kernel

__all__ = ["class_pulls", "class_sums", "finish", "margin_search"]


def class_sums(input: Tensor, target: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    n, dim = input.shape
    sums = ops.class_sums(input, target, num_classes, ignore_index).zero_()
    if n == 0:
        return sums
    rows, family = min(n, num_classes), processor(input.device).family
    classes = sums.new_empty((2, rows), dtype=torch.int32)
    groups = group(target, None, None, classes, num_classes, ignore_index)
    kind = kind_of(input, groups.order.dtype, dim)
    chunk_sums = sums.new_empty((chunk_places(n), dim))
    sum_chunks(input, groups, chunk_sums, kind, family)
    tile = samples_tile(input, family)
    launch(
        class_sums_kernel, (rows,), kind,
        matrix(input), groups, classes, chunk_sums, sums, dim, chunk_size(n),
        BLOCK_N=tile.block_n, BLOCK_D=tile.block_d, **tile.options,
    )  # fmt: skip
    return sums


def class_pulls(
    input: Tensor, input_noise: Tensor | None, target: Tensor, centroid: Tensor, sample_share: Tensor,
    settings: list[float], scheduled: Tensor | None, norm: int, ignore_index: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    delta_var, _, alpha, *_ = settings if scheduled is None else scheduled.tolist()
    (n, dim), num_classes = input.shape, centroid.shape[0]
    slot, pull, pull_sum, terms = ops.class_pulls(input, input_noise, target, centroid)
    pull_sum.zero_()
    if n == 0:
        return slot, pull, pull_sum, terms.zero_()
    rows, family, wide = min(n, num_classes), processor(input.device).family, wide_dtype(input)
    classes = slot.new_empty((2, rows))
    groups = group(target, slot, pull, classes, num_classes, ignore_index, slot_is_class=True)
    given = Given(centroid.contiguous(), sample_share.contiguous())
    kind = kind_of(input, input_noise, *given, groups.order.dtype, dim)
    row_terms, tables = pull.new_zeros((2, rows)), pull.new_empty((2, rows, dim))  # of the tables there is pull_sum
    places, chunk = chunk_places(n), chunk_size(n)
    chunks = Chunks.of(pull, places, dim)
    tile = samples_tile(input, family)
    launch(
        variance_kernel, (rows + places,), kind,
        matrix(input), matrix(input_noise), groups, None, given, chunks, tables, classes, pull, row_terms, n, dim,
        rows, places, chunk, delta_var, alpha, 0.0,
        NORM=norm, BLOCK_N=tile.block_n, BLOCK_D=tile.block_d, **tile.options,
    )  # fmt: skip
    tile = row_tile(dim, wide.itemsize, family, 1, least_warps=4)
    launch(
        class_pulls_kernel, (rows,), kind,
        groups, given, chunks, tables, classes, row_terms, pull_sum, dim, rows, places, chunk,
        BLOCK_D=tile.block_d, **tile.options,
    )  # fmt: skip
    return slot, pull, pull_sum, row_terms.sum(1)


def finish(
    mu: Tensor, centroid: Tensor, pull_sum: Tensor, counts: Tensor, tau: Tensor, weight_c: Tensor,
    bias_c: Tensor | None, weight_w: Tensor, bias_w: Tensor | None, winner: Tensor, settings: list[float],
    scheduled: Tensor | None, norm: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    _, delta_dist, _, beta, gamma, _ = settings if scheduled is None else scheduled.tolist()
    rows, dim = mu.shape
    *results, terms = ops.finish(mu, centroid, pull_sum, counts)
    if rows == 0:
        return *results, terms.zero_()
    given = Rows(*(table.contiguous() for table in (mu, centroid, pull_sum, counts, tau, winner)))
    own, other = classifier(unit_rows(weight_c), bias_c), classifier(unit_rows(weight_w), bias_w)
    present, row_terms = (counts > 0).sum(dtype=torch.int32), mu.new_empty((len(terms), rows))
    tile = row_tile(dim, mu.itemsize, processor(mu.device).family, 1, least_warps=4)
    launch(
        finish_step_kernel, (rows,), kind_of(*given, *own, *other, dim),
        given, own, other, present, RowResults(*results), row_terms, rows, dim, delta_dist, beta, gamma,
        NORM=norm, BLOCK_D=tile.block_d, **tile.options,
    )  # fmt: skip
    return *results, row_terms.sum(1) / present.clamp(min=1)
