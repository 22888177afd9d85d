"""A whole training step in one forward: noise, both views, classifier, cross entropy and loss."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustfast import checks, process_groups
from robustfast.functional import Terms, noisy_pair

IGNORED = -100  # label that counts nowhere, that of F.cross_entropy
CROSS_ENTROPIES = {"clean": ("clean",), "noisy": ("noisy",), "both": ("clean", "noisy")}


class Pass(NamedTuple):
    """Penultimate features (N, D) of a view, and its logits where the model gave them on its way."""

    features: Tensor
    logits: Tensor | None


class RobustClassifier(nn.Module):
    """A classifier of images in [0, 1] that trains itself: its forward is one step for any trainer.

    ``forward(images)`` gives logits. ``forward(images, labels)`` gives ``{"loss", "logits", "terms"}`` with

        loss = cross entropy of the views named + loss_weight * loss(f, g, labels, classifier)

    where f and g are the penultimate features of the clean and of the noisy view. DistributedDataParallel, FSDP and
    torch.compile wrap this module and see one forward a step. Views are float32, or what ``.double()``, ``.half()`` or
    ``.bfloat16()`` made of the module.

    Args:
        model: maps normalised images to logits (N, K). One with timm's ``forward_features``, ``forward_head`` and
            ``get_classifier`` is asked by these; of any other, the features are what its ``classifier`` is given.
        loss: called as DiscriminativeLoss is; None for cross entropy alone.
        classifier: the layer of ``model``, or its name there ("fc", "classifier.6"), that maps features (N, D) to
            logits; None where the model has ``get_classifier``.
        sigma: standard deviation of the noise, for pixels in [0, 1].
        mean, pixel_std: the channels' normalisation, which happens here: images come as they are.
        loss_weight: lambda.
        cross_entropy: of the "clean" view, the "noisy" one, or of "both".
        noisy_share: of the noisy view in the cross entropy of both, 0 to 1; the clean one has the rest.
        label_smoothing: of the cross entropy, as in F.cross_entropy.
        process_group: whose batches count as one for the mean of the cross entropy, as DiscriminativeLoss has it: ranks
            may then have batches of any sizes. The mean over the ranks' losses, which DistributedDataParallel and FSDP
            take of the gradients, is the one over all samples. The same as for the loss; not needed for equal batches.
        seed: of the noise, so that sample_ids and draw fix it; None: another of PyTorch's generator at every step.
        concatenate: one pass of the model over both views, one after the other, instead of one each: faster on small
            batches, but BatchNorm then takes its statistics over both.
        backend: of the noise.

    Raises:
        ValueError: the classifier cannot be found in the model, ``cross_entropy`` is none of the three, or
            ``noisy_share`` is out of range.
    """

    _mean: Tensor
    _pixel_std: Tensor
    accepts_loss_kwargs = False  # to Hugging Face's Trainer: the loss is a mean over the batch as it is

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module | None,
        *,
        classifier: str | nn.Module | None = None,
        sigma: float,
        mean: Sequence[float],
        pixel_std: Sequence[float],
        loss_weight: float = 1.0,
        cross_entropy: str = "clean",
        noisy_share: float = 0.5,
        label_smoothing: float = 0.0,
        process_group: Any = False,
        seed: int | None = None,
        concatenate: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if cross_entropy not in CROSS_ENTROPIES:
            raise ValueError(f"cross_entropy: expected one of {', '.join(CROSS_ENTROPIES)}, got {cross_entropy!r}")
        if not 0 <= noisy_share <= 1:
            raise ValueError(f"noisy_share: expected 0 <= noisy_share <= 1, got {noisy_share!r}")
        self.model, self.loss = model, loss
        self.sigma, self.mean, self.pixel_std = sigma, tuple(mean), tuple(pixel_std)
        for name in ("mean", "pixel_std"):
            self.register_buffer(f"_{name}", torch.tensor(getattr(self, name)).view(-1, 1, 1), persistent=False)
        self.loss_weight, self.cross_entropy, self.seed = loss_weight, cross_entropy, seed
        self.noisy_share = noisy_share
        self.label_smoothing, self.process_group = label_smoothing, process_group
        self.concatenate, self.backend = concatenate, backend
        self.classifier_name = _find_classifier(model, classifier)
        self._asks_timm = all(hasattr(model, name) for name in ("forward_features", "forward_head", "get_classifier"))
        if not self._asks_timm:
            self.classifier.register_forward_pre_hook(_keep_features)

    @property
    def classifier(self) -> nn.Module:
        """The layer from features to logits."""
        return self.model.get_submodule(self.classifier_name)

    def forward(
        self,
        images: Any,
        labels: Tensor | None = None,
        sample_ids: Tensor | None = None,
        draw: int = 0,
    ) -> Any:
        """Logits, or with labels what to minimise.

        Args:
            images: (N, C, H, W), uint8 or floating in [0, 1]. With labels also a pair (clean, noisy) of views that are
                normalised already.
            labels: (N,) class indices of any integer dtype.
            sample_ids: int64 (N,), each image's place in the data set; 0..N-1 where None.
            draw: the epoch, or another number that makes the noise of a sample anew.

        Returns:
            Logits (N, K) without labels, else a dict: ``loss`` to call backward on; ``logits`` of the clean view, or of
            the noisy one where only that is classified; ``terms``, detached: ``cross_entropy``, ``loss`` of the module
            ``loss`` and, where that returns :class:`~robustfast.functional.Terms`, all of them.
        """
        if labels is None:
            return self.model(self._normalized(images))
        labels = _class_indices(labels)
        if isinstance(images, Tensor):
            images = noisy_pair(
                images,
                self.sigma,
                mean=self.mean,
                pixel_std=self.pixel_std,
                seed=self.seed,
                sample_ids=sample_ids,
                draw=draw,
                dtype=self._mean.dtype,
                backend=self.backend,
            )
        views = dict(zip(("clean", "noisy"), images, strict=True))
        classified = CROSS_ENTROPIES[self.cross_entropy]
        used = [view for view in views if self.loss is not None or view in classified]
        passes = dict(zip(used, self._passes([views[view] for view in used]), strict=True))
        logits = [self._logits(passes[view]) for view in classified]
        entropies = [self._cross_entropy(view, labels) for view in logits]
        total = torch.lerp(entropies[0], entropies[-1], self.noisy_share) if len(entropies) == 2 else entropies[0]
        terms = {"cross_entropy": total.detach()}
        if self.loss is not None:
            value = self.loss(passes["clean"].features, passes["noisy"].features, labels, self.classifier)
            if isinstance(value, Terms):
                terms |= value._asdict()
                value = value.loss
            terms["loss"] = value.detach()
            total = total + self.loss_weight * value
        return {"loss": total, "logits": logits[0], "terms": terms}

    def _passes(self, views: list[Tensor]) -> list[Pass]:
        if not self.concatenate:
            return [self._pass(view) for view in views]
        features, logits = self._pass(torch.cat(views))
        parts = [None] * len(views) if logits is None else logits.tensor_split(len(views))
        return list(map(Pass, features.tensor_split(len(views)), parts))

    def _pass(self, images: Tensor) -> Pass:
        if self._asks_timm:
            model: Any = self.model
            return Pass(model.forward_head(model.forward_features(images), pre_logits=True), None)
        kept = _asked.kept = []  # type: ignore[var-annotated]
        try:
            logits = self.model(images)
        finally:
            _asked.kept = None
        if not kept:
            raise ValueError(f"classifier: the model's forward does not call its {self.classifier_name}")
        return Pass(kept[-1], logits)

    def _logits(self, view: Pass) -> Tensor:
        return self.classifier(view.features) if view.logits is None else view.logits

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        group = process_groups.training_group(self)
        if group is None:
            return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        values = F.cross_entropy(logits, labels, reduction="none", label_smoothing=self.label_smoothing)
        return process_groups.mean(values, group, counted=labels != IGNORED)

    def _normalized(self, images: Tensor) -> Tensor:
        pixels = images if images.is_floating_point() else images / 255
        return ((pixels - self._mean) / self._pixel_std).to(self._mean.dtype)


def _class_indices(labels: Tensor) -> Tensor:
    """int64, as F.cross_entropy takes them; probabilities (N, K), which it takes too, as they are."""
    if isinstance(labels, Tensor) and labels.is_floating_point() and labels.dim() == 2:
        return labels
    checks.of_dtype("labels", labels, (*checks.LABELS, *checks.WIDENED_LABELS))
    if labels.dim() != 1:
        raise ValueError(f"labels: expected shape (N,), got {tuple(labels.shape)}")
    return labels.long()


# Where a thread wants what its classifier is given: DataParallel's replicas, which share hooks, have one thread each.
_asked = threading.local()


def _keep_features(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    kept = getattr(_asked, "kept", None)
    if kept is not None:
        kept.append(arguments[0])


def _find_classifier(model: nn.Module, classifier: str | nn.Module | None) -> str:
    """The name of the classifier in the model."""
    if classifier is None and not hasattr(model, "get_classifier"):
        linear = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
        raise ValueError(f"classifier: name the layer that gives the logits, perhaps one of {', '.join(linear)}")
    layer: Any = model.get_classifier() if classifier is None else classifier  # type: ignore[operator]
    layers = dict(model.named_modules())
    name = next((name for name, part in layers.items() if name == layer or part is layer), None)
    if name is None:
        raise ValueError(f"classifier: not in the model: {layer!r}")
    if not hasattr(layers[name], "weight"):
        raise ValueError(f"classifier: {name} has no weight, whose rows are the classes: {layers[name]!r}")
    return name
