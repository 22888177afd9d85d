"""A run's rows as a file, a table, charts and markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

Row = dict[str, Any]
PEER, OURS = "#8a8a8a", "#1f6feb"
COLOURS = {"loop": "#b0b0b0", "eager": PEER, "compiled": "#5f6b7a", "max-autotune": "#39424e"}


def tables(rows: Iterable[Row]) -> list[tuple[tuple[str, str, str], list[Row]]]:
    """Rows by (op, shape, dtype), in the order in which they were measured."""
    return [(key, list(of_key)) for key, of_key in groupby(rows, lambda row: (row["op"], row["shape"], row["dtype"]))]


def title(row: Row) -> str:
    """What a table is about: op, shape and sizes, dtype."""
    sizes, letters = row["sizes"], "PDK" if row["op"] == "margin" else "NDK"
    named = " ".join(f"{letter}={size}" for letter, size in zip(letters, sizes, strict=False))
    if row["op"] == "noise":
        named = "x".join(map(str, sizes))
    return f"{row['op']} {row['shape']} ({named}, {row['dtype']})"


HEADER = ("implementation", "ms", "p20-p80", "speedup", "GB/s", "GFLOP/s", "of ceiling", "peak MiB")


def cells(row: Row) -> tuple[str, ...]:
    """The columns of HEADER."""
    time, speedup = row["seconds"], row.get("speedup")
    faster = ""
    if speedup and row["op"] == "train-step":
        faster = f"{_percent(1 / speedup['median'] - 1)} ({_percent(1 / speedup['p80'] - 1)} to " \
                 f"{_percent(1 / speedup['p20'] - 1)})"  # fmt: skip
    elif speedup:
        faster = f"{speedup['median']:.2f}x ({speedup['p20']:.2f}-{speedup['p80']:.2f}) {speedup['over']}"
    return (
        row["implementation"],
        _digits(1e3 * time["median"]),
        f"{_digits(1e3 * time['p20'])}-{_digits(1e3 * time['p80'])}",
        faster,
        *(_digits(row[what] / time["median"] / 1e9) if row[what] else "" for what in ("bytes", "flops")),
        f"{row['of_ceiling']:.0%}" if "of_ceiling" in row else "",
        "" if row["peak_bytes"] is None else _digits(row["peak_bytes"] / 2**20),
    )


def _digits(x: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def _percent(x: float) -> str:
    return f"{100 * x:+.1f}%"


def machine(content: dict[str, Any]) -> str:
    """One line on where a file's numbers come from."""
    where, ceilings = content["environment"], content["ceilings"]
    parts = [where["device"]]
    if "instruction_set" in where:
        held = " (a machine with more, held to that)" if "limits" in where else ""
        parts.append(f"{where['instruction_set']}{held}, {where['threads']} threads")
    parts.append(f"torch {where['torch']}")
    parts.append(f"copy {ceilings['copy_gb_per_s']:.1f} GB/s")
    parts += [f"{dtype} products {rate:.0f} GFLOP/s" for dtype, rate in ceilings["matrix_gflop_per_s"].items()]
    return ", ".join(parts) + f"; {where['date'][:10]}, commit {(where['commit'] or 'unknown')[:12]}"


def summary(content: dict[str, Any], ops: Sequence[str]) -> str:
    """One markdown row a table: plain PyTorch, the fastest kernel, its speedup over the best of what it is held to.

    Of training steps, what they take without the method and with it. Points of scaling curves are left to their charts.
    """
    speed = ["| | eager, ms | compiled, ms | robustfast, ms | speedup over | of the ceiling |", "|" + " --- |" * 6]
    added = ["| | without the method, ms | with it, ms | more |", "|" + " --- |" * 4]
    for key, rows in tables(content["rows"]):
        if key[0] not in ops or key[1].startswith("scaling-") or not any("speedup" in row for row in rows):
            continue
        times = {row["implementation"]: _digits(1e3 * row["seconds"]["median"]) for row in rows}
        kernels = [row for row in rows if "speedup" in row and row["implementation"] != "reference"]
        ours = min(kernels, key=lambda row: row["seconds"]["median"])
        name, over, ratio = title(ours), ours["speedup"]["over"], cells(ours)[HEADER.index("speedup")]
        if key[0] == "train-step":
            added.append(f"| {name} | {times[over]} | {times[ours['implementation']]} | {ratio} |")
        else:
            plain = " | ".join(times.get(peer, "") for peer in ("eager", "compiled"))
            speed.append(f"| {name} | {plain} | {times[ours['implementation']]} | {ratio} | {ours['of_ceiling']:.0%} |")
    return "\n\n".join("\n".join(table) for table in (speed, added) if len(table) > 2)


def markdown(content: dict[str, Any]) -> str:
    """The tables of a file for docs and README."""
    lines = []
    for _, rows in tables(content["rows"]):
        lines += [f"**{title(rows[0])}**", "", f"| {' | '.join(HEADER)} |", "|" + " --- |" * len(HEADER)]
        lines += [f"| {' | '.join(cells(row))} |" for row in rows]
        lines.append("")
    return "\n".join(lines)


def charts(content: dict[str, Any], folder: Path) -> list[Path]:
    """speedup.png and .svg: bars of every table's times; scaling-AXIS.*: curves where one size alone changes."""
    import matplotlib

    matplotlib.use("Agg")
    written = _bars(content["rows"], folder)
    for axis, name in enumerate("NDK"):
        written += _curves(content["rows"], axis, name, folder)
    return written


def _bars(rows: Sequence[Row], folder: Path) -> list[Path]:
    from matplotlib import pyplot

    groups = tables(rows)
    figure, axes = pyplot.subplots(
        len(groups), 1, figsize=(8, 0.6 + 0.32 * len(rows) + 0.55 * len(groups)), squeeze=False,
        height_ratios=[len(of_group) for _, of_group in groups], layout="constrained",
    )  # fmt: skip
    for axis, (_, of_group) in zip(axes[:, 0], groups, strict=True):
        names = [row["implementation"] for row in of_group]
        colours = [COLOURS.get(row["implementation"], PEER if row["peer"] else OURS) for row in of_group]
        times = [1e3 * row["seconds"]["median"] for row in of_group]
        errors = [[1e3 * abs(row["seconds"]["median"] - row["seconds"][p]) for row in of_group] for p in ("p20", "p80")]
        bars = axis.barh(names, times, xerr=errors, color=colours, height=0.7)
        axis.bar_label(bars, [_digits(time) for time in times], padding=4, fontsize=7)
        if max(times) > 30 * min(times):  # the shortest bar would not be seen
            axis.set_xscale("log")
        axis.margins(x=0.1)
        axis.invert_yaxis()
        axis.set_title(title(of_group[0]), fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("milliseconds (median; bars to the 20th and 80th percentile)", fontsize=8)
    return _save(figure, folder / "times")


def _curves(rows: Sequence[Row], axis: int, name: str, folder: Path) -> list[Path]:
    """Time over one size, for shapes whose other sizes agree: those that `--scaling` measures."""
    from matplotlib import pyplot

    series: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row["shape"].startswith(f"scaling-{name}="):
            series.setdefault(row["implementation"], []).append((row["sizes"][axis], 1e3 * row["seconds"]["median"]))
    if not series:
        return []
    figure, plot = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for implementation, points in series.items():
        if len(points) < 2:
            continue  # the ceiling of small problems
        plot.loglog(*zip(*sorted(points), strict=True), "o-", label=implementation,
                    color=COLOURS.get(implementation, OURS))  # fmt: skip
    plot.set_xlabel(name)
    plot.set_ylabel("milliseconds, forward and backward")
    plot.legend(fontsize=8)
    plot.spines[["top", "right"]].set_visible(False)
    return _save(figure, folder / f"scaling-{name}")


def _save(figure: Any, path: Path) -> list[Path]:
    from matplotlib import pyplot

    written = [path.with_suffix(suffix) for suffix in (".png", ".svg")]
    for target in written:
        figure.savefig(target, dpi=150, metadata={"Date": None} if target.suffix == ".svg" else None)
    pyplot.close(figure)
    return written
