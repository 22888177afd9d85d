"""The arguments of the noise: checked, as in :mod:`robustfast.checks`, and brought into the form that the ops take."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from robustfast import checks
from robustfast.reference import is_static, readable

LARGEST_SCALE = 1e37  # all noise is finite in float32 up to it: no normal is beyond 5.77
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Noise(NamedTuple):
    """What all noise ops take, in their order. ``scales`` and ``draws``, where given, stand for ``scale`` and ``draw``.

    Tensors are on the input's device: ``scales`` float32 and ``draws`` int64, 0-d or (N,); ``seed`` int64, 0-d;
    ``sample_ids`` int64 (N,).
    """

    scale: float
    scales: Tensor | None
    seed: Tensor
    sample_ids: Tensor | None
    draw: int
    draws: Tensor | None
    low: float
    high: float

    def keywords(self) -> dict[str, Any]:
        """All but the scale, as :mod:`robustfast.reference` takes it."""
        draw = self.draw if self.draws is None else self.draws
        return {"seed": self.seed, "sample_ids": self.sample_ids, "draw": draw, "clip": (self.low, self.high)}

    def parted(self) -> tuple[tuple[Tensor | None, ...], tuple[float | int, ...]]:
        """Tensors and numbers, which :meth:`joined` puts together again."""
        return (self.scales, self.seed, self.sample_ids, self.draws), (self.scale, self.draw, self.low, self.high)

    @staticmethod
    def joined(tensors: Sequence[Tensor | None], numbers: Sequence[float | int]) -> Noise:
        (scales, seed, sample_ids, draws), (scale, draw, low, high) = tensors, numbers
        return Noise(scale, scales, seed, sample_ids, draw, draws, low, high)  # type: ignore[arg-type]


def check_noise(
    input: Tensor,
    name: str,
    scale: float | Tensor,
    seed: int | Tensor | None,
    sample_ids: Tensor | Sequence[int] | None,
    draw: int | Tensor,
    clip: tuple[float, float] | None,
    generator: torch.Generator | None,
) -> Noise:
    """``name`` is what the caller knows ``scale`` by."""
    if input.dim() < 1:
        raise ValueError("input: expected a batch, with samples along dimension 0, got a 0-d tensor")
    low, high = check_clip(clip)
    scale, scales = check_scale(name, scale, input)
    draw, draws = check_draw(draw, input)
    if sample_ids is not None:
        sample_ids = integers("sample_ids", sample_ids, input)
        checks.of_shape("sample_ids", sample_ids, (input.shape[0],), input)
        within("sample_ids", sample_ids, 0, 2**63 - 1)
    return Noise(scale, scales, check_seed(seed, generator, input.device), sample_ids, draw, draws, low, high)


def check_clip(clip: tuple[float, float] | None) -> tuple[float, float]:
    """Two numbers, infinite where there is no bound."""
    if clip is None:
        return -math.inf, math.inf
    try:
        low, high = map(float, clip)
    except (TypeError, ValueError, OverflowError):
        low, high = math.nan, math.nan
    if not low <= high:
        raise ValueError(f"clip: expected None or (low, high) with low <= high, got {clip!r}")
    return low, high


def check_scale(name: str, scale: float | Tensor, input: Tensor) -> tuple[float, Tensor | None]:
    if isinstance(scale, Tensor):
        checks.of_dtype(name, scale, checks.FLOATING)
        one_or_each(name, scale, input)
        within(name, scale, 0, LARGEST_SCALE)
        return 0.0, scale.float()
    if not isinstance(scale, (Real, torch.SymFloat)):
        raise TypeError(f"{name}: expected a number or a tensor, got {type(scale).__name__}")
    if not isinstance(scale, (int, float, torch.SymFloat)):
        scale = float(scale)  # numpy's, whose comparisons round
    if not 0 <= scale <= LARGEST_SCALE:
        raise ValueError(f"{name}: expected a number from 0 to {LARGEST_SCALE:g}, got {scale!r}")
    if is_static(scale):
        return float(scale), None
    # As a tensor a schedule's number stays a variable of the compiled graph; a product, since the compiler knows it.
    return 0.0, (torch.ones((), dtype=torch.float64, device=input.device) * scale).float()


def check_draw(draw: int | Tensor, input: Tensor) -> tuple[int, Tensor | None]:
    if isinstance(draw, (Integral, torch.SymInt)):
        if not 0 <= draw < 2**32:
            raise ValueError(f"draw: expected 0 <= draw < 2**32, got {draw!r}")
        return (draw if isinstance(draw, (int, torch.SymInt)) else int(draw)), None
    if not isinstance(draw, Tensor):
        raise ValueError(f"draw: expected an int, 0 <= draw < 2**32, or a tensor of them, got {draw!r}")
    draws = integers("draw", draw, input)
    one_or_each("draw", draws, input)
    within("draw", draws, 0, 2**32 - 1)
    return 0, draws


def check_seed(seed: int | Tensor | None, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """The seed as a 0-d int64 tensor on the device, drawn from the generator, or PyTorch's there, if it is None."""
    if generator is not None and (seed is not None or generator.device.type != device.type):
        given = f"one on {generator.device}" if seed is None else "both"
        raise ValueError(f"generator: expected a generator on {device}, in the place of a seed, got {given}")
    if seed is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device, generator=generator)
    if isinstance(seed, Tensor):
        checks.of_dtype("seed", seed, (torch.int64,))
        if seed.dim() != 0 or seed.device != device:
            raise ValueError(f"seed: expected a 0-d tensor on {device}, got {tuple(seed.shape)} on {seed.device}")
        within("seed", seed, 0, 2**63 - 1)
        return seed
    if not isinstance(seed, (Integral, torch.SymInt)) or not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected an int, 0 <= seed < 2**63, got {seed!r}")
    # A fill runs on the device: unlike torch.tensor it copies nothing to it, so it can stand in a CUDA graph.
    return torch.full((), seed, dtype=torch.int64, device=device)


def integers(name: str, values: Tensor | Sequence[int], input: Tensor) -> Tensor:
    """An int64 tensor; what is none yet is copied to the input's device."""
    if not isinstance(values, Tensor):
        try:
            values = torch.as_tensor(values, device=input.device)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"{name}: expected integers, got {type(values).__name__}") from None
    checks.of_dtype(name, values, INTEGERS)
    return values.long()


def one_or_each(name: str, values: Tensor, input: Tensor) -> None:
    if values.dim() != 0 and values.shape != input.shape[:1]:
        n = input.shape[0]
        raise ValueError(f"{name}: expected shape () or, a number for each sample, ({n},), got {tuple(values.shape)}")
    if values.device != input.device:
        raise ValueError(f"{name}: expected a tensor on {input.device}, got one on {values.device}")


def within(name: str, values: Tensor, low: float, high: float) -> None:
    """Look at a tensor's values where that costs nothing."""
    if readable(values) and not (right := (values >= low) & (values <= high)).all():
        raise ValueError(f"{name}: expected numbers from {low} to {high:g}, got {values.detach()[~right][0].item()}")


def check_channels(name: str, values: Tensor | Sequence[float], images: Tensor) -> Tensor:
    """One float32 per channel on the images' device; a sequence is copied there once and remembered."""
    if not isinstance(values, Tensor):
        try:
            numbers = tuple(float(value) for value in values)
        except (TypeError, ValueError):
            raise TypeError(
                f"{name}: expected a number for each of the {images.shape[1]} channels, got {values!r}"
            ) from None
        finite = torch.compiler.is_compiling() or all(map(math.isfinite, numbers))
        if not finite or (name == "pixel_std" and 0 in numbers):
            raise ValueError(f"{name}: expected finite numbers, of pixel_std other than 0, got {values!r}")
        values = _channels_on(numbers, images.device)
    checks.of_shape(name, values, (images.shape[1],), images)
    return values.float()


_channel_cache: dict[tuple[tuple[float, ...], torch.device], Tensor] = {}


def _channels_on(values: tuple[float, ...], device: torch.device) -> Tensor:
    if torch.compiler.is_compiling() or device.type == "cpu":
        return torch.tensor(values, device=device)
    if (values, device) not in _channel_cache:
        _channel_cache[values, device] = torch.tensor(values, device=device)
    return _channel_cache[values, device]


def check_no_gradient(name: str, noise: Noise, backend: str) -> None:
    if noise.scales is not None and noise.scales.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: {backend} gives no gradient to it: take backend='reference', or hand over {name}.detach()"
        )


def check_out(name: str, out: Tensor, like: Tensor, dtype: torch.dtype, noise: Noise, *others: Tensor) -> None:
    """``out`` can take a result that looks like the input ``like``, and shares no memory with it or the others."""
    checks.of_dtype(name, out, (dtype,))
    checks.of_shape(name, out, like.shape, like)
    tensors = (out, like) if noise.scales is None else (out, like, noise.scales)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError(f"{name}: functions with out= give no gradient, but a tensor requires one: detach it")
    if torch.compiler.is_compiling():
        return
    if any(size > 1 and stride == 0 for size, stride in zip(out.shape, out.stride(), strict=True)):
        raise ValueError(f"{name}: expected elements of their own, got strides {out.stride()}")
    begin, end = extent(out)
    if any(begin < other_end and other_begin < end for other_begin, other_end in map(extent, (like, *others))):
        raise ValueError(f"{name}: expected memory of its own, got that of another argument")


def extent(tensor: Tensor) -> tuple[int, int]:
    """First and last address of a tensor's memory."""
    steps = [(size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    elements = sum(steps) + 1 if tensor.numel() else 0
    return tensor.data_ptr(), tensor.data_ptr() + elements * tensor.element_size()


_warned: set[str] = set()


def warn_once(about: str, message: str) -> None:
    """A warning in the place of the caller of this package, once in a process."""
    if about not in _warned:
        _warned.add(about)
        depth, frame = 1, sys._getframe()
        while frame.f_back and frame.f_globals["__name__"].startswith("robustfast."):
            depth, frame = depth + 1, frame.f_back
        warnings.warn(message, stacklevel=depth)


def warn_of_scale(name: str, scale: float | Tensor, span: float) -> None:
    """Where values have a bounded range: noise larger than that is on another scale, mostly 0 to 255."""
    if not torch.compiler.is_compiling() and not isinstance(scale, Tensor) and span < scale < math.inf:
        message = f"{name} = {scale:g} is more than the range of {span:g} that values are clipped to"
        warn_once(name, f"{message}: is it meant for pixels from 0 to 255? Divide it by 255 then.")


def warn_of_images(images: Tensor) -> None:
    """Where a look at the first image costs next to nothing."""
    if "images" in _warned or not (images.is_floating_point() and images.numel() and readable(images)):
        return
    low, high = (bound.item() for bound in images.detach()[0].aminmax())
    if low < -0.01 or high > 1.01:
        message = f"images: expected floats from 0 to 1, got {low:g} to {high:g}"
        warn_once("images", f"{message}; noisy_pair normalises: hand it images before that, or uint8 ones.")
