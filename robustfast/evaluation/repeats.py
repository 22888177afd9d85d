"""How many noisy copies of an image are classified rightly, and the noise at which half of them are."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from robustfast.evaluation.draws import noise_of, noisy_logits
from robustfast.evaluation.intervals import binomial_interval
from robustfast.evaluation.models import Model, checked, evaluating


def survival(
    model: Model, images: Tensor, labels: Tensor, *, noise: str = "gaussian", scale: float = 0.06, draws: int = 10,
    seed: int = 0, sample_ids: Tensor | None = None, batch_size: int = 256,
) -> Tensor:  # fmt: skip
    """How many noisy copies of each image the model classifies rightly, of ``draws``: the ten-draw test of the paper.

    Args:
        model: maps images (N, C, H, W) in [0, 1] to logits (N, K).
        images, labels: (N, C, H, W) floating in [0, 1], and their classes (N,).
        noise, scale: "gaussian" and its standard deviation, or "uniform" and its bound, in units of the images, which
            are clipped to [0, 1] afterwards.
        draws: copies 0 to draws-1 of :func:`robustfast.functional.gaussian_noise` with this seed and these ids.
        batch_size: noisy copies in one call of the model.

    Returns:
        int64 (N,), 0 to ``draws``.

    Raises:
        TypeError, ValueError: an argument or what the model returns is not as described.
    """
    ids = checked(images, labels, sample_ids, draws=draws, batch_size=batch_size)
    noisy = noise_of(noise, scale, seed, (0.0, 1.0))
    with evaluating(model):
        return _right_copies(model, images, ids, labels, noisy, range(draws), batch_size)


def _right_copies(model, images, ids, labels, noisy, draws, batch_size) -> Tensor:
    """int64 (N,): how many of the draws are classified rightly."""
    right = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    for place, _, logits in noisy_logits(model, images, ids, labels, noisy, draws, batch_size):
        right.index_add_(0, place, (logits.argmax(1) == labels[place]).long())
    return right


class Tolerance(NamedTuple):
    """The noise at which an image is classified rightly half of the time, and bounds on it; float64 (N,) each.

    0 where the image is misclassified without noise, inf where it stands every scale tried.
    """

    scale: Tensor
    low: Tensor
    high: Tensor


def tolerance(
    model: Model, images: Tensor, labels: Tensor, scales: Sequence[float], *, noise: str = "gaussian", draws: int = 20,
    confidence: float = 0.95, seed: int = 0, sample_ids: Tensor | None = None, batch_size: int = 256,
) -> Tolerance:  # fmt: skip
    """Each image's noise tolerance: where its share of right copies, made to fall with the scale, crosses one half.

    Between two scales the share is taken as linear. ``low`` is the greatest scale up to which the Clopper-Pearson
    interval of every share lies above one half, ``high`` the least from which all lie below.

    Args:
        scales: of the noise, ascending, all above 0.
        confidence: of each interval.
        Otherwise as in :func:`survival`.
    """
    if list(scales) != sorted(set(scales)) or not scales or scales[0] <= 0:
        raise ValueError(f"scales: expected ascending numbers above 0, got {list(scales)}")
    settings = {"noise": noise, "draws": draws, "seed": seed, "sample_ids": sample_ids, "batch_size": batch_size}
    clean, *counts = (survival(model, images, labels, scale=scale, **settings) for scale in (0.0, *scales))  # type: ignore[arg-type]
    return tolerance_of(clean > 0, torch.stack(counts, 1), scales, draws, confidence)


def tolerance_of(
    clean: Tensor, counts: Tensor, scales: Sequence[float], draws: int, confidence: float = 0.95
) -> Tolerance:
    """:func:`tolerance` from whether the clean image is classified rightly, (N,), and survival (N, len(scales))."""
    grid = torch.tensor([0.0, *scales], dtype=torch.float64, device=counts.device)
    share = counts.double() / draws
    falling = (share.cummin(1).values + share.flip(1).cummax(1).values.flip(1)) / 2
    share = torch.cat((torch.ones_like(falling[:, :1]), falling), 1)
    above = (share >= 0.5).long().sum(1) - 1  # the last scale with at least a half; falling, so they come first
    after = (above + 1).clamp(max=len(scales))
    first, second = (share.gather(1, at.unsqueeze(1)).squeeze(1) for at in (above, after))
    step = (first - 0.5) / (first - second).clamp(min=1e-12)
    middle = grid[above] + step * (grid[after] - grid[above])
    middle = middle.masked_fill(above == len(scales), torch.inf).masked_fill(~clean, 0)
    lower, upper = binomial_interval(counts, draws, confidence)
    surely_right = (lower > 0.5).long().cumprod(1).sum(1)
    maybe_right = (upper >= 0.5).flip(1).long().cummax(1).values.sum(1)
    beyond = torch.cat((grid[1:], grid.new_tensor([torch.inf])))
    return Tolerance(middle, grid[surely_right * clean], beyond[maybe_right * clean])


class Decision(NamedTuple):
    """Whether an image's probability to be classified rightly is above a share: int64 (N,), 1 above, 0 below, -1 not
    decided; and the draws that this took, int64 (N,)."""

    above: Tensor
    draws: Tensor


def decide_survival(
    model: Model, images: Tensor, labels: Tensor, *, share: float, error: float = 0.01, first: int = 10,
    most: int = 640, noise: str = "gaussian", scale: float = 0.06, seed: int = 0, sample_ids: Tensor | None = None,
    batch_size: int = 256,
) -> Decision:  # fmt: skip
    """Sequential survival: images that are clear after few draws get no more, and each decision keeps its error.

    After ``first`` draws, and whenever their number has doubled, up to ``most``, an image is decided if the
    Clopper-Pearson interval of its probability leaves out ``share``. Each of the L looks has the confidence 1 -
    error / L, so that a decision is wrong with probability ``error`` at most (union bound), however early it falls.

    Args:
        share: 0 < share < 1, of the noisy copies.
        error: the probability of a wrong decision on one image.
        first, most: draws at the first and at the last look.
        Otherwise as in :func:`survival`, whose draws these are.
    """
    for name, value in (("share", share), ("error", error)):
        if not 0 < value < 1:
            raise ValueError(f"{name}: expected a number between 0 and 1, got {value!r}")
    ids = checked(images, labels, sample_ids, first=first, batch_size=batch_size)
    if most < first:
        raise ValueError(f"most: expected at least first ({first}), got {most!r}")
    looks = [0, first]
    while looks[-1] * 2 <= most:
        looks.append(looks[-1] * 2)
    noisy = noise_of(noise, scale, seed, (0.0, 1.0))
    right, above = (torch.zeros(len(images), dtype=torch.int64, device=images.device) for _ in range(2))
    above, used = above - 1, torch.zeros_like(above)
    with evaluating(model):
        for before, now in itertools.pairwise(looks):
            open_ = (above < 0).nonzero().squeeze(1)
            of_open, draws = (images[open_], ids[open_], labels[open_]), range(before, now)
            right[open_] += _right_copies(model, *of_open, noisy, draws, batch_size)
            low, high = binomial_interval(right[open_], now, 1 - error / (len(looks) - 1))
            above[open_] = torch.where(low > share, 1, torch.where(high < share, 0, -1))
            used[open_] = now
    return Decision(above, used)
