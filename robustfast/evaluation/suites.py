"""Which measurements an evaluation takes: quick, as much as the paper, or everything."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from robustfast.evaluation.measurements import (
    Attack,
    Bounds,
    Certificates,
    Curvature,
    Draws,
    Features,
    Measurement,
    Smoothed,
    Spectrum,
)
from robustfast.evaluation.perturbations import AUTHORS, PERTURBATIONS

SUITES = ("quick", "paper", "full")
DRAWS = 10  # of the paper's test of survival


def suite(
    name: str,
    image: Sequence[int],
    *,
    sigma: float,
    sigmas: Sequence[float],
    pixel_std: Sequence[float],
    features: bool,
) -> tuple[Measurement, ...]:
    """The measurements of a suite.

    Args:
        name: "quick": clean images, Gaussian noise of each of ``sigmas`` in ten draws, the Hessian's spectrum and
            features; "paper": also uniform noise, every perturbation once, the other measures of curvature,
            certificates of every tenth image and attacks; "full": every perturbation at every severity, certificates of
            all images from 10,000 draws, and attacks with more steps and restarts.
        image: (C, H, W).
        sigma: of the training noise, by which certificates, attacks and smoothing are scaled.
        pixel_std: the channels' deviations, for the published estimate of curvature.
        features: whether the model has ``features`` and ``fc``.

    Raises:
        ValueError: there is no such suite.
    """
    if name not in SUITES:
        raise ValueError(f"suite: expected one of {', '.join(SUITES)}, got {name!r}")
    levels = sorted({*sigmas, sigma} - {0.0})
    chosen: list[Measurement] = [Draws("clean", None), Spectrum()]
    chosen += [Draws(f"gaussian {level:g}", "gaussian", {"std": level}, draws=DRAWS) for level in levels]
    chosen += [Features("features", sigma)] if features else []
    if name != "quick":
        chosen += _beyond(name == "full", image, sigma, tuple(pixel_std), features)
    return tuple(chosen)


def _beyond(
    full: bool, image: Sequence[int], sigma: float, pixel_std: tuple[float, ...], features: bool
) -> Iterator[Measurement]:
    side, length = min(image[1:]), sigma * math.sqrt(math.prod(image))
    yield Draws(f"uniform {sigma:g}", "uniform", {"epsilon": sigma}, draws=DRAWS)
    for name in PERTURBATIONS:
        for severity in (1, 2, 3, 4, 5) if full else (3,):
            yield Draws(f"{name}, severity {severity}", name, severity=severity)
    for name, parameters in AUTHORS.items():
        if parameters.get("size", 0) <= side:
            yield Draws(f"{name}, the authors'", name, severity="authors")
    for step, draws in ((1e-1, 5), (1e-2, 20), (1e-3, 5)):
        yield Curvature(f"curvature, step {step:g}", step, draws, pixel_std)
    yield Smoothed("smoothed", sigma)
    if features:
        yield Bounds("bounds", sigma)
    yield Certificates("certificates", sigma, n=10_000 if full else 1000, every=1 if full else 10)
    effort = {"steps": 100, "restarts": 5, "queries": 500} if full else {"steps": 20, "queries": 20}
    for norm, radius in (("linf", sigma / 8), ("linf", sigma / 4), ("linf", sigma / 2), ("l2", length / 4)):
        yield Attack(f"{norm} {radius:.3g}", norm, radius, **effort)
