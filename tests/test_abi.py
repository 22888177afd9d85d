"""One binary for PyTorch 2.10 and later: `make abi` fetches the headers of several releases, and runs this."""

import os
import runpy
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from torch_headers import symbols

from robustfast import backends

ROOT = Path(__file__).resolve().parents[1]
SETUP = runpy.run_path(str(ROOT / "setup.py"))
RELEASES = sorted(Path(os.environ.get("ROBUSTFAST_TORCH_HEADERS", ROOT / "build/torch-headers")).glob("*/symbols.txt"))
CUDA = next(iter(sorted(Path("/usr/local").glob("cuda*/include/cuda_runtime_api.h"), reverse=True)), None)

pytestmark = pytest.mark.skipif(not RELEASES, reason="no headers of other releases of PyTorch: make abi fetches them")
every_release = pytest.mark.parametrize("release", [path.parent for path in RELEASES], ids=lambda path: path.name)


@every_release
@pytest.mark.parametrize("source", sorted(path.name for path in (ROOT / "csrc/ops").glob("*.cpp")))
def test_bindings_compile(release, source):
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        pytest.skip("no C++ compiler")
    if "cuda" in source and CUDA is None:
        pytest.skip("no CUDA toolkit")
    include = [ROOT / "csrc", release / "include", sysconfig.get_paths()["include"]]
    flags = [*SETUP["CXX_FLAGS"], "-Werror", "-fsyntax-only", '-DRF_TORCH_VERSION=""']
    flags += [f"-DTORCH_TARGET_VERSION={SETUP['MINIMUM_TORCH']}", *(f"-I{path}" for path in include[:1])]
    flags += [part for path in include[1:] for part in ("-isystem", str(path))]
    if "cuda" in source:
        flags += ["-DUSE_CUDA", "-isystem", str(CUDA.parent)]
    done = subprocess.run([*compiler, *flags, ROOT / "csrc/ops" / source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@every_release
def test_binary_needs_nothing_that_a_release_lacks(release):
    if backends()["cpu"] is not None:
        pytest.skip(backends()["cpu"])
    from robustfast import _C

    needed = {name for name in symbols(Path(_C.__file__), undefined=True) if "cuda" not in name}  # builds for the CPU
    assert needed and needed <= set((release / "symbols.txt").read_text().split())
