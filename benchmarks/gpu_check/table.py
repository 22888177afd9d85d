"""The report as a table."""

from __future__ import annotations

import json

import torch

from robustfast.searches import RATES

NOTES = {
    "times_floor": "x floor", "of_matrix_rate": "of the matrix rate", "of_copy_rate": "of the copy bandwidth",
    "extra_mib": "MiB beside dW",
}  # fmt: skip


COMPILE_AHEAD = "compile ahead"  # a step that only saves time: where it is stopped, what follows takes longer


def failures(stage: dict) -> list[dict]:
    """Steps that did not end well, checks that do not hold, and measurements that an error ended."""
    steps = [
        {"step": name, "status": status}
        for name, status in stage["status"].items()
        if status != 0 and name != COMPILE_AHEAD
    ]
    return steps + [row for row in stage["results"] if not row.get("ok", True)]


def table(report: dict) -> str:
    lines = []
    for name, stage in report["stages"].items():
        machine = stage["machine"]
        lines.append(f"-- {name}: {machine['device']}, torch {machine['torch']}, triton {machine['triton']}")
        lines.append("   " + ", ".join(f"{step} {status}" for step, status in stage["status"].items()))
        if "copy_gbps" in machine:
            lines.append(f"   copy {machine['copy_gbps']:.0f} GB/s, bf16 {machine['bf16_tflops']:.0f} TFLOP/s")
        lines += [f"   {backend} not usable: {why}" for backend, why in stage["not_usable"].items()]
        held = [row["ok"] for row in stage["results"] if "check" in row]
        lines.append(f"   checks: {sum(held)} of {len(held)} pass")
        lines += [
            f"   skipped {row['check']}: {row['skipped']}, {row['backend']}" for row in stage["results"]
            if "skipped" in row
        ]  # fmt: skip
        lines += ["   FAILED " + json.dumps(row)[:300] for row in failures(stage)]
        lines += [timing(row) for row in stage["results"] if "us" in row]
    results = [row for stage in report["stages"].values() for row in stage["results"]]
    return "\n".join(lines + search_table(results))


def search_table(results: list[dict]) -> list[str]:
    """The entries of robustfast.searches.RATES as measured, beside those that are there."""
    measured: dict[tuple, dict[str, float]] = {}
    for row in results:
        if row.get("time") == "search" and "us" in row:
            measured.setdefault((row["capability"], row["dtype"]), {})[row["backend"]] = row["seconds_an_operation"]
    lines = []
    for (capability, dtype), found in measured.items():
        if {"cuda", "triton"} <= found.keys():
            there = RATES.get((capability, getattr(torch, dtype.removeprefix("torch."))))
            chosen = "triton" if there and there.triton < there.own else "cuda"
            change = "stays" if chosen == min(found, key=found.__getitem__) else "WOULD CHANGE"
            entry = f"({capability}, {dtype}): Rates(own={found['cuda']:.2g}, triton={found['triton']:.2g})"
            lines.append(f"searches.RATES {entry}, now {there}: the choice of {chosen} {change}")
    return lines


def timing(row: dict) -> str:
    size = "x".join(map(str, row["size"]))
    dtype = row["dtype"].removeprefix("torch.")
    notes = [f"{row[key]:.2f} {text}" for key, text in NOTES.items() if row.get(key) is not None]
    return f"{row['time']:10} {size:18} {dtype:18} {row['backend']:16} {row['us']:10.1f} us  {', '.join(notes)}"
