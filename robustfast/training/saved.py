"""Trained classifiers, read from their files: for use, and to be tested again under other noise or on other data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustfast.evaluation import Normalized
from robustfast.training import data, files, models
from robustfast.training.config import from_json
from robustfast.training.loop import noise_curve
from robustfast.training.setup import pick_backends, pick_device


class SavedClassifier(Normalized):
    """A trained classifier with the normalisation of its training: images (N, C, H, W) to logits (N, K).

    Images are floating in [0, 1], or uint8 in 0..255. ``features(images)`` gives the penultimate features, ``fc`` is
    the classifier on them.

    Attributes:
        model: the classifier of normalised images.
        config: the settings of its training.
        classes: the names of the K classes.
        image: (C, H, W) of the images it was trained on.
        normalization: ``mean`` and ``pixel_std`` of each channel.
    """

    def __init__(self, weights: dict[str, Tensor], about: dict[str, Any]) -> None:
        config, image, classes = from_json(about["config"]), tuple(about["image"]), tuple(about["classes"])
        model = models.build(config.model, image[0], config.inter_dim, len(classes), seed=0)
        model.load_state_dict(weights)
        super().__init__(model, **about["normalization"])
        self.config, self.image, self.classes, self.normalization = config, image, classes, about["normalization"]

    def normalize(self, images: Tensor) -> Tensor:
        return super().normalize(images if images.is_floating_point() else images / 255)


def load_classifier(path: str | Path, device: str | torch.device = "cpu") -> SavedClassifier:
    """The classifier of a finished run, in evaluation mode.

    Args:
        path: the folder of the run, or its model.safetensors wherever that lies.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, or no model of ours.
    """
    path = Path(path)
    path = path / files.MODEL if path.is_dir() else path
    weights, about = files.load(path, "model")
    try:
        return SavedClassifier(weights, about).to(device).eval()
    except (RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: its tensors are not those of its settings") from error


def evaluate(
    run: Path,
    sigmas: Sequence[float] | None = None,
    *,
    seed: int = 0,
    draws: int = 1,
    source: str | None = None,
    device: str = "auto",
    backend: str = "auto",
) -> list[dict[str, float]]:
    """The noise curve of a run's model on the test images of its data, or of ``source``.

    Args:
        run: the folder of a finished run.
        sigmas, seed, draws, backend: as in :func:`robustfast.evaluation.noise_curve`; None: the run's own sigmas.
        source: as in :func:`robustfast.training.data.load`.

    Raises:
        FileNotFoundError: the run has no model yet.
        ValueError: the data does not fit the model, or the device or backend cannot be had.
    """
    place = pick_device(device)
    pick_backends(backend, place)
    classifier = load_classifier(run, place)
    config = classifier.config
    _, test, names = data.load(source or config.data, config.size if source is None else 0, config.workers)
    image = test.image
    if image != classifier.image or names != classifier.classes:
        raise ValueError(
            f"{source or config.data}: the model takes images {list(classifier.image)} of classes "
            f"{list(classifier.classes)}, got {list(image)} of {list(names)}"
        )
    settings = {**classifier.normalization, "seed": seed, "draws": draws, "backend": backend}
    sigmas = config.test_sigmas if sigmas is None else sigmas
    return noise_curve(classifier.model, test.to(place), sigmas, device=place, **settings)
