"""The command line: ``robustfast train``, ``evaluate``, ``demo`` and ``bench``."""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import torch

from robustfast import disk
from robustfast.extras import needed

try:
    with needed():
        import typer
        from rich import box
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.table import Table

        from robustfast.bench.command import bench
        from robustfast.evaluation import saved
        from robustfast.training import Config, comparison, files, loop, presets
        from robustfast.training.config import METHODS
except ModuleNotFoundError as error:
    sys.exit(f"robustfast: {error}")

app = typer.Typer(
    help="Noise-robust classifiers: the method of arXiv 2405.18499 and its baselines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(bench)
console = Console()


def main() -> None:
    """Run the command line; a mistake of the user's is one line on stderr and exit status 1, no traceback."""
    try:
        app()
    except (ValueError, OSError, FloatingPointError, ModuleNotFoundError) as error:
        sys.exit(f"robustfast: {error}")


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the command's ``**changes`` by one option per field of Config; those not given stay None."""
    signature, hints = inspect.signature(command, eval_str=True), get_type_hints(Config)
    own = [parameter for parameter in signature.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
    options = []
    for field in fields(Config):
        arguments = get_args(hints[field.name])
        kind = list[arguments[0]] if arguments else hints[field.name]  # type: ignore[valid-type]
        option = typer.Option(help=field.metadata["help"])
        annotation = Annotated[kind | None, option]  # type: ignore[valid-type]
        options.append(
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        )
    parameters = own + options
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


@app.command()
@with_settings
def train(
    preset: Annotated[str, typer.Option(help=f"settings to start from: {', '.join(presets.PRESETS)}")] = "digits",
    out: Annotated[Path | None, typer.Option(help="folder of the run (default: runs/PRESET-METHOD-SEED)")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the interrupted run in that folder")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="threads of PyTorch (default: its own choice)")] = None,
    **changes: Any,
) -> None:
    """Train a classifier; options that are not given are those of the preset.

    The folder of the run gets the model of the best epoch on validation images and results.json.
    """
    changes = {name: value for name, value in changes.items() if value is not None}
    config = presets.preset(preset, **changes)
    out = out or Path("runs") / f"{preset}-{config.method}-{config.seed}"
    if threads:
        torch.set_num_threads(threads)
    if resume:
        config = _unchanged(loop.saved_config(out), changes, out)
    with _progress() as progress:
        bar = progress.add_task(config.method, total=config.epochs)

        def on_epoch(record: dict[str, float]) -> None:
            text = f"{config.method}  loss {record['loss']:.3f}  validation {100 * record['validation']:.1f}%"
            progress.update(bar, completed=record["epoch"], description=text)

        try:
            results = loop.resume(out, on_epoch) if resume else loop.train(config, out, on_epoch)
        except KeyboardInterrupt:
            console.print(f"Interrupted. To go on: robustfast train --resume --out {out}")
            raise typer.Exit(130) from None
    console.print(f"\n{config.method} on {config.data}: best epoch {results['best_epoch']} of {config.epochs}")
    console.print(_curve_table(results["test"]))
    console.print(f"Results and model: {out}")


def _unchanged(saved_config: Config, changes: dict[str, Any], out: Path) -> Config:
    for name, value in changes.items():
        old = getattr(saved_config, name)
        if old != (tuple(value) if isinstance(value, list) else value):
            raise ValueError(
                f"{name}: the run in {out} has {old!r}, which cannot change to {value!r} when it is resumed"
            )
    return saved_config


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="folder of a finished run")],
    sigma: Annotated[
        list[float] | None, typer.Option(help="of the noise; repeat the option (default: those of the run)")
    ] = None,
    draws: Annotated[int, typer.Option(min=1, help="draws of the noise per image")] = 4,
    seed: Annotated[int, typer.Option(help="seed of the noise; 0 is that of the run's own test")] = 0,
    data: Annotated[str | None, typer.Option(help="other test images: digits, npz:FILE or folder:DIR")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    backend: Annotated[str, typer.Option(help="backend of the noise")] = "auto",
    out: Annotated[Path | None, typer.Option(help="write the accuracies to this JSON file")] = None,
) -> None:
    """Test a saved model on clean images and under Gaussian noise."""
    curve = saved.evaluate(run, sigma, seed=seed, draws=draws, source=data, device=device, backend=backend)
    if out is not None:
        disk.write_json(out, {"run": str(run), "seed": seed, "draws": draws, "test": curve})
    console.print(_curve_table(curve))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder of results.json and accuracy.png")] = Path("demo"),
    seeds: Annotated[int, typer.Option(min=1, help="runs per method")] = 3,
    epochs: Annotated[int, typer.Option(min=1, help="epochs of each run")] = 40,
    backend: Annotated[str, typer.Option(help="backend of the loss and of the noise")] = "auto",
    workers: Annotated[int | None, typer.Option(min=1, help="runs at a time (default: one per core)")] = None,
) -> None:
    """Compare the paper's method with its four baselines on scikit-learn's handwritten digits."""
    configs = [
        presets.preset("digits", method, seed=seed, epochs=epochs, backend=backend)
        for seed in range(seeds)
        for method in METHODS
    ]
    start = time.perf_counter()
    with _progress() as progress:
        bar = progress.add_task("training", total=len(configs))
        results = comparison.compare(configs, lambda result: progress.advance(bar), workers)
    summary = comparison.summarise(results)
    out.mkdir(parents=True, exist_ok=True)
    content = {"format": files.FORMAT, "summary": summary, "runs": results, "seconds": time.perf_counter() - start}
    disk.write_json(out / files.RESULTS, content)
    comparison.plot(summary, out / "accuracy.png", configs[0].sigma)
    console.print(
        f"\nTest accuracy in % on digits, mean ± standard deviation over {seeds} seeds, on clean images and under "
        f"Gaussian noise of the sigma above each column; trained with sigma {configs[0].sigma:g}:"
    )
    console.print(_summary_table(summary))
    console.print(f"{len(configs)} runs in {content['seconds']:.0f} s. Results and plot: {out}")


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)


def _curve_table(curve: list[dict[str, float]]) -> Table:
    table = Table("sigma of the noise", "accuracy, %", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for point in curve:
        table.add_row(_sigma(point["sigma"]), f"{100 * point['accuracy']:.2f}")
    return table


def _summary_table(summary: list[dict[str, Any]]) -> Table:
    sigmas = dict.fromkeys(point["sigma"] for point in summary)
    table = Table("method", *map(_sigma, sigmas), box=box.SIMPLE, padding=(0, 1, 0, 0))
    for method in dict.fromkeys(point["method"] for point in summary):
        points = (point for point in summary if point["method"] == method)
        table.add_row(method, *(f"{100 * point['mean']:.1f} ± {100 * point['std']:.1f}" for point in points))
    return table


def _sigma(sigma: float) -> str:
    return f"{sigma:g}" if sigma else "clean"
