"""What stands in a cell of the study's tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean, stdev
from typing import Any

from benchmarks.study.collected import CURVATURE

POINTS = 100.0
TITLES = {"digits": "Digits", "mnist": "MNIST"}


def noises_of(study: dict[str, Any]) -> list[str]:
    gaussian = [name for name in study["settings"]["normal"][0] if name.startswith("gaussian ") and "," not in name]
    return ["clean", *gaussian]


def noise_name(name: str) -> str:
    return name.replace("gaussian ", "σ ")


def values(study: dict[str, Any], arm: str, setting: str, key: str = "accuracy") -> list[float]:
    return [seed[setting][key] for seed in study["settings"][arm]]


def tolerance(study: dict[str, Any], arm: str) -> str:
    known = [value for value in study["tolerance"][arm] if value is not None]
    return spread(known, 1, 3) if len(known) == len(study["tolerance"][arm]) else "over the largest σ"


def pair_of(study: dict[str, Any], arm: str, other: str, measure: str) -> dict[str, Any] | None:
    wanted = (arm, other, measure)
    return next((p for p in study["paired"] if (p["arm"], p["against"], p["measure"]) == wanted), None)


def shown(pair: dict[str, Any] | None, measure: str) -> str:
    if pair is None or pair["seeds"] is None:
        return "–"
    text = difference(pair["seeds"], measure)
    return f"**{text}**" if pair["seeds"]["low"] > 0 or pair["seeds"]["high"] < 0 else text


def difference(found: dict[str, Any], measure: str) -> str:
    unit, digits = (1.0, 2) if measure == CURVATURE else (POINTS, 1)
    mean, low, high = (f"{unit * found[key]:+.{digits}f}".replace("-", "−") for key in ("difference", "low", "high"))
    return f"{mean} ({low} to {high})"


def deviation(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def spread(values: Sequence[float | None], unit: float = POINTS, digits: int = 1) -> str:
    known = [unit * value for value in values if value is not None]
    if not known:
        return "–"
    return f"{fmean(known):.{digits}f} ± {deviation(known):.{digits}f}".replace("-", "−")


def by_method(methods: Sequence[str], columns: Sequence[Any], cell: Callable[[str, Any], str], head: Any) -> str:
    return table(["", *head], [[f"`{arm}`", *(cell(arm, column) for column in columns)] for arm in methods])


def columns_of(methods: Sequence[str], columns: dict[str, Callable[[str], str]]) -> str:
    return table(["", *columns], [[f"`{arm}`", *(cell(arm) for cell in columns.values())] for arm in methods])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) + "\n"
