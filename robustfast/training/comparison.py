"""Methods compared over seeds: runs side by side on the cores, then mean and deviation of their accuracies."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from robustfast import disk
from robustfast.extras import needed
from robustfast.training import files, loop
from robustfast.training.config import Config


def compare(
    configs: Sequence[Config],
    on_run: Callable[[dict[str, Any]], None] | None = None,
    workers: int | None = None,
    folders: Sequence[Path] | None = None,
) -> list[dict[str, Any]]:
    """The results of :func:`~robustfast.training.train` for each config, in their order.

    Runs go in parallel, one thread each: small models do not fill several. So results do not depend on the number of
    workers (default: as many as this process may use cores). Whatever ends this call, an interruption or the death of
    this process among it, ends all workers at once.

    Args:
        on_run: called with the results of each run, in the order in which they finish.
        folders: a folder for each run, where an earlier call's is gone on with; None keeps everything in memory.

    Raises:
        ValueError: a folder holds a run of other settings.
        ChildProcessError: a worker was killed.
    """
    places: Sequence[Path | None] = folders or [None] * len(configs)
    return in_parallel(train_or_go_on, list(zip(configs, places, strict=True)), on_run, workers)


def in_parallel(
    function: Callable[..., Any],
    calls: Sequence[tuple[Any, ...]],
    on_done: Callable[[Any], None] | None = None,
    workers: int | None = None,
) -> list[Any]:
    """``function(*call)`` for each call, in processes side by side, which end with this call whatever ends it.

    Args:
        on_done: called with each result, in the order in which they come.
        workers: processes at a time; as many as this process may use cores if None.

    Raises:
        ChildProcessError: a worker was killed.
    """
    workers = min(workers or usable_cores(), len(calls))
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _end_with_parent) as pool:
        try:
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # workers begin, and stay, deaf to it
            try:
                futures = [pool.submit(function, *call) for call in calls]
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            for future in as_completed(futures):
                if on_done is not None:
                    on_done(future.result())
            return [future.result() for future in futures]
        except BrokenProcessPool as error:
            hint = "a worker was killed, perhaps for want of memory: fewer workers need less"
            raise ChildProcessError(hint) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in set(multiprocessing.active_children()) - others:
                worker.kill()
            raise


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def train_or_go_on(config: Config, folder: Path | None) -> dict[str, Any]:
    """The results of a run on one thread: of the one in ``folder`` where it has the same settings."""
    config = replace(config, threads=1)
    if folder is None or not files.holds_run(folder):
        return loop.train(config, folder)
    if loop.saved_run(folder)[0] != config:
        raise ValueError(f"{folder} holds a run of other settings: overwrite it, or choose another folder")
    return loop.resume(folder)


def usable_cores() -> int:
    """The number of cores this process may use, where the system can say so; else of all there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def summarise(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """``{"method", "sigma", "mean", "std", "runs"}`` of the test accuracies, methods in order of appearance.

    std is the sample standard deviation over runs, 0 for a single one.
    """
    accuracies: dict[tuple[str, float], list[float]] = {}
    for result in results:
        for point in result["test"]:
            accuracies.setdefault((result["config"]["method"], point["sigma"]), []).append(point["accuracy"])
    return [
        {
            "method": method,
            "sigma": sigma,
            "mean": fmean(values),
            "std": stdev(values) if len(values) > 1 else 0.0,
            "runs": len(values),
        }
        for (method, sigma), values in accuracies.items()
    ]


def winners(summary: Sequence[dict[str, Any]]) -> set[tuple[str, float]]:
    """The (method, sigma) that the spread carries: mean - std there is above mean + std of every other method."""
    return {
        (point["method"], point["sigma"])
        for point in summary
        if point["runs"] > 1
        and all(
            point["mean"] - point["std"] > other["mean"] + other["std"]
            for other in summary
            if other["sigma"] == point["sigma"] and other["method"] != point["method"]
        )
    }


def plot(summary: Sequence[dict[str, Any]], path: Path, trained_sigma: float) -> None:
    """Save accuracy over sigma, one line per method with its deviation, as the picture ``path``."""
    with needed():
        from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 4.5), layout="constrained")  # no pyplot: needs no display and keeps no global state
    axes = figure.add_subplot()
    for method in dict.fromkeys(point["method"] for point in summary):
        points = [point for point in summary if point["method"] == method]
        mean, std = ([100 * point[key] for point in points] for key in ("mean", "std"))
        axes.errorbar([point["sigma"] for point in points], mean, std, label=method, marker="o", ms=4, capsize=3)
    axes.axvline(trained_sigma, color="grey", lw=1, ls=":")
    axes.annotate(r"$\sigma$ in training", (trained_sigma, 1), xycoords=("data", "axes fraction"), xytext=(3, -12),
                  textcoords="offset points", color="grey")  # fmt: skip
    axes.set(xlabel=r"$\sigma$ of the Gaussian noise", ylabel="test accuracy, %")
    axes.legend()
    axes.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    disk.write(path, picture.getvalue())
