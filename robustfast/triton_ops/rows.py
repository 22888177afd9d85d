"""What the kernels that take whole feature rows share: their tile sizes, loads of samples, settings in full precision."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class RowTile(NamedTuple):
    """A tile of BLOCK_N feature rows, each with all of its D features at once, for so many warps."""

    block_n: int
    block_d: int
    num_warps: int


def row_tile(dim: int, itemsize: int, rows: int = 1 << 20) -> RowTile:
    """At most ``rows`` rows, of about 16 KiB of wide values or of one row, 16 to 32 registers a thread."""
    block_d = max(16, triton.next_power_of_2(dim))
    block_n = max(1, min(rows, 64, (16384 // itemsize) // block_d))
    per_warp = 32 * (64 // itemsize)
    return RowTile(block_n, block_d, max(1, min(16, block_n * block_d // per_warp, 8 if block_d <= 4096 else 16)))


@triton.jit
def scalar(value, WIDE: tl.constexpr):
    """A setting in the dtype of the statistics; settings are passed in float64."""
    return tl.full((), value, WIDE)


@triton.jit
def load_samples(x, stride_n, stride_d, sample, valid, d, dim, WIDE: tl.constexpr):
    """Rows ``sample`` of x, 0 where not valid and beyond the last feature."""
    offset = sample.to(tl.int64)[:, None] * stride_n + d.to(tl.int64)[None, :] * stride_d
    return tl.load(x + offset, mask=valid[:, None] & (d < dim)[None, :], other=0).to(WIDE)


@triton.jit
def load_row(x, row, stride_n, stride_d, d, dim, WIDE: tl.constexpr):
    return tl.load(x + row.to(tl.int64) * stride_n + d.to(tl.int64) * stride_d, mask=d < dim, other=0).to(WIDE)


@triton.jit
def direction(residual, NORM: tl.constexpr):
    """The gradient of ||r||_p, times ||r|| for p = 2."""
    if NORM == 1:
        return tl.where(residual > 0, 1.0, tl.where(residual < 0, -1.0, 0.0)).to(residual.dtype)
    return residual


@triton.jit
def norm_of(residual, axis: tl.constexpr, NORM: tl.constexpr):
    if NORM == 1:
        return tl.sum(tl.abs(residual), axis=axis)
    return exact_sqrt(tl.sum(residual * residual, axis=axis))


@triton.jit
def exact_sqrt(x):
    return tl.sqrt_rn(x) if x.dtype == tl.float32 else tl.sqrt(x)


@triton.jit
def quotient_or_zero(a, b):
    """a / b, 0 where b is 0."""
    return tl.where(b == 0, 0.0, a / tl.where(b == 0, 1.0, b))
