"""Regularization (1/P) sum_c ||m_c||_p: a device function, called where a kernel has the centroid at hand."""

from __future__ import annotations

import triton
import triton.language as tl

from robustfast.triton_ops.elements import direction, length_of, quotient_or_zero


@triton.jit
def centroid_length(centroid, NORM: tl.constexpr):
    """||m_c||_p and its gradient, 0 at m_c = 0."""
    length = length_of(centroid, 0, NORM)
    gradient = direction(centroid, NORM)
    if NORM == 2:
        gradient = quotient_or_zero(gradient, length)
    return length, gradient
