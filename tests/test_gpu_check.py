"""benchmarks/gpu_check.py as far as it goes without a GPU: the same checks and timings, at tiny sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_gpu_check_on_the_cpu(tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join((str(ROOT), *sys.path))}
    out = tmp_path / "check.json"
    command = [sys.executable, ROOT / "benchmarks/gpu_check.py", "--device", "cpu", "--out", out, "--status", "build=0"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    report = json.loads(out.read_text())
    assert report["backends"]["cuda"] is not None
    assert "cuda       not usable" in result.stdout and "exit codes: build 0" in result.stdout
    for row in report["results"]:
        assert "error" not in row or "check" in row, row
        assert row.get("ok", True) and row.get("same_bits", True), row
    assert {row.get("check", row.get("time")) for row in report["results"]} >= {"accuracy", "noise", "loss", "margin"}


def test_checks_alone(tmp_path):
    """What compute-sanitizer watches on a GPU."""
    out = tmp_path / "check.json"
    command = [sys.executable, ROOT / "benchmarks/gpu_check.py", "--device", "cpu", "--part", "cpu", "--checks"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), *sys.path))}
    subprocess.run([*command, "--out", out], env=environment, check=True)
    rows = json.loads(out.read_text())["results"]
    assert len(rows) == 13
    assert all(row["ok"] and row.get("same_bits", True) for row in rows)
