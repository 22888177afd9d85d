"""benchmarks/gpu_check as far as it goes without a GPU: the same checks and timings at tiny sizes, without limits."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from robustfast import backends

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join((str(ROOT), *sys.path))}
needs_cpu = pytest.mark.skipif(backends()["cpu"] is not None, reason=str(backends()["cpu"]))


def gpu_check(*arguments):
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True)


@needs_cpu
def test_gpu_check_on_the_cpu(tmp_path):
    result = gpu_check("benchmarks.gpu_check", "cpu", "--device", "cpu", "--seconds", 0, "--out", tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.startswith("device: ") and "cuda not usable: " in result.stdout
    stage = json.loads((tmp_path / "gpu_check.json").read_text())["stages"]["cpu"]
    assert set(stage["status"].values()) == {0}
    for row in stage["results"]:
        assert "error" not in row and row.get("ok", True), row
    assert {row.get("check", row.get("time")) for row in stage["results"]} >= {
        "accuracy",
        "noise",
        "sums",
        "loss",
        "margin",
    }
    assert {row["backend"] for row in stage["results"]} == {"cpu", "triton", "reference"}


def test_failures_are_found(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.gpu_check.__main__ import Step, run, run_stage
    from benchmarks.gpu_check.table import failures

    wrong = {"check": "noise", "backend": "cpu", "ok": False}
    (tmp_path / "cpu.checks.partial").write_text(json.dumps({"machine": {}, "results": [wrong]}))
    steps = [Step("good", 1, [["true"]]), Step("bad", 1, [["true"], ["sh", "-c", "echo why; exit 3"]])]
    stage = {"machine": {}, "not_usable": {}, "status": {}, "results": []}
    run_stage(lambda: iter(steps), 0, stage, lambda: None, tmp_path)
    assert failures(stage) == [{"step": "bad", "status": 3}, wrong]
    assert "bad ended with 3:\nwhy" in capsys.readouterr().out
    assert run(Step("slow", 1, [["sleep", "60"]]), 0.0, tmp_path) == "stopped after 0 s"


def test_the_table_of_searches_as_measured(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.gpu_check.table import search_table

    seconds = {("cuda", "bfloat16"): 2e-15, ("triton", "bfloat16"): 3e-15, ("cuda", "float32"): 5e-15,
               ("triton", "float32"): 6e-15, ("cuda", "float16"): 1e-15}  # fmt: skip
    rows = [
        {"time": "search", "us": 1.0, "capability": 9, "backend": backend, "dtype": f"torch.{dtype}",
         "seconds_an_operation": of_one} for (backend, dtype), of_one in seconds.items()
    ]  # fmt: skip
    bfloat16, float32 = search_table([{"time": "loss", "us": 1.0}, *rows])
    assert "(9, torch.bfloat16): Rates(own=2e-15, triton=3e-15)" in bfloat16
    assert "the choice of triton WOULD CHANGE" in bfloat16
    assert "now None: the choice of cuda stays" in float32


@needs_cpu
def test_what_compute_sanitizer_watches(tmp_path):
    out = tmp_path / "cpu.partial"
    done = gpu_check("benchmarks.gpu_check.parts", "cpu.checks", "--device", "cpu", "--watched", "--out", out)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["results"]
    assert len(rows) == 14 and all(row["ok"] for row in rows)


def test_every_test_over_backends_runs_on_a_gpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.gpu_check.__main__ import TESTS

    over_backends = r"def test_\w+\([^)]*\b(backend|every_backend|kernels|way|searched)\b|mark\.gpu\b"
    files = {path.name for path in (ROOT / "tests").glob("test_*.py") if re.search(over_backends, path.read_text())}
    assert "test_steps.py" in files and files - {Path(__file__).name} <= set(TESTS)
