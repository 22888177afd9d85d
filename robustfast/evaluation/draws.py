"""Many noisy copies of each image through a model, in batches that mix images and draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from robustfast.evaluation.models import Model, logits_of
from robustfast.functional import gaussian_noise, uniform_noise

NOISES = {"gaussian": gaussian_noise, "uniform": uniform_noise}


class Block(NamedTuple):
    """Logits (B, K) of some noisy copies: draw ``draw`` of the image at ``place``, int64 (B,) each."""

    place: Tensor
    draw: Tensor
    logits: Tensor


@torch.no_grad()
def noisy_logits(
    model: Model,
    images: Tensor,
    ids: Tensor,
    labels: Tensor | None,
    noisy: Callable[[Tensor, Tensor, Tensor], Tensor],
    draws: range,
    batch_size: int,
) -> Iterator[Block]:
    """Logits of every draw of every image; ``noisy(images, ids, draws)`` makes one copy of each image, of its draw."""
    for part in torch.arange(len(images) * len(draws), device=images.device).split(batch_size):
        if len(part):
            place, draw = part // len(draws), draws.start + part % len(draws)
            copies = noisy(images[place], ids[place], draw)
            yield Block(place, draw, logits_of(model, copies, None if labels is None else labels[place]))


def noise_of(name: str, scale: float, seed: int, clip: tuple[float, float] | None) -> Callable[..., Tensor]:
    """``noisy`` of :func:`noisy_logits` for gaussian or uniform noise; ValueError for another name."""
    if name not in NOISES:
        raise ValueError(f"noise: expected one of {', '.join(NOISES)}, got {name!r}")
    add = NOISES[name]
    return lambda images, ids, draw: add(images, scale, seed=seed, sample_ids=ids, draw=draw, clip=clip)
