"""The noise: x + scale * noise, clipped, from Philox4x32-10 words of (seed, sample id, draw, position) alone.

A program takes quads, four consecutive elements of a sample in its logical order, which share one Philox call. Rows of
quads are samples, or planes of a sample where channels matter; a row's elements are ``stride_p`` apart in memory.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from robustfast.triton_ops.rows import narrow, scalar

# sin(x) = x S(x^2) and cos(x) = C(x^2) on [-pi/4, pi/4], errors below 1e-7: Taylor's coefficients.
S1, S2, S3, S4 = (tl.constexpr(sign / math.factorial(n)) for sign, n in ((-1, 3), (1, 5), (-1, 7), (1, 9)))
C1, C2, C3, C4 = (tl.constexpr(sign / math.factorial(n)) for sign, n in ((-1, 2), (1, 4), (-1, 6), (1, 8)))
RADIANS = tl.constexpr(2 * math.pi * 2.0**-32)
LN2_TWICE = tl.constexpr(2 * math.log(2))


@triton.jit
def interleave4(a, b, c, d):
    """(..., Q) four times -> (..., 4 Q), the four of a quad side by side."""
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def box_muller(word_u, word_v):
    """sqrt(-2 ln u) times cos(2 pi v) and sin(2 pi v), u = ((word_u >> 8) + 1) 2^-24, v = (word_v >> 8) 2^-24."""
    u = ((word_u >> 8) + 1).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08
    # 1 - u is exact; near u = 1 the logarithm is a short series of it, where log2's absolute error would show.
    t = 1 - u
    series = 2 * t + t * t * (1 + t * 0.6666666666666666)
    radius = tl.sqrt(tl.where(t < 0.00390625, series, -LN2_TWICE * tl.log2(u)))
    # The angle is a quarter turn times ``turns`` plus a rest of at most an eighth of a turn.
    turns = ((word_v >> 29) + 1) >> 1
    x = ((word_v >> 8) << 10).to(tl.int32, bitcast=True).to(tl.float32) * (RADIANS / 4)
    x2 = x * x
    sin = x + x * x2 * (S1 + x2 * (S2 + x2 * (S3 + x2 * S4)))
    cos = 1 + x2 * (C1 + x2 * (C2 + x2 * (C3 + x2 * C4)))
    swap = (turns & 1) != 0
    first = tl.where(swap, sin, cos)
    second = tl.where(swap, cos, sin)
    first = tl.where(((turns + 1) & 2) != 0, -first, first)
    second = tl.where((turns & 2) != 0, -second, second)
    return radius * first, radius * second


@triton.jit
def uniform(word):
    """2 ((w >> 8) + 0.5) 2^-24 - 1."""
    return ((word >> 8).to(tl.int32).to(tl.float32) - 8388607.5) * 1.1920928955078125e-07


@triton.jit
def words(seed, sample, draw, quad):
    """The four words, uint32, of key seed and counters (quad, sample low, sample high, draw)."""
    low, high = (sample & 0xFFFFFFFF).to(tl.uint32), ((sample >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(tl.load(seed), quad.to(tl.uint32), low, high, tl.cast(draw, tl.uint32))


class Quads(NamedTuple):
    """How a tensor is cut into rows of quads, and the rows into tiles of BLOCK_R rows by BLOCK_Q quads.

    Where a plane has a whole number of quads, or channels do not matter, a row is a plane (one of C in a sample);
    otherwise a row is a sample, and each element finds its channel.
    """

    samples: int
    channels: int
    plane: int
    strides: tuple[int, int, int]  # of a sample, of a channel, of a position in the plane
    planar: bool
    block_r: int
    block_q: int

    @property
    def grid(self) -> tuple[int]:
        rows, size = (self.samples * self.channels, self.plane) if self.planar else (
            self.samples, self.channels * self.plane)  # fmt: skip
        return (triton.cdiv(rows, self.block_r) * triton.cdiv(triton.cdiv(size, 4), self.block_q),)

    @property
    def arguments(self) -> tuple[int, ...]:
        return (self.samples, self.channels, self.plane, *self.strides)

    @property
    def constants(self) -> dict:
        far = self.channels * self.plane >= 2**31
        return {"PLANAR": self.planar, "INDEX": tl.int64 if far else tl.int32, "BLOCK_R": self.block_r,
                "BLOCK_Q": self.block_q, "num_warps": 4}  # fmt: skip


TILE = 256  # quads of a program: 8 elements a thread


def quads(x: Tensor, with_channels: bool) -> Quads:
    """The rows of a dense tensor, contiguous or channels-last."""
    n, size = x.shape[0], math.prod(x.shape[1:])
    last = not x.is_contiguous()
    channels = x.shape[1] if last or with_channels else 1
    plane = size // max(channels, 1)
    strides = (size, 1, channels) if last else (size, plane, 1)
    planar = channels == 1 or plane % 4 == 0
    block_q = min(TILE, triton.next_power_of_2(max(1, triton.cdiv(plane if planar else size, 4))))
    return Quads(n, channels, plane, strides, planar, TILE // block_q, block_q)


def dense(x: Tensor) -> Tensor:
    """x itself if a row-major or channels-last order fills its memory, else a row-major copy."""
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x if last or x.is_contiguous() else x.contiguous()


def laid_out(grad: Tensor, like: Tensor) -> Tensor:
    """grad with the strides of ``like``."""
    return grad if grad.stride() == like.stride() else torch.empty_like(like, dtype=grad.dtype).copy_(grad)


def restored(out: Tensor, x: Tensor) -> Tensor:
    """A result on dense(x) in the memory format of x."""
    return out if out.stride() == x.stride() else torch.empty_like(x, dtype=out.dtype).copy_(out)


def wide_dtype(*dtypes: torch.dtype) -> tl.dtype:
    return tl.float64 if torch.float64 in dtypes else tl.float32


def _add_noise(x, grad, scale, draw, normal):
    """clip(x + scale noise), or where a gradient is given, this where clip did not act."""
    source = dense(x)
    out = torch.empty_like(source)
    cut = quads(source, with_channels=False)
    if x.numel() > 0:
        add_noise_kernel[cut.grid](
            out, source, None if grad is None else laid_out(grad, source), scale, *draw, *cut.arguments,
            WIDE=wide_dtype(x.dtype), NORMAL=normal, **cut.constants,
        )  # fmt: skip
    return restored(out, x)


def gaussian_noise(input: Tensor, std: float, *draw) -> Tensor:
    return _add_noise(input, None, std, draw, normal=True)


def gaussian_noise_backward(grad: Tensor, input: Tensor, std: float, *draw) -> Tensor:
    return _add_noise(input, grad, std, draw, normal=True)


def uniform_noise(input: Tensor, epsilon: float, *draw) -> Tensor:
    return _add_noise(input, None, epsilon, draw, normal=False)


def uniform_noise_backward(grad: Tensor, input: Tensor, epsilon: float, *draw) -> Tensor:
    return _add_noise(input, grad, epsilon, draw, normal=False)


def noisy_pair(
    images: Tensor, std: float, mean: Tensor, pixel_std: Tensor, seed: Tensor, sample_ids: Tensor | None, draw: int,
    low: float, high: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    source = dense(images)
    clean, noisy = torch.empty_like(source, dtype=dtype), torch.empty_like(source, dtype=dtype)
    cut = quads(source, with_channels=True)
    if images.numel() > 0:
        noisy_pair_kernel[cut.grid](
            clean, noisy, source, mean.contiguous(), pixel_std.contiguous(), std, seed, sample_ids, draw, low, high,
            *cut.arguments, WIDE=wide_dtype(dtype), **cut.constants,
        )  # fmt: skip
    return restored(clean, images), restored(noisy, images)


def noisy_pair_backward(
    grad_clean: Tensor, grad_noisy: Tensor, images: Tensor, std: float, pixel_std: Tensor, seed: Tensor,
    sample_ids: Tensor | None, draw: int, low: float, high: float,
) -> Tensor:  # fmt: skip
    source = dense(images)
    out = torch.empty_like(source)
    cut = quads(source, with_channels=True)
    if images.numel() > 0:
        noisy_pair_backward_kernel[cut.grid](
            out, laid_out(grad_clean, source), laid_out(grad_noisy, source), source, pixel_std.contiguous(), std, seed,
            sample_ids, draw, low, high, *cut.arguments, WIDE=wide_dtype(grad_clean.dtype), **cut.constants,
        )  # fmt: skip
    return restored(out, images)


def philox_words(seed: Tensor, sample_id: int, draw: int, quads: int) -> Tensor:
    out = seed.new_empty((quads, 4))
    if quads > 0:
        words_kernel[(triton.cdiv(quads, TILE),)](out, seed, sample_id, draw, quads, BLOCK=TILE)
    return out


@triton.jit
def locate(
    channels,
    plane,
    stride_n,
    stride_c,
    stride_p,
    samples,
    PLANAR: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """This program's tile: samples (R, 1), quads (R, Q), memory offsets, their mask and channels (R, 4 Q or 1)."""
    rows, size = samples, channels * tl.cast(plane, INDEX)
    if PLANAR:
        rows, size = samples * channels, tl.cast(plane, INDEX)
    row_quads = tl.cdiv(size, 4)
    blocks = tl.cdiv(row_quads, BLOCK_Q).to(tl.int32)
    row = (tl.program_id(0) // blocks * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    block = tl.cast(tl.program_id(0) % blocks, INDEX)
    quad = (block * BLOCK_Q + tl.arange(0, BLOCK_Q))[None, :]
    e = (block * (4 * BLOCK_Q) + tl.arange(0, 4 * BLOCK_Q))[None, :]
    mask = (row < rows) & (e < size)
    if PLANAR:
        sample, channel = row // channels, row % channels
        quad += channel * row_quads
        e *= stride_p
    else:
        sample, channel = row, e // plane
        e = e % plane * stride_p
    offset = sample.to(tl.int64) * stride_n + channel * tl.cast(stride_c, INDEX) + e
    return sample, quad, offset, mask, channel


@triton.jit
def noise_of(seed, sample_ids, sample, samples, draw, quad, NORMAL: tl.constexpr):
    """Four float32 noise values for each quad, side by side."""
    name = sample.to(tl.int64)
    if sample_ids is not None:
        name = tl.load(sample_ids + sample, mask=sample < samples, other=0)
    w0, w1, w2, w3 = words(seed, name, draw, quad)
    if NORMAL:
        n0, n1 = box_muller(w0, w1)
        n2, n3 = box_muller(w2, w3)
    else:
        n0, n1, n2, n3 = uniform(w0), uniform(w1), uniform(w2), uniform(w3)
    return interleave4(n0, n1, n2, n3)


@triton.jit
def clip(x, low, high):
    """nan passes."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def add_noise_kernel(
    out, x, grad, scale, seed, sample_ids, draw: tl.int64, low: tl.float64, high: tl.float64,
    samples, channels, plane, stride_n, stride_c, stride_p,
    WIDE: tl.constexpr, NORMAL: tl.constexpr, PLANAR: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    sample, quad, at, mask, _ = locate(
        channels, plane, stride_n, stride_c, stride_p, samples, PLANAR, INDEX, BLOCK_R, BLOCK_Q
    )
    value = tl.load(x + at, mask=mask, other=0).to(WIDE)
    value += (scale * noise_of(seed, sample_ids, sample, samples, draw, quad, NORMAL)).to(WIDE)
    low, high = scalar(low, WIDE), scalar(high, WIDE)
    if grad is not None:
        value = tl.where((value >= low) & (value <= high), tl.load(grad + at, mask=mask, other=0).to(WIDE), 0.0)
    else:
        value = clip(value, low, high)
    tl.store(out + at, value, mask=mask)


@triton.jit
def read_image(images, at, mask, WIDE: tl.constexpr):
    """Pixels on [0, 1]: integers are taken as x / 255."""
    image = tl.load(images + at, mask=mask, other=0)
    if images.dtype.element_ty == tl.uint8:
        return image.to(WIDE) / 255.0
    return image.to(WIDE)


@triton.jit
def noisy_pair_kernel(
    clean, noisy, images, mean, pixel_std, std, seed, sample_ids, draw: tl.int64, low: tl.float64, high: tl.float64,
    samples, channels, plane, stride_n, stride_c, stride_p,
    WIDE: tl.constexpr, PLANAR: tl.constexpr, INDEX: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    sample, quad, at, mask, channel = locate(
        channels, plane, stride_n, stride_c, stride_p, samples, PLANAR, INDEX, BLOCK_R, BLOCK_Q
    )
    value = read_image(images, at, mask, WIDE)
    noise = (std * noise_of(seed, sample_ids, sample, samples, draw, quad, True)).to(WIDE)
    channel = tl.minimum(channel, channels - 1)
    inverse = 1 / tl.load(pixel_std + channel).to(WIDE)
    shift = tl.load(mean + channel).to(WIDE) * inverse
    tl.store(clean + at, value * inverse - shift, mask=mask)
    value = clip(value + noise, scalar(low, WIDE), scalar(high, WIDE))
    tl.store(noisy + at, value * inverse - shift, mask=mask)


@triton.jit
def noisy_pair_backward_kernel(
    d_images, grad_clean, grad_noisy, images, pixel_std, std, seed, sample_ids, draw: tl.int64, low: tl.float64,
    high: tl.float64, samples, channels, plane, stride_n, stride_c, stride_p,
    WIDE: tl.constexpr, PLANAR: tl.constexpr, INDEX: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    sample, quad, at, mask, channel = locate(
        channels, plane, stride_n, stride_c, stride_p, samples, PLANAR, INDEX, BLOCK_R, BLOCK_Q
    )
    value = read_image(images, at, mask, WIDE)
    value += (std * noise_of(seed, sample_ids, sample, samples, draw, quad, True)).to(WIDE)
    passes = (value >= scalar(low, WIDE)) & (value <= scalar(high, WIDE))
    grad = tl.load(grad_clean + at, mask=mask, other=0).to(WIDE)
    grad += tl.where(passes, tl.load(grad_noisy + at, mask=mask, other=0).to(WIDE), 0.0)
    grad /= tl.load(pixel_std + tl.minimum(channel, channels - 1)).to(WIDE)
    tl.store(d_images + at, narrow(grad, d_images.dtype.element_ty), mask=mask)


@triton.jit
def words_kernel(out, seed, sample_id: tl.int64, draw: tl.int64, quads, BLOCK: tl.constexpr):
    quad = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    w0, w1, w2, w3 = words(seed, tl.cast(sample_id, tl.int64), draw, quad)
    e = tl.program_id(0).to(tl.int64) * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    tl.store(out + e, interleave4(w0, w1, w2, w3).to(tl.int64), mask=e < quads * 4)
