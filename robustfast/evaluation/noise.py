"""Accuracy on images with Gaussian noise, the same noise for every classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from robustfast.functional import noisy_pair

BATCH = 1024


@torch.no_grad()
def accuracy(
    model: nn.Module,
    pixels: Tensor,
    labels: Tensor,
    sigma: float = 0.0,
    *,
    mean: Sequence[float],
    pixel_std: Sequence[float],
    seed: int = 0,
    draws: int = 1,
    backend: str = "auto",
) -> float:
    """The share of images that the model classifies rightly in evaluation mode, averaged over draws of the noise.

    Args:
        model: maps normalised images (N, C, H, W) to logits (N, K); its training mode is restored.
        pixels: (N, C, H, W), uint8 or floating in [0, 1]; image i is sample i of the noise, whatever the batch.
        labels: (N,) int64.
        sigma: standard deviation of the noise, for pixels in [0, 1]; noisy pixels are clipped to that. 0: clean images.
        mean, pixel_std: the channels' normalisation.
        seed, draws: the noise is draws 0..draws-1 of this seed: one direction per draw and image for all sigma.

    Returns:
        A fraction in 0..1.

    Raises:
        ValueError: there are no images, or an argument of the noise is out of range.
    """
    if len(labels) == 0:
        raise ValueError("labels: expected at least one image, got none")
    draws = draws if sigma > 0 else 1
    ids = torch.arange(len(labels), device=pixels.device)
    right = torch.zeros((), dtype=torch.int64, device=pixels.device)
    was_training = model.training
    model.eval()
    for draw in range(draws):
        for batch in ids.split(BATCH):
            _, noisy = noisy_pair(
                pixels[batch], sigma, mean=mean, pixel_std=pixel_std, seed=seed, sample_ids=batch, draw=draw,
                backend=backend,
            )  # fmt: skip
            right += (model(noisy).argmax(1) == labels[batch]).sum()
    model.train(was_training)
    return int(right) / (draws * len(labels))


def noise_curve(
    model: nn.Module, pixels: Tensor, labels: Tensor, sigmas: Sequence[float], **settings: Any
) -> list[dict[str, float]]:
    """``[{"sigma": ..., "accuracy": ...}, ...]``: clean first (sigma 0), then each of ``sigmas``.

    Arguments and errors are those of :func:`accuracy`.
    """
    return [
        {"sigma": sigma, "accuracy": accuracy(model, pixels, labels, sigma, **settings)} for sigma in (0.0, *sigmas)
    ]
