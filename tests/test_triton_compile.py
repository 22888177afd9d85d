"""The Triton kernels compiled for GPUs that need not be there: no spills, matrix instructions where they are due."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
# The matrix units' float32 takes three TF32 passes by default; float64 does not go through them on every target.
MATRIX_TYPES = ("*bf16", "*fp16", "*fp32")


def loss(dim: int, dtype: str, **other) -> dict:
    return {"n": 1000, "dim": dim, "classes": 1000, "dtype": dtype} | other


DTYPES = ("bfloat16", "float16", "float32", "float64")
# Rows that are read 16 bytes at once, and rows that are not.
FEATURES = [loss(dim, dtype) for dim in (64, 128, 512, 2048) for dtype in DTYPES]
ODD_FEATURES = [loss(dim, dtype) for dim in (77, 301, 1001) for dtype in ("bfloat16", "float32")]
SMALL = [loss(dim, dtype, n=64, classes=10) for dim in (77, 128, 512) for dtype in ("bfloat16", "float32")]
STEPS = [loss(dim, dtype, rows=1000) for dim in (64, 77, 512) for dtype in ("bfloat16", "float32")]
NOISE = [
    {"shape": [4, 3, 224, 224], "dtype": "uint8", "out": "bfloat16"},
    {"shape": [4, 3, 7, 7], "dtype": "float32", "out": "float32"},
    {"shape": [4, 3, 224, 224], "dtype": "float32", "out": "float16", "per_sample": True},
]
FEW = [loss(512, dtype) for dtype in DTYPES] + [loss(77, "float32"), loss(128, "float32", n=64, classes=10), *NOISE]
FEW.append(loss(512, "bfloat16", rows=1000))
PROBLEMS = {
    "sm_80": [*FEATURES, *ODD_FEATURES, *SMALL, *STEPS, *NOISE],
    "sm_90": [
        *FEATURES,
        *ODD_FEATURES,
        *SMALL,
        loss(128, "bfloat16", n=20000, weight_dtype="float32", norm=1),
        *STEPS,
        *NOISE,
    ],
    "sm_100": FEW,
    "sm_120": FEW,
    "gfx942": FEW,
}

KERNELS = {
    "group_kernel", "rank_kernel", "label_kernel", "rows_kernel", "step_kernel", "sums_kernel", "variance_kernel",
    "prepare_kernel", "search_kernel", "settle_kernel", "finish_kernel", "backward_kernel", "class_sums_kernel",
    "class_pulls_kernel", "finish_step_kernel", "add_noise_kernel", "noisy_pair_kernel", "noisy_pair_backward_kernel",
}  # fmt: skip


def run_script(argument: str, problems: list[dict], cache: Path):
    """What compile_triton.py prints, where kernels are not interpreted."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    script = Path(__file__).with_name("compile_triton.py")
    result = subprocess.run(
        [sys.executable, script, argument], input=json.dumps(problems), env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_noise_of_other_epochs_and_batches_needs_no_other_kernels(tmp_path):
    kernels = [report["kernel"] for report in run_script("sm_90", [{"batches": 20}], tmp_path)]
    assert sorted(kernels) == ["add_noise_kernel", "noisy_pair_kernel", "words_kernel"]


def test_batches_of_other_sizes_need_no_other_kernels(tmp_path):
    """And what `launch` takes for compiled is what Triton would have taken, fused sums or not stated by all."""
    one_program, compared, sorted_by_torch, _ = run_script("kinds", [], tmp_path)
    assert (one_program, compared, sorted_by_torch) == (8, 9, 9)


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_that_the_launchers_choose(target, tmp_path):
    """They compile, nothing spills, and searches use the matrix units; by the compiler's report of every kernel."""
    reports = run_script(target, PROBLEMS[target], tmp_path)
    assert not [report for report in reports if report["spills"] > 0]
    searches = [report for report in reports if report["kernel"] == "search_kernel"]
    types = {report["types"][0] for report in searches}
    assert types >= {"*bf16", "*fp16", "*fp32"}
    assert not [report for report in searches if report["types"][0] in MATRIX_TYPES and report["matrix"] == 0]
    absent = set() if target == "sm_90" else {"label_kernel"}  # of a batch that is long, which one target is enough for
    assert {report["kernel"] for report in reports} == KERNELS - absent
