"""The search of the margin: for each row's class c, the class i whose boundary with c scores highest,
((W_i - W_c) . mu_c + b_i - b_c) / ||W_i - W_c||, the lowest on ties.

The matrix units make both products of a tile of pairs and with them all scores but for a rounding that is bounded: the
pairs that may be the best within that bound, nearly always one, are settled from the differences of their rows of W.
So are close rows, whose distance ||W_i||^2 + ||W_c||^2 - 2 W_i . W_c does not tell, and equal ones, which have none.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from robustfast.triton_ops.device import FUSED, cdiv, kind_of, launch, processor, row_tile
from robustfast.triton_ops.elements import (
    classifier,
    exact_sqrt,
    load_bias,
    load_biases,
    load_row,
    load_rows,
    quotient_or_zero,
    unit_rows,
)

NO_SCORE = tl.constexpr(float("-inf"))
UNSURE = tl.constexpr(float("inf"))
LOWEST = tl.constexpr(-1e30)  # in place of a bias of -inf, so that the pair has a score
NOBODY = tl.constexpr(2**31 - 1)
# Of ||W_c||^2: nearer rows leave a distance of which rounding takes too much. Of ||W_i||^2 + ||W_c||^2, all others are
# at least 1/34 away: with less, the lengths would differ by a factor of 1.3 at most.
CLOSE = tl.constexpr(1 / 12)
# Squares below lose digits or all of their value; squares above may leave the range.
SMALLEST = tl.constexpr(2.0**-90)
LARGEST = tl.constexpr(2.0**120)
PADDING = tl.constexpr(2.0**100)
SQRT2 = tl.constexpr(2.0**0.5)
# Added up in a tile of at most 128 pairs a class: for each that may be the best, with its place in the tile, and for
# each without a score.
ONE_PAIR = tl.constexpr(2**13)
NO_PAIR = tl.constexpr(2**21)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


class SearchTiles(NamedTuple):
    """A program takes BLOCK_C classes of the batch against BLOCK_K rows of W, BLOCK_D features at a time."""

    block_c: int
    block_k: int
    block_d: int
    num_warps: int
    num_stages: int


# The largest tiles whose two accumulators fit in registers, by what is multiplied and how. Half types need rows that
# asynchronous copies can take in whole; other rows pass through registers, which leaves less room. Short rows are done
# before the scores are, so that two programs are to share a multiprocessor, one with its products, one with its scores.
TILES = {
    ("hopper", "half"): SearchTiles(128, 128, 64, 8, 3),
    ("hopper", "short half"): SearchTiles(64, 128, 64, 4, 3),
    ("hopper", "tf32"): SearchTiles(128, 128, 32, 8, 3),
    ("hopper", "tf32x3"): SearchTiles(128, 64, 32, 8, 2),
    ("blackwell", "half"): SearchTiles(128, 64, 64, 8, 3),
    ("blackwell", "tf32"): SearchTiles(128, 128, 32, 8, 3),
    ("blackwell", "tf32x3"): SearchTiles(128, 64, 16, 8, 2),
    ("ampere", "half"): SearchTiles(128, 64, 64, 8, 3),
    ("ampere", "tf32"): SearchTiles(128, 64, 32, 8, 3),
    ("ampere", "tf32x3"): SearchTiles(64, 32, 32, 4, 2),
    ("amd", "half"): SearchTiles(128, 64, 64, 8, 2),
    ("amd", "ieee"): SearchTiles(64, 64, 32, 4, 2),
    ("unaligned", "tf32x3"): SearchTiles(64, 32, 16, 4, 2),
}
UNALIGNED = SearchTiles(64, 64, 32, 8, 2)
DOUBLE = SearchTiles(32, 32, 16, 8, 2)


def margin_search(
    mu: Tensor,
    weight_c: Tensor | None,
    bias_c: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    classes: Tensor | None = None,
    present: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The best pair of each row's class.

    Args:
        mu: (R, D) wide.
        weight_c, bias_c: (R, D) and (R,) or None, of the rows' classes; without weight_c these are rows of ``weight``.
        weight, bias: (K, D) and (K,) or None.
        classes: int32 (R,), the row's own row of ``weight``; -1 where there is none: with weight_c that row is not in
            ``weight`` then, without it the row has no class.
        present: int32, its first entry the number of rows that have a class, if these come first; None for R.

    Returns:
        score: (R,) wide, -inf where a class has no boundary, or no class; nan where any of its scores is nan.
        winner: int32 (R,), the class on the other side, -1 where there is none.
    """
    mu, weight = mu.contiguous(), unit_rows(weight)
    (rows, dim), num_classes, wide = mu.shape, weight.shape[0], mu.dtype
    w, given = classifier(weight, bias), weight_c is not None
    # In the dtype of weight, which rows of the same classifier fit.
    own = w if weight_c is None else classifier(unit_rows(weight_c.to(weight.dtype)), bias_c)
    processors, family = processor(mu.device)
    low_dtype = operand_dtype(weight.dtype, wide)
    precision = matmul_precision(family, low_dtype)
    tiles = search_tiles(family, low_dtype, precision, dim)
    items = search_items(tiles, rows, num_classes, processors)
    columns = cdiv(num_classes, tiles.block_k) * tiles.block_k
    operands = Operands(
        low=mu.new_empty((rows, dim), dtype=low_dtype),
        own_logit=mu.new_empty(rows),
        own_half_square=mu.new_empty(rows),
        slack=mu.new_empty(rows),
        half_square=mu.new_empty(columns),
        offset=mu.new_empty(columns),
    )
    score, winner = mu.new_empty(rows), mu.new_empty(rows, dtype=torch.int32)
    candidates = Candidates(mu.new_empty((items, 2, tiles.block_c)), winner.new_empty((items, tiles.block_c)))
    kind = kind_of(mu, *own, *w, classes, present, dim)
    row = row_tile(dim, wide.itemsize, family, 16)
    weight_programs = cdiv(columns, row.block_n)
    launch(
        prepare_kernel, (weight_programs + rows,), kind,
        mu, own, w, classes, present, operands, num_classes, columns, dim, rows, weight_programs,
        GIVEN=given, BLOCK_N=row.block_n, BLOCK_D=row.block_d, **row.options,
    )  # fmt: skip
    launch(
        search_kernel, (items,), kind,
        own, w, classes, present, operands, candidates, num_classes, dim, rows, items,
        GIVEN=given, PRECISION=precision, EVEN_D=dim % tiles.block_d == 0, FLATTEN=flattened(tiles, family, dim),
        BLOCK_C=tiles.block_c, BLOCK_K=tiles.block_k, BLOCK_D=tiles.block_d,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages, **FUSED,
    )  # fmt: skip
    launch(
        settle_kernel, (rows,), kind,
        mu, own, w, classes, present, operands, candidates, score, winner, num_classes, dim, rows, items,
        GIVEN=given, BLOCK_C=tiles.block_c, BLOCK_K=tiles.block_k, BLOCK_N=row.block_n, BLOCK_D=row.block_d, BLOCK=128,
        **row.options,
    )  # fmt: skip
    return score, winner


class Operands(NamedTuple):
    low: Tensor  # (R, D): mu in the matrix units' dtype
    own_logit: Tensor  # (R,): low . W_c + b_c
    own_half_square: Tensor  # (R,): ||W_c||^2 / 2, nan where every pair of c has to be settled
    slack: Tensor  # (R,): how far two scores of the class may be from where they stand
    half_square: Tensor  # (K,), in whole tiles: ||W_i||^2 / 2, nan where every pair of i has to be settled
    offset: Tensor  # (K,), in whole tiles: b_i


class Candidates(NamedTuple):
    """What is left of each item, a block of classes against a split of W: the best of its best tile and of the others.

    The code is the best's class i, or -1 minus the number of the tile where that has to be settled.
    """

    scores: Tensor  # (items, 2, BLOCK_C) wide
    codes: Tensor  # (items, BLOCK_C) int32


def search_tiles(family: str, dtype: torch.dtype, precision: str, dim: int) -> SearchTiles:
    if dtype == torch.float64:
        return DOUBLE
    kind = "half" if dtype.itemsize == 2 else precision
    tiles = TILES[family, kind]
    if dim < 4 * tiles.block_d:
        tiles = TILES.get((family, f"short {kind}"), tiles)
    return tiles if dim % tiles.block_d == 0 else TILES.get(("unaligned", kind), UNALIGNED)


def flattened(tiles: SearchTiles, family: str, dim: int) -> bool:
    """Whether tiles and features make one loop, which has a tile's first operands on their way before the last ends.

    Hopper's matrix instructions would then wait for one another.
    """
    return family != "hopper" and dim < 4 * tiles.block_d


def search_items(tiles: SearchTiles, rows: int, num_classes: int, processors: int) -> int:
    """Programs, and places for their results: blocks of classes times splits of W.

    One wave of programs if W is short, else at least four, so that an incomplete last one costs little, and splits of
    at most 32 tiles, which are soon looked at again where one tile is not the best beyond doubt.
    """
    blocks, steps = cdiv(rows, tiles.block_c), cdiv(num_classes, tiles.block_k)
    if steps <= 64:
        return max(blocks, min(processors, blocks * steps))
    return max(4 * processors, blocks * cdiv(steps, 32))


def operand_dtype(weight: torch.dtype, wide: torch.dtype) -> torch.dtype:
    """What the matrix units multiply: half types as they are, all others in the dtype of the statistics."""
    return weight if weight.itemsize == 2 and wide == torch.float32 else wide


def matmul_precision(family: str, dtype: torch.dtype) -> str:
    """float32 products take three TF32 passes, or one where PyTorch's matmul settings allow TF32."""
    if dtype != torch.float32 or family == "amd":
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


@triton.jit
def relative_error(WIDE: tl.constexpr):
    """Of the products: matrix units cut off what float32 would round, some 1e-5 of a long one."""
    return 2.0**-44 if tl.float64 == WIDE else 2.0**-16


@triton.jit
def distance_error(WIDE: tl.constexpr):
    """Of two scores, from that of the distances of rows that are not close."""
    return 36 * relative_error(WIDE)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """x in the matrix units' dtype, kept finite."""
    if dtype == tl.float16:
        x = tl.where(tl.abs(x) > 65504.0, tl.where(x > 0, 65504.0, -65504.0), x)
    return x.to(dtype)


@triton.jit
def rows_used(present, rows):
    return rows if present is None else tl.load(present)


@triton.jit
def own_row_of(classes, row, GIVEN: tl.constexpr):
    """Where W_c and b_c stand, in a table of their own where they are given, or in W: -1 where a row has no class."""
    return row if GIVEN else tl.load(classes + row)


@triton.jit
def place_of(classes, row):
    """Each row's own row of W, NOBODY where it is not there, or not known to be."""
    place = tl.full(row.shape, -1, tl.int32) if classes is None else tl.load(classes + row)
    return tl.where(place < 0, NOBODY, place)


@triton.jit
def half_square_of(w, bias, axis: tl.constexpr):
    """||w||^2 / 2, nan where products and sums may leave the range."""
    half_square = tl.sum(w * w, axis=axis) / 2
    known = (half_square < LARGEST) & (bias < UNSURE)  # not so with nan
    return tl.where(known, half_square, float("nan"))


@triton.jit(do_not_specialize=["num_classes", "columns", "rows", "weight_programs"])
def prepare_kernel(
    mu, own, classifier, classes, present, operands, num_classes, columns, dim, rows, weight_programs,
    GIVEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What belongs to BLOCK_N rows of W by the first programs, to one row of mu by each of the others."""
    WIDE: tl.constexpr = mu.dtype.element_ty
    pid = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    if pid < weight_programs:
        k = pid * BLOCK_N + tl.arange(0, BLOCK_N)
        w = load_rows(classifier, k, k < num_classes, d, dim, WIDE)
        offset = load_biases(classifier.bias, k, k < num_classes, WIDE)
        half_square = tl.where(k < num_classes, half_square_of(w, offset, 1), PADDING)
        offset = tl.where((k < num_classes) & ((offset < LOWEST) == 0), offset, LOWEST)
        tl.store(operands.half_square + k, half_square, mask=k < columns)
        tl.store(operands.offset + k, offset, mask=k < columns)
    else:
        row = pid - weight_programs
        own_row = own_row_of(classes, row, GIVEN)
        if (row < rows_used(present, rows)) & (own_row >= 0):
            at = row.to(tl.int64) * dim + d
            mu_c = tl.load(mu + at, mask=d < dim, other=0)
            low = round_to(mu_c, operands.low.dtype.element_ty)
            tl.store(operands.low + at, low, mask=d < dim)
            w = load_row(own, own_row, d, dim, WIDE)
            bias_c = load_bias(own.bias, own_row, WIDE)
            own_logit = tl.sum(low.to(WIDE) * w) + bias_c
            tl.store(operands.own_logit + row, own_logit)
            tl.store(operands.own_half_square + row, half_square_of(w, bias_c, 0))
            # A score changes by ||mu - low|| at most. Products are wrong by some part of the lengths; between rows that
            # are not close, ||W_i|| + ||W_c|| is less than 9 times the distance and ||W_c|| alone less than 4 times.
            rounded = mu_c - low.to(WIDE)
            logit_part = quotient_or_zero(tl.abs(own_logit), exact_sqrt(tl.sum(w * w)))
            part = 9 * exact_sqrt(tl.sum(mu_c * mu_c)) + 4 * logit_part
            error = exact_sqrt(tl.sum(rounded * rounded)) + part * relative_error(WIDE)
            tl.store(operands.slack + row, 2 * error)


@triton.jit
def splits_of(used, max_items, num_classes, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr):
    """Into how many pieces W is cut for each of the blocks of classes, and the number of these blocks."""
    blocks = tl.cdiv(used, BLOCK_C)
    return tl.minimum(tl.cdiv(num_classes, BLOCK_K), max_items // tl.maximum(blocks, 1)), blocks


@triton.jit
def tiles_of(split, splits, num_classes, BLOCK_K: tl.constexpr):
    """The tiles, first and last, of one of the pieces of W."""
    steps = tl.cdiv(num_classes, BLOCK_K)
    first, last = tl.cast(split, tl.int64) * steps // splits, tl.cast(split + 1, tl.int64) * steps // splits
    return first.to(tl.int32), last.to(tl.int32)


@triton.jit(do_not_specialize=["num_classes", "rows", "max_items"])
def search_kernel(
    own, classifier, classes, present, operands, candidates, num_classes, dim, rows, max_items,
    GIVEN: tl.constexpr, PRECISION: tl.constexpr, EVEN_D: tl.constexpr, FLATTEN: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The candidates of each block of classes and split of W."""
    used = rows_used(present, rows)
    splits, blocks = splits_of(used, max_items, num_classes, BLOCK_C, BLOCK_K)
    item = tl.program_id(0)
    if item >= splits * blocks:
        return
    first_tile, last_tile = tiles_of(item // blocks, splits, num_classes, BLOCK_K)

    WIDE: tl.constexpr = operands.own_logit.dtype.element_ty
    # The interpreter cannot multiply bfloat16.
    LOW: tl.constexpr = WIDE if INTERPRETED else operands.low.dtype.element_ty
    # Rows past the end repeat the last one, and so do columns, which have the lowest of scores.
    row = tl.minimum(item % blocks * BLOCK_C + tl.arange(0, BLOCK_C), used - 1)
    own_tile = place_of(classes, row) // BLOCK_K
    own_logit, own_half_square = tl.load(operands.own_logit + row), tl.load(operands.own_half_square + row)
    close = own_half_square * CLOSE + SMALLEST
    slack = tl.load(operands.slack + row) * SQRT2
    mu_rows = operands.low + row.to(tl.int64)[:, None] * dim
    own_rows = own.data + tl.maximum(own_row_of(classes, row, GIVEN), 0).to(tl.int64)[:, None] * own.row
    best = tl.full((BLOCK_C,), NO_SCORE, WIDE)
    others = tl.full((BLOCK_C,), NO_SCORE, WIDE)
    best_code = tl.zeros((BLOCK_C,), tl.int32)
    place = tl.arange(0, BLOCK_K)
    for tile in tl.range(first_tile, last_tile, flatten=FLATTEN):
        k = tl.minimum(tile * BLOCK_K + place, num_classes - 1)
        rows_k = classifier.data + k.to(tl.int64)[None, :] * classifier.row
        # Each pair's logit difference, and -||W_i - W_c||^2 / 2: what the products are added to.
        at = tile * BLOCK_K + place
        logit = tl.load(operands.offset + at)[None, :] - own_logit[:, None]
        closeness = -tl.load(operands.half_square + at)[None, :] - own_half_square[:, None]
        for d0 in range(0, dim, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            if EVEN_D:
                mu = tl.load(mu_rows + d[None, :]).to(LOW)
                w_c = tl.load(own_rows + d[None, :]).to(LOW)
                w = tl.load(rows_k + d[:, None]).to(LOW)
            else:
                mu = tl.load(mu_rows + d[None, :], mask=(d < dim)[None, :], other=0).to(LOW)
                w_c = tl.load(own_rows + d[None, :], mask=(d < dim)[None, :], other=0).to(LOW)
                w = tl.load(rows_k + d[:, None], mask=(d < dim)[:, None], other=0).to(LOW)
            logit = tl.dot(mu, w, logit, input_precision=PRECISION, out_dtype=WIDE)
            closeness = tl.dot(w_c, w, closeness, input_precision=PRECISION, out_dtype=WIDE)
        # No score yet where the distance is not known, or is that of a row from itself; nan compares as false.
        scores = tl.where(-closeness > close[:, None], logit * tl.rsqrt(-closeness), NO_SCORE)  # sqrt(2) of them
        top = tl.max(scores, axis=1)
        least = top - slack - tl.where(tl.abs(top) < UNSURE, distance_error(WIDE) * tl.abs(top), 0.0)
        code = tl.where(scores > NO_SCORE, tl.where(scores >= least[:, None], (place + ONE_PAIR)[None, :], 0), NO_PAIR)
        code = tl.sum(code, axis=1) - tl.where(own_tile == tile, NO_PAIR, 0)
        one = (code >= ONE_PAIR) & (code < 2 * ONE_PAIR) & (top < UNSURE)
        top = tl.where(code < NO_PAIR, top, UNSURE)
        code = tl.where(one, tile * BLOCK_K + (code - ONE_PAIR), -1 - tile)
        others = tl.maximum(others, tl.minimum(best, top))
        best_code = tl.where(top > best, code, best_code)
        best = tl.maximum(best, top)
    at = tl.arange(0, BLOCK_C)
    tl.store(candidates.scores + item * 2 * BLOCK_C + at, best / SQRT2)
    tl.store(candidates.scores + (item * 2 + 1) * BLOCK_C + at, others / SQRT2)
    tl.store(candidates.codes + item * BLOCK_C + at, best_code)


@triton.jit(do_not_specialize=["num_classes", "rows", "max_items"])
def settle_kernel(
    mu, own, classifier, classes, present, operands, candidates, score, winner, num_classes, dim, rows, max_items,
    GIVEN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row each: its candidates' scores from differences of rows of W."""
    WIDE: tl.constexpr = mu.dtype.element_ty
    row = tl.program_id(0)
    used = rows_used(present, rows)
    own_row = own_row_of(classes, row, GIVEN)
    best = tl.full((), NO_SCORE, WIDE)
    best_class = tl.full((), NOBODY, tl.int32)
    if (row < used) & (own_row >= 0):
        place_c = place_of(classes, row)
        d = tl.arange(0, BLOCK_D)
        mu_c = tl.load(mu + row.to(tl.int64) * dim + d, mask=d < dim, other=0)
        splits, blocks = splits_of(used, max_items, num_classes, BLOCK_C, BLOCK_K)
        at = row // BLOCK_C * 2 * BLOCK_C + row % BLOCK_C
        top = tl.full((), NO_SCORE, WIDE)
        for s0 in range(0, splits, BLOCK):
            _, first, others = load_scores(candidates, at, s0, splits, blocks, BLOCK_C, BLOCK)
            known = tl.where(first < UNSURE, first, others)
            top = tl.maximum(top, tl.max(tl.where(known < UNSURE, known, NO_SCORE)))
        least = top - tl.load(operands.slack + row)
        if top > NO_SCORE:
            least -= distance_error(WIDE) * tl.abs(top)
        for s0 in range(0, splits, BLOCK):
            s, first, others = load_scores(candidates, at, s0, splits, blocks, BLOCK_C, BLOCK)
            # Not ``first >= least``: least is nan where mu is, and then all have to be settled.
            open_ = ((first < least) == 0) & (first > NO_SCORE)
            many = ((others < least) == 0) & (others > NO_SCORE)
            while (tl.max(open_.to(tl.int32)) > 0) & (best == best):
                split = tl.min(tl.where(open_, s, NOBODY))
                code = tl.load(candidates.codes + (row // BLOCK_C + split * blocks) * BLOCK_C + row % BLOCK_C)
                begin, end = pairs_of(code, num_classes, BLOCK_K)
                if tl.max((many & (s == split)).to(tl.int32)) > 0:
                    first_tile, last_tile = tiles_of(split, splits, num_classes, BLOCK_K)
                    begin, end = first_tile * BLOCK_K, tl.minimum(last_tile * BLOCK_K, num_classes)
                best, best_class = scan(
                    own, own_row, classifier, mu_c, place_c, begin, end, best, best_class, d, dim, BLOCK_N, BLOCK_D
                )
                open_ = open_ & (s != split)
    tl.store(score + row, best)
    tl.store(winner + row, tl.where(best_class == NOBODY, -1, best_class))


@triton.jit
def load_scores(candidates, at, s0, splits, blocks, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr):
    """Splits, their best tiles' scores and those of all their other tiles."""
    s = s0 + tl.arange(0, BLOCK)
    scores = candidates.scores + at + s * blocks * 2 * BLOCK_C
    first = tl.load(scores, mask=s < splits, other=NO_SCORE)
    return s, first, tl.load(scores + BLOCK_C, mask=s < splits, other=NO_SCORE)


@triton.jit
def pairs_of(code, num_classes, BLOCK_K: tl.constexpr):
    """The classes, begin and end, that a candidate's code stands for."""
    tile = -1 - code
    begin = tl.where(code >= 0, code, tile * BLOCK_K)
    return begin, tl.where(code >= 0, code + 1, tl.minimum((tile + 1) * BLOCK_K, num_classes))


@triton.jit
def scan(
    own, own_row, classifier, mu, place_c, begin, end, best, best_class, d, dim, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The better of the best pair so far and those with classes begin..end-1, from differences of rows of W.

    Equal scores: the lowest class. A score of nan is the best, and ends the search.
    """
    WIDE: tl.constexpr = mu.dtype
    w_c, bias_c = load_row(own, own_row, d, dim, WIDE), load_bias(own.bias, own_row, WIDE)
    k0 = begin
    while (k0 < end) & (best == best):
        k = k0 + tl.arange(0, BLOCK_N)
        valid = (k < end) & (k != place_c)
        normal = load_rows(classifier, k, valid, d, dim, WIDE) - w_c[None, :]
        logit = tl.sum(normal * mu[None, :], axis=1) + (load_biases(classifier.bias, k, valid, WIDE) - bias_c)
        distance = distance_of(normal, 1)
        score = tl.where(valid & (distance != 0), score_of(logit, distance), NO_SCORE)
        broken = tl.min(tl.where(score == score, NOBODY, k))
        top = tl.max(tl.where(score == score, score, NO_SCORE))
        leader = tl.min(tl.where((score == top) & (score > NO_SCORE), k, NOBODY))
        better = (top > best) | ((top == best) & (leader < best_class))
        best_class = tl.where(better, leader, best_class)
        best = tl.where(better, top, best)
        best_class = tl.where(broken < NOBODY, broken, best_class)
        best = tl.where(broken < NOBODY, float("nan"), best)
        k0 += BLOCK_N
    return best, best_class


@triton.jit
def score_of(logit, distance):
    """The signed distance from a boundary: 0 where there is none, nan where the rows' distance is not finite."""
    return tl.where(distance == float("inf"), float("nan"), quotient_or_zero(logit, distance))


@triton.jit
def distance_of(normal, axis: tl.constexpr):
    """||normal||_2 along an axis, scaled by a power of two where squares would leave the dtype's range."""
    DOUBLE_: tl.constexpr = normal.dtype == tl.float64
    LIMIT: tl.constexpr = 2.0**480 if DOUBLE_ else 2.0**60
    FACTOR: tl.constexpr = 2.0**600 if DOUBLE_ else 2.0**100
    largest = tl.max(tl.abs(normal), axis=axis)
    factor = tl.where(largest > LIMIT, 1 / FACTOR, tl.where(largest < 1 / LIMIT, FACTOR, 1.0)).to(normal.dtype)
    scaled = normal * (factor[:, None] if axis == 1 else factor)
    return exact_sqrt(tl.sum(scaled * scaled, axis=axis)) / factor
