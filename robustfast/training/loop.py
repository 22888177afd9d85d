"""The training loop, one for all methods."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import robustfast
from robustfast import disk, ranks
from robustfast.evaluation.noise import count_right, right_share
from robustfast.streams import stream
from robustfast.training import data, files
from robustfast.training.batching import batches
from robustfast.training.config import Config, from_json
from robustfast.training.run import Run
from robustfast.training.setup import Setup, prepare

TEST_SEED = 0  # of the test noise: every method and every run is tested on the same noisy images


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
        disk.make_folder(out)
        files.remove_run(out)
        run.save(out, setup)
    return _go_on(setup, run, out, on_epoch)


def _claim(out: Path, overwrite: bool) -> None:
    if not overwrite and files.holds_run(out):
        raise FileExistsError(
            f"{out} holds a run: go on with it (resume), replace it (overwrite) or choose another folder"
        )
    disk.check_folder(out)


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
        **setup.identity,
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
        about |= {**setup.identity, "normalization": setup.normalization}
        files.save(out / files.MODEL, "model", run.best, about)
        disk.write_json(out / files.RESULTS, results)
    return results
