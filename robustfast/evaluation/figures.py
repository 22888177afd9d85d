"""Figures of the report as inline SVG: no script, no font and no colour that is not in the page's own style."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 440, 290
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 12, 42
# A circle, a square, triangles, a diamond and a cross, about the origin.
MARKS = (
    "M-3.5,0a3.5,3.5 0 1,0 7,0a3.5,3.5 0 1,0 -7,0",
    "M-3.2,-3.2h6.4v6.4h-6.4z",
    "M0,-4.2L4,3.2H-4z",
    "M0,-4.4L4.4,0L0,4.4L-4.4,0z",
    "M-4,-3.2H4L0,4.2z",
    "M-1.3,-4h2.6v2.7H4v2.6H1.3V4h-2.6V1.3H-4v-2.6h2.7z",
)


class Series(NamedTuple):
    """Points of one group, with a band or error bars where ``low`` and ``high`` are given; ``color`` counts groups."""

    label: str
    color: int
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    line: bool = True


class Scale(NamedTuple):
    """From values ``low``..``high`` to pixels ``start``..``end``, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(max(v, 1e-300)) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / ((high - low) or 1.0) * (self.end - self.start)

    def ticks(self) -> list[float]:
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            step = max(1, math.ceil((last - first + 1) / 6))
            return [10.0**power for power in range(first, last + 1, step)]
        rough = (self.high - self.low) / 7 or 1.0
        power = 10 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [step * k for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


def lines(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    title: str,
    log_y: bool = False,
    log_x: bool = False,
    percent: bool = False,
    x_marks: Sequence[tuple[float, str]] = (),
    diagonal: bool = False,
    y_range: tuple[float, float] | None = None,
) -> str:
    """Lines with marks over a common pair of axes; ``x_marks`` are vertical lines with a note."""
    xs = [x for s in series for x in s.x]
    ys = [y for s in series for part in (s.y, s.low or (), s.high or ()) for y in part]
    if log_y:
        ys = [y for y in ys if y > 0]
    if not xs or not ys:
        return _frame(title, f'<text class="note" x="{WIDTH / 2}" y="{HEIGHT / 2}" text-anchor="middle">no data</text>')
    low, high = y_range or _bounds(ys, log_y)
    x_low, x_high = (min(xs) / 1.2, max(xs) * 1.2) if log_x else _padded(min(xs), max(xs))
    across = Scale(x_low, x_high, LEFT, WIDTH - RIGHT, log_x)
    up = Scale(low, high, HEIGHT - BOTTOM, TOP, log_y)
    body = [_axes(across, up, x_label, y_label, percent)]
    if diagonal:
        start, end = max(x_low, low), min(x_high, high)
        place = f'x1="{across(start):.1f}" y1="{up(start):.1f}" x2="{across(end):.1f}" y2="{up(end):.1f}"'
        body.append(f'<line class="note" {place}/>')
    for value, note in x_marks:
        x = across(value)
        body.append(f'<line class="note" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM}"/>')
        body.append(f'<text class="small" x="{x + 4:.1f}" y="{TOP + 10}">{escape(note)}</text>')
    for s in series:
        body.append(_drawn(s, across, up, log_y))
    return _frame(title, "".join(body))


def _drawn(s: Series, across: Scale, up: Scale, log_y: bool) -> str:
    points = [(across(x), up(y)) for x, y in zip(s.x, s.y, strict=True) if y > 0 or not log_y]
    parts = []
    if s.low is not None and s.high is not None:
        edge = [(across(x), up(v)) for x, v in zip(s.x, s.high, strict=True)]
        edge += [(across(x), up(v)) for x, v in reversed(list(zip(s.x, s.low, strict=True)))]
        parts.append(f'<polygon class="band c{s.color}" points="{_points(edge)}"/>')
    if s.line:
        parts.append(f'<polyline class="line c{s.color}" points="{_points(points)}"/>')
    for (px, py), x, y in zip(points, s.x, s.y, strict=False):
        tip = f"{s.label}: {x:.4g}, {y:.4g}"
        mark = MARKS[s.color % len(MARKS)]
        parts.append(
            f'<path class="mark c{s.color}" transform="translate({px:.1f},{py:.1f})" d="{mark}">'
            f"<title>{escape(tip)}</title></path>"
        )
    return "".join(parts)


def bars(groups: Sequence[str], series: Sequence[Series], y_label: str, *, title: str, percent: bool = False) -> str:
    """Bars side by side: ``series[i].y`` has one value for each of ``groups``; low and high are error bars."""
    values = [v for s in series for part in (s.y, s.high or ()) for v in part] + [0.0]
    low = min(0.0, min(v for s in series for v in s.y)) if series else 0.0
    up = Scale(low, (max(values) - low) * 1.05 + low or 1.0, HEIGHT - BOTTOM, TOP)
    across = Scale(0, max(len(groups), 1), LEFT, WIDTH - RIGHT)
    body = [_axes(None, up, "", y_label, percent)]
    width = (across(1) - across(0)) * 0.8 / max(len(series), 1)
    for i, group in enumerate(groups):
        start = across(i) + (across(1) - across(0)) * 0.1
        center = across(i + 0.5)
        body.append(f'<text x="{center:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{escape(group)}</text>')
        for j, s in enumerate(series):
            top, base = sorted((up(s.y[i]), up(0.0)))
            x = start + j * width
            body.append(
                f'<rect class="bar c{s.color}" x="{x:.1f}" y="{top:.1f}" width="{max(width - 1, 0.6):.1f}" '
                f'height="{base - top:.1f}"><title>{escape(f"{s.label}, {group}: {s.y[i]:.4g}")}</title></rect>'
            )
    return _frame(title, "".join(body))


def scatter(
    clean: Sequence[Sequence[float]], noisy: Sequence[Sequence[float]], labels: Sequence[int], title: str
) -> str:
    """Clean features as dots, noisy ones as rings, coloured by class; axes without numbers, of one scale."""
    points = [*clean, *noisy]
    xs, ys = ([point[axis] for point in points] for axis in (0, 1))
    spread = max(max(xs) - min(xs), (max(ys) - min(ys)) * WIDTH / HEIGHT, 1e-9) * 1.06
    middle = ((max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2)
    scale = WIDTH / spread

    def place(point: Sequence[float]) -> tuple[float, float]:
        return WIDTH / 2 + (point[0] - middle[0]) * scale, HEIGHT / 2 - (point[1] - middle[1]) * scale

    parts = []
    for kind, view in (("ring", noisy), ("dot", clean)):
        for point, label in zip(view, labels, strict=True):
            x, y = place(point)
            parts.append(f'<circle class="{kind} k{label % 10}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>')
    return _frame(title, "".join(parts))


def _axes(across: Scale | None, up: Scale, x_label: str, y_label: str, percent: bool) -> str:
    parts = []
    for tick in up.ticks():
        y = up(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{_tick(tick, percent, up.log)}</text>')
    for tick in across.ticks() if across else ():
        parts.append(
            f'<text x="{across(tick):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">'  # type: ignore[misc]
            f"{_tick(tick, False, across.log)}</text>"  # type: ignore[union-attr]
        )
    base = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" y1="{base}" x2="{WIDTH - RIGHT}" y2="{base}"/>')
    middle = (TOP + base) / 2
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>'
    )
    parts.append(f'<text transform="translate(11,{middle}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>')
    return "".join(parts)


def _tick(value: float, percent: bool, log: bool) -> str:
    if percent:
        return f"{100 * value:g}"
    if log and not 1e-3 <= value < 1e4:
        power = round(math.log10(value))
        return f'10<tspan dy="-4" font-size="9">{power}</tspan>'
    return f"{value:.6g}"


def _frame(title: str, body: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{body}</svg>"
    )


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _padded(low: float, high: float) -> tuple[float, float]:
    room = (high - low) * 0.04 or 0.5
    return low - room, high + room


def _bounds(values: Sequence[float], log: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        return 10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high) + 1e-9)
    return _padded(low, high)
