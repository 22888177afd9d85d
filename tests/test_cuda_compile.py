"""The CUDA sources compile for every architecture that wheels target, without a GPU and without spilling."""

import os
import re
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

CSRC = Path(__file__).resolve().parents[1] / "csrc"
SOURCES = sorted(CSRC.glob("cuda/*.cu"))
ARCHITECTURES = ("80", "90a", "100")
NVCC = shutil.which("nvcc") or next(iter(Path("/usr/local").glob("cuda*/bin/nvcc")), None)
REPORT = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for 'sm_(?P<arch>\w+)'.*?(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)
SECONDS_ON_TWO_CORES = 120

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")


def compile_kernels(source, directory):
    """ptxas's report of every kernel; the processor's time is of this process's children and read by the caller."""
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    options = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-Xptxas", "-v", f"-I{CSRC}"]
    command = [str(NVCC), *options, *targets, "-c", str(source), "-o", str(directory / f"{source.stem}.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [match.groupdict() for match in REPORT.finditer(done.stdout + done.stderr)]


def test_kernels_compile_without_spills(tmp_path):
    before, start = os.times(), time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        reports = [
            report for of_file in pool.map(lambda s: compile_kernels(s, tmp_path), SOURCES) for report in of_file
        ]
    after = os.times()
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    assert {report["arch"] for report in reports} == set(ARCHITECTURES)
    spilled = [r for r in reports if any(int(r[key]) for key in ("stack", "stores", "loads"))]
    assert not spilled, spilled
    # Where other work shares the processors only their time says how long two idle cores would take.
    assert min(time.perf_counter() - start, processor / 2) < SECONDS_ON_TWO_CORES


def test_matrix_units_are_used(tmp_path):
    ptx = tmp_path / "margin.ptx"
    command = [str(NVCC), "-std=c++20", "--expt-relaxed-constexpr", "-arch=compute_90a", "-ptx", f"-I{CSRC}"]
    subprocess.run([*command, str(CSRC / "cuda/margin.cu"), "-o", str(ptx)], check=True)
    text = ptx.read_text()
    assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" in text and "ldmatrix.sync" in text


@pytest.mark.parametrize("binding", ["loss_cuda.cpp", "noise_cuda.cpp"])
def test_bindings_compile_against_any_torch(binding, tmp_path):
    """A CPU build of PyTorch has all headers that they need; nvcc only adds the toolkit's to the host compiler's."""
    include = [f"-I{path}" for path in (CSRC, *include_paths())]
    flags = ["-std=c++20", "-Xcompiler", "-fvisibility=hidden,-Wall,-Werror", "-DUSE_CUDA"]
    target = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-c", str(CSRC / "ops" / binding)]
    command = [str(NVCC), *flags, *include, *target, "-o", str(tmp_path / "binding.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"torch {torch.__version__}: {done.stderr}"
