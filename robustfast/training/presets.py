"""Named settings: the digits that need no download, and the paper's CIFAR-10."""

from __future__ import annotations

from typing import Any

from robustfast.training.config import Config

# What benchmarks/tune_digits.py found for each method, with the same number of trials each.
DIGITS: dict[str, dict[str, Any]] = {
    "normal": {"lr": 0.02, "weight_decay": 0.005},
    "noisy": {"lr": 0.02, "weight_decay": 0.0005},
    "both": {"lr": 0.02, "weight_decay": 0.0005},
    "stability": {"lr": 0.03, "loss_weight": 0.03},
    "discriminative": {"lr": 0.02, "delta_dist": 3.0, "alpha": 0.3},
    "discriminative-both": {"lr": 0.02, "alpha": 0.3, "loss_weight": 0.1, "noisy_share": 0.5, "delta_var": 0.5},
}

# arXiv 2405.18499 and its published code.
CIFAR10: dict[str, Any] = {
    "data": "npz:cifar10.npz",
    "model": "resnet18",
    "inter_dim": 128,
    "sigma": 0.06,
    "noise_view": "independent",
    "loss_weight": 1.0,
    "delta_var": 0.5,
    "delta_dist": 5.0,
    "epochs": 200,
    "batch_size": 64,
    "lr": 1e-3,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "milestones": (60, 120, 160),
    "decay": 0.2,
    "crop": 4,
    "flip": True,
    "validation": 0.1,
    "test_sigmas": (0.06, 0.1, 0.15, 0.2),
}
PRESETS = ("digits", "cifar10")


def preset(name: str, method: str = "discriminative", **changes: Any) -> Config:
    """The settings of a preset for a method, with changes.

    Raises:
        ValueError: there is no such preset or method, or a changed setting is out of range.
    """
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    settings = CIFAR10 if name == "cifar10" else DIGITS.get(method, {})
    return Config(**{**settings, "method": method, **changes})
