"""One self-contained page about evaluated models: tables and inline SVG, nothing fetched, no script."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from robustfast import disk
from robustfast.evaluation import figures
from robustfast.evaluation.evaluated import Evaluated, Models, accuracy_table, differences
from robustfast.evaluation.sections import sections
from robustfast.evaluation.summary import right_share
from robustfast.evaluation.table import Columns
from robustfast.extras import needed

WORST = 10  # images shown


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
    shown = Models(models, sigma, classes)
    template = resources.files("robustfast.evaluation").joinpath("templates/report.html.j2").read_text()
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        title=title,
        groups=shown.groups,
        marks=figures.MARKS,
        baseline=shown.baseline,
        classes=classes,
        provenance=provenance,
        sigma=sigma,
        images=models[0].summary["images"],
        models=len(models),
        seeds={group: sum(model.group == group for model in models) for group in shown.groups},
        accuracy=accuracy_table(shown),
        differences=(rows := differences(shown)),
        seeds_paired=any(row["seeds"] for row in rows),
        sections=list(sections(shown)),
        worst=_worst(shown, pictures or {}),
        warnings=[f"{model.name}: {text}" for model in models for text in model.summary.get("warnings", [])],
    )


def worst_images(columns: Columns, setting: str, count: int = WORST) -> np.ndarray:
    """The rows of the images with the fewest right draws of a setting, by mean cross entropy among equals."""
    return np.lexsort((-columns[f"{setting}/nll"].mean(1), right_share(columns, setting)))[:count]


def _worst(models: Models, pictures: Mapping[int, np.ndarray]) -> list[dict[str, Any]]:
    shown = []
    for m in models.firsts():
        if f"{models.noise}/prediction" not in m.columns:
            continue
        rows = [row for row in worst_images(m.columns, models.noise) if int(m.columns["id"][row]) in pictures]
        if rows:
            images = [_wrong(models, m, row, pictures) for row in rows]
            shown.append({"group": m.group, "images": images})
    return shown


def _wrong(models: Models, m: Evaluated, row: int, pictures: Mapping[int, np.ndarray]) -> dict[str, Any]:
    """An image with its label, the class that most copies are taken for, and how many are right."""
    predictions = m.columns[f"{models.noise}/prediction"][row]
    id_, label = int(m.columns["id"][row]), int(m.columns["label"][row])
    return {
        "source": data_uri(pictures[id_]), "id": id_, "label": models.classes[label],
        "taken": models.classes[int(np.bincount(predictions).argmax())],
        "right": int((predictions == label).sum()), "draws": len(predictions),
    }  # fmt: skip


def data_uri(image: np.ndarray) -> str:
    """An image (C, H, W) in [0, 1], grey or RGB, as a PNG within the page."""
    with needed("evaluate"):
        from PIL import Image
    pixels = (np.asarray(image) * 255).round().clip(0, 255).astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(content, "png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
