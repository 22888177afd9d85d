"""The training loop, one for all methods."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import robustfast
from robustfast import disk, ranks
from robustfast.backends import resolve
from robustfast.evaluation.noise import count_right, right_share
from robustfast.functional import noisy_pair
from robustfast.streams import generator, stream
from robustfast.training import data, files, models, recipes
from robustfast.training.config import Config, from_json

TEST_SEED = 0  # of the test noise: every method and every run is tested on the same noisy images


class Setup(NamedTuple):
    """What a run works on and does not change."""

    config: Config
    device: torch.device
    classes: tuple[str, ...]
    train: data.Images | data.Files
    train_ids: Tensor  # (N,) position in the training pool: the identity of a sample for its noise
    validation: data.Images | data.Files
    test: data.Images | data.Files
    normalization: dict[str, Any]  # mean, pixel_std
    backends: dict[str, str]  # of each op used
    fingerprint: str


class Part(NamedTuple):
    """Images, of all ranks, that go through the model at once: a step's, or a part of them with ``accumulate``."""

    positions: Tensor  # in the training images
    share: float  # of the step's images
    last: bool  # of the step


class Batch(NamedTuple):
    """The clean and the noisy view (N, C, H, W) of the same samples, normalised, and their labels (N,)."""

    clean: Tensor
    noisy: Tensor
    target: Tensor


class Run:
    """What training changes, and a checkpoint holds; everything random is a function of (seed, epoch) instead.

    Attributes:
        model: the classifier of normalised images.
        classifier: the method over it: its forward is a step's objective.
        replica: ``classifier`` as this rank calls it: under DistributedDataParallel, where there are several.
        average: of the model's weights over the steps, where ``ema`` is set.
    """

    def __init__(self, setup: Setup) -> None:
        config, self.device = setup.config, setup.device
        self.dtype = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.amp]
        channels = setup.train.image[0]
        self.model = models.build(
            config.model, channels, config.inter_dim, len(setup.classes), stream(config.seed, "init")
        )
        if config.sync_batchnorm:
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.classifier = recipes.build(config, self.model, setup.normalization).to(self.device)
        self.optimizer = _optimizer(config, self.model)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16")
        average = get_ema_multi_avg_fn(config.ema)
        self.average = AveragedModel(self.model, multi_avg_fn=average, use_buffers=True) if config.ema else None
        if config.compile:
            self.classifier.compile()
        self.replica = DistributedDataParallel(self.classifier) if ranks.count() > 1 else self.classifier
        self.best: dict[str, Tensor] = {}
        self.history: list[dict[str, float]] = []
        self.seconds = 0.0

    @property
    def evaluated(self) -> nn.Module:
        """The model whose weights are evaluated and kept."""
        return self.model if self.average is None else self.average.module

    def backward(self, batch: Batch, part: Part) -> Tensor:
        """Add the gradient of a part's objective to the step's; returns this rank's share of the objective."""
        with self._synchronised(part.last):
            with self._mixed_precision():
                loss = self.replica((batch.clean, batch.noisy), batch.target)["loss"]
            self.scaler.scale(loss * part.share).backward()
        return loss.detach()

    def step(self, learning_rate: float) -> None:
        """Take the step whose gradient is there."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update_parameters(self.model)

    def _synchronised(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients go over the ranks once a step."""
        is_alone = isinstance(self.replica, DistributedDataParallel) and not last
        return self.replica.no_sync() if is_alone else nullcontext()  # type: ignore[operator]

    def _mixed_precision(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.dtype is None else torch.autocast(self.device.type, self.dtype)

    @property
    def best_epoch(self) -> int:
        """The epoch, from 1, with the highest validation score; the last of equals."""
        return int(max(self.history, key=lambda record: (record["validation"], record["epoch"]))["epoch"])

    def save(self, out: Path, setup: Setup) -> None:
        """Write the state after the last whole epoch; the identity of the run is its settings and its data."""
        tensors = {f"{part}.{name}": tensor for part, state in self._states().items() for name, tensor in state.items()}
        about = {**_identity(setup), "history": self.history, "seconds": self.seconds}
        about["scaler"] = self.scaler.state_dict()
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
        if self.average is not None:
            self.average.load_state_dict(parts["average"])
        self.scaler.load_state_dict(about.get("scaler", {}))
        self.history, self.seconds = about["history"], about["seconds"]

    def _states(self) -> dict[str, dict[str, Tensor]]:
        momenta = self.optimizer.state_dict()["state"]
        optimizer = {f"{index}.{key}": tensor for index, state in momenta.items() for key, tensor in state.items()}
        average = {} if self.average is None else self.average.state_dict()
        return {
            "classifier": self.classifier.state_dict(),
            "average": average,
            "best": self.best,
            "optimizer": optimizer,
        }


def _optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    if config.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        model.parameters(), config.lr, config.momentum, nesterov=config.momentum > 0, weight_decay=config.weight_decay
    )


def train(
    config: Config,
    out: Path | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train as ``config`` says, keep the weights of the best epoch, and test them once.

    Where torch.distributed has a process group, all ranks call this, share the images of every batch, and get the same
    results; rank 0 alone writes. The batches and their noise do not depend on the number of ranks.

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
    if out is not None:
        ranks.first(lambda: _claim(out, overwrite))
    setup = prepare(config)
    run = Run(setup)
    if out is not None and ranks.rank() == 0:
        files.remove_run(out)
        run.save(out, setup)
    return _go_on(setup, run, out, on_epoch)


def _claim(out: Path, overwrite: bool) -> None:
    if not overwrite and files.holds_run(out):
        raise FileExistsError(
            f"{out} holds a run: go on with it (resume), replace it (overwrite) or choose another folder"
        )
    disk.make_folder(out)


def resume(out: Path, on_epoch: Callable[[dict[str, float]], None] | None = None) -> dict[str, Any]:
    """Go on with the run in ``out`` from its last whole epoch, to the bit where it would be uninterrupted.

    Its settings, the number of threads among them, are those it began with; the number of ranks may be another. A
    finished run is not tested again: its results are returned. See :func:`train` for the rest.

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
    if config.sync_batchnorm and device.type != "cuda":
        raise ValueError("sync_batchnorm: expected a GPU, where PyTorch has it")
    if config.size and config.crop:
        raise ValueError(f"crop: streamed images are cut at random by crop_area, got {config.crop} pixels of padding")
    loaded = data.load(config.data, config.size, config.workers)
    models.check_image(config.model, loaded.train.image[1:])
    ids, held_out = data.stratified_split(loaded.train.labels, config.validation, config.seed)
    train = loaded.train.take(ids)
    return Setup(
        config, device, loaded.classes, train.to(device), ids.to(device), loaded.train.take(held_out).to(device),
        loaded.test.to(device), data.normalization(train), backends, loaded.fingerprint(),
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
            if out is not None and ranks.rank() == 0:
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
    run.classifier.train()
    total = torch.zeros((), device=setup.device)
    counted = torch.zeros((), device=setup.device, dtype=torch.float64)
    steps, done = -(-len(setup.train_ids) // config.batch_size), 0
    for part, batch in batches(setup, epoch):
        loss = run.backward(batch, part)
        taken = loss.isfinite() | (not run.scaler.is_enabled())  # the scaler leaves out steps that are not finite
        total += torch.where(taken, loss, 0) * len(part.positions)
        counted += taken * len(part.positions)
        if part.last:
            run.step(config.learning_rate(epoch + done / steps))
            done += 1
    if not math.isfinite(mean_loss := float(ranks.add(total)) / (float(ranks.add(counted)) or math.nan)):
        raise FloatingPointError(f"epoch {epoch + 1}: the loss is {mean_loss}; a lower learning rate may help")
    ranks.as_on_first(run.evaluated)
    record = {
        "epoch": epoch + 1,
        "lr": config.learning_rate(epoch),
        "loss": mean_loss,
        **validate(setup, run.evaluated),
    }
    run.history.append(record)
    if run.best_epoch == record["epoch"]:
        run.best = {name: tensor.clone() for name, tensor in run.evaluated.state_dict().items()}
    return record


def batches(setup: Setup, epoch: int) -> Iterator[tuple[Part, Batch]]:
    """This rank's share of the training images in the epoch's order; the noise is draw ``epoch`` of each sample."""
    config = setup.config
    order = torch.randperm(len(setup.train_ids), generator=generator(config.seed, "order", epoch)).to(setup.device)
    parts = [part for step in order.split(config.batch_size) for part in _parts(step, config.accumulate)]
    shares = [ranks.share(part.positions) for part in parts]
    settings = {**setup.normalization, "seed": stream(config.seed, "noise"), "draw": epoch, "backend": config.backend}
    sigma = draw_sigmas(config, len(order), epoch, setup.device)
    for part, mine, views in zip(parts, shares, setup.train.augmented(shares, config, epoch), strict=True):
        scale = sigma[mine] if isinstance(sigma, Tensor) else sigma
        pairs = [noisy_pair(pixels, scale, **settings, sample_ids=setup.train_ids[mine]) for pixels in views]
        yield part, Batch(pairs[0][0], pairs[-1][1], setup.train.labels[mine])


def _parts(step: Tensor, accumulate: int) -> list[Part]:
    parts = [index for index in step.tensor_split(accumulate) if len(index)]
    return [Part(index, len(index) / len(step), index is parts[-1]) for index in parts]


def draw_sigmas(config: Config, count: int, epoch: int, device: torch.device) -> Tensor | float:
    """The noise of an epoch: one standard deviation for all, or where ``sigma_spread`` wants it one each, (count,)."""
    if not config.sigma_spread:
        return config.sigma
    even = torch.rand(count, generator=generator(config.seed, "sigma", epoch)).to(device)
    return config.sigma * (1 + config.sigma_spread * (2 * even - 1))


def validate(setup: Setup, model: nn.Module) -> dict[str, float]:
    """Accuracy on clean and on noisy validation images, and their mean, by which the best epoch is chosen."""
    config = setup.config
    seed = stream(config.seed, "validation noise")
    curve = noise_curve(model, setup.validation, [config.sigma], seed=seed, **_noise_settings(setup))
    clean, noisy = (point["accuracy"] for point in curve)
    return {"validation_clean": clean, "validation_noisy": noisy, "validation": (clean + noisy) / 2}


def _noise_settings(setup: Setup) -> dict[str, Any]:
    return {"device": setup.device, **setup.normalization, "backend": setup.config.backend}


def noise_curve(
    model: nn.Module,
    images: data.Images | data.Files,
    sigmas: Sequence[float],
    *,
    device: torch.device,
    draws: int = 1,
    **settings: Any,
) -> list[dict[str, float]]:
    """As :func:`robustfast.evaluation.noise_curve` has it, each rank having looked at its share of the images."""
    sigmas = [0.0, *sigmas]
    parts = [part for part in ranks.share(torch.arange(len(images.labels))).split(images.block) if len(part)]
    batches = (
        (pixels, images.labels[part], part.to(device)) for part, pixels in zip(parts, images.read(parts), strict=True)
    )
    right = ranks.add(count_right(model, batches, sigmas, device=device, draws=draws, **settings))
    return [
        {"sigma": sigma, "accuracy": right_share(number, sigma, len(images.labels), draws)}
        for sigma, number in zip(sigmas, right, strict=True)
    ]


def finish(setup: Setup, run: Run, out: Path | None) -> dict[str, Any]:
    """Test the weights of the best epoch; write them and the results."""
    config, model = setup.config, run.evaluated
    model.load_state_dict(run.best)
    curve = noise_curve(
        model, setup.test, config.test_sigmas, seed=TEST_SEED, draws=config.test_draws, **_noise_settings(setup)
    )
    results = {
        "format": files.FORMAT,
        **_identity(setup),
        "data": {
            "classes": list(setup.classes),
            "image": list(setup.train.image),
            "train": len(setup.train.labels),
            "validation": len(setup.validation.labels),
            "test": len(setup.test.labels),
        },
        "history": run.history,
        "best_epoch": run.best_epoch,
        "test": curve,
        "seconds": run.seconds,
        "environment": {
            "robustfast": robustfast.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": setup.device.type,
            "ranks": ranks.count(),
            "backends": setup.backends,
        },
    }
    if out is not None and ranks.rank() == 0:
        about = {name: results["data"][name] for name in ("classes", "image")}
        about |= {**_identity(setup), "normalization": setup.normalization}
        files.save(out / files.MODEL, "model", run.best, about)
        disk.write_json(out / files.RESULTS, results)
    return results
