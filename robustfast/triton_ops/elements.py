"""What the loss's kernels do with rows and numbers: loads, conversions, lengths.

Arguments that belong together reach a kernel as one named tuple, whose integers, however, Triton always specialises
on: numbers that change from batch to batch stay outside.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Matrix(NamedTuple):
    """A matrix of any strides as a kernel's argument."""

    data: Any
    row: Any  # from one row to the next
    column: Any


def matrix(tensor: Tensor | None) -> Matrix | None:
    return None if tensor is None else Matrix(tensor, *tensor.stride())


def unit_rows(tensor: Tensor) -> Tensor:
    """The same matrix with unit stride along its rows, copied only where it has none."""
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


class Classifier(NamedTuple):
    """W, a Matrix, and b, or rows of them. Of a tuple in a tuple Triton 3.6 loses constants in branches."""

    data: Any
    row: Any
    column: Any  # 1
    bias: Any  # contiguous, or None


def classifier(weight: Tensor, bias: Tensor | None) -> Classifier:
    """Of a weight that went through `unit_rows`."""
    row, column = weight.stride()
    return Classifier(weight, row, column, None if bias is None else bias.contiguous())


@triton.jit
def load_rows(x, row, valid, d, dim, WIDE: tl.constexpr):
    """Rows of the matrix x, 0 where not valid and beyond the last feature."""
    offset = row.to(tl.int64)[:, None] * x.row + d.to(tl.int64)[None, :] * x.column
    return tl.load(x.data + offset, mask=valid[:, None] & (d < dim)[None, :], other=0).to(WIDE)


@triton.jit
def load_row(x, row, d, dim, WIDE: tl.constexpr):
    return tl.load(x.data + row.to(tl.int64) * x.row + d.to(tl.int64) * x.column, mask=d < dim, other=0).to(WIDE)


@triton.jit
def load_table_rows(table, row, valid, d, dim):
    """Rows of a contiguous table, 0 where not valid and beyond the last feature."""
    at = row.to(tl.int64)[:, None] * dim + d[None, :]
    return tl.load(table + at, mask=valid[:, None] & (d < dim)[None, :], other=0)


@triton.jit
def load_biases(bias, row, valid, WIDE: tl.constexpr):
    """Biases of some rows, 0 where not valid or where there are none."""
    return tl.zeros(row.shape, WIDE) if bias is None else tl.load(bias + row, mask=valid, other=0).to(WIDE)


@triton.jit
def load_bias(bias, row, WIDE: tl.constexpr):
    return tl.zeros((), WIDE) if bias is None else tl.load(bias + row).to(WIDE)


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
def direction(residual, NORM: tl.constexpr):
    """The gradient of ||r||_p, times ||r|| for p = 2."""
    if NORM == 1:
        return tl.where(residual > 0, 1.0, tl.where(residual < 0, -1.0, 0.0)).to(residual.dtype)
    return residual


@triton.jit
def length_of(residual, axis: tl.constexpr, NORM: tl.constexpr):
    """||r||_p along an axis."""
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
