"""Regularization (1/P) sum_c ||m_c||_p: a device function, called where a kernel has the centroid at hand."""

from __future__ import annotations

import triton
import triton.language as tl

from robustfast.triton_ops.rows import direction, norm_of, quotient_or_zero


@triton.jit
def center_norm(center, NORM: tl.constexpr):
    """||m_c||_p and its gradient, 0 at m_c = 0."""
    norm = norm_of(center, 0, NORM)
    gradient = direction(center, NORM)
    if NORM == 2:
        gradient = quotient_or_zero(gradient, norm)
    return norm, gradient
