"""The command ``robustfast bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column, Table

from robustfast.backends import LIBRARIES
from robustfast.bench import cases, measure, report, run
from robustfast.disk import write_json
from robustfast.training.setup import pick_device

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def bench(
    ops: Annotated[list[str] | None, typer.Argument(help=f"of {', '.join(cases.OPS)} (default: all)")] = None,
    shapes: Annotated[
        str | None, typer.Option(help="names with commas between; default: what suits the device")
    ] = None,
    backends: Annotated[str | None, typer.Option(help=f"of {', '.join(LIBRARIES)} with commas between; all")] = None,
    dtype: Annotated[str, typer.Option(help=f"{', '.join(DTYPES)}; several with commas between")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda; default: a GPU where there is one")] = "auto",
    seconds: Annotated[float, typer.Option(min=0.01, help="to spend on each table")] = 4.0,
    scaling: Annotated[bool, typer.Option("--scaling", help="also the loss over N, D and K, one at a time")] = False,
    graphs: Annotated[bool, typer.Option(help="on GPUs, also each step in a CUDA graph")] = True,
    out: Annotated[Path, typer.Option(help="folder of results.json and charts")] = Path("bench"),
) -> None:
    """Measure the kernels against plain PyTorch on this machine.

    All implementations of a table take turns in one run. Times are medians; a speedup is the median over rounds of the
    best plain PyTorch's time by the kernel's. Ctrl-C keeps what was measured.
    """
    chosen = _names("ops", ops or cases.OPS, cases.OPS)
    dtypes = [DTYPES[name] for name in _names("dtype", dtype.split(","), DTYPES)]
    asked = _names("backends", backends.split(","), LIBRARIES) if backends else None
    where = pick_device(device)
    planned = run.plan(chosen, shapes.split(",") if shapes else None, dtypes, where)
    if scaling:
        planned += [("loss", name, dtype) for name in cases.SCALING for dtype in dtypes]
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    names, reasons = cases.usable(asked, where)
    for name, reason in reasons.items():
        console.print(f"{name}: not measured: {reason}", style="dim", soft_wrap=True)
    content: dict[str, Any] = {"environment": measure.environment(where), "unusable": reasons, "rows": []}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with measure.interruptible() as interrupted, Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("ceilings", total=len(planned))
        ceilings = run.Ceilings(where)
        for op, shape, kind in planned:
            progress.update(bar, description=f"{op} {shape}")
            case, rows = run.measure(op, shape, kind, names, ceilings, seconds, graphs)
            content["rows"] += rows
            content["ceilings"] = ceilings.as_json()
            write_json(out / "results.json", content)
            progress.console.print(_table(rows))
            for name, note in case.notes.items():
                progress.console.print(f"  {name}: not measured: {note}", style="dim", soft_wrap=True)
            progress.advance(bar)
    if content["rows"]:
        console.print(report.machine(content), soft_wrap=True)
        report.charts(content, out)
        console.print(f"Results and charts: {out}")
    if interrupted:
        console.print(f"Interrupted after {len(report.tables(content['rows']))} of {len(planned)} tables.")
        raise typer.Exit(130)


def _names(argument: str, given: Any, known: Any) -> list[str]:
    names = [name.strip() for name in given]
    for name in names:
        if name not in known:
            raise ValueError(f"{argument}: expected some of {', '.join(known)}, got {name!r}")
    return names


def _table(rows: list[report.Row]) -> Table:
    header = ["", *report.HEADER[1:]]
    if rows[0]["op"] == "train-step":
        header[header.index("speedup")] = "more than " + cases.BOTH
    lines = [report.cells(row) for row in rows]
    shown = [column for column in range(len(header)) if any(line[column] for line in lines)]
    # In a narrow terminal names and comparisons go on in a second line, and nothing is cut off.
    columns = [
        Column(header[column], overflow="fold")
        if report.HEADER[column] in ("implementation", "speedup")
        else Column(header[column].replace(" ", "\n"), no_wrap=True, justify="right")
        for column in shown
    ]
    table = Table(*columns, title=report.title(rows[0]), title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for row, line in zip(rows, lines, strict=True):
        table.add_row(*(line[column] for column in shown), style="" if row["peer"] else "bold")
    return table
