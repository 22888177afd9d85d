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

from robustfast.triton_ops.rows import narrow, processor, scalar

LN2_TWICE = tl.constexpr(2 * math.log(2))
TURN = tl.constexpr(2 * math.pi)


@triton.jit
def log_series(x):
    """-2 ln(1 + x) / x for |x| <= 1/3, minimax, relative error 2e-7."""
    y = 0.30730990710118106 * x - 0.3422236216148614
    y = (y * x + 0.32840250109208052) * x - 0.3959007508383835
    y = (y * x + 0.5001523916010496) * x - 0.6667597736946836
    return (y * x + 0.9999987557962463) * x - 1.9999996724305368


@triton.jit
def sin_series(z):
    """sin(2 pi sqrt(z)) / sqrt(z) for z <= 1/4, minimax, error 1e-7 of the sine."""
    y = -12.271261390449189 * z + 41.20539421304336
    y = (y * z - 76.58010036542551) * z + 81.59618385578511
    return (y * z - 41.34142139793366) * z + 6.283182818541808


@triton.jit
def cos_series(z):
    """cos(2 pi sqrt(z)) for z <= 1/4, minimax, error 1e-8."""
    y = (6.529609898007555 * z - 25.968312914977616) * z + 60.16783162286123
    y = (y * z - 85.45016553631896) * z + 64.93911898307908
    return (y * z - 19.73920453207719) * z + 0.9999999891722187


@triton.jit
def interleave4(a, b, c, d):
    """(..., Q) four times -> (..., 4 Q), the four of a quad side by side."""
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def box_muller(word_u, word_v, HARDWARE: tl.constexpr):
    """sqrt(-2 ln u) times cos(2 pi v) and sin(2 pi v), u = ((word_u >> 8) + 1) 2^-24, v = (word_v >> 8) 2^-24.

    u = 2^(k - 24) (1 + x) with x from -1/3 to 1/3, so that the logarithm is accurate near u = 1 too, as the hardware's
    is not; the libraries' have branches for what cannot occur here. NVIDIA's sine is good to 2^-21 up to half a turn.
    """
    bits = ((word_u >> 8) + 1).to(tl.int32).to(tl.float32).to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F2AAAAB) & -8388608
    x = (bits - exponent).to(tl.float32, bitcast=True) - 1
    radius = tl.sqrt(x * log_series(x) + (24 - (exponent >> 23)).to(tl.float32) * LN2_TWICE)
    turn = (word_v & 0xFFFFFF00).to(tl.int32, bitcast=True).to(tl.float32) * 2.3283064365386963e-10  # v, or v - 1
    if HARDWARE:
        cos, sin = nvidia("cos.approx.ftz.f32", turn * TURN), nvidia("sin.approx.ftz.f32", turn * TURN)
    else:
        square = turn * turn
        cos, sin = cos_series(square), turn * sin_series(square)
    return radius * cos, radius * sin


@triton.jit
def nvidia(instruction: tl.constexpr, x):
    return tl.inline_asm_elementwise(instruction + " $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def uniform(word):
    """2 ((w >> 8) + 0.5) 2^-24 - 1."""
    return ((word >> 8).to(tl.int32).to(tl.float32) - 8388607.5) * 1.1920928955078125e-07


@triton.jit
def words(seed, sample, draw, quad):
    """The four words of Philox4x32-10, uint32, of key seed and counters (quad, sample low, sample high, draw)."""
    seed = tl.load(seed)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c0, c1, c2, c3 = quad.to(tl.uint32), sample.to(tl.uint32), (sample >> 32).to(tl.uint32), tl.cast(draw, tl.uint32)
    for _ in tl.static_range(10):
        # Products in 64 bits are one instruction each; tl.philox takes two, for the upper and the lower half.
        first, second = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c2 = (second >> 32).to(tl.uint32) ^ c1 ^ k0, (first >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = second.to(tl.uint32), first.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


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
    hardware: bool  # whether NVIDIA's own instructions are there
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
        return {"PLANAR": self.planar, "INDEX": tl.int64 if far else tl.int32, "HARDWARE": self.hardware,
                "BLOCK_R": self.block_r, "BLOCK_Q": self.block_q, "num_warps": 4}  # fmt: skip


TILE = 512  # quads of a program: 16 elements a thread


def quads(x: Tensor, with_channels: bool) -> Quads:
    """The rows of a dense tensor, contiguous or channels-last."""
    n, size = x.shape[0], math.prod(x.shape[1:])
    last = not x.is_contiguous()
    channels = x.shape[1] if last or with_channels else 1
    plane = size // max(channels, 1)
    strides = (size, 1, channels) if last else (size, plane, 1)
    planar = channels == 1 or plane % 4 == 0
    block_q = min(TILE, triton.next_power_of_2(max(1, triton.cdiv(plane if planar else size, 4))))
    return Quads(n, channels, plane, strides, planar, has_nvidia_instructions(x.device), TILE // block_q, block_q)


def has_nvidia_instructions(device: torch.device) -> bool:
    return device.type == "cuda" and processor(device).family != "amd"


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
def noise_of(seed, sample_ids, sample, samples, draw, quad, NORMAL: tl.constexpr, HARDWARE: tl.constexpr):
    """Four float32 noise values for each quad, side by side."""
    name = sample.to(tl.int64)
    if sample_ids is not None:
        name = tl.load(sample_ids + sample, mask=sample < samples, other=0)
    w0, w1, w2, w3 = words(seed, name, draw, quad)
    if NORMAL:
        n0, n1 = box_muller(w0, w1, HARDWARE)
        n2, n3 = box_muller(w2, w3, HARDWARE)
    else:
        n0, n1, n2, n3 = uniform(w0), uniform(w1), uniform(w2), uniform(w3)
    return interleave4(n0, n1, n2, n3)


@triton.jit
def clip(x, low, high):
    """nan passes."""
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def add_noise_kernel(
    out, x, grad, scale, seed, sample_ids, draw: tl.int64, low: tl.float64, high: tl.float64,
    samples, channels, plane, stride_n, stride_c, stride_p,
    WIDE: tl.constexpr, NORMAL: tl.constexpr, PLANAR: tl.constexpr, INDEX: tl.constexpr,
    HARDWARE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    sample, quad, at, mask, _ = locate(
        channels, plane, stride_n, stride_c, stride_p, samples, PLANAR, INDEX, BLOCK_R, BLOCK_Q
    )
    value = tl.load(x + at, mask=mask, other=0).to(WIDE)
    value += (scale * noise_of(seed, sample_ids, sample, samples, draw, quad, NORMAL, HARDWARE)).to(WIDE)
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
        return image.to(WIDE) * tl.full((), 1 / 255, WIDE)
    return image.to(WIDE)


@triton.jit
def noisy_pair_kernel(
    clean, noisy, images, mean, pixel_std, std, seed, sample_ids, draw: tl.int64, low: tl.float64, high: tl.float64,
    samples, channels, plane, stride_n, stride_c, stride_p,
    WIDE: tl.constexpr, PLANAR: tl.constexpr, INDEX: tl.constexpr, HARDWARE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    sample, quad, at, mask, channel = locate(
        channels, plane, stride_n, stride_c, stride_p, samples, PLANAR, INDEX, BLOCK_R, BLOCK_Q
    )
    value = read_image(images, at, mask, WIDE)
    noise = (std * noise_of(seed, sample_ids, sample, samples, draw, quad, True, HARDWARE)).to(WIDE)
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
    WIDE: tl.constexpr, PLANAR: tl.constexpr, INDEX: tl.constexpr, HARDWARE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    sample, quad, at, mask, channel = locate(
        channels, plane, stride_n, stride_c, stride_p, samples, PLANAR, INDEX, BLOCK_R, BLOCK_Q
    )
    value = read_image(images, at, mask, WIDE)
    value += (std * noise_of(seed, sample_ids, sample, samples, draw, quad, True, HARDWARE)).to(WIDE)
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
