"""The five methods: each is a module that turns a model and a batch into the number to minimise."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustfast.losses import DiscriminativeLoss
from robustfast.training.config import Config
from robustfast.training.models import Classifier


class Batch(NamedTuple):
    """The clean and the noisy view (N, C, H, W) of the same samples, normalised, and their labels (N,)."""

    clean: Tensor
    noisy: Tensor
    target: Tensor


class CrossEntropy(nn.Module):
    """Mean over some views of the batch of their cross entropy."""

    def __init__(self, *views: str) -> None:
        super().__init__()
        self.views = views

    def forward(self, model: Classifier, batch: Batch) -> Tensor:
        losses = [F.cross_entropy(model(getattr(batch, view)), batch.target) for view in self.views]
        return torch.stack(losses).mean()


class Stability(nn.Module):
    """Cross entropy of the clean view + weight * mean_i ||f_i - g_i||_2."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, model: Classifier, batch: Batch) -> Tensor:
        features, noisy = model.features(batch.clean), model.features(batch.noisy)
        distance = torch.linalg.vector_norm(features - noisy, dim=1).mean()
        return F.cross_entropy(model.fc(features), batch.target) + self.weight * distance


class Discriminative(nn.Module):
    """The paper's method: cross entropy of the clean view + weight * discriminative loss of the features of both."""

    def __init__(self, weight: float, loss: DiscriminativeLoss) -> None:
        super().__init__()
        self.weight, self.loss = weight, loss

    def forward(self, model: Classifier, batch: Batch) -> Tensor:
        features, noisy = model.features(batch.clean), model.features(batch.noisy)
        loss = self.loss(features, noisy, batch.target, model.fc)
        return F.cross_entropy(model.fc(features), batch.target) + self.weight * loss


def build(config: Config, num_classes: int) -> nn.Module:
    """The recipe of ``config.method``; what it remembers from step to step is in its state_dict."""
    if config.method == "stability":
        return Stability(config.loss_weight)
    if config.method == "discriminative":
        loss = DiscriminativeLoss(
            num_classes,
            config.inter_dim,
            config.delta_var,
            config.delta_dist,
            config.norm,
            config.alpha,
            config.beta,
            config.gamma,
            config.centroid_momentum,
            backend=config.backend,
        )
        return Discriminative(config.loss_weight, loss)
    return CrossEntropy(*{"normal": ("clean",), "noisy": ("noisy",), "both": ("clean", "noisy")}[config.method])
