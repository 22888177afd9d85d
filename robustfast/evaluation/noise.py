"""Accuracy on images with Gaussian noise, the same noise for every classifier."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from robustfast.evaluation.models import evaluating
from robustfast.functional import noisy_pair

BATCH = 1024


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
    ids = torch.arange(len(labels), device=pixels.device)
    batches = ((pixels[batch], labels[batch], batch) for batch in ids.split(BATCH))
    (right,) = count_right(
        model, batches, [sigma], device=pixels.device, draws=draws, mean=mean, pixel_std=pixel_std, seed=seed,
        backend=backend,
    )  # fmt: skip
    return right_share(right, sigma, len(labels), draws)


def noise_curve(
    model: nn.Module, pixels: Tensor, labels: Tensor, sigmas: Sequence[float], **settings: Any
) -> list[dict[str, float]]:
    """``[{"sigma": ..., "accuracy": ...}, ...]``: clean first (sigma 0), then each of ``sigmas``.

    Arguments and errors are those of :func:`accuracy`.
    """
    return [
        {"sigma": sigma, "accuracy": accuracy(model, pixels, labels, sigma, **settings)} for sigma in (0.0, *sigmas)
    ]


@torch.no_grad()
def count_right(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    sigmas: Sequence[float],
    *,
    device: torch.device,
    draws: int = 1,
    **settings: Any,
) -> Tensor:
    """How many images the model classifies rightly under each sigma, int64 (S,), draws added up; see :func:`accuracy`.

    Args:
        batches: (pixels, labels, sample ids), read once.
        device: of batches, model and result.
        draws: of the noise; one where sigma is 0.
        settings: those of :func:`robustfast.functional.noisy_pair`.
    """
    right = torch.zeros(len(sigmas), dtype=torch.int64, device=device)
    with evaluating(model):
        for pixels, labels, ids in batches:
            for i, sigma in enumerate(sigmas):
                for draw in range(draws if sigma > 0 else 1):
                    _, noisy = noisy_pair(pixels, sigma, **settings, sample_ids=ids, draw=draw)
                    right[i] += (model(noisy).argmax(1) == labels).sum()
    return right


def right_share(right: Tensor, sigma: float, images: int, draws: int) -> float:
    """The accuracy of so many right ones, as :func:`count_right` counts them."""
    return int(right) / ((draws if sigma > 0 else 1) * images)
