"""Trained runs and models of the user's, evaluated from the command line: what to measure, where it goes, its page."""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import robustfast
from robustfast import disk, ranks
from robustfast.evaluation import report, stream, table
from robustfast.evaluation.evaluated import Evaluated
from robustfast.evaluation.folders import ImageFolder
from robustfast.evaluation.models import Normalized
from robustfast.evaluation.suites import SUITES, suite
from robustfast.evaluation.summary import summarise
from robustfast.extras import imported, needed
from robustfast.training import Config, data, saved
from robustfast.training.setup import pick_device

RESULTS = "results.json"
BATCH = 256  # images read at a time
NOT_OF_THE_METHOD = ("seed", "device", "backend", "threads", "workers")


@dataclass(frozen=True)
class Subject:
    """A model to evaluate, and on what."""

    name: str
    group: str
    seed: int
    model: nn.Module
    source: str
    sigma: float
    sigmas: tuple[float, ...]
    pixel_std: tuple[float, ...]
    classes: tuple[str, ...] | None  # None: whatever the data has
    image: tuple[int, ...] | None
    training: dict[str, Any] | None = None  # the run's settings but for its seed and what it ran on


@dataclass(frozen=True)
class Options:
    """How to evaluate; None: as the run was trained."""

    suite: str = "quick"
    source: str | None = None
    sigmas: tuple[float, ...] | None = None
    seed: int = 0
    batch_size: int = 256
    device: str = "auto"
    size: int = 224
    overwrite: bool = False


def of_run(run: Path, options: Options) -> Subject:
    """The classifier of a finished run; OSError or ValueError where there is none."""
    classifier = saved.load_classifier(run, pick_device(options.device))
    config = classifier.config
    sigmas = options.sigmas or config.test_sigmas
    sigma = config.sigma or next((level for level in sigmas if level), 0.06)  # the suite needs some noise to scale with
    return Subject(
        name=run.name, group=config.method, seed=config.seed, model=classifier,
        source=options.source or _test_images(config), sigma=sigma, sigmas=sigmas,
        pixel_std=tuple(classifier.normalization["pixel_std"]), classes=classifier.classes, image=classifier.image,
        training={name: value for name, value in config.as_json().items() if name not in NOT_OF_THE_METHOD},
    )  # fmt: skip


def _test_images(config: Config) -> str:
    """Where a run's test images are: streamed as they were in training."""
    return f"images:{data.train_and_test(Path(config.data.partition(':')[2]))[1]}" if config.size else config.data


def of_factory(
    factory: str,
    weights: Path | None,
    source: str,
    sigma: float,
    normalization: tuple[Sequence[float], Sequence[float]] | None,
    options: Options,
) -> Subject:
    """The model that ``package.module:factory`` makes, with the weights of a safetensors file.

    Raises:
        ValueError: there is no such factory, it makes no module, or the weights are not the model's.
        OSError: the file cannot be read.
    """
    name = factory.partition(":")[2]
    try:
        make = imported(factory)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--model {factory}: expected package.module:factory: {error}") from error
    model = make()
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model {factory}: expected a torch.nn.Module, got {type(model).__name__}")
    if weights is not None:
        load_weights(model, weights)
    std: tuple[float, ...] = (1.0,)
    if normalization is not None:
        model, std = Normalized(model, *normalization), tuple(normalization[1])
    levels = options.sigmas or tuple(round(factor * sigma, 6) for factor in (0.5, 1.0, 1.5, 2.0))
    model = model.to(pick_device(options.device)).eval()
    return Subject(name, name, 0, model, source, sigma, levels, std, None, None)


def load_weights(model: nn.Module, path: Path) -> None:
    """Put the tensors of a safetensors file into the model; ValueError naming the file if they do not fit."""
    with needed():
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path}: not this model's weights: {' '.join(str(error).split())}") from error


def evaluate(
    subject: Subject, out: Path, options: Options, on_images: Callable[[int, int], None] | None = None
) -> Evaluated:
    """Measure, write ``out``/images.npz and ``out``/results.json, and return what the page needs.

    A finished evaluation is read; an interrupted one goes on.

    Raises:
        ValueError: the data does not fit the model, or ``out`` holds an evaluation of something else.
    """
    source = _source_of(subject, options)
    features = all(hasattr(getattr(subject.model, "model", subject.model), part) for part in ("features", "fc"))
    std = subject.pixel_std if len(subject.pixel_std) == source.image[0] else subject.pixel_std * source.image[0]
    chosen = suite(
        options.suite, source.image, sigma=subject.sigma, sigmas=subject.sigmas, pixel_std=std, features=features
    )
    disk.make_folder(out)
    if options.overwrite and ranks.rank() == 0:
        _remove(out)
    start = time.perf_counter()
    columns, about = stream.measure(
        subject.model,
        source.batches(),
        chosen,
        out,
        seed=options.seed,
        batch_size=options.batch_size,
        device=pick_device(options.device),
        about={
            "suite": options.suite,
            "data": subject.source,
            "image": source.image,
            "sigma": subject.sigma,
            "training": subject.training,
        },
        on_images=None if on_images is None else lambda count: on_images(count, source.total),
    )
    fc: Any = subject.model.fc if features else None
    summary = summarise(columns, about, (fc.weight, fc.bias) if features else None)
    if ranks.rank() == 0 and not (out / RESULTS).exists():
        content = {
            "format": stream.FORMAT, "name": subject.name, "group": subject.group, "seed": subject.seed,
            "classes": list(source.classes), "about": about, "summary": summary, "environment": environment(),
            "pixels": hashlib.blake2b(columns["pixels"].tobytes(), digest_size=16).hexdigest(),
            "seconds": time.perf_counter() - start,
        }  # fmt: skip
        disk.write_json(out / RESULTS, content)
    return Evaluated(subject.name, subject.group, subject.seed, columns, about, summary)


def _source_of(subject: Subject, options: Options) -> Source:
    """The images of the evaluation; ValueError where the model takes others."""
    source = open_source(subject.source, subject.image[-1] if subject.image else options.size)
    if subject.image is not None and (source.image, source.classes) != (subject.image, subject.classes):
        raise ValueError(
            f"{subject.source}: the model takes images {list(subject.image)} of classes {list(subject.classes or ())}, "
            f"got {list(source.image)} of {list(source.classes)}"
        )
    return source


def _remove(out: Path) -> None:
    """Delete what an evaluation has left there."""
    for name in (stream.TABLE, RESULTS):
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / stream.PARTS, ignore_errors=True)


def evaluate_run(run: Path, options: Options) -> str:
    """:func:`evaluate` for a worker of several: one thread, into RUN/evaluation-SUITE; returns the run's name."""
    torch.set_num_threads(1)
    evaluate(of_run(run, options), folder_of(run, options.suite), options)
    return run.name


def folder_of(run: Path, suite: str) -> Path:
    """Where a run's evaluation lies."""
    return run / f"evaluation-{suite}"


def read(out: Path) -> Evaluated:
    """What :func:`evaluate` left in ``out``; OSError or ValueError where there is nothing whole."""
    columns, about = table.read(out / stream.TABLE)
    content = disk.read_json(out / RESULTS)
    return Evaluated(content["name"], content["group"], content["seed"], columns, about, content["summary"])


def find(place: Path) -> Path:
    """The folder of an evaluation: ``place`` itself, or the largest suite beside the run in ``place``."""
    for folder in (place, *(folder_of(place, name) for name in reversed(SUITES))):
        if (folder / stream.TABLE).exists() and (folder / RESULTS).exists():
            return folder
    raise ValueError(f"{place}: no finished evaluation; make one with: robustfast evaluate {place}")


def grouped(models: Sequence[Evaluated]) -> list[Evaluated]:
    """The models with groups in which they differ by their seed alone: others stand by their own name."""
    own = {}
    for group in {model.group for model in models}:
        of_group = [model for model in models if model.group == group]
        seeds = {model.seed for model in of_group}
        own[group] = len(seeds) < len(of_group) or any(
            model.about["training"] != of_group[0].about["training"] for model in of_group
        )
    return [model._replace(group=model.name) if own[model.group] else model for model in models]


def write_page(path: Path, models: Sequence[Evaluated], source: str, title: str) -> None:
    """The page about evaluated models, with their worst images."""
    opened = open_source(source, models[0].about["image"][-1])
    models = grouped(models)
    sigma = models[0].about["sigma"]
    ids = {
        int(model.columns[table.ID][row])
        for model in models
        if f"gaussian {sigma:g}/nll" in model.columns and opened.image[0] in data.CHANNELS
        for row in report.worst_images(model.columns, f"gaussian {sigma:g}")
    }
    pictures = {id_: opened.picture(id_) for id_ in ids if id_ < opened.total}
    report.write(
        path, models, title=title, classes=opened.classes, sigma=sigma, pictures=pictures,
        provenance=provenance(models, source),
    )  # fmt: skip


def provenance(models: Sequence[Evaluated], source: str) -> dict[str, str]:
    """What the page says about the origin of its numbers."""
    pixels = np.concatenate([model.columns["pixels"] for model in models[:1]])
    here = environment()
    return {
        "data": f"{source}, {len(pixels)} images, hash {hashlib.blake2b(pixels.tobytes(), digest_size=8).hexdigest()}",
        "noise": f"seed {models[0].about['seed']}, sample id = place in the test data",
        "suites": ", ".join(dict.fromkeys(model.about["suite"] for model in models)),
        **{f"weights of {model.name}": str(model.about["model"]) for model in models},
        "versions": ", ".join(f"{name} {here[name]}" for name in ("robustfast", "torch", "python")),
        "commit": str(here["commit"] or "unknown"),
    }


def environment() -> dict[str, Any]:
    """Versions, device and commit."""
    return {
        "robustfast": robustfast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "ranks": ranks.count(),
        "commit": _commit(),
    }


def _commit() -> str | None:
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


class Source(NamedTuple):
    """Test images: how many, (C, H, W), the classes' names, the batches, and one image in [0, 1] by its id."""

    total: int
    image: tuple[int, ...]
    classes: tuple[str, ...]
    batches: Callable[[], Iterator[tuple[Tensor, Tensor, Tensor]]]
    picture: Callable[[int], np.ndarray]


def open_source(source: str, size: int) -> Source:
    """The test images of ``images:DIR``, streamed and cut to ``size``, or of what :func:`robustfast.training.data.load`
    takes, held in memory."""
    kind, _, path = source.partition(":")
    test: data.Images | data.Files
    if kind == "images" and path:
        folder = ImageFolder(Path(path), size)
        test, classes = data.Files.all_of(folder, workers=0), folder.classes
    else:
        _, test, classes = data.load(source)

    def batches() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        parts = torch.arange(len(test.labels)).split(BATCH)
        for part, pixels in zip(parts, test.read(parts), strict=True):
            yield pixels, test.labels[part], part

    def picture(id_: int) -> np.ndarray:
        (pixels,) = next(test.read([torch.tensor([id_])]))
        return pixels.numpy() / (255 if pixels.dtype == torch.uint8 else 1)

    return Source(len(test.labels), test.image, classes, batches, picture)
