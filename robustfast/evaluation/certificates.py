"""Certified radii by randomised smoothing (Cohen, Rosenfeld and Kolter 2019)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from robustfast.evaluation.draws import noise_of, noisy_logits
from robustfast.evaluation.intervals import binomial_bound
from robustfast.evaluation.models import Model, above_zero, checked_images, evaluating, positive


class Certificate(NamedTuple):
    """What holds of the smoothed classifier, with probability 1 - alpha for each image.

    prediction int64 (N,): its class, -1 where it abstains. radius float64 (N,): within this L2 distance, in units of
    the images, the prediction does not change; 0 where it abstains. votes int64 (N,): for the class that won the
    selection, of the n draws.
    """

    prediction: Tensor
    radius: Tensor
    votes: Tensor


def certify(
    model: Model, images: Tensor, *, sigma: float, n0: int = 100, n: int = 10_000, alpha: float = 0.001, seed: int = 0,
    sample_ids: Tensor | None = None, batch_size: int = 1024,
) -> Certificate:  # fmt: skip
    """The smoothed classifier's predictions and radii, CERTIFY of arXiv 1902.02918.

    The class with the most votes of draws 0 to n0-1 is selected; of n draws more, k vote for it. p = beta.ppf(alpha, k,
    n-k+1) is a lower bound of its probability, and the radius is sigma * Phi^-1(p) where p > 1/2.

    Args:
        model: maps images (N, C, H, W), which leave [0, 1] here, to logits (N, K).
        images: (N, C, H, W) floating in [0, 1].
        sigma: standard deviation > 0 of the noise, which is not clipped.
        n0, n, alpha: draws of the selection and of the estimate, and the probability of a wrong certificate.
        seed, sample_ids: key of the noise, as in :func:`robustfast.functional.gaussian_noise`.
        batch_size: noisy copies in one call of the model.

    Raises:
        TypeError, ValueError: an argument or what the model returns is not as described.
    """
    ids = checked_images(images, sample_ids)
    positive(n0=n0, n=n, batch_size=batch_size)
    above_zero(sigma=sigma)
    if not 0 < alpha < 1:
        raise ValueError(f"alpha: expected 0 < alpha < 1, got {alpha!r}")
    noisy = noise_of("gaussian", float(sigma), seed, None)
    with evaluating(model):
        selected = _votes(model, images, ids, noisy, range(n0), batch_size).argmax(1)
        counts = _votes(model, images, ids, noisy, range(n0, n0 + n), batch_size)
    votes = counts.gather(1, selected.unsqueeze(1)).squeeze(1) if len(images) else selected
    p = binomial_bound(votes, n, alpha)
    sure = p > 0.5
    radius = torch.where(sure, sigma * torch.special.ndtri(p), 0)
    return Certificate(torch.where(sure, selected, -1), radius, votes)


def _votes(model, images, ids, noisy, draws, batch_size) -> Tensor:
    """int64 (N, K): how many of the draws go to each class; counted where the images are."""
    votes = torch.zeros(len(images), 1, dtype=torch.int64, device=images.device)
    for place, _, logits in noisy_logits(model, images, ids, None, noisy, draws, batch_size):
        if votes.shape[1] != logits.shape[1]:
            votes = votes.new_zeros(len(images), logits.shape[1])
        votes.index_put_((place, logits.argmax(1)), torch.ones_like(place), accumulate=True)
    return votes


def certified_accuracy(certificate: Certificate, labels: Tensor, radii: Tensor) -> Tensor:
    """The share of images that are classified rightly with a certificate of at least each of ``radii`` (R,): (R,)."""
    right = certificate.prediction == labels
    return (right & (certificate.radius >= radii.unsqueeze(1).to(certificate.radius))).double().mean(1)
