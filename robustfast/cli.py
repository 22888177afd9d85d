"""The command line: ``robustfast train``, ``evaluate``, ``compare``, ``demo`` and ``bench``."""

from __future__ import annotations

import inspect
import itertools
import os
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import robustfast
from robustfast import disk, ranks
from robustfast.extras import needed

try:
    with needed():
        import typer
        from rich import box
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.table import Table
        from rich.text import Text

        from robustfast.bench.command import bench
        from robustfast.commands import runs
        from robustfast.commands.evaluate import compare, evaluate
        from robustfast.evaluation.suites import SUITES
        from robustfast.training import Config, comparison, files, loop, presets
        from robustfast.training.config import METHODS
except ModuleNotFoundError as error:
    sys.exit(f"robustfast: {error}")

app = typer.Typer(
    help="Noise-robust classifiers: the method of arXiv 2405.18499 and its baselines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(bench)
app.command()(evaluate)
app.command()(compare)
console = Console()
OVERWRITE = typer.Option("--overwrite", help="replace what that folder holds")


def main() -> None:
    """Run the command line; a mistake of the user's is one line on stderr and exit status 1, no traceback."""
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    try:
        app()
    except OSError as error:
        sys.exit(f"{_name()}: {error.filename}: {error.strerror}" if error.filename else f"{_name()}: {error}")
    except (ValueError, FloatingPointError, ModuleNotFoundError) as error:
        sys.exit(f"{_name()}: {error}")


def _name() -> str:
    """Who says it: under torchrun each rank has errors of its own."""
    rank = int(os.environ.get("RANK", "0"))
    return f"robustfast (rank {rank})" if rank else "robustfast"


def _show_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: Any) -> None:
    """Those of this package are one line, like errors."""
    ours = Path(robustfast.__file__).parent in Path(filename).parents
    text = f"{_name()}: {message}\n" if ours else warnings.formatwarning(message, category, filename, lineno)
    sys.stderr.write(text)


def _show_version(wanted: bool) -> None:
    if wanted:
        say(f"robustfast {robustfast.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass


def say(text: str) -> None:
    """Print a line as it is, on rank 0: unwrapped, and with brackets in paths left alone."""
    if ranks.rank() == 0:
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the command's ``**changes`` by one option per field of Config; those not given stay None."""
    signature, hints = inspect.signature(command, eval_str=True), get_type_hints(Config)
    own = [parameter for parameter in signature.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
    options = []
    for field in fields(Config):
        arguments = get_args(hints[field.name])
        kind = list[arguments[0]] if arguments else hints[field.name]  # type: ignore[valid-type]
        option = typer.Option(help=field.metadata["help"], show_default=_shown_default(field.name))
        annotation = Annotated[kind | None, option]  # type: ignore[valid-type]
        options.append(
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        )
    parameters = own + options
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _shown_default(setting: str) -> str:
    """The setting of the first preset for the default method, and of the others where they differ."""
    first, *others = ((name, str(presets.preset(name).as_json()[setting]).strip("[]")) for name in presets.PRESETS)
    return "; ".join([first[1], *(f"{name}: {value}" for name, value in others if value != first[1])])


@app.command()
@with_settings
def train(
    preset: Annotated[
        str | None,
        typer.Option(help=f"settings to start from: {', '.join(presets.PRESETS)}", show_default=presets.PRESETS[0]),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder of the run", show_default="runs/PRESET-METHOD-SEED")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the interrupted run in that folder")] = False,
    overwrite: Annotated[bool, OVERWRITE] = False,
    timeout: Annotated[float, typer.Option(min=1, help="seconds that a rank of torchrun waits for another")] = 600,
    **changes: Any,
) -> None:
    """Train a classifier; options that are not given are those of the preset (defaults: for the default method).

    The folder of the run gets the model of the best epoch on validation images and results.json. Under torchrun
    (torchrun --nproc-per-node 2 -m robustfast train ...) the processes share the images of each step.
    """
    with ranks.joined(timeout):
        _train(preset, out, resume, overwrite, changes)


def _train(preset: str | None, out: Path | None, resume: bool, overwrite: bool, changes: dict[str, Any]) -> None:
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other")
    if resume and preset and out:
        raise ValueError(f"--preset: the run in {out} keeps its own settings when it is resumed")
    changes = {name: value for name, value in changes.items() if value is not None}
    if not (resume and out):
        config, done = presets.preset(preset or presets.PRESETS[0], **changes), 0
        out = out or Path("runs") / f"{preset or presets.PRESETS[0]}-{config.method}-{config.seed}"
    if resume:
        config, done = loop.saved_run(out)
        _unchanged(config, changes, out)
        say(f"Going on after epoch {done} of {config.epochs}, on {config.threads} thread(s) as the run began.")
    elif not overwrite and ranks.first(lambda: files.holds_run(out)):
        raise FileExistsError(
            f"{out} holds a run: --resume goes on with it, --overwrite replaces it, --out names another"
        )
    try:
        with _progress(config.method, config.epochs, done) as step:

            def on_epoch(record: dict[str, float]) -> None:
                text = f"{config.method}  loss {record['loss']:.3f}  validation {100 * record['validation']:.1f}%"
                step(int(record["epoch"]), text)

            results = loop.resume(out, on_epoch) if resume else loop.train(config, out, on_epoch, overwrite=overwrite)
    except KeyboardInterrupt:
        hint = f" To go on: robustfast train --resume --out {shlex.quote(str(out))}" if files.holds_run(out) else ""
        say(f"Interrupted.{hint}")
        raise typer.Exit(130) from None
    except FloatingPointError as error:
        raise FloatingPointError(f"{error} (--overwrite replaces this run)") from error
    say(f"\n{config.method} on {config.data}: best epoch {results['best_epoch']} of {config.epochs}")
    if ranks.rank() == 0:
        console.print(_curve_table(results["test"]))
    say(f"Results and model: {out}")


def _unchanged(config: Config, changes: dict[str, Any], out: Path) -> None:
    for name, value in changes.items():
        old = getattr(config, name)
        if old != (tuple(value) if isinstance(value, list) else value):
            raise ValueError(
                f"{name}: the run in {out} has {old!r}, which cannot change to {value!r} when it is resumed"
            )


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder of results.json, accuracy.png and all runs")] = Path("demo"),
    seeds: Annotated[int, typer.Option(min=1, help="runs per method")] = 3,
    epochs: Annotated[int, typer.Option(min=1, help="epochs of each run")] = 40,
    backend: Annotated[str, typer.Option(help="backend of the loss and of the noise")] = "auto",
    workers: Annotated[int | None, typer.Option(min=1, help="runs at a time", show_default="one per core")] = None,
    suite: Annotated[
        str, typer.Option(help=f"what seed 0 is evaluated by: {', '.join(SUITES)}; others: quick")
    ] = "paper",
    overwrite: Annotated[bool, OVERWRITE] = False,
) -> None:
    """Compare the six methods, the paper's among them, on scikit-learn's handwritten digits.

    Runs that an earlier call left in the folder are gone on with.
    """
    configs = [
        presets.preset("digits", method, seed=seed, epochs=epochs, backend=backend)
        for seed in range(seeds)
        for method in METHODS
    ]
    folders = [out / "runs" / f"{config.method}-{config.seed}" for config in configs]
    disk.make_folder(out)
    if overwrite:
        for folder in (out, *folders):
            files.remove_run(folder)
    if count := sum((folder / files.RESULTS).exists() for folder in folders):
        say(f"{count} of {len(folders)} runs have finished before; --overwrite trains them anew.")
    start = time.perf_counter()
    try:
        with _progress("training", len(configs)) as step:
            finished = itertools.count(1)

            def on_run(result: dict[str, Any]) -> None:
                config = result["config"]
                step(next(finished), f"{config['method']}, seed {config['seed']}: {result['seconds']:.0f} s")

            results = comparison.compare(configs, on_run, workers, folders)
    except KeyboardInterrupt:
        say("Interrupted. To go on: the same command again" + ", without --overwrite" * overwrite)
        raise typer.Exit(130) from None
    summary = comparison.summarise(results)
    content = {"format": files.FORMAT, "summary": summary, "runs": results, "seconds": time.perf_counter() - start}
    disk.write_json(out / files.RESULTS, content)
    comparison.plot(summary, out / "accuracy.png", configs[0].sigma)
    spread = f", mean ± standard deviation over {seeds} seeds" if seeds > 1 else ""
    say(
        f"\nTest accuracy in % on digits{spread}, on clean images and under Gaussian noise of the sigma above each "
        f"column; trained with sigma {configs[0].sigma:g}"
        + ("; bold where mean - deviation is above mean + deviation of every other method:" if seeds > 1 else ":")
    )
    console.print(_summary_table(summary))
    say(f"{len(configs)} runs in {content['seconds']:.0f} s. Results and plot: {out}")
    _demo_page(out, folders, suite, workers, overwrite)


def _demo_page(out: Path, folders: list[Path], suite: str, workers: int | None, overwrite: bool) -> None:
    """Evaluate all runs, those of seed 0 by ``suite`` and the others quickly, and write the page about them."""
    suites = (suite if folder.name.endswith("-0") else "quick" for folder in folders)
    calls = [(folder, runs.Options(name, overwrite=overwrite)) for folder, name in zip(folders, suites, strict=True)]
    calls.sort(key=lambda call: call[1].suite == "quick")  # the long ones first
    try:
        with _progress("evaluation", len(calls)) as step:
            finished = itertools.count(1)
            comparison.in_parallel(
                runs.evaluate_run, calls, lambda name: step(next(finished), f"evaluated {name}"), workers
            )
    except KeyboardInterrupt:
        say("Interrupted. To go on: the same command again, without --overwrite")
        raise typer.Exit(130) from None
    models = [runs.read(runs.find(folder)) for folder in folders]
    runs.write_page(out / "report.html", models, "digits", "Digits: what the methods withstand")
    say(f"Page: {out / 'report.html'}")


@contextmanager
def _progress(name: str, total: int, done: int = 0) -> Iterator[Callable[[int, str], None]]:
    """A function of (steps done, text): on a terminal it moves a bar, elsewhere it prints a line."""
    if not console.is_terminal or ranks.rank() > 0:
        yield lambda done, text: say(f"{done} of {total}  {text}")
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(name, total=total, completed=done)
        yield lambda done, text: progress.update(bar, completed=done, description=text)


def _curve_table(curve: list[dict[str, float]]) -> Table:
    table = Table("sigma of the noise", "accuracy, %", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for point in curve:
        table.add_row(_sigma(point["sigma"]), f"{100 * point['accuracy']:.2f}")
    return table


def _summary_table(summary: list[dict[str, Any]]) -> Table:
    sigmas = dict.fromkeys(point["sigma"] for point in summary)
    leading = comparison.winners(summary)
    table = Table("method", *map(_sigma, sigmas), box=box.SIMPLE, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    table.columns[0].no_wrap = True  # whole in 80 columns

    def cell(point: dict[str, Any]) -> Text:
        spread = f" ± {100 * point['std']:.1f}" if point["runs"] > 1 else ""
        style = "bold" if (point["method"], point["sigma"]) in leading else ""
        return Text(f"{100 * point['mean']:.1f}{spread}", style)

    for method in dict.fromkeys(point["method"] for point in summary):
        table.add_row(method, *(cell(point) for point in summary if point["method"] == method))
    return table


def _sigma(sigma: float) -> str:
    return f"{sigma:g}" if sigma else "clean"
