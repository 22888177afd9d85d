"""How models are asked: images in [0, 1] in, logits out, in evaluation mode, and both checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from robustfast import checks

Model = Callable[[Tensor], Tensor]


class Normalized(nn.Module):
    """A model of normalised images as one of images in [0, 1]: ``model((x - mean) / pixel_std)``.

    Args:
        model: maps normalised images (N, C, H, W) to logits (N, K).
        mean, pixel_std: one number per channel.
    """

    mean: Tensor
    pixel_std: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], pixel_std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1))

    def normalize(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.pixel_std

    def forward(self, images: Tensor) -> Tensor:
        return self.model(self.normalize(images))

    def features(self, images: Tensor) -> Tensor:
        """Penultimate features (N, D), of a model that has ``features``."""
        return self.model.features(self.normalize(images))  # type: ignore[operator]

    @property
    def fc(self) -> Any:
        """The linear classifier on the features, of a model that has ``fc``."""
        return self.model.fc


@contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """The model in evaluation mode; every part of it gets its own mode back."""
    modes = {part: part.training for part in model.modules()} if isinstance(model, nn.Module) else {}
    try:
        for part in modes:
            part.training = False
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def logits_of(model: Model, images: Tensor, labels: Tensor | None = None) -> Tensor:
    """The model's logits (N, K), checked; labels, where given, are checked to be classes of the model.

    Raises:
        TypeError: the model does not return a floating tensor.
        ValueError: it returns another shape, probabilities, or numbers that are not finite; or a label is none of its K
            classes.
    """
    logits = model(images)
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        got = f"a tensor of {logits.dtype}" if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"model: expected logits, a floating tensor (N, K), got {got}")
    if logits.dim() != 2 or len(logits) != len(images):
        raise ValueError(f"model: expected logits ({len(images)}, K), got shape {tuple(logits.shape)}")
    values = logits.detach()
    if not bool(values.isfinite().all()):
        raise ValueError(f"model: expected finite logits, got {int((~values.isfinite()).sum())} that are inf or nan")
    if len(values) and bool((values >= 0).all() & ((values.sum(1) - 1).abs() < 1e-3).all()):
        raise ValueError("model: expected logits, got probabilities (no entry below 0, every row sums to 1)")
    if labels is not None and len(labels) and int(labels.max()) >= logits.shape[1]:
        raise ValueError(f"labels: expected classes 0..{logits.shape[1] - 1} of the model, got {int(labels.max())}")
    return logits


def checked_images(images: Tensor, sample_ids: Tensor | None = None) -> Tensor:
    """The ids (N,) of a batch of images, 0..N-1 where none are given, after a check of both.

    Raises:
        TypeError, ValueError: images are not a floating tensor (N, C, H, W) in [0, 1], or ids not int64 (N,) >= 0.
    """
    checks.of_dtype("images", images, checks.FLOATING)
    if images.dim() != 4:
        raise ValueError(f"images: expected shape (N, C, H, W), got {tuple(images.shape)}")
    if images.numel():
        low, high = (float(bound) for bound in images.detach().aminmax())
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"images: expected values in [0, 1], got {low:g} to {high:g}; normalise inside of the model"
            )
    if sample_ids is None:
        return torch.arange(len(images), device=images.device)
    checks.of_dtype("sample_ids", sample_ids, (torch.int64,))
    checks.of_shape("sample_ids", sample_ids, (len(images),), images)
    if len(images) and int(sample_ids.min()) < 0:
        raise ValueError(f"sample_ids: expected ids >= 0, got {int(sample_ids.min())}")
    return sample_ids


def checked_labels(labels: Tensor, images: Tensor) -> None:
    """TypeError or ValueError where labels are not integers (N,) >= 0 on the images' device."""
    checks.of_dtype("labels", labels, checks.LABELS)
    checks.of_shape("labels", labels, (len(images),), images)
    if len(labels) and int(labels.min()) < 0:
        raise ValueError(f"labels: expected classes from 0, got {int(labels.min())}")


def checked(images: Tensor, labels: Tensor, sample_ids: Tensor | None, **counts: int) -> Tensor:
    """The ids (N,) of images with labels, after a check of all three and of counts such as draws, each at least 1."""
    ids = checked_images(images, sample_ids)
    checked_labels(labels, images)
    positive(**counts)
    return ids


def positive(**counts: int) -> None:
    """ValueError where a count is not an int of at least 1."""
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")


def above_zero(**numbers: float) -> None:
    """ValueError where a number is not finite and above 0."""
    for name, value in numbers.items():
        if not (isinstance(value, (int, float)) and 0 < value < math.inf):
            raise ValueError(f"{name}: expected a finite number above 0, got {value!r}")


def in_batches(
    measure: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]],
    model: Model,
    images: Tensor,
    labels: Tensor,
    sample_ids: Tensor | None,
    batch_size: int,
) -> tuple[Tensor, ...]:
    """``measure(images, labels, ids)`` of each batch, joined; of no images too, whose results have the right shapes."""
    ids = checked(images, labels, sample_ids, batch_size=batch_size)
    parts = zip(*(part.split(batch_size) for part in (images, labels, ids)), strict=True)
    with evaluating(model):
        results = [measure(*part) for part in parts]
    return tuple(torch.cat(column) for column in zip(*results, strict=True))
