"""The CUDA sources compile for every architecture that wheels target, and for the desktop's, without a GPU, without
warnings and without spilling."""

import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
SASS = runpy.run_path(str(ROOT / "benchmarks/sass.py"))
PAGE = (ROOT / "docs/performance.md").read_text()
SOURCES = sorted(CSRC.glob("cuda/*.cu"))
# The desktop's (sm_120) from the PTX of 10.0, as a wheel's kernels come to it.
TARGETS = {"80": "80", "90a": "90a", "100": "100", "120": "100"}
NVCC = shutil.which("nvcc") or next(iter(Path("/usr/local").glob("cuda*/bin/nvcc")), None)
REPORT = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for 'sm_(?P<arch>\w+)'.*?(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_kernels_compile_without_spills(source, tmp_path):
    targets = [f"-gencode=arch=compute_{ptx},code=sm_{arch}" for arch, ptx in TARGETS.items()]
    options = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-Werror", "all-warnings", "-Xptxas", "-v", f"-I{CSRC}"]
    command = [str(NVCC), *options, *targets, "-fatbin", str(source), "-o", str(tmp_path / "kernels.fatbin")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reports = [match.groupdict() for match in REPORT.finditer(done.stdout + done.stderr)]
    assert {report["arch"] for report in reports} == set(TARGETS)
    spilled = [r for r in reports if any(int(r[key]) for key in ("stack", "stores", "loads"))]
    assert not spilled, spilled
    if source.stem in SASS["EVIDENCE"] and SASS["cuobjdump"]():
        assert_page_shows(SASS["evidence"](source.stem, SASS["kernels"](tmp_path / "kernels.fatbin")))


def assert_page_shows(evidence):
    """What this nvcc makes of the sources, if it is the page's; and that nothing waits for loads, of any nvcc."""
    version = subprocess.run([str(NVCC), "--version"], capture_output=True, text=True).stdout
    if f"nvcc {re.search(r'release ([0-9.]+)', version)[1]}" in PAGE:
        shown = [f"| {kernel} | {what} | [^|]+ | {re.escape(value)} |" for (kernel, what), value in evidence.items()]
        assert not [row for row in shown if not re.search(row, PAGE)]
    waited = [value for (_, what), value in evidence.items() if "waited for" in what]
    assert all(value.startswith("0 of ") for value in waited)


def test_matrix_units_are_used(tmp_path):
    ptx = tmp_path / "margin_search.ptx"
    command = [str(NVCC), "-std=c++20", "--expt-relaxed-constexpr", "-arch=compute_90a", "-ptx", f"-I{CSRC}"]
    subprocess.run([*command, str(CSRC / "cuda/margin_search.cu"), "-o", str(ptx)], check=True)
    text = ptx.read_text()
    assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" in text and "ldmatrix.sync" in text


@pytest.mark.parametrize("binding", sorted(path.name for path in CSRC.glob("ops/*_cuda.cpp")))
def test_bindings_compile_against_any_torch(binding, tmp_path):
    """A CPU build of PyTorch has all headers that they need; nvcc only adds the toolkit's to the host compiler's."""
    include = [f"-I{path}" for path in (CSRC, *include_paths())]
    flags = ["-std=c++20", "-Xcompiler", "-fvisibility=hidden,-Wall,-Werror", "-DUSE_CUDA"]
    target = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-c", str(CSRC / "ops" / binding)]
    command = [str(NVCC), *flags, *include, *target, "-o", str(tmp_path / "binding.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"torch {torch.__version__}: {done.stderr}"
