"""Margin: (1/P) sum_c max_{i != c} max(delta_d + ((W_i - W_c) . mu_c + b_i - b_c) / ||W_i - W_c||, 0).

Three steps: squared norms and keys of W's rows; the winner of each class, on the matrix units; the winner's score and
gradient, computed again from its two rows of W. Nothing of size P x K is stored.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from robustfast.triton_ops.grouping import NOT_FINITE, PRESENT
from robustfast.triton_ops.rows import exact_sqrt, load_row, load_samples, narrow, quotient_or_zero

NO_SCORE = tl.constexpr(float("-inf"))
LOOK_AGAIN = tl.constexpr(float("inf"))
NOBODY = tl.constexpr(2**31 - 1)
SMALLEST = tl.constexpr(2.0**-126)
# Of ||W_i||^2 + ||W_c||^2: nearer rows leave a distance of which rounding takes too much. Matrix units cut off what
# float32 would round, some 1e-5 of a long product.
CANCELLED = tl.constexpr(2.0**-5)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


class MarginTiles(NamedTuple):
    """The winner's search takes BLOCK_C classes of the batch against BLOCK_K rows of W, BLOCK_D features at a time."""

    block_c: int
    block_k: int
    block_d: int
    num_warps: int
    num_stages: int


# The largest tiles whose two accumulators fit in registers, by what is multiplied and how. Half types need rows that
# asynchronous copies can take in whole; other rows pass through registers, which leaves less room.
TILES = {
    ("hopper", "half"): MarginTiles(128, 128, 64, 8, 3),
    ("hopper", "tf32"): MarginTiles(128, 128, 32, 8, 3),
    ("hopper", "tf32x3"): MarginTiles(128, 64, 32, 8, 2),
    ("ampere", "half"): MarginTiles(128, 64, 64, 8, 3),
    ("ampere", "tf32"): MarginTiles(128, 64, 32, 8, 3),
    ("ampere", "tf32x3"): MarginTiles(64, 32, 32, 4, 2),
    ("amd", "half"): MarginTiles(128, 64, 64, 8, 2),
    ("amd", "ieee"): MarginTiles(64, 64, 32, 4, 2),
}
UNALIGNED = MarginTiles(64, 64, 32, 8, 2)
DOUBLE = MarginTiles(32, 32, 16, 4, 2)


def margin_tiles(family: str, dtype: torch.dtype, precision: str, dim: int) -> MarginTiles:
    if dtype == torch.float64:
        return DOUBLE
    tiles = TILES[family, "half" if dtype.itemsize == 2 else precision]
    return tiles if dim % tiles.block_d == 0 or precision == "tf32x3" else UNALIGNED


def flattened(tiles: MarginTiles, dim: int) -> bool:
    """Whether tiles and features make one loop, which has a tile's first operands on their way before the last ends.

    Hopper's matrix instructions then wait for one another, which costs more once a tile has enough work of its own.
    """
    return dim < 4 * tiles.block_d


def margin_items(tiles: MarginTiles, rows: int, num_classes: int, processors: int) -> int:
    """Programs, and places for their results, of the winner's search: blocks of classes times splits of W.

    One wave of programs if W is short, else four, so that an incomplete last one costs little; at least one a block.
    """
    blocks, steps = triton.cdiv(rows, tiles.block_c), triton.cdiv(num_classes, tiles.block_k)
    return max(blocks, min((4 if steps > 64 else 1) * processors, blocks * steps))


def matmul_precision(family: str, dtype: torch.dtype) -> str:
    """float32 products take three TF32 passes, or one where PyTorch's matmul settings allow TF32."""
    if dtype != torch.float32 or family == "amd":
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


@triton.jit
def describe_weight(
    weight, w_k, w_d, bias, square, key, index, num_classes, dim, block, WIDE: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """||W_i||^2 and a key of the row's bits, for BLOCK_K rows.

    The key is a sum modulo 2^64 of the bits times odd numbers, its upper half kept: with the squared norms it tells
    equal rows, between which there is no boundary, from merely close ones.
    """
    k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    squares = tl.zeros((BLOCK_K,), WIDE)
    keys = tl.zeros((BLOCK_K,), tl.int64)
    for d0 in range(0, dim, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        w = load_samples(weight, w_k, w_d, k, k < num_classes, d, dim, WIDE) + 0.0  # -0 becomes 0
        squares += tl.sum(w * w, axis=1)
        bits = w.to(tl.int64 if w.dtype == tl.float64 else tl.int32, bitcast=True).to(tl.int64)
        mixed = (d + 1).to(tl.int64) * -7046029254386353131
        odd = (mixed ^ (mixed >> 29)) * -4658895280553007687 | 1
        keys += tl.sum((bits ^ (bits >> 16)) * odd[None, :], axis=1)
    tl.store(square + k, squares, mask=k < num_classes)
    tl.store(key + k, (keys >> 32).to(tl.int32), mask=k < num_classes)
    not_finite = (squares - squares != 0) & (k < num_classes)
    if bias is not None:
        b = tl.load(bias + k, mask=k < num_classes, other=0)
        not_finite = not_finite | (b != b)
    if tl.max(not_finite.to(tl.int32)) > 0:
        tl.atomic_max(index + NOT_FINITE, 1)


@triton.jit
def splits_of(present, max_items, num_classes, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr):
    """Into how many pieces W is cut for each of the blocks of classes, and the number of these blocks."""
    blocks = tl.cdiv(present, BLOCK_C)
    return tl.minimum(tl.cdiv(num_classes, BLOCK_K), max_items // tl.maximum(blocks, 1)), blocks


@triton.jit
def classes_of(split, splits, num_classes, BLOCK_K: tl.constexpr):
    """The blocks of classes, first and last, of one of the pieces of W."""
    steps = tl.cdiv(num_classes, BLOCK_K)
    first, last = tl.cast(split, tl.int64) * steps // splits, tl.cast(split + 1, tl.int64) * steps // splits
    return first.to(tl.int32), last.to(tl.int32)


@triton.jit(do_not_specialize=["num_classes", "max_items"])
def margin_kernel(
    low, weight, w_k, bias, square, key, own, classes, index,  # (R, D), (K, D), its stride, (K,) x 3, (R,), (2, R)
    best_score, best_class,  # (items, BLOCK_C)
    num_classes, dim, max_items,
    PRECISION: tl.constexpr, EVEN_D: tl.constexpr, FLATTEN: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The best score and its class, of each split of W, for blocks of the batch's classes.

    Where a row of W is so close to W_c that ||W_i||^2 + ||W_c||^2 - 2 W_i . W_c does not tell their distance, the score
    is LOOK_AGAIN, which `find_winner` does.
    """
    present = tl.load(index + PRESENT)
    splits, blocks = splits_of(present, max_items, num_classes, BLOCK_C, BLOCK_K)
    item = tl.program_id(0)
    if item >= splits * blocks:
        return
    block, split = item % blocks, item // blocks
    first, last = classes_of(split, splits, num_classes, BLOCK_K)

    WIDE: tl.constexpr = own.dtype.element_ty
    # The interpreter cannot multiply bfloat16.
    LOW: tl.constexpr = WIDE if INTERPRETED else low.dtype.element_ty
    # Rows and columns past the end repeat the last one, which changes no maximum.
    row = tl.minimum(block * BLOCK_C + tl.arange(0, BLOCK_C), present - 1)
    label = tl.load(classes + row)
    own_logit, own_square, own_key = tl.load(own + row), tl.load(square + label), tl.load(key + label)
    mu_rows = low + row.to(tl.int64)[:, None] * dim
    own_rows = weight + label.to(tl.int64)[:, None] * w_k
    score = tl.full((BLOCK_C,), NO_SCORE, WIDE)
    winner = tl.full((BLOCK_C,), NOBODY, tl.int32)
    for step in tl.range(first, last, flatten=FLATTEN):
        k = tl.minimum(step * BLOCK_K + tl.arange(0, BLOCK_K), num_classes - 1)
        rows = weight + k.to(tl.int64)[None, :] * w_k
        logit = tl.zeros((BLOCK_C, BLOCK_K), WIDE)
        gram = tl.zeros((BLOCK_C, BLOCK_K), WIDE)
        for d0 in range(0, dim, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            if EVEN_D:
                mu = tl.load(mu_rows + d[None, :]).to(LOW)
                w_c = tl.load(own_rows + d[None, :]).to(LOW)
                w = tl.load(rows + d[:, None]).to(LOW)
            else:
                mu = tl.load(mu_rows + d[None, :], mask=(d < dim)[None, :], other=0).to(LOW)
                w_c = tl.load(own_rows + d[None, :], mask=(d < dim)[None, :], other=0).to(LOW)
                w = tl.load(rows + d[:, None], mask=(d < dim)[:, None], other=0).to(LOW)
            logit = tl.dot(mu, w, logit, input_precision=PRECISION, out_dtype=WIDE)
            gram = tl.dot(w_c, w, gram, input_precision=PRECISION, out_dtype=WIDE)
        if bias is not None:
            logit += tl.load(bias + k).to(WIDE)[None, :]
        squares = tl.load(square + k)[None, :]
        both = squares + own_square[:, None]
        distance2 = both - 2 * gram
        scores = (logit - own_logit[:, None]) * tl.rsqrt(tl.maximum(distance2, SMALLEST))
        same = (tl.load(key + k)[None, :] == own_key[:, None]) & (squares == own_square[:, None])
        scores = tl.where(distance2 <= both * CANCELLED, tl.where(same, NO_SCORE, LOOK_AGAIN), scores)
        top = tl.max(scores, axis=1)
        leader = tl.min(tl.where(scores == top[:, None], k[None, :], NOBODY), axis=1)
        better = top > score
        winner = tl.where(better, leader, winner)
        score = tl.where(better, top, score)
    c = tl.arange(0, BLOCK_C)
    tl.store(best_score + item * BLOCK_C + c, score)
    tl.store(best_class + item * BLOCK_C + c, winner)


@triton.jit
def find_winner(
    best_score, best_class, index, weight, w_k, w_d, bias, mu, label, row, splits, blocks, num_classes, d, dim,
    WIDE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The class with the highest score over the splits of W, the lowest on ties; NOBODY if there is no boundary."""
    top = tl.full((BLOCK,), NO_SCORE, WIDE)
    winner = tl.full((BLOCK,), NOBODY, tl.int32)
    look_again = 0
    for split in range(0, splits, BLOCK):
        s = split + tl.arange(0, BLOCK)
        at = row + s * blocks * BLOCK_C
        score = tl.load(best_score + at, mask=s < splits, other=NO_SCORE)
        look_again |= tl.max((score == LOOK_AGAIN).to(tl.int32))
        better = (score > top) & (score != LOOK_AGAIN)
        winner = tl.where(better, tl.load(best_class + at, mask=s < splits, other=NOBODY), winner)
        top = tl.where(better, score, top)
    best = tl.max(top)
    winner = tl.min(tl.where(top == best, winner, NOBODY))
    if look_again != 0 and tl.load(index + NOT_FINITE) == 0:
        for split in range(0, splits):
            if tl.load(best_score + row + split * blocks * BLOCK_C) == LOOK_AGAIN:
                first, last = classes_of(split, splits, num_classes, BLOCK_K)
                for k in range(first * BLOCK_K, tl.minimum(last * BLOCK_K, num_classes)):
                    _, distance, score = boundary(weight, w_k, w_d, bias, mu, k, label, d, dim, WIDE)
                    better = (distance != 0) & ((score > best) | ((score == best) & (k < winner)))
                    best, winner = tl.where(better, score, best), tl.where(better, k, winner)
    return winner


@triton.jit
def boundary(weight, w_k, w_d, bias, mu, k, label, d, dim, WIDE: tl.constexpr):
    """W_k - W_label, its length and the signed distance of mu from the boundary between the two classes."""
    k = tl.cast(k, tl.int32)
    normal = load_row(weight, k, w_k, w_d, d, dim, WIDE) - load_row(weight, label, w_k, w_d, d, dim, WIDE)
    logit = tl.sum(normal * mu)
    if bias is not None:
        logit += tl.load(bias + k).to(WIDE) - tl.load(bias + label).to(WIDE)
    distance = exact_sqrt(tl.sum(normal * normal))
    return normal, distance, quotient_or_zero(logit, distance)


@triton.jit
def margin(weight, w_k, w_d, bias, mu, label, winner, d, dim, delta_dist, share, WIDE: tl.constexpr):
    """The hinge of one class's margin, its gradients in W_winner, in b_winner and in mu, and whether it is active."""
    found = winner != NOBODY
    other = tl.where(found, winner, label)
    normal, distance, score = boundary(weight, w_k, w_d, bias, mu, other, label, d, dim, WIDE)
    found = found & (distance != 0)
    hinge = tl.where(found & ((delta_dist + score <= 0) == 0), delta_dist + score, 0.0)  # nan passes
    slope = tl.where(hinge != 0, quotient_or_zero(share, distance), 0.0)
    unit = quotient_or_zero(normal, distance)
    return hinge, slope * (mu - score * unit), slope, slope * normal, hinge != 0


@triton.jit
def find_rows(classes, num_rows, k, BLOCK: tl.constexpr):
    """The row whose class k is (-1: none), and how many rows classes below k won, and k itself."""
    own, below, count = -1, 0, 0
    for r0 in range(0, num_rows, BLOCK):
        r = r0 + tl.arange(0, BLOCK)
        label = tl.load(classes + r, mask=r < num_rows, other=-1)
        winner = tl.load(classes + num_rows + r, mask=r < num_rows, other=-1)
        own = tl.maximum(own, tl.max(tl.where(label == k, r, -1)))
        below += tl.sum(((winner >= 0) & (winner < k)).to(tl.int32))
        count += tl.sum((winner == k).to(tl.int32))
    return own, below, count


@triton.jit
def list_rows_won(winners, listed, num_rows, k, BLOCK: tl.constexpr):
    """The rows that class k won, in order."""
    count = 0
    for r0 in range(0, num_rows, BLOCK):
        r = r0 + tl.arange(0, BLOCK)
        won = (tl.load(winners + r, mask=r < num_rows, other=-1) == k).to(tl.int32)
        tl.store(listed + count + tl.cumsum(won) - 1, r, mask=won != 0)
        count += tl.sum(won)


@triton.jit
def weight_gradient(
    d_weight, d_bias, boundary_grad, boundary_bias, classes, listed, grad_loss, k, candidate, slice_, dim, num_rows,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Slice BLOCK_D of dW_k, and db_k: the rows that k won, in order, minus the row whose class k is.

    ``candidate`` >= 0: k is the winner of that row; leave it to the row whose class k is, or to the first row it won.
    """
    WIDE: tl.constexpr = boundary_grad.dtype.element_ty
    own, below, count = find_rows(classes, num_rows, k, BLOCK)
    listed += slice_ * num_rows + below  # a place of its own for each k
    if count > 0:
        list_rows_won(classes + num_rows, listed, num_rows, k, BLOCK)
        tl.debug_barrier()
    if candidate >= 0:
        k = tl.where((own >= 0) | (tl.load(listed) != candidate), -1, k)
    if k >= 0:
        d = slice_ * BLOCK_D + tl.arange(0, BLOCK_D)
        total = tl.zeros((BLOCK_D,), WIDE)
        total_bias = tl.zeros((), WIDE)
        for i in range(0, count, BLOCK_N):
            j = i + tl.arange(0, BLOCK_N)
            valid = j < count
            row = tl.load(listed + j, mask=valid, other=0)
            total += tl.sum(load_samples(boundary_grad, dim, 1, row, valid, d, dim, WIDE), axis=0)
            total_bias += tl.sum(tl.load(boundary_bias + row, mask=valid, other=0))
        if own >= 0:
            total -= load_row(boundary_grad, own, dim, 1, d, dim, WIDE)
            total_bias -= tl.load(boundary_bias + own)
        if d_weight is not None:
            total = narrow(total * grad_loss, d_weight.dtype.element_ty)
            tl.store(d_weight + tl.cast(k, tl.int64) * dim + d, total, mask=d < dim)
        if d_bias is not None:
            tl.store(d_bias + k, narrow(total_bias * grad_loss, d_bias.dtype.element_ty), mask=slice_ == 0)
