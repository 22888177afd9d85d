"""What one process measures: python -m benchmarks.gpu_check.parts PART --out FILE. Everything known so far is in the
file after every result, whatever ends the process."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from benchmarks.gpu_check.checks import Row, checks
from benchmarks.gpu_check.machine import Machine, versions
from benchmarks.gpu_check.sizes import TINY, WATCHED, Sizes
from benchmarks.gpu_check.timings import baselines, timings

WARM_PROCESSES = 8


def rows_of(part: str, machine: Machine, sizes: Sizes) -> Iterator[Row]:
    """``part`` is a backend and what to do with it, as in cuda.checks; baselines.timings is plain PyTorch."""
    backend, kind = part.split(".")
    if kind == "timings":
        return baselines(machine, sizes) if backend == "baselines" else timings(machine, backend, sizes)
    return checks(machine, backend, sizes)


def measured(what: dict, measure: Callable[[], dict]) -> dict:
    """The row of a result; a failure is one as well, so that it does not hide the rest."""
    try:
        return what | measure()
    except Exception as error:
        return what | {"ok": False, "error": repr(error)[:500]}


def write(out: Path, report: dict) -> None:
    partial = out.with_name(out.name + ".new")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    partial.replace(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--watched", action="store_true", help="few and small sizes, for compute-sanitizer")
    parser.add_argument("--warm", type=int, metavar="I", help="every WARM_PROCESSES-th row from I on, for its caches")
    options = parser.parse_args()
    sizes = WATCHED if options.watched else Sizes() if options.device == "cuda" else TINY
    report: dict = {"machine": versions(options.device), "results": []}
    if options.warm is not None:
        machine, sizes = Machine(options.device, rounds=1), replace(sizes, graph=(), stream=(), beyond_32_bits=())
        for what, measure in islice(rows_of(options.part, machine, sizes), options.warm, None, WARM_PROCESSES):
            measured(what, measure)
        return
    machine = Machine(options.device, 30 if options.device == "cuda" else 1)
    if options.part.endswith(".timings"):
        report["machine"] |= machine.measure_ceilings(sizes.copy, sizes.matrix)
    write(options.out, report)
    for what, measure in rows_of(options.part, machine, sizes):
        report["results"].append(measured(what, measure))
        write(options.out, report)


if __name__ == "__main__":
    main()
