"""What the study trains: the six methods, and variations of them, each over the same seeds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from robustfast.training.config import METHODS, Config
from robustfast.training.presets import DIGITS, preset

SEEDS = 5


@dataclass(frozen=True)
class Arm:
    """A method, with changes to its settings of the preset digits; a variation is set beside the arm ``base``."""

    name: str
    method: str
    changes: dict[str, Any] = field(default_factory=dict)
    base: str | None = None

    @property
    def suite(self) -> str:
        return "quick" if self.base else "paper"

    def folder(self, seed: int) -> str:
        """The name of a run's folder; that of a method is the demo's, so that the demo takes over the study's runs."""
        return f"{self.name.replace(' ', '-')}-{seed}"

    def config(self, seed: int, settings: dict[str, Any]) -> Config:
        return preset("digits", self.method, seed=seed, threads=1, **{**settings, **self.changes})


METHOD_ARMS = tuple(Arm(method, method) for method in METHODS)
# Of "discriminative" with another cross entropy, the rest as that method has it.
SAME_LOSS = {"loss_weight": 1.0, "delta_var": 0.5, **DIGITS["discriminative"]}
VARIATIONS = (
    Arm("without margin", "discriminative", {"beta": 0.0}, "discriminative"),
    Arm("without alignment", "discriminative", {"alignment": "none"}, "discriminative"),
    Arm("own centroids", "discriminative", {"alignment": "own"}, "discriminative"),
    Arm("momentum 0", "discriminative", {"centroid_momentum": 0.0}, "discriminative"),
    Arm("momentum 0.9", "discriminative", {"centroid_momentum": 0.9}, "discriminative"),
    Arm("delta_dist 1", "discriminative", {"delta_dist": 1.0}, "discriminative"),
    Arm("delta_dist 5", "discriminative", {"delta_dist": 5.0}, "discriminative"),
    Arm("noisy cross entropy", "discriminative-both", {**SAME_LOSS, "noisy_share": 1.0}, "discriminative"),
    Arm("cross entropy of both", "discriminative-both", {**SAME_LOSS, "noisy_share": 0.5}, "discriminative"),
    Arm("crops", "discriminative", {"crop": 1}, "discriminative"),
    Arm("independent crops", "discriminative", {"crop": 1, "noise_view": "independent"}, "crops"),
    Arm("noisy with a sigma each", "noisy", {"sigma_spread": 1.0}, "noisy"),
    Arm("discriminative-both with a sigma each", "discriminative-both", {"sigma_spread": 1.0}, "discriminative-both"),
)
ARMS = (*METHOD_ARMS, *VARIATIONS)
