"""Runs cases and turns their times into rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from robustfast.bench import cases
from robustfast.bench.cases import Case
from robustfast.bench.measure import Spread, captured, copy_rate, interleave, matrix_rate, ratios

Row = dict[str, Any]


class Ceilings:
    """The device's copy bandwidth and matrix rate, each measured once in a run."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.copy = copy_rate(device)
        self.matrix: dict[torch.dtype, float] = {}

    def floor(self, case: Case) -> float:
        """Seconds that no implementation of the case can do without."""
        seconds = case.bytes / self.copy
        if case.flops:
            if case.dtype not in self.matrix:
                self.matrix[case.dtype] = matrix_rate(self.device, case.dtype)
            seconds += case.flops / self.matrix[case.dtype]
        return seconds

    def as_json(self) -> dict[str, Any]:
        rates = {str(dtype).removeprefix("torch."): rate / 1e9 for dtype, rate in self.matrix.items()}
        return {"copy_gb_per_s": self.copy / 1e9, "matrix_gflop_per_s": rates}


def rows_of(case: Case, ceilings: Ceilings, seconds: float, graphs: bool = False) -> list[Row]:
    """One row an implementation, then one a part of the ceiling; docs/benchmarks.md says what their numbers are."""
    device, steps = ceilings.device, dict(case.steps)
    if graphs and device.type == "cuda":
        for name, step in case.steps.items():
            try:
                steps[f"{name} graph"] = captured(step)
            except RuntimeError as error:  # it waits for the device
                case.notes[f"{name} graph"] = str(error).splitlines()[0]
    steps |= case.ceilings
    times, peaks = interleave(steps, device, seconds)
    peers = [name for name in times if name.removesuffix(" graph") in case.peers]
    ours = [name for name in times if name.removesuffix(" graph") not in {*peers, *cases.PEERS, *case.ceilings}]
    middle = {name: Spread.of(present(values)) for name, values in times.items()}
    floor, null = ceilings.floor(case), middle[cases.NULL].median if cases.NULL in middle else 0.0
    best = min(peers, key=lambda name: middle[name].median, default=None)
    rows = []
    for name, values in times.items():
        row: Row = {"op": case.op, "shape": case.shape, "sizes": list(case.sizes),
                    "dtype": str(case.dtype).removeprefix("torch."), "implementation": name,
                    "seconds": asdict(middle[name]), "rounds": len(present(values)), "bytes": case.bytes,
                    "flops": case.flops, "peer": name not in ours}  # fmt: skip
        if name == cases.NULL:
            row |= {"bytes": 0, "flops": 0}
        elif floor:
            called = name not in case.ceilings and not name.endswith(" graph")
            least = floor + null if called else floor
            row |= {"floor_seconds": least, "of_ceiling": least / middle[name].median}
        if best is not None and name in ours:
            row["speedup"] = {"over": best, **asdict(Spread.of(ratios(times[best], values)))}
        row["peak_bytes"] = None if name.endswith(" graph") else peaks[name]
        rows.append(row)
    return rows


def present(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def plan(
    ops: Sequence[str], shapes: Sequence[str] | None, dtypes: Sequence[torch.dtype], device: torch.device
) -> list[tuple[str, str, torch.dtype]]:
    """(op, shape, dtype) of each table.

    Raises:
        ValueError: no op has a shape of that name.
    """
    for shape in shapes or ():
        if not any(shape in cases.SHAPES[op] for op in ops):
            known = sorted({name for op in ops for name in cases.SHAPES[op]})
            raise ValueError(f"shapes: expected some of {', '.join(known)}, got {shape!r}")
    usual = {op: tuple(cases.SHAPES[op]) if device.type == "cuda" else cases.ON_CPU[op] for op in ops}
    return [
        (op, shape, dtype)
        for op in ops
        for shape in (usual[op] if shapes is None else [name for name in shapes if name in cases.SHAPES[op]])
        for dtype in dtypes
    ]


def measure(
    op: str, shape: str, dtype: torch.dtype, names: Sequence[str], ceilings: Ceilings, seconds: float, graphs: bool
) -> tuple[Case, list[Row]]:
    """One table. Its inputs are gone before those of the next are made."""
    torch._dynamo.reset()
    case = cases.BUILDERS[op](shape, dtype, ceilings.device, names)
    return case, rows_of(case, ceilings, seconds, graphs)
