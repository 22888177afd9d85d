"""The training loop, one for all methods."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import robustfast
from robustfast import disk
from robustfast.backends import resolve
from robustfast.evaluation import noise_curve
from robustfast.functional import noisy_pair
from robustfast.streams import generator, stream
from robustfast.training import data, files, models, recipes
from robustfast.training.augment import Placements, draw_placements, place
from robustfast.training.config import Config, from_json

TEST_SEED = 0  # of the test noise: every method and every run is tested on the same noisy images


class Setup(NamedTuple):
    """What a run works on and does not change."""

    config: Config
    classes: tuple[str, ...]
    train: data.Images
    train_ids: Tensor  # (N,) position in the training pool: the identity of a sample for its noise
    validation: data.Images
    test: data.Images
    normalization: dict[str, Any]  # mean, pixel_std
    backends: dict[str, str]  # of each op used
    fingerprint: str


class Batch(NamedTuple):
    """The clean and the noisy view (N, C, H, W) of the same samples, normalised, and their labels (N,)."""

    clean: Tensor
    noisy: Tensor
    target: Tensor


class Run:
    """What training changes, and a checkpoint holds; everything random is a function of (seed, epoch) instead."""

    def __init__(self, setup: Setup) -> None:
        config, classes = setup.config, len(setup.classes)
        self.device = device = setup.train.pixels.device
        channels = setup.train.pixels.shape[1]
        self.model = models.build(config.model, channels, config.inter_dim, classes, stream(config.seed, "init"))
        self.classifier = recipes.build(config, self.model, setup.normalization).to(device)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), config.lr, config.momentum, nesterov=config.momentum > 0,
            weight_decay=config.weight_decay,
        )  # fmt: skip
        self.best: dict[str, Tensor] = {}
        self.history: list[dict[str, float]] = []
        self.seconds = 0.0

    @property
    def best_epoch(self) -> int:
        """The epoch, from 1, with the highest validation score; the last of equals."""
        return int(max(self.history, key=lambda record: (record["validation"], record["epoch"]))["epoch"])

    def save(self, out: Path, setup: Setup) -> None:
        """Write the state after the last whole epoch; the identity of the run is its settings and its data."""
        tensors = {f"{part}.{name}": tensor for part, state in self._states().items() for name, tensor in state.items()}
        about = {**_identity(setup), "history": self.history, "seconds": self.seconds}
        files.save(out / files.STATE, "state", tensors, about)

    def load(self, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        """Take over what :meth:`save` wrote."""
        parts: dict[str, dict[str, Tensor]] = {part: {} for part in self._states()}
        for name, tensor in tensors.items():
            part, _, key = name.partition(".")
            parts[part][key] = tensor
        self.classifier.load_state_dict(parts["classifier"])
        self.best = {name: tensor.to(self.device) for name, tensor in parts["best"].items()}
        momenta: dict[int, dict[str, Tensor]] = {}
        for name, tensor in parts["optimizer"].items():
            index, _, key = name.partition(".")
            momenta.setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": momenta})
        self.history, self.seconds = about["history"], about["seconds"]

    def _states(self) -> dict[str, dict[str, Tensor]]:
        momenta = self.optimizer.state_dict()["state"]
        optimizer = {f"{index}.{key}": tensor for index, state in momenta.items() for key, tensor in state.items()}
        return {
            "classifier": self.classifier.state_dict(),
            "best": self.best,
            "optimizer": optimizer,
        }


def train(
    config: Config,
    out: Path | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train as ``config`` says, keep the weights of the best epoch, and test them once.

    Args:
        config: all settings; on the CPU they fix the result bit for bit, for one machine, version of PyTorch and
            backend; on a GPU as far as cuDNN's algorithms repeat theirs. ``threads`` 0 becomes PyTorch's present
            number.
        out: folder for the run: its state after every epoch, then model.safetensors (the best epoch's weights) and
            results.json. None keeps everything in memory.
        on_epoch: called with each new record of the history, after it is on the disk.
        overwrite: delete a run that ``out`` holds; otherwise that is an error.

    Returns:
        The content of results.json, as docs/results.md describes it.

    Raises:
        FileExistsError: ``out`` holds a run.
        OSError: ``out`` cannot be written to.
        ValueError: the data or a setting is wrong.
        FloatingPointError: the loss of an epoch is not finite; the state of the last good epoch is kept.
    """
    if out is not None and not overwrite and files.holds_run(out):
        raise FileExistsError(
            f"{out} holds a run: go on with it (resume), replace it (overwrite) or choose another folder"
        )
    if out is not None:
        disk.make_folder(out)
    setup = prepare(config)
    run = Run(setup)
    if out is not None:
        files.remove_run(out)
        run.save(out, setup)
    return _go_on(setup, run, out, on_epoch)


def resume(out: Path, on_epoch: Callable[[dict[str, float]], None] | None = None) -> dict[str, Any]:
    """Go on with the run in ``out`` from its last whole epoch, to the bit where it would be uninterrupted.

    Its settings, the number of threads among them, are those it began with. A finished run is not tested again: its
    results are returned. See :func:`train` for the rest.

    Raises:
        FileNotFoundError: there is no run in ``out``.
        ValueError: the data is no longer that of the run, a file is damaged, or the results are another run's.
    """
    tensors, about = _saved_state(out)
    if (results := _finished(out, about)) is not None:
        return results
    setup = prepare(from_json(about["config"]))
    if setup.fingerprint != about["fingerprint"]:
        raise ValueError(f"{out}: {setup.config.data} is not the data this run began with")
    run = Run(setup)
    try:
        run.load(tensors, about)
    except (RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"{out / files.STATE}: its tensors are not those of its settings") from error
    return _go_on(setup, run, out, on_epoch)


def saved_run(out: Path) -> tuple[Config, int]:
    """The settings of the run in ``out`` and how many epochs of it are done.

    Raises:
        FileNotFoundError: there is no run in ``out``.
        ValueError: its state is damaged.
    """
    _, about = _saved_state(out)
    return from_json(about["config"]), len(about["history"])


def _saved_state(out: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        return files.load(out / files.STATE, "state")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{out}: no run to go on with: there is no {files.STATE}") from error


def _finished(out: Path, about: dict[str, Any]) -> dict[str, Any] | None:
    """The results of the run whose state is ``about``, if it has finished."""
    path = out / files.RESULTS
    if not path.exists():
        return None
    results = disk.read_json(path)
    if (results.get("config"), results.get("fingerprint")) != (about["config"], about["fingerprint"]):
        raise ValueError(f"{path}: the results of another run than {files.STATE} beside it")
    return results


def _identity(setup: Setup) -> dict[str, Any]:
    """What makes a run this run: each of its files holds it."""
    return {"config": setup.config.as_json(), "fingerprint": setup.fingerprint}


def prepare(config: Config) -> Setup:
    """Load the data, hold out validation and fix the normalisation, on the device."""
    device = pick_device(config.device)
    backends = pick_backends(config.backend, device)
    config = replace(config, threads=config.threads or torch.get_num_threads())
    loaded = data.load(config.data)
    models.check_image(config.model, loaded.train.pixels.shape[2:])
    ids, held_out = data.stratified_split(loaded.train.labels, config.validation, config.seed)
    train = loaded.train.take(ids)
    mean, pixel_std = data.channel_statistics(train.pixels)
    return Setup(
        config, loaded.classes, train.to(device), ids.to(device), loaded.train.take(held_out).to(device),
        loaded.test.to(device), {"mean": mean, "pixel_std": pixel_std}, backends, loaded.fingerprint(),
    )  # fmt: skip


def pick_device(name: str) -> torch.device:
    """The device that ``auto`` (a GPU if there is one), ``cpu`` or ``cuda`` names; ValueError if it cannot be had."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: no GPU is visible to PyTorch")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def pick_backends(name: str, device: torch.device) -> dict[str, str]:
    """The backend of each op that training uses; ValueError if the one named cannot run there."""
    try:
        return {op: resolve(name, device.type, op) for op in ("discriminative_loss", "noisy_pair")}
    except RuntimeError as error:
        raise ValueError(error) from error


def _go_on(
    setup: Setup, run: Run, out: Path | None, on_epoch: Callable[[dict[str, float]], None] | None
) -> dict[str, Any]:
    with _threads(setup.config.threads):
        while len(run.history) < setup.config.epochs:
            start = time.perf_counter()
            record = train_epoch(setup, run)
            run.seconds += time.perf_counter() - start
            if out is not None:
                run.save(out, setup)
            if on_epoch is not None:
                on_epoch(record)
        return finish(setup, run, out)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """PyTorch with that many threads; with as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train_epoch(setup: Setup, run: Run) -> dict[str, float]:
    """One pass over the training images, then validation; the record goes to the history and is returned."""
    config, epoch = setup.config, len(run.history)
    for group in run.optimizer.param_groups:
        group["lr"] = config.learning_rate(epoch)
    run.classifier.train()
    total = torch.zeros((), device=setup.train_ids.device)
    for batch in batches(setup, epoch):
        loss = run.classifier((batch.clean, batch.noisy), batch.target)["loss"]
        run.optimizer.zero_grad()
        loss.backward()
        run.optimizer.step()
        total += loss.detach() * len(batch.target)
    if not math.isfinite(mean_loss := float(total) / len(setup.train_ids)):
        raise FloatingPointError(f"epoch {epoch + 1}: the loss is {mean_loss}; a lower learning rate may help")
    record = {"epoch": epoch + 1, "lr": config.learning_rate(epoch), "loss": mean_loss, **validate(setup, run.model)}
    run.history.append(record)
    if run.best_epoch == record["epoch"]:
        run.best = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    return record


def batches(setup: Setup, epoch: int) -> Iterator[Batch]:
    """The training images in the epoch's order; the noise is draw ``epoch`` of each sample."""
    config, device, count = setup.config, setup.train_ids.device, len(setup.train_ids)
    order = torch.randperm(count, generator=generator(config.seed, "order", epoch)).to(device)
    clean_places, noisy_places = (
        draw_placements(count, config.crop, config.flip, generator(config.seed, "places", view, epoch)).to(device)
        for view in ("clean", "noisy")
    )
    noise_seed, sigma = stream(config.seed, "noise"), draw_sigmas(config, count, epoch, device)

    def views(index: Tensor, places: Placements) -> tuple[Tensor, Tensor]:
        pixels = setup.train.pixels[index]
        if config.crop or config.flip:
            pixels = place(pixels, places.take(index), config.crop)
        return noisy_pair(
            pixels, sigma[index] if isinstance(sigma, Tensor) else sigma, **setup.normalization, seed=noise_seed,
            sample_ids=setup.train_ids[index], draw=epoch, backend=config.backend,
        )  # fmt: skip

    for index in order.split(config.batch_size):
        clean, noisy = views(index, clean_places)
        if config.noise_view == "independent":
            _, noisy = views(index, noisy_places)
        yield Batch(clean, noisy, setup.train.labels[index])


def draw_sigmas(config: Config, count: int, epoch: int, device: torch.device) -> Tensor | float:
    """The noise of an epoch: one standard deviation for all, or where ``sigma_spread`` wants it one each, (count,)."""
    if not config.sigma_spread:
        return config.sigma
    even = torch.rand(count, generator=generator(config.seed, "sigma", epoch)).to(device)
    return config.sigma * (1 + config.sigma_spread * (2 * even - 1))


def validate(setup: Setup, model: nn.Module) -> dict[str, float]:
    """Accuracy on clean and on noisy validation images, and their mean, by which the best epoch is chosen."""
    config = setup.config
    curve = noise_curve(
        model, *setup.validation, [config.sigma], **setup.normalization, seed=stream(config.seed, "validation noise"),
        backend=config.backend,
    )  # fmt: skip
    clean, noisy = (point["accuracy"] for point in curve)
    return {"validation_clean": clean, "validation_noisy": noisy, "validation": (clean + noisy) / 2}


def finish(setup: Setup, run: Run, out: Path | None) -> dict[str, Any]:
    """Test the weights of the best epoch; write them and the results."""
    config = setup.config
    run.model.load_state_dict(run.best)
    results = {
        "format": files.FORMAT,
        **_identity(setup),
        "data": {
            "classes": list(setup.classes),
            "image": list(setup.train.pixels.shape[1:]),
            "train": len(setup.train.labels),
            "validation": len(setup.validation.labels),
            "test": len(setup.test.labels),
        },
        "history": run.history,
        "best_epoch": run.best_epoch,
        "test": noise_curve(
            run.model, *setup.test, config.test_sigmas, **setup.normalization, seed=TEST_SEED,
            draws=config.test_draws, backend=config.backend,
        ),
        "seconds": run.seconds,
        "environment": {
            "robustfast": robustfast.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": setup.train.pixels.device.type,
            "backends": setup.backends,
        },
    }  # fmt: skip
    if out is not None:
        about = {name: results["data"][name] for name in ("classes", "image")}
        about |= {**_identity(setup), "normalization": setup.normalization}
        files.save(out / files.MODEL, "model", run.best, about)
        disk.write_json(out / files.RESULTS, results)
    return results
