"""The batches of an epoch: their order, this rank's share, and the noise of each sample."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from robustfast import ranks
from robustfast.functional import noisy_pair
from robustfast.streams import generator, stream
from robustfast.training.config import Config
from robustfast.training.setup import Setup


class Part(NamedTuple):
    """Images, of all ranks, that go through the model at once: a step's, or a part of them with ``accumulate``."""

    positions: Tensor  # in the training images
    share: float  # of the step's images
    last: bool  # of the step


class Batch(NamedTuple):
    """The clean and the noisy view (N, C, H, W) of the same samples, normalised, and their labels (N,)."""

    clean: Tensor
    noisy: Tensor
    target: Tensor


def batches(setup: Setup, epoch: int) -> Iterator[tuple[Part, Batch]]:
    """This rank's share of the training images in the epoch's order; the noise is draw ``epoch`` of each sample."""
    config = setup.config
    order = torch.randperm(len(setup.train_ids), generator=generator(config.seed, "order", epoch)).to(setup.device)
    parts = [part for step in order.split(config.batch_size) for part in _parts(step, config.accumulate)]
    shares = [ranks.share(part.positions) for part in parts]
    settings = {**setup.normalization, "seed": stream(config.seed, "noise"), "draw": epoch, "backend": config.backend}
    sigma = draw_sigmas(config, len(order), epoch, setup.device)
    for part, mine, views in zip(parts, shares, setup.train.augmented(shares, config, epoch), strict=True):
        scale = sigma[mine] if isinstance(sigma, Tensor) else sigma
        pairs = [noisy_pair(pixels, scale, **settings, sample_ids=setup.train_ids[mine]) for pixels in views]
        yield part, Batch(pairs[0][0], pairs[-1][1], setup.train.labels[mine])


def _parts(step: Tensor, accumulate: int) -> list[Part]:
    parts = [index for index in step.tensor_split(accumulate) if len(index)]
    return [Part(index, len(index) / len(step), index is parts[-1]) for index in parts]


def draw_sigmas(config: Config, count: int, epoch: int, device: torch.device) -> Tensor | float:
    """The noise of an epoch: one standard deviation for all, or where ``sigma_spread`` wants it one each, (count,)."""
    if not config.sigma_spread:
        return config.sigma
    even = torch.rand(count, generator=generator(config.seed, "sigma", epoch)).to(device)
    return config.sigma * (1 + config.sigma_spread * (2 * even - 1))
