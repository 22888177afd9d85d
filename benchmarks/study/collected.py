"""The study's numbers, from the tables of all its runs: by arm and seed, and paired between arms."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import count, takewhile
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.study.arms import ARMS, METHOD_ARMS, Arm
from robustfast.commands import runs
from robustfast.evaluation.evaluated import Evaluated, corruption_errors
from robustfast.evaluation.intervals import paired
from robustfast.evaluation.summary import right_share

FORMAT = 1
CURVATURE = "log10 of ‖H‖²"
Models = dict[str, list[Evaluated]]  # of each arm, by seed


def collect(place: Path, about: dict[str, Any]) -> dict[str, Any]:
    """What docs/study.md is made of; ``place`` holds the runs' folders, those that are finished count."""
    found = {arm.name: list(_finished(place, arm)) for arm in ARMS}
    models = {name: of_arm for name, of_arm in found.items() if of_arm}
    if not models:
        sys.exit(f"{place}: no run of the study is finished there; without --collect it is trained")
    methods = {arm.name: models[arm.name] for arm in METHOD_ARMS if arm.name in models}
    first = next(iter(models.values()))[0]
    return {
        "format": FORMAT,
        **about,
        "images": first.summary["images"],
        "sigma": first.about["sigma"],
        "environment": runs.environment(),
        "arms": [
            {"name": arm.name, "method": arm.method, "changes": _changes(arm), "base": arm.base,
             "seeds": len(models[arm.name])}
            for arm in ARMS if arm.name in models
        ],
        "settings": _by_arm(models, _settings),
        "tolerance": _by_arm(models, lambda m: m.summary["tolerance"]["lower quartile"]),
        "curvature": _by_arm(models, _curvature),
        "explained": _by_arm(methods, _explained),
        "bounds": _by_arm(methods, lambda m: {k: v["median"] for k, v in m.summary["bounds"]["ratios"].items()}),
        "certificates": _by_arm(methods, _certificates),
        "attacks": _by_arm(methods, _attacks),
        "warnings": [f"{m.name}: {text}" for arm in methods.values() for m in arm for text in m.summary["warnings"]],
        "features": _by_arm(models, _features),
        "corruption": corruption_errors(methods, "normal"),
        "paired": list(_pairs(models)),
    }  # fmt: skip


def _changes(arm: Arm) -> dict[str, Any]:
    """The settings in which a variation differs from the arm that it is set beside."""
    base = next((other for other in ARMS if other.name == arm.base), arm)
    own, its = (each.config(0, {}).as_json() for each in (arm, base))
    return {name: value for name, value in own.items() if value != its[name]}


def _finished(place: Path, arm: Arm) -> Iterator[Evaluated]:
    folders = (runs.folder_of(place / arm.folder(seed), arm.suite) for seed in count())
    return map(runs.read, takewhile(lambda folder: (folder / runs.RESULTS).exists(), folders))


def _by_arm(models: Models, number: Callable[[Evaluated], Any]) -> dict[str, list[Any]]:
    return {name: [number(m) for m in of_arm] for name, of_arm in models.items()}


def _settings(m: Evaluated) -> dict[str, dict[str, float]]:
    return {
        s["name"]: {
            "accuracy": s["accuracy"], "flips": s["flips"], "all_right": s["survival"][-1] / m.summary["images"],
            **{name: s["calibration"][name] for name in ("ece", "nll", "aurc")},
        }
        for s in m.summary["settings"]
    }  # fmt: skip


def _curvature(m: Evaluated) -> dict[str, float]:
    exact = {name: m.summary["spectrum"][name]["median"] for name in ("top", "trace", "squared norm")}
    exact["mean squared norm"] = m.summary["spectrum"]["squared norm"]["mean"]
    published = {f"published, h = {c['step']:g}": c["mean"] for c in m.summary.get("curvature", [])}
    return exact | published | ({"smoothed": m.summary["smoothed"]["mean"]} if "smoothed" in m.summary else {})


def _explained(m: Evaluated) -> dict[str, dict[str, float | None]]:
    return {
        e["name"]: {
            "of groups": e["of groups"], "per image": e["per image"]["spearman"],
            "given": e["given margin, confidence and gradient"]["spearman"],
        }
        for e in m.summary["explained"]
    }  # fmt: skip


def _certificates(m: Evaluated) -> dict[str, float]:
    found = m.summary["certificates"]
    return {name: found[name] for name in ("images", "abstained", "mean radius", "n", "sigma", "alpha")}


def _attacks(m: Evaluated) -> dict[str, dict[str, float]]:
    return {a["name"]: {"accuracy": a["accuracy"], "searched": a["searched"]} for a in m.summary["attacks"]}


def _features(m: Evaluated) -> dict[str, float]:
    """Means over classes."""
    names = ("compactness", "alignment", "shift", "boundary", "separability")
    return {name: fmean(value for value in m.summary["features"][name] if value is not None) for name in names}


def _pairs(models: Models) -> Iterator[dict[str, Any]]:
    """Both discriminative methods against every other method, and every variation against its base."""
    methods = [arm.name for arm in METHOD_ARMS]
    paper, recipe = methods[-2:]
    wanted = [(name, other) for name in (paper, recipe) for other in methods if other not in (name, recipe)]
    varied = [arm.name for arm in ARMS if arm.base == recipe]  # the recipe with more variety of noise
    augmented = [arm.name for arm in ARMS if arm.base == "noisy"]
    wanted += [(recipe, other) for other in augmented]
    wanted += [(name, other) for name in varied for other in (*methods, *augmented) if other != recipe]
    for name, other in wanted + [(arm.name, arm.base) for arm in ARMS if arm.base]:
        pairs = list(zip(models.get(name, ()), models.get(other, ()), strict=False))
        if not pairs:
            continue
        shared = _per_image(pairs[0][1])
        for measure in (measure for measure in _per_image(pairs[0][0]) if measure in shared):
            yield {"arm": name, "against": other, "measure": measure, **_paired(pairs, measure)}


def _paired(pairs: Sequence[tuple[Evaluated, Evaluated]], measure: str) -> dict[str, Any]:
    """Over seeds: of the means over images; over images: of the means over seeds."""
    a, b = (np.stack([_per_image(pair[side])[measure] for pair in pairs]) for side in (0, 1))
    of_seeds = paired(a.mean(1), b.mean(1))._asdict() if len(pairs) > 1 else None
    return {"seeds": of_seeds, "images": paired(a.mean(0), b.mean(0))._asdict()}


def _per_image(m: Evaluated) -> dict[str, np.ndarray]:
    """float64 (N,) by measure: the share of right copies of each setting, right after each attack, curvature."""
    found = {s["name"]: right_share(m.columns, s["name"]) for s in m.summary["settings"]
             if s["draws"] >= 10 or s["name"] == "clean"}  # fmt: skip
    found |= {a["name"]: m.columns[f"{a['name']}/right"].astype(np.float64) for a in m.summary.get("attacks", [])}
    squared = (m.columns["spectrum"].astype(np.float64) ** 2).sum(1)
    return found | {CURVATURE: np.log10(squared + 1e-12)}
