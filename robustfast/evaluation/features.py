"""What the loss's terms claim, measured on features: gathered classes, noise that moves little, distant boundaries."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from robustfast import checks, reference


class FeatureStatistics(NamedTuple):
    """Per class, (K,) each, float64 but ``samples``; nan for a class without samples.

    ``samples`` int64; ``compactness`` mean distance of the clean features from their centroid, ``alignment`` of the
    noisy ones from the clean centroid (nan without noisy features); ``shift`` distance between the clean and the noisy
    centroid; ``boundary`` signed distance of the clean centroid from the nearest decision boundary of its class,
    positive on the right side (minus the score of the loss's margin); ``separability`` distance to the nearest other
    centroid over the root mean square distance of the class's features from their own.
    """

    samples: Tensor
    compactness: Tensor
    alignment: Tensor
    shift: Tensor
    boundary: Tensor
    separability: Tensor


def feature_statistics(
    input: Tensor, input_noise: Tensor | None, target: Tensor, weight: Tensor, bias: Tensor | None
) -> FeatureStatistics:
    """How the penultimate features of each class lie.

    Args:
        input, input_noise: clean features (N, D), and those of noisy views of the same samples, or None.
        target: labels (N,).
        weight, bias: the classifier (K, D) and (K,) or None.

    Raises:
        TypeError, ValueError, IndexError: as of :func:`robustfast.functional.discriminative_loss`.
    """
    input, input_noise, weight, bias = _wide(input, input_noise, target, weight, bias)
    classes = len(weight)
    labels = target.long()
    count = labels.bincount(minlength=classes)

    def mean(values: Tensor) -> Tensor:
        total = values.new_zeros(classes, *values.shape[1:]).index_add(0, labels, values)
        return total / count.view(-1, *[1] * (values.dim() - 1))

    centroid = mean(input)
    spread = (input - centroid[labels]).norm(dim=1)
    boundary = _nearest(centroid.nan_to_num(), torch.arange(classes, device=weight.device), weight, bias)
    between = torch.cdist(centroid, centroid, compute_mode="donot_use_mm_for_euclid_dist")
    between.fill_diagonal_(torch.inf)
    nearest = between.nan_to_num(nan=torch.inf, posinf=torch.inf).amin(1)
    none = torch.full_like(boundary, torch.nan)
    return FeatureStatistics(
        count,
        mean(spread),
        none if input_noise is None else mean((input_noise - centroid[labels]).norm(dim=1)),
        none if input_noise is None else (mean(input_noise) - centroid).norm(dim=1),
        torch.where(count > 0, boundary, none),
        torch.where(count > 0, nearest / mean(spread.square()).sqrt(), none),
    )


def boundary_distance(input: Tensor, target: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The signed distance (N,) of each feature vector from the nearest decision boundary of its class, float64.

    min over i of ((W_c - W_i) . f + b_c - b_i) / ||W_c - W_i||: positive where f is classified as c. inf where no W_i
    differs from W_c. Arguments and errors as of :func:`feature_statistics`.
    """
    input, _, weight, bias = _wide(input, None, target, weight, bias)
    return _nearest(input, target.long(), weight, bias)


def _wide(input, input_noise, target, weight, bias):
    state = input.new_zeros(weight.shape, dtype=checks.wide_dtype(input))
    seen = torch.zeros(len(weight), dtype=torch.bool, device=weight.device)
    checks.discriminative_loss(input, input_noise, target, weight, bias, state, seen)
    checks.labels(target, len(weight), -100)
    if len(target) and int(target.min()) < 0:
        raise IndexError(f"target: expected labels of classes, got {int(target.min())}")
    return tuple(None if part is None else part.detach().double() for part in (input, input_noise, weight, bias))


def _nearest(points: Tensor, classes: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    score, _ = reference.margin_search(points, *reference.rows_of(weight, bias, classes), weight, bias)
    return -score


class Projection(NamedTuple):
    """Two coordinates (N, 2) of the clean and of the noisy features, on the same axes, and the variance kept, 0..1."""

    clean: Tensor
    noisy: Tensor
    kept: float


def principal_components(input: Tensor, input_noise: Tensor) -> Projection:
    """Both (N, D) on the two principal components of the clean features, float64; signs fixed by the largest entry."""
    clean, noisy = input.detach().double(), input_noise.detach().double()
    center = clean.mean(0)
    _, singular, axes = torch.linalg.svd(clean - center, full_matrices=False)
    axes = axes[:2]
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    kept = singular[:2].square().sum() / singular.square().sum().clamp(min=1e-300)
    return Projection((clean - center) @ axes.T, (noisy - center) @ axes.T, float(kept))


def tsne(input: Tensor, input_noise: Tensor, *, seed: int = 0) -> Projection:
    """A joint t-SNE embedding of both (N, D), by scikit-learn; kept is nan, since distances have no scale there.

    On one thread: several would wait for each other at each of a thousand steps, for long where cores are busy.
    """
    from robustfast.extras import needed

    with needed("evaluate"):
        from sklearn.manifold import TSNE
        from threadpoolctl import threadpool_limits
    both = torch.cat((input, input_noise)).detach().double().cpu().numpy()
    with threadpool_limits(1):
        embedded = TSNE(random_state=seed, perplexity=min(30, (len(both) - 1) / 3)).fit_transform(both)
    points = torch.from_numpy(embedded)
    return Projection(points[: len(input)], points[len(input) :], float("nan"))
