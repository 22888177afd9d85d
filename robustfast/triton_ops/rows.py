"""What kernels that take whole feature rows share: the device, tile sizes, loads of samples, small arithmetic."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Processor(NamedTuple):
    """What the tiles are made for: a device's multiprocessors, and whether it is a Hopper or later data-centre GPU."""

    multiprocessors: int
    family: str  # "hopper", "ampere" (sm_80 and all other NVIDIA GPUs) or "amd"


@cache
def processor(device: torch.device) -> Processor:
    if device.type == "cpu":
        return Processor(1, "ampere")
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return Processor(properties.multi_processor_count, "amd")
    return Processor(properties.multi_processor_count, "hopper" if properties.major in (9, 10) else "ampere")


class RowTile(NamedTuple):
    """A tile of BLOCK_N feature rows, each with all of its D features at once, for so many warps."""

    block_n: int
    block_d: int
    num_warps: int


def row_tile(dim: int, itemsize: int, rows: int = 64, kib: int = 16) -> RowTile:
    """At most ``rows`` rows, of so many KiB of wide values or of one row, on enough warps to hold them in registers."""
    block_d = max(16, triton.next_power_of_2(dim))
    block_n = max(1, min(rows, kib * 1024 // itemsize // block_d))
    return RowTile(block_n, block_d, max(1, min(16 if block_d > 4096 else 8, block_n * block_d * itemsize // 1024)))


def warps(number: int, family: str, itemsize: int) -> dict:
    """Launch options for so many warps that hold their tile in registers, half of them where values have 4 bytes.

    NVIDIA's assembler, given no bound, spills a few of them to fit one more program on a multiprocessor.
    """
    if family == "amd":
        return {"num_warps": number}
    return {"num_warps": number, "maxnreg": min(255, (1024 if itemsize == 4 and number > 4 else 2048) // number)}


@triton.jit
def scalar(value, WIDE: tl.constexpr):
    """A setting in the dtype of the statistics; settings are passed in float64."""
    return tl.full((), value, WIDE)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """x in another dtype; float64 becomes a half type by way of float32, as Triton has no direct conversion."""
    if x.dtype == tl.float64 and dtype.primitive_bitwidth == 16:
        x = x.to(tl.float32)
    return x.to(dtype)


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
