"""What a run works on: its data, device and backends, found before anything is trained."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from robustfast.backends import resolve
from robustfast.training import data, models
from robustfast.training.config import Config


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

    @property
    def identity(self) -> dict[str, Any]:
        """What makes a run this run: each of its files holds it."""
        return {"config": self.config.as_json(), "fingerprint": self.fingerprint}


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
