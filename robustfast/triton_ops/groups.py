"""The classes of a batch as rows: samples in the order of their labels, classes of many samples in chunks.

Integers only, by comparison and prefix sums, so the order of every later sum is fixed. Nothing waits for the device:
how many rows there are stays in ``counters``, and kernels launched for more of them return at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from robustfast import checks
from robustfast.triton_ops.device import FUSED, cdiv, launch, next_power_of_2

PRESENT = tl.constexpr(0)  # P, the number of rows
FINISHED = tl.constexpr(1)  # programs of the last kernel that are through
COUNTERS = tl.constexpr(4)

# Up to here samples are ranked by comparing all pairs, in one program and in many; above, torch sorts them.
ONE_PROGRAM = 512
COMPARED = 16384


class Groups(NamedTuple):
    """All int32, ``order`` int64 where torch sorted."""

    counters: Tensor  # (COUNTERS,)
    begin: Tensor  # (R + 1,) where in the sorted order a row's samples begin
    chunk_row: Tensor  # the row of each chunk of a long class (-1: there is none)
    order: Tensor  # (N,) samples sorted by label, ties in the batch's order


def chunk_size(n: int) -> int:
    """Samples of a class that one program takes: enough programs for the device even if all have one label."""
    return 16 * max(1, cdiv(n, 2048))


def chunk_places(n: int) -> int:
    """Places for chunks of long classes, those of more samples than a chunk."""
    return 2 * n // chunk_size(n) + 2


def group(
    target: Tensor, slot: Tensor | None, pull: Tensor | None, classes: Tensor, num_classes: int, ignore_index: int,
    slot_is_class: bool = False,
) -> Groups:  # fmt: skip
    """Fill classes (2, R), and where they are given slot (N,) and, for ignored samples, pull (2, N) with zeros.

    ``slot_is_class``: samples have the row of their class in tables with a row for each class.
    """
    if target.device.type == "cpu":
        checks.labels(target, num_classes, ignore_index)
    n, rows = target.shape[0], classes.shape[1]
    places, chunk = chunk_places(n), chunk_size(n)
    compared = n <= COMPARED
    kind = target.dtype, target.get_device(), target.stride(0), pull is None or pull.dtype, compared, ignore_index
    # Parts begin at multiples of 16 bytes, whatever the sizes: kernels are compiled for that.
    parts = [-(-size // 4) * 4 for size in (COUNTERS.value, rows + 1, places, *((n, n) if compared else ()))]
    counters, begin, chunk_row, *sorted_ = target.new_empty(sum(parts), dtype=torch.int32).split(parts)
    if not compared:
        labels = target.new_empty(n, dtype=torch.int32)
        groups = Groups(counters, begin, chunk_row, labels)
        launch(
            label_kernel, (cdiv(n, 1024),), kind,
            target, target.stride(0), groups, labels, classes, n, num_classes, rows, places, ignore_index,
            BLOCK=1024, **ASSERTING,
        )  # fmt: skip
        ordered, order = labels.sort(stable=True)
        groups = groups._replace(order=order)
    else:
        order, ordered = sorted_
        groups = Groups(counters, begin, chunk_row, order)
        key = tl.int32 if (num_classes + 2) * n < 2**31 else tl.int64
        if n <= ONE_PROGRAM:
            block = max(16, next_power_of_2(n))
            launch(
                group_kernel, (1,), kind,
                target, target.stride(0), groups, ordered, slot, pull, classes, n, num_classes, rows, places, chunk,
                ignore_index,
                SLOT_IS_CLASS=slot_is_class, KEY=key, BLOCK=block, num_warps=max(1, min(8, block // 32)), **ASSERTING,
            )  # fmt: skip
            return groups
        launch(
            rank_kernel, (cdiv(n, 64),), kind,
            target, target.stride(0), groups, ordered, classes, n, num_classes, rows, places, ignore_index,
            KEY=key, BLOCK=64, STEP=64, **ASSERTING,
        )  # fmt: skip
    launch(
        rows_kernel, (cdiv(n, 1024),), kind,
        groups, ordered, slot, pull, classes, n, num_classes, chunk, SLOT_IS_CLASS=slot_is_class, BLOCK=1024, SCAN=4096,
        **FUSED,
    )  # fmt: skip
    return groups


# Arguments that change from batch to batch, for which no kernel is to be compiled anew.
VARYING = {
    "do_not_specialize": ["n", "num_classes", "rows", "places", "chunk", "ignore_index"],
    "do_not_specialize_on_alignment": ["target"],
}
# Labels are asserted on the device; the overflow checks that come with assertions are not wanted.
ASSERTING = {"debug": True, "sanitize_overflow": False, **FUSED}


@triton.jit
def read_label(target, stride, i, n, num_classes, ignore_index, ASSERT: tl.constexpr):
    """The class of a sample; ``num_classes`` if it counts nowhere."""
    label = tl.load(target + i.to(tl.int64) * stride, mask=i < n, other=0).to(tl.int64)
    ignored = (label == ignore_index) | (i >= n)
    known = (label >= 0) & (label < num_classes)
    if ASSERT:
        tl.device_assert(known | ignored, "target: a label is outside 0..num_classes-1 and is not ignore_index")
    return tl.where(known & (ignored == 0), label, num_classes).to(tl.int32)


@triton.jit
def reset(groups, classes, rows, places, i, step):
    """Counters to 0, tables of chunks and classes to -1; ``i`` are this program's threads out of ``step``."""
    tl.store(groups.counters + i, 0, mask=i < COUNTERS)
    for j in range(0, places, step):
        tl.store(groups.chunk_row + j + i, -1, mask=j + i < places)
    for j in range(0, 2 * rows, step):
        tl.store(classes + j + i, -1, mask=j + i < 2 * rows)


@triton.jit
def rank(target, stride, i, label, n, num_classes, ignore_index, KEY: tl.constexpr, STEP: tl.constexpr):
    """How many samples come before each of ``i`` in the order of (label, position)."""
    key = label.to(KEY) * n + i
    before = tl.zeros_like(label)
    for j0 in range(0, n, STEP):
        j = j0 + tl.arange(0, STEP)
        other = read_label(target, stride, j, n, num_classes, ignore_index, ASSERT=False)
        other = other.to(KEY) * n + j
        before += tl.sum((other[None, :] < key[:, None]).to(tl.int32), axis=1)
    return before


@triton.jit
def make_rows(
    groups, ordered, slot, pull, classes, n, num_classes, chunk, position, SLOT_IS_CLASS: tl.constexpr,
    BLOCK: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """Number the classes among sorted positions position..position+BLOCK-1."""
    rows_before = 0
    begin_before = 0
    for p0 in range(0, position, SCAN):
        p = p0 + tl.arange(0, SCAN)
        label = tl.load(ordered + p, mask=p < position, other=num_classes)
        first = (label != tl.load(ordered + p - 1, mask=(p > 0) & (p < position), other=-1)) & (label < num_classes)
        rows_before += tl.sum(first.to(tl.int32))
        begin_before = tl.maximum(begin_before, tl.max(tl.where(first, p, 0)))

    p = position + tl.arange(0, BLOCK)
    label = tl.load(ordered + p, mask=p < n, other=num_classes)
    counted = label < num_classes
    first = counted & (label != tl.load(ordered + p - 1, mask=(p > 0) & (p < n), other=-1))
    row = rows_before + tl.cumsum(first.to(tl.int32)) - 1
    tl.store(groups.begin + row, p, mask=first)
    tl.debug_barrier()
    begin = tl.load(groups.begin + row, mask=counted & (row >= rows_before), other=0)
    begin = tl.where(row >= rows_before, begin, begin_before)
    tl.store(classes + row, label, mask=first)
    final = counted & (tl.load(ordered + p + 1, mask=p + 1 < n, other=num_classes) == num_classes)
    tl.store(groups.begin + row + 1, p + 1, mask=final)
    tl.store(groups.counters + PRESENT + tl.zeros_like(p), row + 1, mask=final)

    sample = tl.load(groups.order + p, mask=p < n, other=0)
    if slot is not None:
        tl.store(slot + sample, tl.where(counted, label if SLOT_IS_CLASS else row, -1), mask=p < n)
    if pull is not None:
        ignored = (p < n) & (counted == 0)
        tl.store(pull + sample, 0.0, mask=ignored)
        tl.store(pull + n + sample, 0.0, mask=ignored)

    j = (p - begin) // chunk
    is_long = (j > 0) | (tl.load(ordered + p + chunk, mask=p + chunk < n, other=-1) == label)
    opens = counted & (j * chunk == p - begin) & is_long
    tl.store(groups.chunk_row + first_chunk(begin, chunk) + j, row, mask=opens)


@triton.jit
def first_chunk(begin, chunk):
    """The place of the first chunk of a long class whose samples begin there; those of its others follow.

    No two classes share a place: one of n > chunk samples has ceil(n / chunk) <= floor(2 n / chunk) chunks.
    """
    return tl.cdiv(2 * begin, chunk)


@triton.jit
def samples_of(groups, row):
    """Where in the sorted order the samples of a row begin and end."""
    return tl.load(groups.begin + row), tl.load(groups.begin + row + 1)


@triton.jit
def samples_of_chunk(groups, place, chunk):
    """A chunk's row (-1: there is none), where the row's samples begin and end, and where the chunk's do."""
    row = tl.load(groups.chunk_row + place)
    row_begin, row_end = samples_of(groups, tl.maximum(row, 0))
    begin = row_begin + (place - first_chunk(row_begin, chunk)) * chunk
    return row, row_begin, row_end, begin, tl.minimum(begin + chunk, row_end)


@triton.jit(**VARYING)
def group_kernel(
    target, stride, groups, ordered, slot, pull, classes, n, num_classes, rows, places, chunk, ignore_index,
    SLOT_IS_CLASS: tl.constexpr, KEY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All of it in one program."""
    i = tl.arange(0, BLOCK)
    reset(groups, classes, rows, places, i, BLOCK)
    label = read_label(target, stride, i, n, num_classes, ignore_index, ASSERT=True)
    position = rank(target, stride, i, label, n, num_classes, ignore_index, KEY, 16)
    tl.store(groups.order + position, i, mask=i < n)
    tl.store(ordered + position, label, mask=i < n)
    tl.debug_barrier()
    make_rows(groups, ordered, slot, pull, classes, n, num_classes, chunk, 0, SLOT_IS_CLASS, BLOCK, BLOCK)


@triton.jit(**VARYING)
def rank_kernel(
    target, stride, groups, ordered, classes, n, num_classes, rows, places, ignore_index,
    KEY: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Samples sorted by label, as one of two kernels."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    reset(groups, classes, rows, places, i, tl.num_programs(0) * BLOCK)
    label = read_label(target, stride, i, n, num_classes, ignore_index, ASSERT=True)
    position = rank(target, stride, i, label, n, num_classes, ignore_index, KEY, STEP)
    tl.store(groups.order + position, i, mask=i < n)
    tl.store(ordered + position, label, mask=i < n)


@triton.jit(**VARYING)
def label_kernel(
    target, stride, groups, labels, classes, n, num_classes, rows, places, ignore_index, BLOCK: tl.constexpr
):
    """Labels for torch to sort, as int32 and with num_classes for ignored samples."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    reset(groups, classes, rows, places, i, tl.num_programs(0) * BLOCK)
    tl.store(labels + i, read_label(target, stride, i, n, num_classes, ignore_index, ASSERT=True), mask=i < n)


@triton.jit(do_not_specialize=["n", "num_classes", "chunk"])
def rows_kernel(
    groups, ordered, slot, pull, classes, n, num_classes, chunk, SLOT_IS_CLASS: tl.constexpr, BLOCK: tl.constexpr,
    SCAN: tl.constexpr,
):  # fmt: skip
    """Sorted samples as rows."""
    position = tl.program_id(0) * BLOCK
    make_rows(groups, ordered, slot, pull, classes, n, num_classes, chunk, position, SLOT_IS_CLASS, BLOCK, SCAN)
