"""Classes split over ranks: which rank has which rows, and how batches, rows and winners come together.

Every rank has torch.chunk's block of the classes, which is also how DTensor's Shard(0) lays out a table; the last ranks
may have none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from robustfast import collectives, reference
from robustfast.reference import Groups


class Block(NamedTuple):
    """This rank's block of the classes that the ranks of ``group`` share."""

    num_classes: int  # of all ranks
    first: int
    size: int
    group: Any

    @classmethod
    def of(cls, num_classes: int, group: Any) -> Block:
        most = -(-num_classes // collectives.size(group))
        first = min(collectives.rank(group) * most, num_classes)
        return cls(num_classes, first, min(most, num_classes - first), group)

    def local(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of this rank's tables for ids of classes, and which of them are its own; the others' row is 0."""
        row = ids.long() - self.first
        mine = (row >= 0) & (row < self.size)
        return torch.where(mine, row, 0), mine


def fetch(block: Block, ids: Tensor, tables: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Rows ``ids`` (R,) of tables (K, ...), of which each rank has its block, on every rank; zeros for ids below 0.

    One all-reduce of integers, in which all ranks but one add 0: the rows arrive bit for bit, nan too.
    """
    local, mine = block.local(ids)
    if block.size == block.num_classes:
        rows_here = [reference.read_state(table, local).to(dtype) for table in tables]
        return [rows.masked_fill(~mine.view(-1, *(1,) * (rows.dim() - 1)), 0) for rows in rows_here]
    shapes = [(len(ids), *table.shape[1:]) for table in tables]
    widths = [table[0:0].flatten(1).shape[1] if table.dim() > 1 else 1 for table in tables]
    rows = torch.zeros(len(ids), sum(widths), dtype=dtype, device=ids.device)
    if block.size:
        own = [table[local].to(dtype).reshape(len(ids), width) for table, width in zip(tables, widths, strict=True)]
        rows = torch.where(mine.unsqueeze(1), torch.cat(own, 1), rows)
    bits = rows.view(torch.int64 if dtype == torch.float64 else torch.int32)
    rows = collectives.all_reduce(bits, "SUM", block.group).view(dtype)
    return [part.reshape(shape) for part, shape in zip(rows.split(widths, 1), shapes, strict=True)]


@torch.no_grad()
def write_block(block: Block, groups: Groups, centroid: Tensor, centroids: Tensor, seen: Tensor) -> None:
    """The state of this rank's classes in the batch, as reference.write_state has it."""
    if block.size:
        place, mine = block.local(groups.classes)
        reference.write_rows(place, mine & groups.taken, centroid, centroids, seen)


def best_of_ranks(score: Tensor, winner: Tensor, block: Block) -> Tensor:
    """The winner (R,) of all classes, -1 where no rank has one, of each rank's best score and its row (R,).

    MAX of the score, then MIN of the class among those that have it: exact, the lowest class on ties; nan wins.
    """
    score = torch.where(score.isnan(), torch.nan, score + 0.0)  # one nan, and no negative zero
    bits = score.view(torch.int64 if score.dtype == torch.float64 else torch.int32)
    order = torch.where(bits < 0, bits ^ torch.iinfo(bits.dtype).max, bits)  # of integers as of floats, nan at the top
    best = collectives.all_reduce(order.clone(), "MAX", block.group)
    none = torch.iinfo(winner.dtype).max
    classes = torch.where((order == best) & (winner >= 0), winner + block.first, none)
    classes = collectives.all_reduce(classes, "MIN", block.group)
    return torch.where(classes == none, -1, classes)
