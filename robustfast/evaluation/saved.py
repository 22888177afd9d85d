"""Saved runs, tested again: other noise, or other data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from robustfast.evaluation.noise import noise_curve
from robustfast.training import data, files, models
from robustfast.training.config import from_json
from robustfast.training.loop import pick_device


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
        source: digits, npz:FILE or folder:DIR.

    Raises:
        FileNotFoundError: the run has no model yet.
        ValueError: the data does not fit the model.
    """
    weights, about = files.load_model(run / files.MODEL)
    config, classes, image = from_json(about["config"]), about["classes"], about["image"]
    _, test, names = data.load(source or config.data)
    if list(test.pixels.shape[1:]) != image or list(names) != classes:
        raise ValueError(
            f"{source or config.data}: the model takes images {image} of classes {classes}, "
            f"got {list(test.pixels.shape[1:])} of {list(names)}"
        )
    model = models.build(config.model, image[0], config.inter_dim, len(classes), seed=0)
    model.load_state_dict(weights)
    place = pick_device(device)
    settings = {**about["normalization"], "seed": seed, "draws": draws, "backend": backend}
    return noise_curve(model.to(place), *test.to(place), config.test_sigmas if sigmas is None else sigmas, **settings)
