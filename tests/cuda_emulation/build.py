"""Builds the CUDA backend with g++ for the CPU: the same kernels, launchers and bindings under the library
``robustfast_emulated``, whose ops take CPU tensors."""

from __future__ import annotations

import fcntl
import hashlib
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
FLAGS = [
    *("-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-ffp-contract=off"),
    *("-Wall", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"),
    *("-DRF_CUDA_LIBRARY=robustfast_emulated", "-DRF_CUDA_KEY=CPU"),
]


def build() -> Path:
    """The shared library, compiled if sources, flags or PyTorch differ from those of the last time."""
    sources = [*sorted(CSRC.glob("cuda/*.cu")), *sorted(CSRC.glob("ops/*_cuda.cpp"))]
    sources += [HERE / "emulation.cpp", HERE / "torch.cpp"]
    files = [path for folder in (CSRC, HERE) for path in sorted(folder.rglob("*")) if path.is_file()]
    key = hashlib.sha256(repr((FLAGS, torch.__version__, [path.read_bytes() for path in files])).encode())
    directory = CSRC.parent / "build" / "cuda_emulation"
    directory.mkdir(parents=True, exist_ok=True)
    library = directory / f"{key.hexdigest()[:16]}.so"
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process of the tests compiles the same
        if not library.exists():
            for old in directory.glob("*.so"):
                old.unlink()
            with tempfile.TemporaryDirectory(dir=directory) as objects:
                _compile(sources, Path(objects)).replace(library)
    return library


def _compile(sources: list[Path], directory: Path) -> Path:
    includes = [f"-I{path}" for path in (HERE, CSRC, *include_paths())]

    def compile(source: Path) -> Path:
        target = directory / f"{source.parent.name}_{source.stem}.o"
        _run(["g++", *FLAGS, *includes, "-x", "c++", "-c", str(source), "-o", str(target)])
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile, sources))
    library = directory / "library.so"
    lib = Path(torch.__file__).parent / "lib"
    # The functions of torch.cpp are the library's own, whatever PyTorch exports under the same names.
    _run(["g++", "-shared", "-Wl,-Bsymbolic", *map(str, objects), f"-L{lib}", "-ltorch_cpu", "-o", str(library)])
    return library


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
