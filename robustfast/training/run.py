"""The state of a run: model, optimizer and history, their step and their checkpoint."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from robustfast import ranks
from robustfast.streams import stream
from robustfast.training import files, models, recipes
from robustfast.training.batching import Batch, Part
from robustfast.training.config import Config
from robustfast.training.setup import Setup


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
        about = {**setup.identity, "history": self.history, "seconds": self.seconds}
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
