"""What a table of evaluated images says: every number is computed from the table, none while models run."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustfast.evaluation.confidence import calibration_of, reliability
from robustfast.evaluation.features import feature_statistics
from robustfast.evaluation.intervals import correlation
from robustfast.evaluation.repeats import tolerance_of
from robustfast.evaluation.table import Columns

RADII = 21  # points of a certified curve
QUARTILES = {"lower quartile": 0.25, "median": 0.5, "upper quartile": 0.75}


def summarise(columns: Columns, about: dict[str, Any], classifier: tuple[Tensor, Tensor | None] | None = None) -> dict:
    """All summaries of one table, in types that JSON has; a part whose measurement was not taken is missing.

    Args:
        columns, about: of :func:`robustfast.evaluation.table.read`.
        classifier: weight (K, D) and bias (K,) of the linear classifier, for the boundaries of classes.

    Raises:
        ValueError: clean images were not measured, which others are compared with.
    """
    if "clean/prediction" not in columns:
        raise ValueError('columns: expected those of Draws("clean", None) among them')
    kinds: dict[str, list[dict[str, Any]]] = {}
    for measurement in about["measurements"]:
        kinds.setdefault(measurement["kind"], []).append(measurement)
    found: dict[str, Any] = {"images": len(columns["id"])}
    found["settings"] = [_setting(columns, measurement) for measurement in kinds.get("Draws", [])]
    if levels := [m for m in kinds.get("Draws", []) if m["perturbation"] == "gaussian" and m["severity"] is None]:
        found["tolerance"] = _tolerance(columns, levels)
    if "Spectrum" in kinds:
        found["spectrum"] = _spectrum(columns)
        found["explained"] = [
            _explained(columns, measurement) for measurement in kinds["Draws"] if measurement["draws"] >= 10
        ]
    if "Curvature" in kinds:
        found["curvature"] = [
            {**{key: m[key] for key in ("name", "step", "draws")}, **_spread(columns[m["name"]])}
            for m in kinds["Curvature"]
        ]
    for measurement in kinds.get("Smoothed", []):
        values = columns[f"{measurement['name']}/value"]
        found["smoothed"] = {"sigma": measurement["sigma"], **_spread(values)}
    for measurement in kinds.get("Bounds", []):
        found["bounds"] = _bounds(columns, measurement)
    for measurement in kinds.get("Certificates", []):
        found["certificates"] = _certificates(columns, measurement)
    if "Attack" in kinds:
        found["attacks"], found["warnings"] = _attacks(columns, kinds["Attack"])
        found["without_gradient"] = _without_gradient(columns)
    if "Features" in kinds and classifier is not None:
        found["features"] = _features(columns, kinds["Features"][0], classifier)
    return found


def right_share(columns: Columns, name: str) -> np.ndarray:
    """float64 (N,): the share of an image's draws of one setting that are classified rightly."""
    return (columns[f"{name}/prediction"] == columns["label"][:, None]).mean(1)


def _setting(columns: Columns, measurement: dict[str, Any]) -> dict[str, Any]:
    name, draws = measurement["name"], measurement["draws"]
    share, prediction = right_share(columns, name), columns[f"{name}/prediction"]
    error = float(share.std(ddof=1) / math.sqrt(len(share))) if len(share) > 1 else float("nan")
    counts = np.rint(share * draws).astype(int)
    confidence, nll, brier = (
        torch.from_numpy(columns[f"{name}/{part}"]).flatten() for part in ("confidence", "nll", "brier")
    )
    right = torch.from_numpy(prediction == columns["label"][:, None]).flatten()
    points = reliability(confidence, right)
    labels = columns["label"]
    return {
        **measurement,
        "accuracy": float(share.mean()),
        "standard_error": _number(error),
        "survival": np.bincount(counts, minlength=draws + 1).tolist(),
        "flips": float((prediction != columns["clean/prediction"]).mean()),
        "classes": [_number(share[labels == label].mean()) for label in range(int(labels.max()) + 1)]
        if len(labels) else [],
        "calibration": _numbers(calibration_of(confidence, right, nll, brier)),
        "reliability": [
            {"images": int(n), "confidence": float(c), "accuracy": float(a)}
            for n, c, a in zip(*points, strict=True)
            if n
        ],
    }  # fmt: skip


def _tolerance(columns: Columns, levels: list[dict[str, Any]]) -> dict[str, Any]:
    """Quartiles over images of the Gaussian noise at which half of an image's draws are right; None beyond the last."""
    levels = sorted(levels, key=lambda m: m["parameters"]["std"])
    draws = min(m["draws"] for m in levels)
    label = columns["label"][:, None]
    counts = [(columns[f"{m['name']}/prediction"][:, :draws] == label).sum(1) for m in levels]
    clean = torch.from_numpy(right_share(columns, "clean") > 0)
    scales = [m["parameters"]["std"] for m in levels]
    found = tolerance_of(clean, torch.from_numpy(np.stack(counts, 1)), scales, draws).scale.sort().values
    quartiles = {name: found[int(share * (len(found) - 1))] for name, share in QUARTILES.items()}
    return {"scales": scales, "draws": draws, **{name: _number(value) for name, value in quartiles.items()}}


def _spectrum(columns: Columns) -> dict[str, Any]:
    values = columns["spectrum"].astype(np.float64)
    return {"top": _spread(values[:, 0]), "trace": _spread(values.sum(1)), "squared norm": _spread((values**2).sum(1))}


def _spread(values: np.ndarray) -> dict[str, float | None]:
    values = values.astype(np.float64)
    low, median, high = np.quantile(values, [0.05, 0.5, 0.95])
    return {"mean": float(values.mean()), "median": float(median), "low": float(low), "high": float(high)}


def _explained(columns: Columns, measurement: dict[str, Any]) -> dict[str, Any]:
    """Curvature ||H||_F^2 against survival, per image and by groups of equal count, the group of 0 included."""
    name, draws = measurement["name"], measurement["draws"]
    counts = np.rint(right_share(columns, name) * draws)
    curvature = (columns["spectrum"].astype(np.float64) ** 2).sum(1)
    logarithm = np.log10(curvature + 1e-12)
    controls = [columns["clean/confidence"][:, 0], columns["clean/nll"][:, 0], columns["gradient"]]
    if "features/clean boundary" in columns:
        controls.append(columns["features/clean boundary"])
    given = np.column_stack([np.nan_to_num(np.asarray(part, dtype=np.float64), posinf=1e9) for part in controls])
    groups = [
        {"count": int(k), "images": int((counts == k).sum()), "curvature": float(curvature[counts == k].mean())}
        for k in np.unique(counts)
    ]
    means = correlation([g["count"] for g in groups], [g["curvature"] for g in groups])
    return {
        "name": name,
        "draws": draws,
        "groups": groups,
        "of groups": _number(means.pearson),
        "per image": _numbers(correlation(curvature, counts)),
        "per image, log": _numbers(correlation(logarithm, counts)),
        "given margin, confidence and gradient": _numbers(correlation(logarithm, counts, given)),
    }


def _bounds(columns: Columns, measurement: dict[str, Any]) -> dict[str, Any]:
    name = measurement["name"]
    parts = {
        part: columns[f"{name}/{part}"].astype(np.float64)
        for part in ("displacement", "linear", "top", "top_bound", "trace", "trace_bound")
    }
    pairs = {"displacement": "linear", "top": "top_bound", "trace": "trace_bound"}
    slack = {value: _spread(parts[value] / np.maximum(parts[bound], 1e-30)) for value, bound in pairs.items()}
    return {
        "sigma": measurement["sigma"], "means": {k: float(v.mean()) for k, v in parts.items()}, "ratios": slack
    }  # fmt: skip


def _certificates(columns: Columns, measurement: dict[str, Any]) -> dict[str, Any]:
    name = measurement["name"]
    taken = columns[f"{name}/prediction"] != -2
    prediction, radius = columns[f"{name}/prediction"][taken], columns[f"{name}/radius"][taken].astype(np.float64)
    right = prediction == columns["label"][taken]
    largest = float(radius.max()) if len(radius) else 0.0
    curve = [{"radius": float(r), "accuracy": float((right & (radius >= r)).mean())}
             for r in np.linspace(0, largest * 1.02, RADII)] if len(radius) else []  # fmt: skip
    return {
        **measurement, "images": int(taken.sum()), "abstained": int((prediction == -1).sum()),
        "mean radius": _number(np.where(right, radius, 0).mean()) if len(radius) else None, "curve": curve,
    }  # fmt: skip


def _attacks(columns: Columns, measurements: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Accuracies under attack with what their audits found, and what casts doubt on them."""
    results, warnings = [], []
    smaller = {norm: float(right_share(columns, "clean").mean()) for norm in ("linf", "l2")}
    for m in sorted(measurements, key=lambda m: (m["norm"], m["epsilon"])):
        name = m["name"]
        right, fewer, searched, still = (
            float(columns[f"{name}/{part}"].mean()) for part in ("right", "fewer", "searched", "still")
        )
        longest, before = float(columns[f"{name}/length"].max()), smaller[m["norm"]]
        results.append({
            **m, "accuracy": right, "fewer_steps": fewer, "smaller_radius": before, "searched": searched,
            "still": still, "longest": longest, "outside": longest > m["epsilon"] * (1 + 1e-4) + 1e-6,
        })  # fmt: skip
        doubts = {
            f"gradients may be masked: a black-box search leaves {searched:.1%} right, the attack {right:.1%}":
                searched < right,
            f"a quarter of the steps leaves {fewer:.1%} right, the attack {right:.1%}": fewer < right,
            "more images are right than at a smaller radius": right > before,
            "an attacked image lies outside of the ball": results[-1]["outside"],
            f"radius 0 moves {1 - still:.1%} of the images": still < 1,
        }  # fmt: skip
        warnings += [f"{name}: {doubt}" for doubt, holds in doubts.items() if holds]
        smaller[m["norm"]] = right
    if unmoved := _without_gradient(columns):
        warnings.append(f"the loss of {unmoved} of {len(columns['id'])} images has no gradient")
    return results, warnings


def _without_gradient(columns: Columns) -> int:
    return int((columns["gradient"] == 0).sum()) if "gradient" in columns else 0


def _features(columns: Columns, measurement: dict[str, Any], classifier: tuple[Tensor, Tensor | None]) -> dict:
    name = measurement["name"]
    clean, noisy, labels = (torch.from_numpy(columns[part]) for part in (f"{name}/clean", f"{name}/noisy", "label"))
    weight, bias = classifier[0].detach().cpu(), None if classifier[1] is None else classifier[1].detach().cpu()
    found = feature_statistics(clean, noisy, labels, weight, bias)
    return {
        "sigma": measurement["sigma"],
        **{part: [_number(value) for value in values.tolist()] for part, values in found._asdict().items()},
        "boundary of images": _spread(columns[f"{name}/clean boundary"]),
        "boundary of noisy images": _spread(columns[f"{name}/noisy boundary"]),
    }


def _numbers(found: Any) -> dict[str, float | None]:
    return {name: _number(value) for name, value in found._asdict().items()}


def _number(value: Any) -> float | None:
    """A number that JSON has; None for nan and infinity."""
    value = float(value)
    return value if math.isfinite(value) else None
