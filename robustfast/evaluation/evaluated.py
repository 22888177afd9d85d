"""Evaluated models side by side: groups of seeds, their accuracies, differences to a baseline, corruption errors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np

from robustfast.evaluation.intervals import paired
from robustfast.evaluation.summary import right_share
from robustfast.evaluation.table import Columns

BASELINE = "normal"


class Evaluated(NamedTuple):
    """One evaluated model: its group (the method), seed, table, and :func:`robustfast.evaluation.summary.summarise`."""

    name: str
    group: str
    seed: int
    columns: Columns
    about: dict[str, Any]
    summary: dict[str, Any]


class Models:
    """Evaluated models by group, in the groups' order; ``sigma`` of the noise in training, ``classes`` by name."""

    def __init__(self, models: Sequence[Evaluated], sigma: float, classes: Sequence[str]) -> None:
        self.models, self.sigma, self.classes = models, sigma, classes
        self.groups = list(dict.fromkeys(model.group for model in models))
        self.baseline = BASELINE if BASELINE in self.groups else self.groups[0]
        self.noise = f"gaussian {sigma:g}"

    def of(self, group: str, part: str | None = None) -> list[Evaluated]:
        return [m for m in self.models if m.group == group and (part is None or part in m.summary)]

    def firsts(self, part: str | None = None) -> list[Evaluated]:
        """Of each group the first seed that has this part."""
        return [m for group in self.groups for m in self.of(group, part)[:1]]

    def values(self, group: str, setting: str, key: str = "accuracy") -> list[float]:
        return [s[key] for m in self.of(group) for s in m.summary["settings"] if s["name"] == setting]

    def settings(self, perturbation: str | None) -> list[dict[str, Any]]:
        found = {s["name"]: s for m in self.models for s in m.summary["settings"] if s["perturbation"] == perturbation}
        return list(found.values())

    def noise_levels(self) -> list[tuple[float, str]]:
        """(std, the setting's name) of the clean images and each Gaussian noise."""
        noise = [(s["parameters"]["std"], s["name"]) for s in self.settings("gaussian") if s["severity"] is None]
        return [(0.0, "clean"), *sorted(noise)]

    def color(self, group: str) -> int:
        return self.groups.index(group) % 6


def accuracy_table(models: Models) -> dict[str, Any]:
    """Mean and deviation over seeds by group and noise; best: above every other group by more than both deviations."""
    points = models.noise_levels()
    cells = {group: [mean_std(models.values(group, name)) for _, name in points] for group in models.groups}
    best = [
        [
            len(models.groups) > 1
            and all(len(models.of(g)) > 1 for g in models.groups)  # one seed has no spread to carry a winner
            and all(cell[0] - cell[1] > other[i][0] + other[i][1] for g, other in cells.items() if g != group)
            for i, cell in enumerate(cells[group])
        ]
        for group in models.groups
    ]
    return {
        "head": ["clean", *(f"{level:g}" for level, _ in points[1:])],
        "rows": [
            {"name": group, "cells": [{"mean": m, "std": s, "best": marks[i]} for i, (m, s) in enumerate(of)]}
            for (group, of), marks in zip(cells.items(), best, strict=True)
        ],
    }  # fmt: skip


def differences(models: Models) -> list[dict[str, Any]]:
    """Each group against the baseline: over the images of one seed, and over seeds."""
    rows = []
    for group in models.groups:
        if group == models.baseline:
            continue
        for setting in ("clean", models.noise):
            pairs = [
                (m, other)
                for m in models.of(group)
                for other in models.of(models.baseline)
                if m.seed == other.seed and np.array_equal(m.columns["pixels"], other.columns["pixels"])
                and f"{setting}/nll" in m.columns and f"{setting}/nll" in other.columns
            ]  # fmt: skip
            if not pairs:
                continue
            mine, base = pairs[0]
            over_images = paired(right_share(mine.columns, setting), right_share(base.columns, setting))
            over_seeds = None
            if len(pairs) > 1:
                means = [[right_share(m.columns, setting).mean() for m in pair] for pair in pairs]
                over_seeds = paired([a for a, _ in means], [b for _, b in means])
            rows.append({
                "group": group, "setting": setting, "seed": mine.seed,
                "images": over_images._asdict(), "seeds": over_seeds._asdict() if over_seeds else None,
            })  # fmt: skip
    return rows


class CorruptionErrors(NamedTuple):
    """Errors over those of a baseline, means over perturbations: mCE, relative mCE and mFR."""

    mean: float
    relative: float
    flips: float


def corruption_errors(groups: Mapping[str, Sequence[Evaluated]], baseline: str) -> dict[str, CorruptionErrors]:
    """mCE, relative mCE and mFR of each group against the baseline: Hendrycks and Dietterich 2019, equations 1 to 3.

    Of each perturbation the errors are summed over the severities that all models have, then divided by those of the
    baseline (relative: both less the clean error; flips: predictions that differ from the clean image's instead of
    errors), then averaged over the perturbations. nan where the baseline makes no error. Models without perturbations
    count nowhere.
    """

    def perturbed(model: Evaluated) -> dict[tuple[str, int], dict[str, Any]]:
        return {
            (s["perturbation"], s["severity"]): s for s in model.summary["settings"] if isinstance(s["severity"], int)
        }

    found = {group: [m for m in models if perturbed(m)] for group, models in groups.items()}
    shared = set.intersection(*(set(perturbed(m)) for models in found.values() for m in models))
    kinds = sorted({kind for kind, _ in shared})

    def clean(group: str) -> float:
        return fmean(1 - s["accuracy"] for m in found[group] for s in m.summary["settings"] if s["name"] == "clean")

    def of(group: str, kind: str, key: str) -> float:
        values = [s[key] for m in found[group] for at, s in perturbed(m).items() if at in shared and at[0] == kind]
        return fmean(values) if key == "flips" else 1 - fmean(values)

    def mean_ratio(group: str, key: str, less: bool = False) -> float:
        pairs = [[of(g, kind, key) - (clean(g) if less else 0.0) for g in (group, baseline)] for kind in kinds]
        return fmean(mine / base if base else float("nan") for mine, base in pairs)

    return {
        group: CorruptionErrors(
            mean_ratio(group, "accuracy"), mean_ratio(group, "accuracy", less=True), mean_ratio(group, "flips")
        )
        for group in groups
    }


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    if not values:
        return float("nan"), 0.0
    return fmean(values), stdev(values) if len(values) > 1 else 0.0


def mean_of(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
