"""The noise: x + scale * noise, clipped, from Philox4x32-10 words of (seed, sample id, draw, position) alone.

A program takes quads, four consecutive elements of a sample in its logical order, which share one Philox call. Rows of
quads are samples, or planes of a sample where channels matter; a row's elements are ``stride_p`` apart in memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from robustfast.ops import DISTRIBUTIONS
from robustfast.triton_ops.device import processor
from robustfast.triton_ops.elements import narrow, scalar

# Roundings are those written here: with fused products at the compiler's discretion an element's bits would depend on
# the kernel's layout. So kernels take this option, and products that are fused say so.
ROUNDED = {"enable_fp_fusion": False}


@triton.jit
def minus_log(n):
    """-ln(n 2^-24) for whole n in [1, 2^24], relatively accurate near the end, error 3e-8: as csrc/common/normal.h."""
    scaled = n.to(tl.int32, bitcast=True) - 0x4B3504F3  # n 2^-24 = 2^exponent (1 + z), 1 + z from sqrt(1/2) on
    exponent = (scaled & -0x800000).to(tl.float32)
    z = ((scaled & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1
    p = tl.fma(z, 0.08979536592960358, -0.14426882565021515)
    p = tl.fma(tl.fma(p, z, 0.14883682131767273), z, -0.1655178815126419)
    p = tl.fma(tl.fma(p, z, 0.19963477551937103), z, -0.25002583861351013)
    p = tl.fma(tl.fma(p, z, 0.3333393335342407), z, -0.4999998211860657)
    return tl.fma(exponent, -8.262958467867065e-08, -tl.fma(p, z * z, z))


@triton.jit
def radius(n, scale, HARDWARE: tl.constexpr):
    """scale sqrt(-2 ln(n 2^-24)). NVIDIA's logarithm has an absolute error: near 1 a series replaces it."""
    if HARDWARE:
        u = n * 5.9604644775390625e-08
        t = 1 - u
        series = t * tl.fma(t, tl.fma(t, -0.480898347, -0.721347520), -1.44269504)
        log2 = tl.where(t < 0.03125, series, nvidia("lg2.approx.ftz.f32 $0, $1;", u))
        return nvidia("neg.f32 $0, $1; sqrt.approx.ftz.f32 $0, $0;", log2) * (1.17741002 * scale)
    return tl.sqrt(minus_log(n)) * (1.41421356 * scale)


@triton.jit
def cos_sin(r, HARDWARE: tl.constexpr):
    """cos(pi r) and sin(pi r), |r| <= 1/2; errors 6e-8 and 8e-9, as csrc/common/normal.h, or NVIDIA's 2^-21."""
    if HARDWARE:
        angle = r * 3.14159265
        return nvidia("cos.approx.ftz.f32 $0, $1;", angle), nvidia("sin.approx.ftz.f32 $0, $1;", angle)
    z = r * r
    c = tl.fma(z, 0.21883049607276917, -1.331491470336914)
    c = tl.fma(tl.fma(tl.fma(c, z, 4.058358669281006), z, -4.93479061126709), z, 0.9999999403953552)
    s = tl.fma(z, 0.07643315196037292, -0.5976252555847168)
    s = tl.fma(tl.fma(tl.fma(s, z, 2.549957752227783), z, -5.1677021980285645), z, 3.141592502593994)
    return c, s * r


@triton.jit
def interleave4(a, b, c, d):
    """(..., Q) four times -> (..., 4 Q), the four of a quad side by side."""
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def box_muller(word_u, word_v, scale, HARDWARE: tl.constexpr):
    """scale sqrt(-2 ln u) times cos(2 pi v) and sin(2 pi v), u = ((word_u >> 8) + 1) 2^-24, v = (word_v >> 8) 2^-24.

    2 v = half + 1/2 - r, half = 0 or 1, |r| <= 1/2; half a turn changes both signs, a quarter makes cosines of sines.
    """
    length = radius(((word_u >> 8) + 1).to(tl.int32).to(tl.float32), scale, HARDWARE)
    length = (length.to(tl.uint32, bitcast=True) ^ (word_v & 0x80000000)).to(tl.float32, bitcast=True)
    r = 1.5 - (((word_v >> 8) & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    cos, sin = cos_sin(r, HARDWARE)
    return length * sin, length * cos


@triton.jit
def nvidia(instructions: tl.constexpr, x):
    return tl.inline_asm_elementwise(instructions, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def uniform(word):
    """2 ((w >> 8) + 0.5) 2^-24 - 1."""
    return ((word >> 8).to(tl.int32).to(tl.float32) - 8388607.5) * 1.1920928955078125e-07


@triton.jit
def wide_product(word, MULTIPLIER: tl.constexpr, HARDWARE: tl.constexpr):
    """The 64 bits of a product: one instruction, of which LLVM makes two, and tl.umulhi too."""
    if HARDWARE:
        return tl.inline_asm_elementwise(
            "mul.wide.u32 $0, $1, $2;", "=l,r,r", [word, MULTIPLIER], dtype=tl.uint64, is_pure=True, pack=1
        )
    return word.to(tl.uint64) * MULTIPLIER


@triton.jit
def words(seed, sample_id, draw, quad, HARDWARE: tl.constexpr):
    """The four words of Philox4x32-10, uint32, of key seed and counters (quad, sample low, sample high, draw)."""
    seed = tl.load(seed)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c0, c1, c2 = quad.to(tl.uint32), sample_id.to(tl.uint32), (sample_id >> 32).to(tl.uint32)
    c3 = tl.cast(draw, tl.uint32)
    for _ in tl.static_range(10):
        first, second = wide_product(c0, 0xD2511F53, HARDWARE), wide_product(c2, 0xCD9E8D57, HARDWARE)
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
        far = self.channels * self.plane > 2**31 - 8 * TILE  # with what a tile has beyond the end
        return {"PLANAR": self.planar, "INDEX": tl.int64 if far else tl.int32, "HARDWARE": self.hardware,
                "BLOCK_R": self.block_r, "BLOCK_Q": self.block_q, "num_warps": 4} | ROUNDED  # fmt: skip


TILE = 512  # quads of a program: 16 elements a thread
GAUSSIAN = tl.constexpr(DISTRIBUTIONS.index("gaussian"))
UNIFORM = tl.constexpr(DISTRIBUTIONS.index("uniform"))
# Numbers that change from call to call, and the places of small tensors: no kernel is compiled anew for them.
UNSPECIALIZED = {
    "do_not_specialize": ["scale_step", "id_step", "draw", "draw_step", "samples", "sample_id", "quads"],
    "do_not_specialize_on_alignment": ["scales", "seed", "sample_ids", "draws", "mean", "pixel_std"],
}


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


def step(values: Tensor | None) -> int:
    """Between the numbers of two samples, in elements; 0 where there is one for all."""
    return 0 if values is None or values.dim() == 0 else values.stride(0)


def noise_arguments(scale, scales, seed, sample_ids, draw, draws, low, high) -> tuple:
    """The arguments of :func:`noise_of`, from those of the ops, and the bounds."""
    return (scale, scales, step(scales), seed, sample_ids, step(sample_ids), draw, draws, step(draws), low, high)


def add_noise_out(input: Tensor, distribution: int, *rest) -> None:
    *noise, out = rest
    source = dense(input)
    _add_noise(source, None, distribution, noise, direct := directly(out, source))
    if direct is not out:
        out.copy_(direct)


def directly(out: Tensor, source: Tensor) -> Tensor:
    """``out`` if its elements lie as those of ``source``, else memory where they do."""
    return out if out.stride() == source.stride() else torch.empty_like(source, dtype=out.dtype)


def add_noise(input: Tensor, distribution: int, *noise) -> Tensor:
    source = dense(input)
    return restored(_add_noise(source, None, distribution, noise, torch.empty_like(source)), input)


def add_noise_backward(grad: Tensor, input: Tensor, distribution: int, *noise) -> Tensor:
    source = dense(input)
    grad = laid_out(grad, source)
    return restored(_add_noise(source, grad, distribution, noise, torch.empty_like(source)), input)


def _add_noise(source: Tensor, grad: Tensor | None, distribution: int, noise: Sequence, out: Tensor) -> Tensor:
    """clip(x + scale noise), or where a gradient is given, this where clip did not act."""
    cut = quads(source, with_channels=False)
    if source.numel() > 0:
        add_noise_kernel[cut.grid](
            out, source, grad, *noise_arguments(*noise), *cut.arguments, WIDE=wide_dtype(source.dtype),
            DISTRIBUTION=distribution, **cut.constants,
        )  # fmt: skip
    return out


def noisy_pair_out(images: Tensor, mean: Tensor, pixel_std: Tensor, *rest) -> None:
    *noise, clean, noisy = rest
    source = dense(images)
    views = [directly(view, source) for view in (clean, noisy)]
    _noisy_pair(source, mean, pixel_std, noise, *views)
    for view, direct in zip((clean, noisy), views, strict=True):
        if direct is not view:
            view.copy_(direct)


def noisy_pair(images: Tensor, mean: Tensor, pixel_std: Tensor, *rest) -> tuple[Tensor, Tensor]:
    *noise, dtype = rest
    source = dense(images)
    clean, noisy = torch.empty_like(source, dtype=dtype), torch.empty_like(source, dtype=dtype)
    _noisy_pair(source, mean, pixel_std, noise, clean, noisy)
    return restored(clean, images), restored(noisy, images)


def _noisy_pair(
    source: Tensor, mean: Tensor, pixel_std: Tensor, noise: Sequence, clean: Tensor, noisy: Tensor
) -> None:  # fmt: skip
    cut = quads(source, with_channels=True)
    if source.numel() > 0:
        noisy_pair_kernel[cut.grid](
            clean, noisy, source, mean.contiguous(), pixel_std.contiguous(), *noise_arguments(*noise),
            *cut.arguments, WIDE=wide_dtype(clean.dtype), **cut.constants,
        )  # fmt: skip


def noisy_pair_backward(grad_clean: Tensor, grad_noisy: Tensor, images: Tensor, pixel_std: Tensor, *noise) -> Tensor:
    source = dense(images)
    out = torch.empty_like(source)
    cut = quads(source, with_channels=True)
    if images.numel() > 0:
        noisy_pair_backward_kernel[cut.grid](
            out, laid_out(grad_clean, source), laid_out(grad_noisy, source), source, pixel_std.contiguous(),
            *noise_arguments(*noise), *cut.arguments, WIDE=wide_dtype(grad_clean.dtype), **cut.constants,
        )  # fmt: skip
    return restored(out, images)


def philox_words(seed: Tensor, sample_id: int, draw: int, quads: int) -> Tensor:
    out = seed.new_empty((quads, 4))
    if quads > 0:
        words_kernel[(triton.cdiv(quads, TILE),)](
            out, seed, sample_id, draw, quads, HARDWARE=has_nvidia_instructions(seed.device), BLOCK=TILE, **ROUNDED
        )  # fmt: skip
    return out


@triton.jit
def locate(
    channels, plane, stride_n, stride_c, stride_p, samples, PLANAR: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
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
def of_sample(value, values, step, sample, samples):
    """A sample's number: its own of ``values``, or the same for all."""
    if values is not None:
        value = tl.load(values + sample.to(tl.int64) * step, mask=sample < samples, other=0)
    return value


@triton.jit
def noise_of(
    scale, scales, scale_step, seed, sample_ids, id_step, draw, draws, draw_step, sample, samples, quad,
    DISTRIBUTION: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """scale times four float32 noise values for each quad, side by side."""
    sample_id = of_sample(sample.to(tl.int64), sample_ids, id_step, sample, samples)
    scale = of_sample(scale, scales, scale_step, sample, samples)
    w0, w1, w2, w3 = words(seed, sample_id, of_sample(draw, draws, draw_step, sample, samples), quad, HARDWARE)
    if DISTRIBUTION == GAUSSIAN:
        n0, n1 = box_muller(w0, w1, scale, HARDWARE)
        n2, n3 = box_muller(w2, w3, scale, HARDWARE)
    else:
        tl.static_assert(DISTRIBUTION == UNIFORM, "there is no such distribution")
        n0, n1, n2, n3 = scale * uniform(w0), scale * uniform(w1), scale * uniform(w2), scale * uniform(w3)
    return interleave4(n0, n1, n2, n3)


@triton.jit
def clip(x, low, high):
    """nan passes."""
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(**UNSPECIALIZED)
def add_noise_kernel(
    out, x, grad, scale, scales, scale_step: tl.int64, seed, sample_ids, id_step: tl.int64, draw: tl.int64, draws,
    draw_step: tl.int64, low: tl.float64, high: tl.float64,
    samples, channels, plane, stride_n, stride_c, stride_p,
    WIDE: tl.constexpr, DISTRIBUTION: tl.constexpr, PLANAR: tl.constexpr, INDEX: tl.constexpr,
    HARDWARE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    sample, quad, at, mask, _ = locate(
        channels, plane, stride_n, stride_c, stride_p, samples, PLANAR, INDEX, BLOCK_R, BLOCK_Q
    )
    value = tl.load(x + at, mask=mask, other=0).to(WIDE)
    value += noise_of(
        scale, scales, scale_step, seed, sample_ids, id_step, draw, draws, draw_step, sample, samples, quad,
        DISTRIBUTION, HARDWARE,
    ).to(WIDE)  # fmt: skip
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


@triton.jit(**UNSPECIALIZED)
def noisy_pair_kernel(
    clean, noisy, images, mean, pixel_std, scale, scales, scale_step: tl.int64, seed, sample_ids, id_step: tl.int64,
    draw: tl.int64, draws, draw_step: tl.int64, low: tl.float64, high: tl.float64,
    samples, channels, plane, stride_n, stride_c, stride_p,
    WIDE: tl.constexpr, PLANAR: tl.constexpr, INDEX: tl.constexpr, HARDWARE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    sample, quad, at, mask, channel = locate(
        channels, plane, stride_n, stride_c, stride_p, samples, PLANAR, INDEX, BLOCK_R, BLOCK_Q
    )
    value = read_image(images, at, mask, WIDE)
    noise = noise_of(
        scale, scales, scale_step, seed, sample_ids, id_step, draw, draws, draw_step, sample, samples, quad, GAUSSIAN,
        HARDWARE,
    ).to(WIDE)  # fmt: skip
    channel = tl.minimum(channel, channels - 1)
    inverse = 1 / tl.load(pixel_std + channel).to(WIDE)
    shift = -tl.load(mean + channel).to(WIDE) * inverse
    tl.store(clean + at, tl.fma(value, inverse, shift), mask=mask)
    value = clip(value + noise, scalar(low, WIDE), scalar(high, WIDE))
    tl.store(noisy + at, tl.fma(value, inverse, shift), mask=mask)


@triton.jit(**UNSPECIALIZED)
def noisy_pair_backward_kernel(
    grad_images, grad_clean, grad_noisy, images, pixel_std, scale, scales, scale_step: tl.int64, seed, sample_ids,
    id_step: tl.int64, draw: tl.int64, draws, draw_step: tl.int64, low: tl.float64, high: tl.float64,
    samples, channels, plane, stride_n, stride_c, stride_p,
    WIDE: tl.constexpr, PLANAR: tl.constexpr, INDEX: tl.constexpr, HARDWARE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    sample, quad, at, mask, channel = locate(
        channels, plane, stride_n, stride_c, stride_p, samples, PLANAR, INDEX, BLOCK_R, BLOCK_Q
    )
    value = read_image(images, at, mask, WIDE)
    value += noise_of(
        scale, scales, scale_step, seed, sample_ids, id_step, draw, draws, draw_step, sample, samples, quad, GAUSSIAN,
        HARDWARE,
    ).to(WIDE)  # fmt: skip
    passes = (value >= scalar(low, WIDE)) & (value <= scalar(high, WIDE))
    grad = tl.load(grad_clean + at, mask=mask, other=0).to(WIDE)
    grad += tl.where(passes, tl.load(grad_noisy + at, mask=mask, other=0).to(WIDE), 0.0)
    grad /= tl.load(pixel_std + tl.minimum(channel, channels - 1)).to(WIDE)
    tl.store(grad_images + at, narrow(grad, grad_images.dtype.element_ty), mask=mask)


@triton.jit(**UNSPECIALIZED)
def words_kernel(
    out, seed, sample_id: tl.int64, draw: tl.int64, quads, HARDWARE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    quad = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    w0, w1, w2, w3 = words(seed, tl.cast(sample_id, tl.int64), draw, quad, HARDWARE)
    e = tl.program_id(0).to(tl.int64) * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    tl.store(out + e, interleave4(w0, w1, w2, w3).to(tl.int64), mask=e < quads * 4)
