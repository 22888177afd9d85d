"""Perturbed images: the same for every model, whatever the batch, the device or the order.

Each function below takes images (N, C, H, W) in [0, 1], float32 or float64, and returns new ones in [0, 1]; what is
random in it comes from the package's Philox words of (seed, sample id, draw). Severities 1 to 5 follow CIFAR-10-C
(Hendrycks and Dietterich 2019) where it has the perturbation.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from robustfast import reference
from robustfast.evaluation.models import checked_images
from robustfast.extras import needed
from robustfast.functional import gaussian_noise, uniform_noise
from robustfast.noise import check_draw
from robustfast.streams import stream


class Key(NamedTuple):
    """What random numbers depend on: an int seed, sample ids int64 (N,), and the draw of all or, (N,), of each."""

    seed: int
    sample_ids: Tensor
    draw: int | Tensor

    def of(self, purpose: str) -> Key:
        """Other numbers, for a second purpose on the same images."""
        return self._replace(seed=stream(self.seed, purpose))

    def words(self, count: int) -> Tensor:
        """int64 (N, count), uniform on 0..2^32-1."""
        seed = torch.full((), self.seed, dtype=torch.int64, device=self.sample_ids.device)
        return reference.philox_words(seed, self.sample_ids, self.draw, -(-count // 4)).flatten(1)[:, :count]

    def uniform(self, like: Tensor) -> Tensor:
        """Uniform on (0, 1), one per element of ``like`` (N, ...), float32 or float64."""
        noise = uniform_noise(torch.zeros_like(like), 1.0, clip=None, **self._asdict())
        return (noise + 1) / 2


def gaussian(images: Tensor, key: Key, *, std: float) -> Tensor:
    """clip(x + std * eps, 0, 1), eps ~ N(0, 1): :func:`robustfast.functional.gaussian_noise` with the same key."""
    return gaussian_noise(images, std, **key._asdict())


def uniform(images: Tensor, key: Key, *, epsilon: float) -> Tensor:
    """clip(x + u, 0, 1), u uniform on [-epsilon, epsilon]."""
    return uniform_noise(images, epsilon, **key._asdict())


def salt_and_pepper(images: Tensor, key: Key, *, amount: float) -> Tensor:
    """A share ``amount`` of the values becomes 0 or 1, each as often."""
    _within("amount", amount, 0, 1)
    u = key.of("salt-and-pepper").uniform(images)
    return images.masked_fill(u < amount / 2, 0).masked_fill(u > 1 - amount / 2, 1)


def poisson(images: Tensor, key: Key, *, photons: float) -> Tensor:
    """clip(Poisson(photons * x) / photons, 0, 1): fewer photons, more noise; by inversion, so one word a value."""
    _within("photons", photons, 1, 1e6)
    rate, u = (part.double() for part in (photons * images, key.of("poisson").uniform(images)))
    most = math.ceil(photons + 12 * math.sqrt(photons) + 30)
    cdf = _poisson_cdf(rate, most)
    low, high = torch.full_like(rate, -1, dtype=torch.int64), torch.full_like(rate, most, dtype=torch.int64)
    for _ in range((most + 1).bit_length()):  # low < the count <= high
        middle = (low + high) >> 1
        enough = (middle >= 0) & (cdf(middle.clamp(min=0)) >= u)
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return (high.double() / photons).clamp(max=1).to(images.dtype)


def _poisson_cdf(rate: Tensor, most: int) -> Callable[[Tensor], Tensor]:
    """count -> P(Poisson(rate) <= count), by a table where the rates are few, as those of 8-bit images are."""
    rates, which = rate.unique(return_inverse=True)
    if len(rates) > 1024:
        return lambda count: torch.special.gammaincc(count.double() + 1, rate)
    counts = torch.arange(1.0, most + 2, dtype=torch.float64, device=rate.device)
    table = torch.special.gammaincc(counts.expand(len(rates), -1), rates.unsqueeze(1).expand(-1, most + 1))
    return lambda count: table[which, count]


def requantised(images: Tensor, key: Key, *, std: float) -> Tensor:
    """Gaussian noise, then rounded to the 256 levels of an 8-bit file."""
    return (gaussian(images, key, std=std) * 255).round() / 255


def occlusion(images: Tensor, key: Key, *, patches: int, size: int, fill: float = 0.0) -> Tensor:
    """``patches`` squares of ``size`` pixels, each anywhere within the image, are painted ``fill``."""
    n, _, height, width = images.shape
    for name, value in (("patches", patches), ("size", size)):
        if not isinstance(value, int) or value < 0:
            raise ValueError(f"{name}: expected a whole number of at least 0, got {value!r}")
    _within("fill", fill, 0, 1)
    if size > min(height, width):
        raise ValueError(f"size: expected a patch of at most {min(height, width)} pixels, the images' side, got {size}")
    words = key.of("occlusion").words(2 * patches).view(n, patches, 2)
    top = (words[..., 0] * (height - size + 1)) >> 32
    left = (words[..., 1] * (width - size + 1)) >> 32
    rows = _spanned(top, size, height).unsqueeze(3)
    columns = _spanned(left, size, width).unsqueeze(2)
    covered = (rows & columns).any(1) if patches else rows.new_zeros(n, height, width)
    return images.masked_fill(covered.unsqueeze(1), fill)


def _spanned(start: Tensor, size: int, length: int) -> Tensor:
    """bool (N, patches, length): start <= position < start + size."""
    position = torch.arange(length, device=start.device)
    return (position >= start.unsqueeze(-1)) & (position < start.unsqueeze(-1) + size)


def combined(images: Tensor, key: Key, *, std: float, patches: int, size: int, fill: float = 0.0) -> Tensor:
    """Gaussian noise, then patches."""
    return occlusion(gaussian(images, key, std=std), key, patches=patches, size=size, fill=fill)


def down_up(images: Tensor, key: Key, *, factor: float) -> Tensor:
    """Bilinear, without antialiasing, to ``factor`` of the size, rounded, and back."""
    if not 0 < factor <= 1:
        raise ValueError(f"factor: expected 0 < factor <= 1, got {factor!r}")
    small = tuple(max(1, round(factor * side)) for side in images.shape[2:])
    if not len(images):
        return images.clone()
    down = F.interpolate(images, small, mode="bilinear", align_corners=False)
    return F.interpolate(down, images.shape[2:], mode="bilinear", align_corners=False)


def gaussian_blur(images: Tensor, key: Key, *, sigma: float) -> Tensor:
    """Convolution with a Gaussian of ``sigma`` pixels, cut at 4 sigma; the border's pixels go on outside."""
    _within("sigma", sigma, 0, 1000)
    radius = math.ceil(4 * sigma)
    offset = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    weight = torch.exp(-0.5 * (offset / max(sigma, 1e-9)) ** 2)
    weight = weight / weight.sum()
    return _along(_along(images, weight, 2), weight, 3).clamp(0, 1)


def _along(images: Tensor, weight: Tensor, dim: int) -> Tensor:
    """sum_j weight_j * images shifted by j along one dimension, the border repeated."""
    length, radius = images.shape[dim], len(weight) // 2
    position = torch.arange(length, device=images.device)
    total = torch.zeros_like(images)
    for j, share in enumerate(weight, -radius):
        total += share * images.index_select(dim, (position + j).clamp(0, length - 1))
    return total


def motion_blur(images: Tensor, key: Key, *, length: float) -> Tensor:
    """The mean along a line of ``length`` pixels whose angle is uniform on -45 to 45 degrees, one an image."""
    _within("length", length, 0, 1000)
    n, _, height, width = images.shape
    if not n:
        return images.clone()
    turn = key.of("motion-blur").words(1)[:, 0].to(images.dtype) * 2.0**-32 - 0.5
    angle = (turn * math.pi / 2).view(-1, 1, 1)
    row, column = (torch.arange(side, device=images.device, dtype=images.dtype) for side in (height, width))
    offsets = torch.linspace(-length / 2, length / 2, 2 * math.ceil(length) + 1).tolist()
    total = torch.zeros_like(images)
    for offset in offsets:
        y, x = row.view(-1, 1) + offset * angle.sin(), column + offset * angle.cos()
        scaled = (x * 2 / max(width - 1, 1) - 1, y * 2 / max(height - 1, 1) - 1)  # -1 to 1 between the outer pixels
        grid = torch.stack(torch.broadcast_tensors(*scaled), -1)
        total += F.grid_sample(images, grid, padding_mode="border", align_corners=True)
    return (total / len(offsets)).clamp(0, 1)


def brightness(images: Tensor, key: Key, *, shift: float) -> Tensor:
    """clip(x + shift, 0, 1)."""
    _within("shift", shift, -1, 1)
    return (images + shift).clamp(0, 1)


def contrast(images: Tensor, key: Key, *, factor: float) -> Tensor:
    """clip(m + factor * (x - m), 0, 1), m the mean of each channel of each image."""
    _within("factor", factor, 0, 100)
    mean = images.double().mean((2, 3), keepdim=True).to(images.dtype)
    return (mean + factor * (images - mean)).clamp(0, 1)


def jpeg(images: Tensor, key: Key, *, quality: int) -> Tensor:
    """Written as JPEG by Pillow and read again: grey or RGB, in 8 bits."""
    with needed("evaluate"):
        from PIL import Image
    if not isinstance(quality, int) or not 1 <= quality <= 100:
        raise ValueError(f"quality: expected a whole number from 1 to 100, got {quality!r}")
    if images.shape[1] not in (1, 3):
        raise ValueError(f"images: expected 1 or 3 channels for JPEG, got {images.shape[1]}")
    pixels = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    result = np.empty_like(pixels)
    for source, target in zip(pixels, result, strict=True):
        file = io.BytesIO()
        Image.fromarray(source if source.shape[2] == 3 else source[:, :, 0]).save(file, "jpeg", quality=quality)
        target[:] = np.asarray(Image.open(file)).reshape(target.shape)
    return torch.from_numpy(result).to(images.device, images.dtype).permute(0, 3, 1, 2).contiguous() / 255


def _within(name: str, value: float, low: float, high: float) -> None:
    if not (isinstance(value, (int, float)) and low <= value <= high):
        raise ValueError(f"{name}: expected a number from {low:g} to {high:g}, got {value!r}")


@dataclass(frozen=True)
class Perturbation:
    """A function of this module, and the parameters that severities 1 to 5 and the paper's authors give it."""

    apply: Callable[..., Tensor]
    severities: Callable[[int, int], dict[str, Any]]  # of (severity, shorter side of the images)
    authors: dict[str, Any] | None = None


def _steps(name: str, *values: float) -> Callable[[int, int], dict[str, Any]]:
    return lambda severity, side: {name: values[severity - 1]}


def _patches(severity: int, side: int) -> dict[str, Any]:
    return {"patches": severity, "size": max(1, side // 4)}


_GAUSSIAN = _steps("std", 0.04, 0.06, 0.08, 0.09, 0.10)
_TABLE = {
    "gaussian": Perturbation(gaussian, _GAUSSIAN, {"std": 50 / 255}),
    "uniform": Perturbation(uniform, _steps("epsilon", 0.07, 0.10, 0.14, 0.16, 0.17), {"epsilon": 50 / 255}),
    "occlusion": Perturbation(occlusion, _patches, {"patches": 20, "size": 70}),
    "down-up": Perturbation(down_up, _steps("factor", 0.75, 0.6, 0.5, 0.4, 0.3), {"factor": 1 / 3}),
    "combined": Perturbation(
        combined,
        lambda severity, side: {**_GAUSSIAN(severity, side), **_patches(severity, side)},
        {"std": 40 / 255, "patches": 20, "size": 70},
    ),
    "salt-and-pepper": Perturbation(salt_and_pepper, _steps("amount", 0.01, 0.02, 0.03, 0.05, 0.07)),
    "poisson": Perturbation(poisson, _steps("photons", 500, 250, 100, 75, 50)),
    "gaussian-blur": Perturbation(gaussian_blur, _steps("sigma", 0.4, 0.6, 0.7, 0.8, 1.0)),
    "motion-blur": Perturbation(motion_blur, _steps("length", 1.5, 2, 3, 4, 5)),
    "brightness": Perturbation(brightness, _steps("shift", 0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": Perturbation(contrast, _steps("factor", 0.75, 0.5, 0.4, 0.3, 0.15)),
    "jpeg": Perturbation(jpeg, _steps("quality", 80, 65, 58, 50, 40)),
    "requantised": Perturbation(requantised, _GAUSSIAN),
}
PERTURBATIONS = tuple(_TABLE)
AUTHORS = {name: entry.authors for name, entry in _TABLE.items() if entry.authors is not None}


def perturb(
    images: Tensor,
    name: str,
    severity: int | str | None = None,
    *,
    seed: int = 0,
    sample_ids: Tensor | None = None,
    draw: int | Tensor = 0,
    **parameters: Any,
) -> Tensor:
    """The images, perturbed; the given ones are left as they are.

    Args:
        images: (N, C, H, W), floating in [0, 1].
        name: one of :data:`PERTURBATIONS`; the functions of this module of these names say what they do.
        severity: 1 to 5; "authors" for the parameters of the paper's authors; None where ``parameters`` has all.
        seed, sample_ids, draw: what the random numbers of an image depend on, as in
            :func:`robustfast.functional.gaussian_noise`; ids default to 0..N-1, and draw may be one for each image.
        parameters: those of the perturbation's function; they come before those of the severity.

    Returns:
        (N, C, H, W) in the images' dtype, in [0, 1].

    Raises:
        TypeError, ValueError: an argument is of the wrong dtype, shape or range, a parameter is missing or unknown, or
            a patch is larger than the images.
    """
    ids = checked_images(images, sample_ids)
    settings = parameters_of(name, severity, min(images.shape[2:]), parameters)
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected an int, 0 <= seed < 2**63, got {seed!r}")
    check_draw(draw, images)
    wide = images.to(torch.promote_types(images.dtype, torch.float32))
    return _TABLE[name].apply(wide, Key(seed, ids, draw), **settings).to(images.dtype)


def parameters_of(name: str, severity: int | str | None, side: int, changes: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a perturbation of images with this shorter side: those of the severity, then ``changes``."""
    if name not in _TABLE:
        raise ValueError(f"name: expected one of {', '.join(PERTURBATIONS)}, got {name!r}")
    perturbation = _TABLE[name]
    settings: dict[str, Any] = {}
    if severity == "authors":
        if perturbation.authors is None:
            raise ValueError(f"severity: the authors have no {name}; expected 1 to 5")
        settings = perturbation.authors
    elif severity in (1, 2, 3, 4, 5):
        settings = perturbation.severities(int(severity), side)
    elif severity is not None:
        raise ValueError(f"severity: expected 1 to 5, 'authors' or None, got {severity!r}")
    settings = settings | changes
    expected = perturbation.apply.__kwdefaults__ or {}
    known = [*perturbation.severities(1, side), *(name for name in expected)]
    if unknown := settings.keys() - set(known):
        raise TypeError(f"{name}: has {', '.join(known)}, got {', '.join(sorted(unknown))}")
    if missing := [name for name in known if name not in settings and name not in expected]:
        raise ValueError(f"{name}: expected a severity, or {', '.join(missing)}")
    return settings
