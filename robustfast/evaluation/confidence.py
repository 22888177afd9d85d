"""Whether a model's confidence is what it says: the probability of being right."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from robustfast import checks
from robustfast.evaluation.models import positive


class Scores(NamedTuple):
    """What calibration is computed from, per image: the class of the greatest logit, int64 (N,), and float64 (N,) its
    probability, the cross entropy in nats and the Brier score sum_k (p_k - [k = label])^2."""

    prediction: Tensor
    confidence: Tensor
    nll: Tensor
    brier: Tensor


def scores(logits: Tensor, labels: Tensor) -> Scores:
    """The scores of logits (N, K) for labels (N,)."""
    p = logits.double().softmax(1)
    confidence, prediction = p.max(1)
    own = F.one_hot(labels.long(), logits.shape[1])
    return Scores(
        prediction, confidence, F.cross_entropy(logits.double(), labels.long(), reduction="none"),
        (p - own).square().sum(1),
    )  # fmt: skip


class Calibration(NamedTuple):
    """Five numbers, each 0 at best; nan of no images.

    ``ece``, ``adaptive_ece``: the expected calibration error, sum over bins of (share of images) * |accuracy - mean
    confidence|, with bins of equal width (Guo et al. 2017) and with bins of equal counts (Nixon et al. 2019).
    ``brier``, ``nll``: means of the Brier score and of the cross entropy. ``aurc``: the area under the risk-coverage
    curve: the mean over n of the error rate of the n most confident images (Geifman and El-Yaniv 2017).
    """

    ece: float
    adaptive_ece: float
    brier: float
    nll: float
    aurc: float


def calibration(logits: Tensor, labels: Tensor, *, bins: int = 15) -> Calibration:
    """How well logits (N, K) are calibrated for labels (N,): see :class:`Calibration`.

    Raises:
        TypeError, ValueError: logits are not floating (N, K) and finite, or labels not integers (N,) in 0..K-1.
    """
    checks.of_dtype("logits", logits, checks.FLOATING)
    if logits.dim() != 2 or not bool(logits.isfinite().all()):
        raise ValueError(f"logits: expected finite numbers of shape (N, K), got {tuple(logits.shape)}")
    checks.of_dtype("labels", labels, checks.LABELS)
    checks.of_shape("labels", labels, (len(logits),), logits)
    if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < logits.shape[1]):
        raise ValueError(
            f"labels: expected classes 0..{logits.shape[1] - 1}, got {int(labels.min())} to {int(labels.max())}"
        )
    found = scores(logits, labels)
    return calibration_of(found.confidence, found.prediction == labels, found.nll, found.brier, bins=bins)


def calibration_of(confidence: Tensor, right: Tensor, nll: Tensor, brier: Tensor, *, bins: int = 15) -> Calibration:
    """:func:`calibration` from the scores of each image."""
    positive(bins=bins)
    if not len(confidence):
        return Calibration(*[float("nan")] * 5)
    confidence, right = confidence.double(), right.double()
    order = confidence.argsort(descending=True, stable=True)
    counts = torch.arange(1, len(order) + 1, dtype=torch.float64, device=order.device)
    risk = (1 - right[order]).cumsum(0) / counts
    equal_width = (confidence * bins).ceil().long().clamp(1, bins) - 1
    rank = torch.empty_like(order).scatter(0, order.flip(0), torch.arange(len(order), device=order.device))
    equal_mass = rank * bins // len(order)
    ece, adaptive_ece = (_expected_error(confidence, right, bin_, bins) for bin_ in (equal_width, equal_mass))
    return Calibration(
        ece, adaptive_ece, float(brier.double().mean()), float(nll.double().mean()), float(risk.mean()),
    )  # fmt: skip


def _expected_error(confidence: Tensor, right: Tensor, bin_: Tensor, bins: int) -> float:
    gap = torch.zeros(bins, dtype=torch.float64, device=bin_.device).scatter_add(0, bin_, right - confidence)
    return float(gap.abs().sum() / len(bin_))


class Reliability(NamedTuple):
    """Bins of equal width of the confidence: number of images, their mean confidence and accuracy (nan of none)."""

    images: Tensor
    confidence: Tensor
    accuracy: Tensor


def reliability(confidence: Tensor, right: Tensor, *, bins: int = 15) -> Reliability:
    """The points of a reliability diagram."""
    bin_ = (confidence.double() * bins).ceil().long().clamp(1, bins) - 1
    count = bin_.bincount(minlength=bins)
    sums = (
        torch.zeros(bins, dtype=torch.float64, device=bin_.device).scatter_add(0, bin_, part.double())
        for part in (confidence, right)
    )
    return Reliability(count, *(total / count for total in sums))
