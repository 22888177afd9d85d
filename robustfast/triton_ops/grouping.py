"""The classes of a batch as rows: samples in the order of their labels, runs of one class, long runs in chunks.

Integers only, by comparison and prefix sums, so the order of every later sum is fixed. Nothing waits for the device:
how many rows there are stays in ``index``, and kernels launched for more of them return at once.

``index`` holds, in int32: ``HEAD`` counters; the row of each chunk of a long run (-1: none); the R + 1 starts of runs
in the sorted order; and, where samples were ranked here, their order and sorted labels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from robustfast import checks

PRESENT = tl.constexpr(0)  # P, the number of rows
FINISHED = tl.constexpr(1)  # programs of the last kernel that are through
NOT_FINITE = tl.constexpr(2)  # whether a row of W holds inf or nan
HEAD = tl.constexpr(4)

# Up to here samples are ranked by comparing all pairs, in one program and in many; above, torch sorts them.
ONE_PROGRAM = 512
COMPARED = 16384


class Groups(NamedTuple):
    layout: Tensor  # int32, see above
    order: Tensor  # (N,) samples sorted by label, ties in the batch's order
    chunk: int  # samples of a long run that one program takes
    num_chunks: int  # size of the table of chunks


def group(target: Tensor, slot: Tensor, pull: Tensor, classes: Tensor, num_classes: int, ignore_index: int) -> Groups:
    """Fill slot (N,), classes (2, R) and, for ignored samples, pull (2, N) with zeros; see docs/ops.md."""
    if target.device.type == "cpu":
        checks.labels(target, num_classes, ignore_index)
    n, rows = target.shape[0], classes.shape[1]
    chunk = chunk_size(n)
    num_chunks = 2 * n // chunk + 2
    fixed = -(-(HEAD.value + num_chunks + rows + 1) // 4) * 4  # what follows is aligned to 16 bytes
    compared = n <= COMPARED
    index = target.new_empty(fixed + 2 * n if compared else fixed, dtype=torch.int32)
    sizes = (n, num_classes, rows, num_chunks, ignore_index)
    key = tl.int32 if (num_classes + 2) * n < 2**31 else tl.int64
    order, ordered = index[fixed:].tensor_split([n])
    if n <= ONE_PROGRAM:
        block = max(16, triton.next_power_of_2(n))
        group_kernel[(1,)](
            target, target.stride(0), order, ordered, slot, pull, index, classes, *sizes,
            KEY=key, CHUNK=chunk, BLOCK=block, num_warps=max(1, min(8, block // 32)), **ASSERTING,
        )  # fmt: skip
        return Groups(index, order, chunk, num_chunks)
    if compared:
        rank_kernel[(triton.cdiv(n, 64),)](
            target, target.stride(0), order, ordered, index, classes, *sizes, KEY=key, BLOCK=64, STEP=64, **ASSERTING
        )
    else:
        labels = torch.empty_like(slot)
        label_kernel[(triton.cdiv(n, 1024),)](
            target, target.stride(0), labels, index, classes, *sizes, BLOCK=1024, **ASSERTING
        )
        ordered, order = labels.sort(stable=True)
    rows_kernel[(triton.cdiv(n, 1024),)](
        order, ordered, slot, pull, index, classes, *sizes[:-1], CHUNK=chunk, BLOCK=1024, SCAN=4096
    )
    return Groups(index, order, chunk, num_chunks)


def chunk_size(n: int) -> int:
    """Samples of a class that one program sums: enough programs for the device even if all have one label."""
    return max(16, triton.next_power_of_2(n) // 128)


# Arguments that change from batch to batch, for which no kernel is to be compiled anew.
SIZES = ["num_samples", "num_classes", "num_rows", "num_chunks", "ignore_index"]
# Labels are asserted on the device; the overflow checks that come with assertions are not wanted.
ASSERTING = {"debug": True, "sanitize_overflow": False}


@triton.jit
def read_label(target, stride, i, num_samples, num_classes, ignore_index, ASSERT: tl.constexpr):
    """The class of a sample; ``num_classes`` if it counts nowhere."""
    label = tl.load(target + i.to(tl.int64) * stride, mask=i < num_samples, other=0).to(tl.int64)
    ignored = (label == ignore_index) | (i >= num_samples)
    known = (label >= 0) & (label < num_classes)
    if ASSERT:
        tl.device_assert(known | ignored, "target: a label is outside 0..num_classes-1 and is not ignore_index")
    return tl.where(known & (ignored == 0), label, num_classes).to(tl.int32)


@triton.jit
def reset(index, classes, num_rows, num_chunks, i, step):
    """Counters to 0, tables of chunks and classes to -1; ``i`` are this program's threads out of ``step``."""
    tl.store(index + i, 0, mask=i < HEAD)
    for j in range(0, num_chunks, step):
        tl.store(index + HEAD + j + i, -1, mask=j + i < num_chunks)
    for j in range(0, 2 * num_rows, step):
        tl.store(classes + j + i, -1, mask=j + i < 2 * num_rows)


@triton.jit
def rank(target, stride, i, label, num_samples, num_classes, ignore_index, KEY: tl.constexpr, STEP: tl.constexpr):
    """How many samples come before each of ``i`` in the order of (label, position)."""
    key = label.to(KEY) * num_samples + i
    before = tl.zeros_like(label)
    for j0 in range(0, num_samples, STEP):
        j = j0 + tl.arange(0, STEP)
        other = read_label(target, stride, j, num_samples, num_classes, ignore_index, ASSERT=False)
        other = other.to(KEY) * num_samples + j
        before += tl.sum((other[None, :] < key[:, None]).to(tl.int32), axis=1)
    return before


@triton.jit
def make_rows(
    order, ordered, slot, pull, index, classes, num_samples, num_classes, num_rows, num_chunks, begin,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """Number the runs of equal labels among sorted positions begin..begin+BLOCK-1."""
    rows_before = 0
    start_before = 0
    for p0 in range(0, begin, SCAN):
        p = p0 + tl.arange(0, SCAN)
        label = tl.load(ordered + p, mask=p < begin, other=num_classes)
        first = (label != tl.load(ordered + p - 1, mask=(p > 0) & (p < begin), other=-1)) & (label < num_classes)
        rows_before += tl.sum(first.to(tl.int32))
        start_before = tl.maximum(start_before, tl.max(tl.where(first, p, 0)))

    p = begin + tl.arange(0, BLOCK)
    label = tl.load(ordered + p, mask=p < num_samples, other=num_classes)
    counted = label < num_classes
    first = counted & (label != tl.load(ordered + p - 1, mask=(p > 0) & (p < num_samples), other=-1))
    row = rows_before + tl.cumsum(first.to(tl.int32)) - 1
    starts = index + HEAD + num_chunks
    tl.store(starts + row, p, mask=first)
    tl.debug_barrier()
    start = tl.load(starts + row, mask=counted & (row >= rows_before), other=0)
    start = tl.where(row >= rows_before, start, start_before)
    tl.store(classes + row, label, mask=first)
    final = counted & (tl.load(ordered + p + 1, mask=p + 1 < num_samples, other=num_classes) == num_classes)
    tl.store(starts + row + 1, p + 1, mask=final)
    tl.store(index + PRESENT + tl.zeros_like(p), row + 1, mask=final)

    sample = tl.load(order + p, mask=p < num_samples, other=0)
    tl.store(slot + sample, tl.where(counted, row, -1), mask=p < num_samples)
    ignored = (p < num_samples) & (counted == 0)
    tl.store(pull + sample, 0.0, mask=ignored)
    tl.store(pull + num_samples + sample, 0.0, mask=ignored)

    # Chunk j of a long run that starts at s has number ceil(2 s / CHUNK) + j: no two runs share one, since a run of
    # n > CHUNK samples has ceil(n / CHUNK) <= floor(2 n / CHUNK) chunks.
    j = (p - start) // CHUNK
    is_long = (j > 0) | (tl.load(ordered + p + CHUNK, mask=p + CHUNK < num_samples, other=-1) == label)
    opens = counted & (j * CHUNK == p - start) & is_long
    tl.store(index + HEAD + tl.cdiv(2 * start, CHUNK) + j, row, mask=opens)


@triton.jit(do_not_specialize=SIZES)
def group_kernel(
    target, stride, order, ordered, slot, pull, index, classes, num_samples, num_classes, num_rows, num_chunks,
    ignore_index, KEY: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All of it in one program."""
    i = tl.arange(0, BLOCK)
    reset(index, classes, num_rows, num_chunks, i, BLOCK)
    label = read_label(target, stride, i, num_samples, num_classes, ignore_index, ASSERT=True)
    position = rank(target, stride, i, label, num_samples, num_classes, ignore_index, KEY, 16)
    tl.store(order + position, i, mask=i < num_samples)
    tl.store(ordered + position, label, mask=i < num_samples)
    tl.debug_barrier()
    make_rows(
        order, ordered, slot, pull, index, classes, num_samples, num_classes, num_rows, num_chunks, 0, CHUNK, BLOCK,
        BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def rank_kernel(
    target, stride, order, ordered, index, classes, num_samples, num_classes, num_rows, num_chunks, ignore_index,
    KEY: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    reset(index, classes, num_rows, num_chunks, i, tl.num_programs(0) * BLOCK)
    label = read_label(target, stride, i, num_samples, num_classes, ignore_index, ASSERT=True)
    position = rank(target, stride, i, label, num_samples, num_classes, ignore_index, KEY, STEP)
    tl.store(order + position, i, mask=i < num_samples)
    tl.store(ordered + position, label, mask=i < num_samples)


@triton.jit(do_not_specialize=SIZES)
def label_kernel(
    target, stride, labels, index, classes, num_samples, num_classes, num_rows, num_chunks, ignore_index,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    reset(index, classes, num_rows, num_chunks, i, tl.num_programs(0) * BLOCK)
    label = read_label(target, stride, i, num_samples, num_classes, ignore_index, ASSERT=True)
    tl.store(labels + i, label, mask=i < num_samples)


@triton.jit(do_not_specialize=SIZES[:-1])
def rows_kernel(
    order, ordered, slot, pull, index, classes, num_samples, num_classes, num_rows, num_chunks, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    make_rows(
        order, ordered, slot, pull, index, classes, num_samples, num_classes, num_rows, num_chunks,
        tl.program_id(0) * BLOCK, CHUNK, BLOCK, SCAN,
    )  # fmt: skip


@triton.jit
def run_of_row(index, row, num_chunks):
    """Where in the sorted order the samples of a row begin and end."""
    starts = index + HEAD + num_chunks + row
    return tl.load(starts), tl.load(starts + 1)
