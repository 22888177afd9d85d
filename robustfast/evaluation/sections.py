"""Sections of the page about evaluated models: each yields its figures, as SVG, and its tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from robustfast.evaluation import figures
from robustfast.evaluation.evaluated import Evaluated, Models, corruption_errors, mean_of, mean_std
from robustfast.evaluation.features import principal_components, tsne
from robustfast.evaluation.figures import Series
from robustfast.evaluation.summary import QUARTILES

PROJECTED, EMBEDDED = 400, 200  # images in a projection, and in t-SNE, which takes a second for as many
CLASS_BARS, CLASS_COLUMNS = 20, 30  # classes at the most in a figure of bars, and in a table

Part = str | dict[str, Any]  # a figure, or a table


def sections(models: Models) -> Iterator[dict[str, Any]]:
    """The sections that have something to show, for the template."""
    for key, section in SECTIONS.items():
        parts = list(section(models))
        charts = [part for part in parts if isinstance(part, str)]
        if parts:
            yield {
                "key": key,
                "figures": [{"svg": chart, "caption": _caption(chart)} for chart in charts],
                "tables": [part for part in parts if not isinstance(part, str)],
            }


def accuracy(models: Models) -> Iterator[Part]:
    points = models.noise_levels()
    right, flipped = (
        [_against_noise(models, group, key, part) for group in models.groups]
        for key, part in (("accuracy", points), ("flips", points[1:]))
    )
    marks = [(models.sigma, "in training")] if any(abs(level - models.sigma) < 1e-9 for level, _ in points) else []
    label = "σ of the noise"
    yield figures.lines(right, label, "accuracy, %", title="Accuracy against noise", percent=True, x_marks=marks)
    yield figures.lines(flipped, label, "flipped, %", title="Flip rate against noise", percent=True)


def survival(models: Models) -> Iterator[Part]:
    for setting in [models.noise, *(s["name"] for s in models.settings("uniform") if s["draws"] >= 10)]:
        series = []
        for group in models.groups:
            counts = models.values(group, setting, "survival")
            if counts:
                total = np.sum(np.asarray(counts, dtype=float), axis=0)
                at_least = (total[::-1].cumsum()[::-1] / total.sum()).tolist()
                series.append(Series(group, models.color(group), list(range(len(at_least))), at_least))
        if series:
            yield figures.lines(series, "noisy copies", "images with at least so many right, %",
                                title=f"Survival, {setting}", percent=True)  # fmt: skip
    title = "Noise tolerance: the σ at which half of an image's copies are right, quartiles over the images"
    rows = [
        [m.group, *(_beyond(m.summary["tolerance"], name) for name in QUARTILES)] for m in models.firsts("tolerance")
    ]
    yield from _table(title, ["", *QUARTILES], rows)


def curvature(models: Models) -> Iterator[Part]:
    yield from _explained(models)
    steps = [
        _series(m.group, models.color(m.group), sorted((c["step"], c["mean"]) for c in m.summary["curvature"]))
        for m in models.firsts("curvature")
    ]
    if steps:
        yield figures.lines(steps, "step h", "published estimate", log_y=True, log_x=True,
                            title="The published estimate depends on its step")  # fmt: skip
    rows = [
        [m.group, *(f"{m.summary['bounds']['ratios'][key]['median']:.2g}" for key in ("displacement", "top", "trace"))]
        for m in models.firsts("bounds")
    ]
    title = "Theory as measurement: medians over images of a quantity over what the theory sets beside it"
    yield from _table(title, ["", "E‖f(x+σε) − f(x)‖² / σ²‖J‖²", "λ max / bound", "tr H / bound"], rows)


def _explained(models: Models) -> Iterator[Part]:
    """Curvature against survival, over all seeds of a group."""
    series, rows = [], []
    for group in models.groups:
        found = [e for m in models.of(group, "explained") for e in m.summary["explained"] if e["name"] == models.noise]
        if not found:
            continue
        total = _merged([e["groups"] for e in found])
        points = [(g["count"], g["curvature"]) for g in total]
        series.append(_series(group, models.color(group), points))
        spectrum = [m.summary["spectrum"] for m in models.of(group, "spectrum")]
        rows.append([
            group,
            f"{_geometric([s['top']['median'] for s in spectrum]):.3g}",
            f"{_geometric([s['squared norm']['median'] for s in spectrum]):.3g}",
            _signed(mean_of(e["of groups"] for e in found)),
            _signed(mean_of(e["per image"]["pearson"] for e in found)),
            _signed(mean_of(e["per image"]["spearman"] for e in found)),
            _signed(mean_of(e["given margin, confidence and gradient"]["spearman"] for e in found)),
        ])  # fmt: skip
    if series:
        yield figures.lines(series, "right of ten draws", "mean curvature ‖H‖²", log_y=True,
                            title="Curvature against survival")  # fmt: skip
    head = [
        "", "λ max", "‖H‖²", "r of groups", "r per image", "ρ per image", "ρ given margin, confidence, gradient"
    ]  # fmt: skip
    title = "Curvature of the loss (exact) against survival: medians over images, and correlations"
    yield from _table(title, head, rows)


def perturbations(models: Models) -> Iterator[Part]:
    names = list(dict.fromkeys(
        s["name"] for m in models.models for s in m.summary["settings"]
        if s["perturbation"] and s["severity"] is not None
    ))  # fmt: skip
    if not names:
        return
    present = [group for group in models.groups if models.values(group, names[0])]
    rows = [[name, *(_percent(mean_std(models.values(group, name))[0]) for group in present)] for name in names]
    baseline = models.baseline if models.baseline in present else present[0]
    errors = corruption_errors({group: models.of(group) for group in present}, baseline)
    for place, name in enumerate(("mCE", "relative mCE", "mFR")):
        rows.append([name, *(_percent(errors[group][place]) for group in present)])
    yield from _table("Accuracy under each perturbation", ["", *present], rows)


def certificates(models: Models) -> Iterator[Part]:
    series, rows = [], []
    for m in models.firsts("certificates"):
        found = m.summary["certificates"]
        points = [(p["radius"], p["accuracy"]) for p in found["curve"]]
        series.append(_series(m.group, models.color(m.group), points))
        rows.append([m.group, str(found["images"]), str(found["abstained"]), f"{found['mean radius']:.3f}",
                     f"{found['n']:,}", f"{found['sigma']:g}", f"{found['alpha']:g}"])  # fmt: skip
    if series:
        yield figures.lines(series, "certified L2 radius", "certified accuracy, %", percent=True,
                            title="Certified accuracy")  # fmt: skip
    yield from _table("Certificates", ["", "images", "abstained", "mean radius", "draws", "σ", "α"], rows)


def attacks(models: Models) -> Iterator[Part]:
    for norm, label in (("linf", "L∞"), ("l2", "L2")):
        series = []
        for m in models.firsts("attacks"):
            points = [(a["epsilon"], a["accuracy"]) for a in m.summary["attacks"] if a["norm"] == norm]
            clean = next(s["accuracy"] for s in m.summary["settings"] if s["name"] == "clean")
            if points:
                series.append(_series(m.group, models.color(m.group), [(0.0, clean), *points]))
        if series:
            yield figures.lines(series, f"{label} radius ε", "accuracy, %", percent=True,
                                title=f"Accuracy under attack, {label}")  # fmt: skip
    head = [
        "", "right, %", "¼ of the steps", "smaller radius", "black box", "radius 0",
        "move / ε", "no gradient",
    ]  # fmt: skip
    rows = [_audited(m, found) for m in models.firsts("attacks") for found in m.summary["attacks"]]
    yield from _table("Audit of the attacks: what casts doubt on an accuracy is marked", head, rows)


def _audited(m: Evaluated, found: Mapping[str, Any]) -> list[Any]:
    right, unmoved = found["accuracy"], m.summary["without_gradient"]
    return [
        f"{m.group}, {found['name']}",
        _percent(right),
        {"text": _percent(found["fewer_steps"]), "mark": found["fewer_steps"] < right},
        {"text": _percent(found["smaller_radius"]), "mark": found["smaller_radius"] < right},
        {"text": _percent(found["searched"]), "mark": found["searched"] < right},
        {"text": _percent(found["still"]), "mark": found["still"] < 1},
        {"text": f"{found['longest'] / found['epsilon']:.3f}", "mark": found["outside"]},
        {"text": f"{unmoved} of {m.summary['images']}", "mark": unmoved > 0},
    ]


def calibration(models: Models) -> Iterator[Part]:
    rows = []
    for setting in ("clean", models.noise):
        series = []
        for m in models.firsts():
            found = next((s for s in m.summary["settings"] if s["name"] == setting), None)
            if found is None:
                continue
            points = [(p["confidence"], p["accuracy"]) for p in found["reliability"] if p["images"] >= 10]
            if points:
                series.append(_series(m.group, models.color(m.group), points))
            numbers = [mean_of(v[key] for v in models.values(m.group, setting, "calibration"))  # type: ignore[index]
                       for key in ("ece", "adaptive_ece", "brier", "nll", "aurc")]  # fmt: skip
            rows.append([f"{m.group}, {setting}", *("–" if v is None else f"{v:.3f}" for v in numbers)])
        yield figures.lines(series, "confidence", "accuracy, %", title=f"Reliability, {setting}",
                            percent=True, diagonal=True, y_range=(0, 1))  # fmt: skip
    yield from _table("Calibration errors (0 is best)", ["", "ECE", "adaptive ECE", "Brier", "NLL", "AURC"], rows)


def features(models: Models) -> Iterator[Part]:
    for m in models.firsts("features"):
        yield from _projections(m)
    titles = {
        "compactness": "Distance of clean features from their centroid",
        "alignment": "Distance of noisy features from the clean centroid",
        "boundary": "Distance of the centroid from the nearest boundary",
    }
    for key, title in titles.items():
        series = [
            _series(m.group, models.color(m.group), [(i, v or 0.0) for i, v in enumerate(m.summary["features"][key])])
            for m in models.firsts("features")
        ]
        if series and len(models.classes) <= CLASS_BARS:
            yield figures.bars([str(name)[:8] for name in models.classes], series, "distance", title=title)


def _projections(m: Evaluated) -> Iterator[Part]:
    """Features on two principal components and, where scikit-learn is installed, embedded by t-SNE."""
    clean, noisy = (torch.from_numpy(m.columns[f"features/{view}"][:PROJECTED]) for view in ("clean", "noisy"))
    if clean.shape[0] <= 2 or clean.shape[1] <= 1:
        return
    found = principal_components(clean, noisy)
    labels = m.columns["label"][:PROJECTED].tolist()
    title = f"{m.group}: two principal components, {found.kept:.0%} of the variance"
    yield figures.scatter(found.clean.tolist(), found.noisy.tolist(), labels, title)
    if find_spec("sklearn"):
        found = tsne(clean[:EMBEDDED], noisy[:EMBEDDED])
        yield figures.scatter(found.clean.tolist(), found.noisy.tolist(), labels[:EMBEDDED], f"{m.group}: t-SNE")


def classes(models: Models) -> Iterator[Part]:
    rows: list[list[Any]] = []
    for group in models.groups:
        found = models.values(group, models.noise, "classes")
        if found:
            means = [mean_of(column) for column in zip(*found, strict=True)]  # type: ignore[call-overload]
            low = min((v for v in means if v is not None), default=None)
            rows.append([group, *({"text": _percent(v), "mark": v == low} for v in means)])
    if len(models.classes) <= CLASS_COLUMNS:
        yield from _table("Accuracy by class", ["", *map(str, models.classes)], rows)


# By the key of its heading and words in the template.
SECTIONS: dict[str, Callable[[Models], Iterator[Part]]] = {
    section.__name__: section
    for section in (
        accuracy, survival, curvature, perturbations, certificates, attacks, calibration, features, classes
    )
}  # fmt: skip


def _against_noise(models: Models, group: str, key: str, settings: Sequence[tuple[float, str]]) -> Series:
    """A number of each of these settings against the noise: mean and deviation over the seeds that have it."""
    found = [(level, values) for level, name in settings if (values := models.values(group, name, key))]
    cells = [mean_std(values) for _, values in found]
    return Series(
        group, models.color(group), [level for level, _ in found], [mean for mean, _ in cells],
        [mean - std for mean, std in cells], [mean + std for mean, std in cells],
    )  # fmt: skip


def _series(label: str, color: int, points: Sequence[tuple[float, float]]) -> Series:
    return Series(label, color, [x for x, _ in points], [y for _, y in points])


def _caption(svg: str) -> str:
    """The title that the figure carries, already escaped."""
    return svg.partition("<title>")[2].partition("</title>")[0]


def _table(caption: str, head: list[str], rows: list[list[Any]]) -> Iterator[Part]:
    """A table, where it has rows: a cell is its text, or its text and whether it is marked."""
    if rows:
        cells = [[cell if isinstance(cell, dict) else {"text": cell, "mark": False} for cell in row] for row in rows]
        yield {"caption": caption, "head": head, "rows": cells}


def _merged(rows: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Groups of equal survival of several seeds as one: means weighted by images."""
    merged = []
    for count in sorted({g["count"] for row in rows for g in row}):
        of_count = [g for row in rows for g in row if g["count"] == count]
        images = sum(g["images"] for g in of_count)
        merged.append({"count": count, "curvature": sum(g["images"] * g["curvature"] for g in of_count) / images})
    return merged


def _geometric(values: Sequence[float]) -> float:
    return float(np.exp(np.log(np.maximum(values, 1e-300)).mean()))


def _percent(value: float | None) -> str:
    return "–" if value is None or value != value else f"{100 * value:.1f}"


def _beyond(tolerance: Mapping[str, Any], quartile: str) -> str:
    value = tolerance[quartile]
    return f"over {tolerance['scales'][-1]:g}" if value is None else f"{value:.3f}"


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2f}".replace("-", "−")
