"""The six methods, each a RobustClassifier: which views its cross entropy sees, and which loss comes beside it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from robustfast import process_groups, ranks
from robustfast.classifier import RobustClassifier
from robustfast.losses import DiscriminativeLoss
from robustfast.training.config import Config
from robustfast.training.models import Classifier

CROSS_ENTROPY = {"noisy": "noisy", "both": "both", "discriminative-both": "both"}  # others: of the clean view


class Stability(nn.Module):
    """mean_i ||f_i - g_i||_2 over the samples of all ranks, in the signature of DiscriminativeLoss."""

    process_group = "world"

    def forward(self, input: Tensor, input_noise: Tensor, target: Tensor, fc: Any) -> Tensor:
        return process_groups.mean(
            torch.linalg.vector_norm(input - input_noise, dim=1), process_groups.training_group(self)
        )


class OwnCentroids(nn.Module):
    """The discriminative loss whose noisy features are drawn to the centroids of their own view, or not at all.

    An ablation: the variance is still the mean of both views' compactness, the rest is of the clean view.
    """

    def __init__(self, config: Config, num_classes: int) -> None:
        super().__init__()
        halved = replace(config, alpha=config.alpha / 2)
        self.clean = discriminative_loss(halved, num_classes)
        self.noisy = (
            discriminative_loss(replace(halved, beta=0.0, gamma=0.0), num_classes)
            if config.alignment == "own"
            else None
        )

    def forward(self, input: Tensor, input_noise: Tensor, target: Tensor, fc: Any) -> Tensor:
        loss = self.clean(input, None, target, fc)
        return loss if self.noisy is None else loss + self.noisy(input_noise, None, target, fc)


def discriminative_loss(config: Config, num_classes: int) -> DiscriminativeLoss:
    return DiscriminativeLoss(
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
        process_group="world",
        max_batch=-(-config.batch_size // (config.accumulate * ranks.count())),
    )


def build(config: Config, model: Classifier, normalization: dict[str, Any]) -> RobustClassifier:
    """The method of ``config`` over ``model``; what it remembers from step to step is in its state_dict."""
    loss: nn.Module | None = None
    if config.method == "stability":
        loss = Stability()
    elif config.method.startswith("discriminative"):
        make = discriminative_loss if config.alignment == "clean" else OwnCentroids
        loss = make(config, model.fc.out_features)
    return RobustClassifier(
        model,
        loss,
        sigma=config.sigma,
        **normalization,
        loss_weight=config.loss_weight,
        cross_entropy=CROSS_ENTROPY.get(config.method, "clean"),
        noisy_share=config.noisy_share,
        label_smoothing=config.label_smoothing,
        process_group="world",
        backend=config.backend,
    )
