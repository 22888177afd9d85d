"""The regression gate: speedups measured now against those committed for the same instruction set."""

import json
from pathlib import Path

import pytest
import torch

from robustfast.bench import cases, measure, report, run

RESULTS = Path(__file__).parent / "results"
DROP = 0.2  # of a committed speedup, that fails
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_addoption(parser):
    parser.addoption("--seconds", type=float, default=6.0, help="to spend on each table")


@pytest.fixture(scope="session")
def ceilings():
    return run.Ceilings(DEVICE)


def committed(op, shape, dtype):
    """{implementation: median speedup} of a table on a machine like this one, or nothing."""
    here = measure.environment(DEVICE)
    for path in RESULTS.glob("bench_*.json"):
        content = json.loads(path.read_text())
        where = content["environment"]
        if all(where.get(key) == here.get(key) for key in ("instruction_set", "limits", "threads", "cuda")):
            return speedups(
                row for row in content["rows"] if (row["op"], row["shape"], row["dtype"]) == (op, shape, dtype)
            )
    return {}


def speedups(rows):
    """{implementation: median speedup} of the kernels of a table."""
    return {row["implementation"]: row["speedup"]["median"] for row in rows if "speedup" in row}


def dropped(now, before):
    """{implementation: (speedup now, as committed)} of those that lost more than DROP."""
    return {name: (now[name], old) for name, old in before.items() if name in now and now[name] < (1 - DROP) * old}


@pytest.fixture
def gate(benchmark, ceilings, request, capsys):
    """Measures a table, shows it, and fails where a kernel's speedup is less than 1 - DROP of the committed one."""

    def measure_table(op, shape, dtype):
        names, _ = cases.usable(None, DEVICE)
        case, rows = run.measure(op, shape, dtype, names, ceilings, request.config.getoption("--seconds"), graphs=True)
        benchmark.group = report.title(rows[0])
        benchmark.pedantic(case.steps[names[0]], rounds=5, warmup_rounds=1)
        with capsys.disabled():
            print(f"\n{report.title(rows[0])}")
            for row in rows:
                print("    " + "  ".join(f"{cell:>14}" for cell in report.cells(row)))
            before = committed(op, shape, rows[0]["dtype"])
            if not before:
                print("    compared with nothing: no results of a machine like this one are committed")
        now = speedups(rows)
        benchmark.extra_info |= {"speedup": now, "committed": before}
        slower = dropped(now, before)
        assert not slower, f"speedup now and as committed: {slower}"

    return measure_table
