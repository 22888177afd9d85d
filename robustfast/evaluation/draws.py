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
    """Logits (draws, images, K): consecutive draws from ``first`` on, of the images from ``start`` on."""

    start: int
    first: int
    logits: Tensor


@torch.no_grad()
def noisy_logits(
    model: Model,
    images: Tensor,
    ids: Tensor,
    labels: Tensor | None,
    noisy: Callable[[Tensor, Tensor, int], Tensor],
    draws: range,
    batch_size: int,
) -> Iterator[Block]:
    """Logits of every image's draws, where ``noisy(images, ids, draw)`` makes one draw of some of the images."""
    together = min(len(draws), batch_size)
    for start in range(0, len(images), max(1, batch_size // together)):
        part = slice(start, start + max(1, batch_size // together))
        for first in range(draws.start, draws.stop, together):
            block = range(first, min(first + together, draws.stop))
            copies = torch.cat([noisy(images[part], ids[part], draw) for draw in block])
            repeated = None if labels is None else labels[part].repeat(len(block))
            logits = logits_of(model, copies, repeated)
            yield Block(start, first, logits.view(len(block), -1, logits.shape[1]))


def noise_of(name: str, scale: float, seed: int, clip: tuple[float, float] | None) -> Callable[..., Tensor]:
    """``noisy`` of :func:`noisy_logits` for gaussian or uniform noise; ValueError for another name."""
    if name not in NOISES:
        raise ValueError(f"noise: expected one of {', '.join(NOISES)}, got {name!r}")
    add = NOISES[name]
    return lambda images, ids, draw: add(images, scale, seed=seed, sample_ids=ids, draw=draw, clip=clip)
