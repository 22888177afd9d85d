"""What is measured of each image: each measurement turns a batch into columns of the table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from robustfast.evaluation import attacks, certificates, confidence, features, hessian
from robustfast.evaluation.draws import noisy_logits
from robustfast.evaluation.models import evaluating
from robustfast.evaluation.perturbations import perturb


class Batch(NamedTuple):
    """Images (N, C, H, W) in [0, 1], their labels and ids (N,), the seed of all noise, and images in a model's call."""

    images: Tensor
    labels: Tensor
    ids: Tensor
    seed: int
    batch_size: int

    @property
    def keys(self) -> dict[str, Any]:
        return {"seed": self.seed, "sample_ids": self.ids, "batch_size": self.batch_size}


class Measurement(Protocol):
    """Has a name, settings (its fields), and makes columns (N, ...) of the images of a batch."""

    @property
    def name(self) -> str: ...

    def __call__(self, model: Any, batch: Batch) -> dict[str, Tensor]: ...


def settings(measurement: Any) -> dict[str, Any]:
    """A measurement's kind and fields, in types that JSON has."""
    return {"kind": type(measurement).__name__, **asdict(measurement)}


def columns(name: str, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The columns name/... of a measurement that makes several."""
    return {f"{name}/{part}": values for part, values in found.items()}


@dataclass(frozen=True)
class Draws:
    """Predictions and scores of ``draws`` perturbed copies: accuracy, survival, flips and calibration."""

    name: str
    perturbation: str | None  # None: the clean image
    parameters: dict[str, Any] = field(default_factory=dict)
    severity: int | str | None = None
    draws: int = 1

    def __call__(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        images, labels, ids, seed, batch_size = batch

        def perturbed(images: Tensor, ids: Tensor, draw: Tensor) -> Tensor:
            if self.perturbation is None:
                return images
            return perturb(
                images, self.perturbation, self.severity, seed=seed, sample_ids=ids, draw=draw, **self.parameters
            )

        shape = len(images), self.draws
        found = {"prediction": torch.zeros(shape, dtype=torch.int32, device=images.device)} | {
            name: torch.zeros(shape, device=images.device) for name in ("confidence", "nll", "brier")
        }
        with evaluating(model):
            for place, draw, logits in noisy_logits(
                model, images, ids, labels, perturbed, range(self.draws), batch_size
            ):
                for name, values in confidence.scores(logits, labels[place])._asdict().items():
                    found[name][place, draw] = values.to(found[name].dtype)
        return columns(self.name, found)


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of the loss's Hessian in the input, and the norm of its gradient there."""

    name: str = "spectrum"

    def __call__(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        spectrum = hessian.input_hessian_spectrum(model, batch.images, batch.labels, batch_size=batch.batch_size)
        with evaluating(model):
            gradient = attacks.ascent_direction(model, batch.images, batch.labels)[2]
        return {self.name: spectrum, "gradient": gradient.flatten(1).double().norm(dim=1)}


@dataclass(frozen=True)
class Curvature:
    """The published finite-difference estimate, in units of x / pixel_std."""

    name: str
    step: float = 1e-2
    draws: int = 20
    pixel_std: tuple[float, ...] | None = None

    def __call__(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        found = hessian.curvature(
            model, batch.images, batch.labels, draws=self.draws, step=self.step, pixel_std=self.pixel_std, **batch.keys
        )
        return {self.name: found}


@dataclass(frozen=True)
class UnderNoise:
    """Columns of a function of the Hessian's module that averages over draws of noise of scale sigma."""

    name: str
    sigma: float
    draws: int = 20

    function: ClassVar[Callable[..., Any]]

    def __call__(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        found = self.function(model, batch.images, batch.labels, sigma=self.sigma, draws=self.draws, **batch.keys)
        return columns(self.name, found._asdict())


class Smoothed(UnderNoise):
    """The trace of the Hessian of the loss smoothed at scale sigma, with its standard error."""

    function = staticmethod(hessian.smoothed_trace)


class Bounds(UnderNoise):
    """Features' displacement and the curvature's bounds."""

    function = staticmethod(hessian.theory)


@dataclass(frozen=True)
class Features:
    """Penultimate features of the clean image and of one with Gaussian noise, and their distance to the boundary."""

    name: str
    sigma: float

    @torch.no_grad()
    def __call__(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        noisy = perturb(batch.images, "gaussian", std=self.sigma, seed=batch.seed, sample_ids=batch.ids)
        columns = {}
        with evaluating(model):
            for view, images in (("clean", batch.images), ("noisy", noisy)):
                found = model.features(images)
                columns[f"{self.name}/{view}"] = found
                columns[f"{self.name}/{view} boundary"] = features.boundary_distance(
                    found, batch.labels, model.fc.weight, model.fc.bias
                )
        return columns


@dataclass(frozen=True)
class Certificates:
    """Certificates by randomised smoothing, of the images whose id is a multiple of ``every``; -2 for the others."""

    name: str
    sigma: float
    n0: int = 100
    n: int = 1000
    alpha: float = 0.001
    every: int = 1

    def __call__(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        taken = batch.ids % self.every == 0
        keys = {**batch.keys, "sample_ids": batch.ids[taken]}
        found = certificates.certify(
            model, batch.images[taken], sigma=self.sigma, n0=self.n0, n=self.n, alpha=self.alpha, **keys
        )
        spread = {
            name: values.new_full((len(batch.ids),), -2).masked_scatter(taken, values)
            for name, values in found._asdict().items()
        }
        return columns(self.name, spread)


@dataclass(frozen=True)
class Attack:
    """Whether the image is classified rightly after a white-box attack, and what its audit needs of each image.

    ``right`` after the attack, found by asking the model again; ``fewer``: after a quarter of the steps; ``searched``:
    after the black-box search; ``length`` of the attack's move; ``still``: whether an attack of radius 0 returns the
    image.
    """

    name: str
    norm: str
    epsilon: float
    steps: int = 20
    restarts: int = 1
    queries: int = 50

    def __call__(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        images, labels = batch.images, batch.labels
        ball = {"norm": self.norm, "epsilon": self.epsilon, **batch.keys}
        white = {**ball, "steps": self.steps, "restarts": self.restarts}
        found = attacks.attack(model, images, labels, **white)
        weaker = attacks.attack(model, images, labels, **{**white, "steps": max(1, self.steps // 4)})
        unmoved = attacks.attack(model, images, labels, **{**ball, "epsilon": 0.0, "steps": 1})
        box = attacks.random_search(model, images, labels, queries=self.queries, **ball)
        moved = (found - images).double().flatten(1)
        length = moved.abs().amax(1) if self.norm == "linf" else moved.norm(dim=1)
        columns = {
            part: attacks.still_right(model, moved, labels, batch.batch_size)
            for part, moved in (("right", found), ("fewer", weaker), ("searched", box))
        }
        columns |= {"length": length, "still": (unmoved == images).flatten(1).all(1)}
        return {f"{self.name}/{part}": column for part, column in columns.items()}
