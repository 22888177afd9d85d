"""What a step of several ranks is expected to take, by which they choose their ways.

From sizes that all ranks have in common and from constants, never from a clock: so all of them choose the same.
docs/scaling.md derives it and compares it with measurements.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from robustfast import checks


class Costs(NamedTuple):
    """Seconds that parts of a step take."""

    collective: float  # of a few bytes
    sent: float  # a byte that a rank sends
    gathered: float  # a byte of gathered features: put together, and gone through by the forward on every rank
    table: float  # a byte of a table (R, D): all that the steps of the loss do with such tables
    searched: float  # an operation of the search


COSTS = {
    "cpu": Costs(collective=1e-4, sent=1e-9, gathered=1.5e-9, table=1e-8, searched=5e-12),
    "cuda": Costs(collective=2e-5, sent=2e-11, gathered=3e-12, table=1.2e-11, searched=5e-15),
}


class Step(NamedTuple):
    """Sizes of a step; a noisy view is taken to be there. Methods only: PyTorch 2.10 compiles no tuple's properties."""

    ranks: int
    n: int  # of all ranks, each filled up to the largest batch
    num_classes: int
    dim: int
    element: int  # bytes of a feature
    wide: int  # bytes of an element of the tables
    costs: Costs

    @classmethod
    def of(cls, features: Tensor, n: int, num_classes: int, ranks: int) -> Step:
        costs = COSTS.get(features.device.type, COSTS["cuda"])
        element, wide = features.element_size(), checks.wide_dtype(features).itemsize
        return cls(ranks, n, num_classes, features.shape[1], element, wide, costs)

    def sums(self) -> float:
        """Two all-reduces of a table (K, D), the loss by its steps, and the search."""
        costs, table = self.costs, self.num_classes * self.dim * self.wide
        search = self._search()
        return 2 * costs.collective + table * (4 * self._share() * costs.sent + costs.table) + min(search)

    def gather(self) -> float:
        """An all-gather of both views, the forward of all samples, and the search."""
        costs, features = self.costs, 2 * self.n * self.dim * self.element
        alone, shared = self._search()
        exchanged = 2 * costs.collective + features * (self._share() * costs.sent + costs.gathered)
        return exchanged + min(alone, shared + self._steps())

    def gather_shares(self) -> bool:
        """Whether the ranks share the search of gathered samples, for which the loss has to be made of its steps."""
        alone, shared = self._search()
        return shared + self._steps() < alone

    def search_is_shared(self) -> bool:
        """Whether the ranks share the search of the classes of the batch."""
        alone, shared = self._search()
        return shared < alone

    def _share(self) -> float:
        return (self.ranks - 1) / self.ranks

    def _rows(self) -> int:  # R, the classes of the batch at most
        return min(self.n, self.num_classes)

    def _steps(self) -> float:
        return self._rows() * self.dim * self.wide * self.costs.table

    def _search(self) -> tuple[float, float]:
        """Seconds of 4 R K D operations on each rank, and of a part of them with a collective of the winners."""
        alone = 4 * self._rows() * self.num_classes * self.dim * self.costs.searched
        return alone, alone / self.ranks + self.costs.collective
