"""The commands ``robustfast evaluate`` and ``robustfast compare``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from robustfast import disk, ranks
from robustfast.commands import runs
from robustfast.evaluation.evaluated import Evaluated
from robustfast.evaluation.intervals import Paired, paired
from robustfast.evaluation.suites import SUITES
from robustfast.evaluation.summary import right_share

console = Console()
TRAINING_SIGMA = 0.06  # of a model whose training nobody tells
WAIT = 1800.0  # seconds: a rank that is done waits for the others' whole share


def evaluate(
    folders: Annotated[
        list[Path] | None, typer.Argument(metavar="[RUN]...", help="folders of finished runs", show_default=False)
    ] = None,
    suite: Annotated[str, typer.Option(help=f"what is measured: {', '.join(SUITES)}")] = "quick",
    model: Annotated[str | None, typer.Option(help="a model of yours: package.module:factory")] = None,
    weights: Annotated[Path | None, typer.Option(help="its weights, a safetensors file")] = None,
    mean: Annotated[list[float] | None, typer.Option(help="its normalisation; repeat for each channel")] = None,
    pixel_std: Annotated[list[float] | None, typer.Option(help="its normalisation; repeat for each channel")] = None,
    training_sigma: Annotated[
        float | None,
        typer.Option(help="of --model's training noise, scales the suite", show_default=str(TRAINING_SIGMA)),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="test images: digits, npz:FILE, images:DIR and others", show_default="the run's")
    ] = None,
    size: Annotated[int, typer.Option(min=1, help="side that images:DIR are resized and cut to")] = 224,
    sigma: Annotated[
        list[float] | None, typer.Option(help="of the noise; repeat the option", show_default="those of the run")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="of all noise")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="images in a call of the model")] = 256,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    out: Annotated[Path | None, typer.Option(help="folder of --model's files", show_default="evaluation-SUITE")] = None,
    page: Annotated[
        Path | None, typer.Option(help="the page to write", show_default="report.html in the first folder")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace evaluations that are there")] = False,
) -> None:
    """Measure what classifiers withstand, and write one page about them.

    Of each run, RUN/evaluation-SUITE gets images.npz, what happened to every image, and results.json. An interrupted
    evaluation goes on. Under torchrun the ranks share the images.
    """
    options = runs.Options(suite, data, tuple(sigma) if sigma else None, seed, batch_size, device, size, overwrite)
    if bool(folders) == bool(model):
        raise ValueError("expected folders of runs, or --model")
    of_model = {"weights": weights, "mean": mean, "pixel-std": pixel_std, "training-sigma": training_sigma, "out": out}
    if folders and (given := [f"--{name}" for name, value in of_model.items() if value not in (None, [])]):
        raise ValueError(f"{', '.join(given)}: expected with --model alone; a run has its own")
    if page is not None:
        disk.make_folder(page.parent)
    with ranks.joined(WAIT):
        if model:
            if data is None:
                raise ValueError("--data: expected with --model")
            if bool(mean) != bool(pixel_std):
                raise ValueError("--mean, --pixel-std: expected both or neither")
            normalization = (mean, pixel_std) if mean and pixel_std else None
            noise = TRAINING_SIGMA if training_sigma is None else training_sigma
            subjects = [runs.of_factory(model, weights, data, noise, normalization, options)]
            places = [out or Path(f"evaluation-{suite}")]
        else:
            subjects = [runs.of_run(folder, options) for folder in folders or []]
            places = [runs.folder_of(folder, suite) for folder in folders or []]
        models = []
        for subject, place in zip(subjects, places, strict=True):
            try:
                with _progress(subject.name) as step:
                    models.append(runs.evaluate(subject, place, options, step))
            except KeyboardInterrupt:
                console.print("Interrupted. To go on: the same command again" + ", without --overwrite" * overwrite)
                raise typer.Exit(130) from None
        if ranks.rank() == 0:
            target = page or places[0] / "report.html"
            runs.write_page(target, models, subjects[0].source, f"{subjects[0].source}: what the models withstand")
            console.print(accuracy_table(models))
            console.print(f"Page: {target}", markup=False, highlight=False, soft_wrap=True)


def compare(
    a: Annotated[Path, typer.Argument(help="an evaluated run, or the folder of an evaluation")],
    b: Annotated[Path, typer.Argument(help="another, of the same images")],
    confidence: Annotated[float, typer.Option(min=0.5, max=0.9999, help="of the intervals")] = 0.95,
) -> None:
    """Compare two evaluated models image by image: A - B, its confidence interval, and a sign test.

    Accuracies are in percentage points; where an image has several draws, their mean counts.
    """
    models = [runs.read(runs.find(place)) for place in (a, b)]
    head = ("accuracy, %", a.name, b.name, "A - B", f"{confidence:.0%} interval", "p")
    shown = Table(*head, box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in (shown.columns[0], shown.columns[4]):  # whole in a narrow terminal too
        column.no_wrap = True
    for name, mean_a, mean_b, found in comparisons(*models, confidence=confidence):
        difference, p_value = f"{found.difference:+.2f}", f"{found.p_value:.2g}"
        interval = f"{found.low:+.2f} to {found.high:+.2f}"
        shown.add_row(name, f"{mean_a:.2f}", f"{mean_b:.2f}", difference, interval, p_value)
    console.print(shown)
    console.print(f"{len(models[0].columns['id'])} images, paired; p: exact sign test", highlight=False)


def comparisons(a: Evaluated, b: Evaluated, *, confidence: float = 0.95) -> list[tuple[str, float, float, Paired]]:
    """(what, mean of A, mean of B, paired difference) of all that both tables have.

    Raises:
        ValueError: they are not of the same images, or under other noise.
    """
    if not (
        np.array_equal(a.columns["id"], b.columns["id"]) and np.array_equal(a.columns["pixels"], b.columns["pixels"])
    ):
        raise ValueError(f"{a.name}, {b.name}: evaluated on different images")
    if a.about["seed"] != b.about["seed"]:
        raise ValueError(f"{a.name}, {b.name}: evaluated with different seeds of the noise")
    rows = []
    measured = {m["name"]: m for m in b.about["measurements"]}
    for m in a.about["measurements"]:
        if measured.get(m["name"]) != m:
            continue
        for name, (x, y) in _comparable(m, a, b).items():
            rows.append((name, float(x.mean()), float(y.mean()), paired(x, y, confidence)))
    return rows


def _comparable(m: dict, a: Evaluated, b: Evaluated) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    name = m["name"]
    if m["kind"] == "Draws":
        return {name: tuple(100 * right_share(model.columns, name) for model in (a, b))}  # type: ignore[dict-item]
    if m["kind"] == "Attack":
        return {name: tuple(100.0 * model.columns[f"{name}/right"] for model in (a, b))}  # type: ignore[dict-item]
    if m["kind"] == "Spectrum":
        norms = (np.log10((model.columns[name].astype(np.float64) ** 2).sum(1) + 1e-12) for model in (a, b))
        return {"log10 of the curvature": tuple(norms)}  # type: ignore[dict-item]
    return {}


def accuracy_table(models: list[Evaluated]) -> Table:
    names = [s["name"] for s in models[0].summary["settings"] if s["perturbation"] in (None, "gaussian")]
    shown = Table("accuracy, %", *names, box=box.SIMPLE, padding=(0, 1, 0, 0))
    for model in models:
        found = {s["name"]: s["accuracy"] for s in model.summary["settings"]}
        shown.add_row(model.name, *(f"{100 * found[name]:.2f}" if name in found else "" for name in names))
    return shown


@contextmanager
def _progress(name: str) -> Iterator[Callable[[int, int], None] | None]:
    if not console.is_terminal or ranks.rank() > 0:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(name, total=None)
        yield lambda done, total: progress.update(bar, completed=done, total=total)
