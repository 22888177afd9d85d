"""Names of the published code: importing ``DiscriminativeLoss_forcing`` from here is the one line to change."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.modules.loss import _Loss

from robustfast.losses import DiscriminativeLoss

__all__ = ["DiscriminativeLoss_forcing"]

# The published code's methods for parts of the loss, which is one op here.
PARTS = ("_discriminative_loss", "_cluster_means", "_variance_term", "_margin_term", "_regularization_term")


class DiscriminativeLoss_forcing(DiscriminativeLoss, _Loss):
    """:class:`robustfast.DiscriminativeLoss` with the published constructor and attributes.

    docs/pytorch.md says where it differs on purpose.

    Args:
        size_average: without effect, as in the published code, but for the attribute ``reduction``.
        **keywords: those of :class:`robustfast.DiscriminativeLoss` that the published code lacks.
    """

    def __init__(
        self, num_classes: int = 10, dim: int = 256, delta_var: float = 0.5, delta_dist: float = 3.0, norm: int = 2,
        alpha: float = 1.0, beta: float = 1.0, gamma: float = 0.001, momentum: float = 0.99, size_average: bool = True,
        **keywords: Any,
    ) -> None:  # fmt: skip
        super().__init__(num_classes, dim, delta_var, delta_dist, norm, alpha, beta, gamma, momentum, **keywords)
        self.reduction = "mean" if size_average else "sum"

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        for name in PARTS:
            if name in cls.__dict__:
                raise TypeError(_not_called(name))

    def __setattr__(self, name: str, value: Any) -> None:
        if name in PARTS:
            raise TypeError(_not_called(name))
        super().__setattr__(name, value)

    @property
    def mean_before(self) -> Tensor:
        """The momentum centroids (num_classes, dim), which is the buffer ``centroids``; assignment copies."""
        return self.centroids

    @mean_before.setter
    def mean_before(self, value: Tensor) -> None:
        self.centroids.copy_(value)

    @property
    def init(self) -> tuple[bool, ...]:
        """Which classes were seen, the buffer ``seen`` as Python's bools: reading it waits for the device."""
        return tuple(self.seen.tolist())

    @init.setter
    def init(self, value: Any) -> None:
        self.seen.copy_(self.seen.new_tensor(value))


def _not_called(name: str) -> str:
    return (
        f"{name}: the loss is one op here, which would not call this method; add a term to the loss's value, or build"
        " another loss from robustfast.reference"
    )
