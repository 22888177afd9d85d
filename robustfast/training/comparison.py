"""Methods compared over seeds: runs side by side on the cores, then mean and deviation of their accuracies."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from robustfast.extras import needed
from robustfast.training.config import Config
from robustfast.training.loop import train


def compare(
    configs: Sequence[Config], on_run: Callable[[dict[str, Any]], None] | None = None, workers: int | None = None
) -> list[dict[str, Any]]:
    """The results of :func:`~robustfast.training.train` for each config, in their order.

    Runs go in parallel, one thread each: small models do not fill several. So results do not depend on the number of
    workers (default: as many as this process may use cores).
    """
    workers = min(workers or usable_cores(), len(configs))
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,))
    with pool:
        futures = [pool.submit(train, config) for config in configs]
        try:
            for future in as_completed(futures):
                if on_run is not None:
                    on_run(future.result())
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


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
    figure.savefig(path, dpi=150)
