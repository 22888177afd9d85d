"""The five methods, each a RobustClassifier: which views its cross entropy sees, and which loss comes beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from robustfast.classifier import RobustClassifier
from robustfast.losses import DiscriminativeLoss
from robustfast.training.config import Config
from robustfast.training.models import Classifier


class Stability(nn.Module):
    """mean_i ||f_i - g_i||_2, in the signature of DiscriminativeLoss."""

    def forward(self, input: Tensor, input_noise: Tensor, target: Tensor, fc: Any) -> Tensor:
        return torch.linalg.vector_norm(input - input_noise, dim=1).mean()


def build(config: Config, model: Classifier, normalization: dict[str, Any]) -> RobustClassifier:
    """The method of ``config`` over ``model``; what it remembers from step to step is in its state_dict."""
    loss: nn.Module | None = None
    if config.method == "stability":
        loss = Stability()
    elif config.method == "discriminative":
        loss = DiscriminativeLoss(
            model.fc.out_features,
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
    return RobustClassifier(
        model,
        loss,
        sigma=config.sigma,
        **normalization,
        loss_weight=config.loss_weight,
        cross_entropy=config.method if config.method in ("noisy", "both") else "clean",
        backend=config.backend,
    )
