"""The loss as a module: a drop-in replacement of the published one."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from robustfast import checks, functional, process_groups
from robustfast.backends import ops
from robustfast.gathering import Ranks
from robustfast.global_batch import EXCHANGES, GlobalLoss, choose
from robustfast.reference import Settings, Terms


class DiscriminativeLoss(nn.Module):
    """Discriminative loss on penultimate features with noisy-to-clean alignment, arXiv 2405.18499.

    Holds one momentum centroid per class (buffers ``centroids`` (num_classes, dim) and ``seen`` (num_classes,)), which
    move in training mode with gradients enabled. ``centroids`` is float32, float64 after ``.double()``, and stays
    float32 under ``.half()`` and ``.bfloat16()``. The equations stand in
    :func:`robustfast.functional.discriminative_loss`.

    Args:
        num_classes: K >= 2.
        dim: D, the number of penultimate features.
        delta_var: distance from the centroid below which a feature is not pulled.
        delta_dist: distance from the nearest decision boundary that a centroid should keep.
        norm: p in {1, 2} of variance and regularization.
        alpha, beta, gamma: weights of variance, margin and regularization.
        momentum: rho, the share of the previous centroid.
        ignore_index: samples with this label count nowhere.
        backend: "auto", or one of :func:`robustfast.backends`.
        process_group: whose batches, of any sizes, count as one batch in training: "world" (or True) for all ranks,
            looked up at each step; a torch.distributed group or a DeviceMesh of one dimension that this rank is in;
            None or False for this rank alone, None with a warning where several ranks train. In eval mode and under
            no_grad each rank's batch stands for itself.
        exchange: what the ranks of the group send each other, the same on all of them: "sums" of each class's features
            (16 K D bytes from each rank in float32, whatever the batch, and no waiting for a GPU), or "gather", the
            samples themselves. "auto" takes what is expected to take less time (docs/scaling.md) for ``max_batch``,
            or else for the batches of the first step (a compiled step without ``max_batch``: sums).
        max_batch: no rank has more samples than this; the gathering then waits for no sizes and can be compiled or
            captured in a CUDA graph.
        return_terms: forward returns :class:`~robustfast.functional.Terms` instead of the scalar loss.
    """

    centroids: Tensor
    seen: Tensor

    def __init__(
        self,
        num_classes: int = 10,
        dim: int = 256,
        delta_var: float = 0.5,
        delta_dist: float = 3.0,
        norm: int = 2,
        alpha: float = 1.0,
        beta: float = 1.0,
        gamma: float = 0.001,
        momentum: float = 0.99,
        *,
        ignore_index: int = -100,
        backend: str = "auto",
        process_group: Any = None,
        exchange: str = "auto",
        max_batch: int | None = None,
        return_terms: bool = False,
    ) -> None:
        super().__init__()
        self.num_classes, self.dim = checks.whole("num_classes", num_classes, 2), checks.whole("dim", dim, 1)
        checks.loss_settings(Settings(delta_var, delta_dist, alpha, beta, gamma, momentum), norm)
        self.delta_var, self.delta_dist, self.norm = delta_var, delta_dist, int(norm)
        self.alpha, self.beta, self.gamma, self.momentum = alpha, beta, gamma, momentum
        self.ignore_index, self.backend = ignore_index, backend
        if exchange not in EXCHANGES:
            raise ValueError(f"exchange: expected one of {', '.join(EXCHANGES)}, got {exchange!r}")
        if max_batch is not None and not max_batch >= 0:
            raise ValueError(f"max_batch: expected a number of samples or None, got {max_batch!r}")
        self.process_group, self.exchange, self.max_batch = process_group, exchange, max_batch
        self._auto: str | None = None  # the exchange that the first step has chosen
        self.return_terms = return_terms
        self.register_buffer("centroids", torch.zeros(self._classes_here(), self.dim, dtype=torch.float32))
        self.register_buffer("seen", torch.zeros(self._classes_here(), dtype=torch.bool))

    def forward(self, input: Tensor, input_noise: Tensor | None, target: Tensor, fc: Any) -> Tensor | Terms:
        """The loss of a batch.

        Args:
            input: clean features (N, dim).
            input_noise: features (N, dim) of the noisy views, or None.
            target: labels (N,).
            fc: the classifier, an nn.Linear or anything with ``weight`` (num_classes, dim) and ``bias`` (num_classes,)
                or None. Of a module that is more, such as a cosine head, the boundaries are others: it is refused.

        Returns:
            The scalar loss, or all of :class:`~robustfast.functional.Terms` where ``return_terms`` holds.
        """
        weight, bias = checks.classifier(fc, input, self.num_classes, self.dim)
        group = process_groups.training_group(self)
        op_of = ops if group is None else partial(GlobalLoss, self._ranks(input, group))
        return self._loss(input, input_noise, target, weight, bias, op_of)

    def _loss(self, input, input_noise, target, weight, bias, op_of, least: int = 2) -> Tensor | Terms:
        settings = Settings(self.delta_var, self.delta_dist, self.alpha, self.beta, self.gamma, self.momentum)
        state = self._buffers  # which a module looks through slowly
        loss, terms = functional.loss_and_terms(
            input, input_noise, target, weight, bias, state["centroids"], state["seen"], settings, self.norm,
            self.training, self.ignore_index, self.backend, op_of, least,
        )  # fmt: skip
        return Terms(loss, *terms) if self.return_terms else loss

    def _ranks(self, input: Tensor, group: Any) -> Ranks:
        exchange = self._auto if self.exchange == "auto" else self.exchange
        if exchange is None:
            exchange = choose(self.max_batch, input, self.num_classes, group)
            if not torch.compiler.is_compiling():
                self._auto = exchange
        return Ranks(group, exchange, self.max_batch)

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, dim={self.dim}, delta_var={self.delta_var}, "
            f"delta_dist={self.delta_dist}, norm={self.norm}, alpha={self.alpha}, beta={self.beta}, "
            f"gamma={self.gamma}, momentum={self.momentum}, backend={self.backend!r}"
        )

    def _classes_here(self) -> int:
        return self.num_classes

    def reset_parameters(self) -> None:
        """Forgets all centroids; what a module on the meta device needs after ``to_empty``, which does it by itself."""
        self.centroids.zero_()
        self.seen.zero_()

    def _apply(self, fn: Any, recurse: bool = True) -> DiscriminativeLoss:
        before = self.centroids
        super()._apply(fn, recurse)
        if self.centroids.dtype in (torch.float16, torch.bfloat16):  # ten thousand 1% steps vanish in 8 bits
            self.centroids = before.to(self.centroids.device, torch.float32)
        if before.is_meta and not self.centroids.is_meta:
            self.reset_parameters()
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        names = (prefix + "centroids", prefix + "seen")
        if not any(name in state_dict for name in names):
            message = f"{names[0]}, {names[1]}: the checkpoint is of a model without the loss's state"
            warnings.warn(f"{message}; with strict=False it loads, and that state stays what it is", stacklevel=3)
        elif isinstance(state_dict.get(names[0]), Tensor):  # with assign=True it would replace the state, dtype and all
            state_dict = {**state_dict, names[0]: state_dict[names[0]].to(self.centroids.dtype)}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def __deepcopy__(self, memo: dict[int, Any]) -> DiscriminativeLoss:
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        memo[id(self.process_group)] = self.process_group  # a handle of this process, shared by copies
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"process_group": process_groups.portable(self.process_group)}
