"""The report as a table."""

from __future__ import annotations

import json

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
    return "\n".join(lines)


def timing(row: dict) -> str:
    size = "x".join(map(str, row["size"]))
    dtype = row["dtype"].removeprefix("torch.")
    notes = [f"{row[key]:.2f} {text}" for key, text in NOTES.items() if row.get(key) is not None]
    return f"{row['time']:10} {size:18} {dtype:18} {row['backend']:16} {row['us']:10.1f} us  {', '.join(notes)}"
