"""One self-contained page about evaluated models: tables and inline SVG, nothing fetched, no script."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np
import torch

from robustfast import disk
from robustfast.evaluation import figures
from robustfast.evaluation.features import principal_components
from robustfast.evaluation.figures import Series
from robustfast.evaluation.intervals import paired
from robustfast.evaluation.summary import QUARTILES, right_share
from robustfast.evaluation.table import Columns
from robustfast.extras import needed

BASELINE = "normal"
PROJECTED, WORST = 400, 10  # images in a projection, and of the worst shown


class Evaluated(NamedTuple):
    """One evaluated model: its group (the method), seed, table, and :func:`robustfast.evaluation.summary.summarise`."""

    name: str
    group: str
    seed: int
    columns: Columns
    about: dict[str, Any]
    summary: dict[str, Any]


def write(path: Path, models: Sequence[Evaluated], **details: Any) -> None:
    """Put the page of :func:`render` in place in one step."""
    disk.write(path, render(models, **details).encode())


def render(
    models: Sequence[Evaluated],
    *,
    title: str,
    classes: Sequence[str],
    provenance: Mapping[str, str],
    sigma: float,
    pictures: Mapping[int, np.ndarray] | None = None,
) -> str:
    """The page as HTML.

    Args:
        models: at least one; those of one group are its seeds, groups keep their order.
        title: of the page.
        classes: names of the classes.
        provenance: what the page says about where its numbers come from.
        sigma: of the noise in training, which the figures are about.
        pictures: images (C, H, W) in [0, 1] by id, to show the worst ones of :func:`worst_images`.
    """
    with needed("evaluate"):
        from jinja2 import Environment, StrictUndefined
    groups = list(dict.fromkeys(model.group for model in models))
    view = _View(models, groups, sigma)
    template = resources.files("robustfast.evaluation").joinpath("templates/report.html.j2").read_text()
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        title=title,
        groups=groups,
        marks=figures.MARKS,
        baseline=view.baseline,
        classes=classes,
        provenance=provenance,
        sigma=sigma,
        images=models[0].summary["images"],
        models=len(models),
        seeds={group: sum(model.group == group for model in models) for group in groups},
        accuracy=view.accuracy_table(),
        differences=(differences := view.differences()),
        seeds_paired=any(row["seeds"] for row in differences),
        sections=[section for section in view.sections(classes) if section["figures"] or section["tables"]],
        worst=view.worst(classes, pictures or {}),
        warnings=[f"{model.name}: {text}" for model in models for text in model.summary.get("warnings", [])],
    )


def worst_images(columns: Columns, setting: str, count: int = WORST) -> np.ndarray:
    """The rows of the images with the fewest right draws of a setting, by mean cross entropy among equals."""
    return np.lexsort((-columns[f"{setting}/nll"].mean(1), right_share(columns, setting)))[:count]


class _View:
    """The models' numbers arranged for tables and figures."""

    def __init__(self, models: Sequence[Evaluated], groups: list[str], sigma: float) -> None:
        self.models, self.groups, self.sigma = models, groups, sigma
        self.baseline = BASELINE if BASELINE in groups else groups[0]
        self.noise = f"gaussian {sigma:g}"

    def of(self, group: str, part: str | None = None) -> list[Evaluated]:
        return [m for m in self.models if m.group == group and (part is None or part in m.summary)]

    def values(self, group: str, setting: str, key: str = "accuracy") -> list[float]:
        return [s[key] for m in self.of(group) for s in m.summary["settings"] if s["name"] == setting]

    def settings(self, perturbation: str | None) -> list[dict[str, Any]]:
        found = {s["name"]: s for m in self.models for s in m.summary["settings"] if s["perturbation"] == perturbation}
        return list(found.values())

    def curve_settings(self) -> list[tuple[float, str]]:
        noise = [(s["parameters"]["std"], s["name"]) for s in self.settings("gaussian") if s["severity"] is None]
        return [(0.0, "clean"), *sorted(noise)]

    def accuracy_table(self) -> dict[str, Any]:
        points = self.curve_settings()
        cells = {group: [_mean_std(self.values(group, name)) for _, name in points] for group in self.groups}
        best = [
            [
                len(self.groups) > 1
                and all(len(self.of(g)) > 1 for g in self.groups)  # one seed has no spread to carry a winner
                and all(cell[0] - cell[1] > other[i][0] + other[i][1] for g, other in cells.items() if g != group)
                for i, cell in enumerate(cells[group])
            ]
            for group in self.groups
        ]
        return {
            "head": ["clean", *(f"{level:g}" for level, _ in points[1:])],
            "rows": [
                {"name": group, "cells": [{"mean": m, "std": s, "best": marks[i]} for i, (m, s) in enumerate(of)]}
                for (group, of), marks in zip(cells.items(), best, strict=True)
            ],
        }  # fmt: skip

    def differences(self) -> list[dict[str, Any]]:
        """Each group against the baseline: over the images of one seed, and over seeds."""
        rows = []
        for group in self.groups:
            if group == self.baseline:
                continue
            for setting in ("clean", self.noise):
                pairs = [
                    (m, other)
                    for m in self.of(group)
                    for other in self.of(self.baseline)
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

    def color(self, group: str) -> int:
        return self.groups.index(group) % 6

    def sections(self, classes: Sequence[str]) -> list[dict[str, Any]]:
        return [
            self.accuracy_section(),
            self.survival_section(),
            self.curvature_section(),
            self.perturbation_section(),
            self.certificate_section(),
            self.attack_section(),
            self.calibration_section(),
            self.feature_section(classes),
            self.class_section(classes),
        ]

    def curve(self, group: str, key: str, settings: Sequence[tuple[float, str]]) -> Series:
        """A number of each of these settings against the noise: mean and deviation over the seeds that have it."""
        found = [(level, values) for level, name in settings if (values := self.values(group, name, key))]
        cells = [_mean_std(values) for _, values in found]
        return Series(
            group, self.color(group), [level for level, _ in found], [mean for mean, _ in cells],
            [mean - std for mean, std in cells], [mean + std for mean, std in cells],
        )  # fmt: skip

    def accuracy_section(self) -> dict[str, Any]:
        points = self.curve_settings()
        accuracy, flips = (
            [self.curve(group, key, part) for group in self.groups]
            for key, part in (("accuracy", points), ("flips", points[1:]))
        )
        marks = [(self.sigma, "in training")] if any(abs(level - self.sigma) < 1e-9 for level, _ in points) else []
        label = "σ of the noise"
        charts = [
            figures.lines(accuracy, label, "accuracy, %", title="Accuracy against noise", percent=True, x_marks=marks),
            figures.lines(flips, label, "flipped, %", title="Flip rate against noise", percent=True),
        ]
        return _section("accuracy", charts)

    def survival_section(self) -> dict[str, Any]:
        charts = []
        wanted = [self.noise, *(s["name"] for s in self.settings("uniform") if s["draws"] >= 10)]
        for setting in wanted:
            series = []
            for group in self.groups:
                rows = self.values(group, setting, "survival")
                if rows:
                    total = np.sum(np.asarray(rows, dtype=float), axis=0)
                    at_least = (total[::-1].cumsum()[::-1] / total.sum()).tolist()
                    series.append(Series(group, self.color(group), list(range(len(at_least))), at_least))
            if series:
                charts.append(figures.lines(series, "noisy copies", "images with at least so many right, %",
                                            title=f"Survival, {setting}", percent=True))  # fmt: skip
        quartiles = [
            [group, *(_beyond(m.summary["tolerance"], name) for name in QUARTILES)]
            for group in self.groups
            for m in self.of(group, "tolerance")[:1]
        ]
        title = "Noise tolerance: the σ at which half of an image's copies are right, quartiles over the images"
        return _section("survival", charts, [_table(title, ["", *QUARTILES], quartiles)] if quartiles else [])

    def curvature_section(self) -> dict[str, Any]:
        charts, tables = [], []
        series, rows = [], []
        for group in self.groups:
            found = [e for m in self.of(group, "explained") for e in m.summary["explained"] if e["name"] == self.noise]
            if not found:
                continue
            total = _merged([e["groups"] for e in found])
            series.append(
                Series(group, self.color(group), [g["count"] for g in total], [g["curvature"] for g in total])
            )
            partial = "given margin, confidence and gradient"
            spectrum = [m.summary["spectrum"] for m in self.of(group, "spectrum")]
            rows.append([
                group,
                f"{_geometric([s['top']['median'] for s in spectrum]):.3g}",
                f"{_geometric([s['squared norm']['median'] for s in spectrum]):.3g}",
                _signed(_mean_of(e["of groups"] for e in found)),
                _signed(_mean_of(e["per image"]["pearson"] for e in found)),
                _signed(_mean_of(e["per image"]["spearman"] for e in found)),
                _signed(_mean_of(e[partial]["spearman"] for e in found)),
            ])  # fmt: skip
        if series:
            charts.append(figures.lines(series, "right of ten draws", "mean curvature ‖H‖²", log_y=True,
                                        title="Curvature against survival"))  # fmt: skip
            tables.append(_table(
                "Curvature of the loss (exact) against survival: medians over images, and correlations",
                ["", "λ max", "‖H‖²", "r of groups", "r per image", "ρ per image",
                 "ρ given margin, confidence, gradient"],
                rows,
            ))  # fmt: skip
        steps = []
        for group in self.groups:
            for m in self.of(group, "curvature")[:1]:
                points = sorted((c["step"], c["mean"]) for c in m.summary["curvature"])
                steps.append(_series(group, self.color(group), points))
        if steps:
            charts.append(figures.lines(steps, "step h", "published estimate", log_y=True, log_x=True,
                                        title="The published estimate depends on its step"))  # fmt: skip
        bounds = [
            [
                group,
                *(f"{m.summary['bounds']['ratios'][key]['median']:.2g}" for key in ("displacement", "top", "trace")),
            ]
            for group in self.groups
            for m in self.of(group, "bounds")[:1]
        ]
        if bounds:
            tables.append(_table(
                "Theory as measurement: medians over images of a quantity over what the theory sets beside it",
                ["", "E‖f(x+σε) − f(x)‖² / σ²‖J‖²", "λ max / bound", "tr H / bound"], bounds,
            ))  # fmt: skip
        return _section(
            "curvature",
            charts,
            tables,
        )

    def perturbation_section(self) -> dict[str, Any]:
        names = list(dict.fromkeys(
            s["name"] for m in self.models for s in m.summary["settings"]
            if s["perturbation"] and s["severity"] is not None
        ))  # fmt: skip
        if not names:
            return _section("perturbations", [])
        present = [group for group in self.groups if self.values(group, names[0])]
        rows = [[name, *(_percent(_mean_std(self.values(group, name))[0]) for group in present)] for name in names]
        errors = corruption_errors(
            {group: self.of(group) for group in present}, self.baseline if self.baseline in present else present[0]
        )
        rows.append(["mCE", *(_percent(errors[group][0]) for group in present)])
        rows.append(["relative mCE", *(_percent(errors[group][1]) for group in present)])
        return _section(
            "perturbations",
            [],
            [_table("Accuracy under each perturbation", ["", *present], rows)],
        )

    def certificate_section(self) -> dict[str, Any]:
        series, rows = [], []
        for group in self.groups:
            for m in self.of(group, "certificates")[:1]:
                found = m.summary["certificates"]
                curve = found["curve"]
                series.append(
                    Series(group, self.color(group), [p["radius"] for p in curve], [p["accuracy"] for p in curve])
                )
                rows.append([group, str(found["images"]), str(found["abstained"]), f"{found['mean radius']:.3f}",
                             f"{found['n']:,}", f"{found['sigma']:g}", f"{found['alpha']:g}"])  # fmt: skip
        charts = []
        if series:
            charts.append(figures.lines(series, "certified L2 radius", "certified accuracy, %", percent=True,
                                        title="Certified accuracy"))  # fmt: skip
        return _section(
            "certificates",
            charts,
            [_table("Certificates", ["", "images", "abstained", "mean radius", "draws", "σ", "α"], rows)]
            if rows
            else [],
        )

    def attack_section(self) -> dict[str, Any]:
        present = [m for group in self.groups for m in self.of(group, "attacks")[:1]]
        charts = []
        for norm, label in (("linf", "L∞"), ("l2", "L2")):
            series = []
            for m in present:
                points = [(a["epsilon"], a["accuracy"]) for a in m.summary["attacks"] if a["norm"] == norm]
                clean = next(s["accuracy"] for s in m.summary["settings"] if s["name"] == "clean")
                if points:
                    series.append(_series(m.group, self.color(m.group), [(0.0, clean), *points]))
            if series:
                charts.append(figures.lines(series, f"{label} radius ε", "accuracy, %", percent=True,
                                            title=f"Accuracy under attack, {label}"))  # fmt: skip
        return _section(
            "attacks",
            charts,
        )

    def calibration_section(self) -> dict[str, Any]:
        charts, rows = [], []
        for setting in ("clean", self.noise):
            series = []
            for group in self.groups:
                for m in self.of(group)[:1]:
                    found = next((s for s in m.summary["settings"] if s["name"] == setting), None)
                    if found is None:
                        continue
                    points = [(p["confidence"], p["accuracy"]) for p in found["reliability"] if p["images"] >= 10]
                    if points:
                        series.append(_series(group, self.color(group), points))
                    numbers = [_mean_of(v[key] for v in self.values(group, setting, "calibration"))  # type: ignore[index]
                               for key in ("ece", "adaptive_ece", "brier", "nll", "aurc")]  # fmt: skip
                    rows.append([f"{group}, {setting}", *("–" if v is None else f"{v:.3f}" for v in numbers)])
            charts.append(figures.lines(series, "confidence", "accuracy, %", title=f"Reliability, {setting}",
                                        percent=True, diagonal=True, y_range=(0, 1)))  # fmt: skip
        return _section(
            "calibration",
            charts,
            [_table("Calibration errors (0 is best)", ["", "ECE", "adaptive ECE", "Brier", "NLL", "AURC"], rows)],
        )

    def feature_section(self, classes: Sequence[str]) -> dict[str, Any]:
        charts, bar_series = [], {"compactness": [], "alignment": [], "boundary": []}  # type: ignore[var-annotated]
        for group in self.groups:
            for m in self.of(group, "features")[:1]:
                chosen = slice(0, PROJECTED)
                clean, noisy = (torch.from_numpy(m.columns[f"features/{view}"][chosen]) for view in ("clean", "noisy"))
                if clean.shape[0] > 2 and clean.shape[1] > 1:
                    found = principal_components(clean, noisy)
                    labels = m.columns["label"][chosen].tolist()
                    title = f"{group}: two principal components, {found.kept:.0%} of the variance"
                    charts.append(figures.scatter(found.clean.tolist(), found.noisy.tolist(), labels, title))
                for name, held in bar_series.items():
                    held.append(
                        Series(
                            group,
                            self.color(group),
                            range(len(classes)),
                            [v or 0.0 for v in m.summary["features"][name]],
                        )
                    )
        projections = [{"svg": chart, "caption": _caption(chart)} for chart in charts]
        names = [str(name)[:8] for name in classes]
        titles = {
            "compactness": "Distance of clean features from their centroid",
            "alignment": "Distance of noisy features from the clean centroid",
            "boundary": "Distance of the centroid from the nearest boundary",
        }
        charts = [
            figures.bars(names, series, "distance", title=titles[key])
            for key, series in bar_series.items() if series and len(names) <= 20
        ]  # fmt: skip
        section = _section(
            "features",
            charts,
        )
        section["figures"] = projections + section["figures"]
        return section

    def class_section(self, classes: Sequence[str]) -> dict[str, Any]:
        if len(classes) > 30:
            return _section("classes", [])
        rows = []
        for group in self.groups:
            found = self.values(group, self.noise, "classes")
            if found:
                means = [_mean_of(column) for column in zip(*found, strict=True)]  # type: ignore[call-overload]
                low = min((v for v in means if v is not None), default=None)
                rows.append([group, *({"text": _percent(v), "mark": v == low} for v in means)])
        return _section(
            "classes",
            [],
            [_table("Accuracy by class", ["", *map(str, classes)], rows)] if rows else [],
        )

    def worst(self, classes: Sequence[str], pictures: Mapping[int, np.ndarray]) -> list[dict[str, Any]]:
        shown = []
        for group in self.groups:
            m = self.of(group)[0]
            if f"{self.noise}/prediction" not in m.columns:
                continue
            images = []
            for row in worst_images(m.columns, self.noise):
                id_ = int(m.columns["id"][row])
                if id_ not in pictures:
                    continue
                predictions = m.columns[f"{self.noise}/prediction"][row]
                taken_for = int(np.bincount(predictions).argmax())
                images.append({
                    "source": data_uri(pictures[id_]), "id": id_, "label": classes[int(m.columns["label"][row])],
                    "taken": classes[taken_for], "right": int((predictions == m.columns["label"][row]).sum()),
                    "draws": len(predictions),
                })  # fmt: skip
            if images:
                shown.append({"group": group, "images": images})
        return shown


def corruption_errors(groups: Mapping[str, Sequence[Evaluated]], baseline: str) -> dict[str, tuple[float, float]]:
    """(mCE, relative mCE) of each group against the baseline: Hendrycks and Dietterich 2019, equations 1 and 2.

    Of each perturbation the errors are summed over the severities that all models have, then divided by those of the
    baseline (relative: both less the clean error), then averaged over the perturbations. nan where the baseline makes
    no error. Models without perturbations count nowhere.
    """

    def errors(model: Evaluated) -> dict[tuple[str, int], float]:
        return {
            (setting["perturbation"], setting["severity"]): 1 - setting["accuracy"]
            for setting in model.summary["settings"]
            if isinstance(setting["severity"], int)
        }

    found = {group: [m for m in models if errors(m)] for group, models in groups.items()}
    shared = set.intersection(*(set(errors(m)) for models in found.values() for m in models))
    kinds = sorted({kind for kind, _ in shared})

    def of(group: str, kind: str | None) -> float:
        if kind is None:
            return fmean(1 - s["accuracy"] for m in found[group] for s in m.summary["settings"] if s["name"] == "clean")
        return fmean(
            error for m in found[group] for key, error in errors(m).items() if key in shared and key[0] == kind
        )

    def ratio(group: str, kind: str, less: bool) -> float:
        mine, base = (of(g, kind) - (of(g, None) if less else 0.0) for g in (group, baseline))
        return mine / base if base else float("nan")

    return {
        group: (fmean(ratio(group, kind, False) for kind in kinds), fmean(ratio(group, kind, True) for kind in kinds))
        for group in groups
    }


def data_uri(image: np.ndarray) -> str:
    """An image (C, H, W) in [0, 1], grey or RGB, as a PNG within the page."""
    with needed("evaluate"):
        from PIL import Image
    pixels = (np.asarray(image) * 255).round().clip(0, 255).astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(content, "png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


def _section(key: str, charts: Sequence[str], tables: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    return {
        "key": key, "figures": [{"svg": chart, "caption": _caption(chart)} for chart in charts],
        "tables": list(tables),
    }  # fmt: skip


def _series(label: str, color: int, points: Sequence[tuple[float, float]]) -> Series:
    return Series(label, color, [x for x, _ in points], [y for _, y in points])


def _caption(svg: str) -> str:
    """The title that the figure carries, already escaped."""
    return svg.partition("<title>")[2].partition("</title>")[0]


def _table(caption: str, head: list[str], rows: list[list[Any]]) -> dict[str, Any]:
    rows = [[cell if isinstance(cell, dict) else {"text": cell, "mark": False} for cell in row] for row in rows]
    return {"caption": caption, "head": head, "rows": rows}


def _merged(rows: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Groups of equal survival of several seeds as one: means weighted by images."""
    merged = []
    for count in sorted({g["count"] for row in rows for g in row}):
        of_count = [g for row in rows for g in row if g["count"] == count]
        images = sum(g["images"] for g in of_count)
        merged.append({"count": count, "curvature": sum(g["images"] * g["curvature"] for g in of_count) / images})
    return merged


def _mean_std(values: Sequence[float]) -> tuple[float, float]:
    if not values:
        return float("nan"), 0.0
    return fmean(values), stdev(values) if len(values) > 1 else 0.0


def _mean_of(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _geometric(values: Sequence[float]) -> float:
    return float(np.exp(np.log(np.maximum(values, 1e-300)).mean()))


def _percent(value: float | None) -> str:
    return "–" if value is None or value != value else f"{100 * value:.1f}"


def _beyond(tolerance: Mapping[str, Any], quartile: str) -> str:
    value = tolerance[quartile]
    return f"over {tolerance['scales'][-1]:g}" if value is None else f"{value:.3f}"


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2f}".replace("-", "−")
