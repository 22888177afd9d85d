"""The settings of a run: everything that decides its result. One field is one option of ``robustfast train``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, get_args, get_type_hints

from robustfast import checks
from robustfast.reference import Settings

METHODS = ("normal", "noisy", "both", "stability", "discriminative", "discriminative-both")
MODELS = ("small", "lenet", "resnet18")
NOISE_VIEWS = ("same", "independent")
ALIGNMENTS = ("clean", "own", "none")
SCHEDULES = ("step", "cosine")
OPTIMIZERS = ("sgd", "adamw")
PRECISIONS = ("none", "bf16", "fp16")
CHOICES = {
    "method": METHODS,
    "noise_view": NOISE_VIEWS,
    "alignment": ALIGNMENTS,
    "schedule": SCHEDULES,
    "optimizer": OPTIMIZERS,
    "amp": PRECISIONS,
}


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Config:
    """Settings of one training run, checked on construction (ValueError naming the setting).

    The meaning of each field stands in its help text, which ``robustfast train --help`` prints.
    """

    method: str = _setting("discriminative", f"one of {', '.join(METHODS)}")
    data: str = _setting("digits", "digits, npz:FILE, folder:DIR, cifar10:DIR, svhn:DIR or idx:DIR")
    size: int = _setting(0, "side that images of folder:DIR are resized and cut to, streamed from the disk; 0: as is")
    workers: int = _setting(2, "processes of each rank that read streamed images; no result depends on it")
    model: str = _setting("small", f"{', '.join(MODELS)}, timm:NAME or package.module:factory")
    inter_dim: int = _setting(64, "number of penultimate features")
    sigma: float = _setting(0.25, "standard deviation of the training noise, for pixels in [0, 1]")
    sigma_spread: float = _setting(
        0.0, "s: the noise of each image has a sigma drawn evenly from sigma * (1 - s) to sigma * (1 + s)"
    )
    noise_view: str = _setting("same", "augmentation of the noisy view: same as the clean one's, or independent")
    noisy_share: float = _setting(0.5, "both, discriminative-both: share of the noisy view in the cross entropy")
    loss_weight: float = _setting(1.0, "lambda, the weight of the stability or discriminative loss")
    alignment: str = _setting(
        "clean", f"discriminative: whose centroids draw the noisy features, one of {', '.join(ALIGNMENTS)}"
    )
    delta_var: float = _setting(0.5, "discriminative: distance from the centroid without pull")
    delta_dist: float = _setting(3.0, "discriminative: distance to keep from the decision boundary")
    norm: int = _setting(2, "discriminative: p of the distances to centroids, 1 or 2")
    alpha: float = _setting(1.0, "discriminative: weight of the variance")
    beta: float = _setting(1.0, "discriminative: weight of the margin")
    gamma: float = _setting(0.001, "discriminative: weight of the regularization")
    centroid_momentum: float = _setting(0.99, "discriminative: share of the previous centroid")
    label_smoothing: float = _setting(0.0, "share of the cross entropy's target that all classes have in common")
    epochs: int = _setting(40, "passes over the training images")
    batch_size: int = _setting(64, "images in a step, of all ranks together")
    accumulate: int = _setting(1, "parts that a step's images go through the model in, one after the other")
    optimizer: str = _setting("sgd", f"one of {', '.join(OPTIMIZERS)}")
    lr: float = _setting(0.03, "learning rate, before decay")
    momentum: float = _setting(0.9, "momentum of SGD (Nesterov's)")
    weight_decay: float = _setting(5e-4, "weight decay")
    schedule: str = _setting("step", "of the learning rate: step, at the milestones, or cosine, to 0 at the end")
    warmup: float = _setting(0.0, "epochs in which the learning rate rises to its full value from a hundredth")
    milestones: tuple[int, ...] = _setting((20, 30), "epochs at which the learning rate decays; repeat the option")
    decay: float = _setting(0.2, "factor of the learning rate at each milestone")
    ema: float = _setting(0.0, "decay of the average of the weights that is evaluated and kept, 0.9999 say; 0 for none")
    amp: str = _setting("none", f"mixed precision in training: {', '.join(PRECISIONS)}")
    compile: bool = _setting(False, "train through torch.compile")
    sync_batchnorm: bool = _setting(False, "statistics of BatchNorm over all ranks; on GPUs")
    crop: int = _setting(0, "random crops after padding by this many black pixels; 0 for none")
    crop_area: float = _setting(0.08, "streamed images: least share of an image's area in its random crop")
    flip: bool = _setting(False, "mirror every other image at random")
    validation: float = _setting(0.25, "share of the training images held out to choose the best epoch")
    test_sigmas: tuple[float, ...] = _setting((0.15, 0.25, 0.4, 0.6), "noise of the final test; repeat the option")
    test_draws: int = _setting(4, "draws of the noise per test image")
    seed: int = _setting(0, "decides the split, the initial weights, the order, the augmentation and the noise")
    device: str = _setting("auto", "auto, cpu or cuda")
    backend: str = _setting("auto", "backend of the loss and of the noise: auto, cpu, cuda, triton or reference")
    threads: int = _setting(0, "threads of PyTorch; 0: its own choice, kept when the run is resumed")

    def __post_init__(self) -> None:
        self._expect_types()
        for name in ("milestones", "test_sigmas"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, choices in CHOICES.items():
            self._expect(name, f"one of {', '.join(choices)}", choices.__contains__)
        named = f"one of {', '.join(MODELS)}, timm:NAME or package.module:factory"
        self._expect("model", named, lambda name: name in MODELS or all(name.partition(":")))
        for name in ("inter_dim", "batch_size", "accumulate", "epochs", "test_draws"):
            self._expect(name, "at least 1", lambda value: value >= 1)
        for name in ("sigma", "loss_weight", "lr", "weight_decay", "warmup", "crop", "size", "workers", "threads"):
            self._expect(name, "a finite number >= 0", lambda value: 0 <= value < math.inf)
        for name in ("momentum", "ema", "label_smoothing"):
            self._expect(name, f"0 <= {name} < 1", lambda value: 0 <= value < 1)
        for name in ("noisy_share", "sigma_spread"):
            self._expect(name, f"0 <= {name} <= 1", lambda value: 0 <= value <= 1)
        for name in ("decay", "crop_area"):
            self._expect(name, f"0 < {name} <= 1", lambda value: 0 < value <= 1)
        self._expect("validation", "0 < validation < 1", lambda value: 0 < value < 1)
        self._expect("seed", "0 <= seed < 2**63", lambda value: 0 <= value < 2**63)
        self._expect("test_sigmas", "finite numbers >= 0", lambda values: all(0 <= v < math.inf for v in values))
        settings = Settings(self.delta_var, self.delta_dist, self.alpha, self.beta, self.gamma, self.centroid_momentum)
        checks.loss_settings(settings, self.norm)

    def _expect_types(self) -> None:
        for name, hint in get_type_hints(Config).items():
            value = getattr(self, name)
            kind, *several = get_args(hint) or (hint,)  # (int, ...) of tuple[int, ...]
            accepted = (int, float) if kind is float else kind
            entries = value if several else [value]
            if not isinstance(entries, list | tuple) or not all(
                isinstance(entry, accepted) and isinstance(entry, bool) <= (kind is bool) for entry in entries
            ):
                raise ValueError(f"{name}: expected {kind.__name__}{'s' if several else ''}, got {value!r}")

    def _expect(self, name: str, expected: str, holds: Callable[[Any], bool]) -> None:
        value = getattr(self, name)
        if not holds(value):
            raise ValueError(f"{name}: expected {expected}, got {value!r}")

    @property
    def views(self) -> tuple[str, ...]:
        """The augmentations of an image in a step, by name."""
        return ("clean", "noisy") if self.noise_view == "independent" else ("clean",)

    def learning_rate(self, epoch: float) -> float:
        """The learning rate after so many epochs, a fraction within one: a function of that alone needs no state."""
        if epoch < self.warmup:
            return self.lr * (0.01 + 0.99 * epoch / self.warmup)
        if self.schedule == "cosine":
            done = (epoch - self.warmup) / max(self.epochs - self.warmup, 1e-9)
            return self.lr * (1 + math.cos(math.pi * min(done, 1.0))) / 2
        return self.lr * self.decay ** sum(epoch >= milestone for milestone in self.milestones)

    def as_json(self) -> dict[str, Any]:
        """The settings by name, in types that JSON has."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}


def from_json(settings: dict[str, Any]) -> Config:
    """The Config that :meth:`Config.as_json` made ``settings`` of.

    Raises:
        ValueError: a setting is unknown or out of range.
    """
    unknown = settings.keys() - {field.name for field in fields(Config)}
    if unknown:
        raise ValueError(f"unknown settings: {', '.join(sorted(unknown))}")
    return Config(**settings)
