"""Builds robustfast._C: CPU kernels where there is a C++ compiler, CUDA kernels where a toolkit fits PyTorch.

CXX is the compiler's command. ROBUSTFAST_BUILD_CUDA=auto|0|1 decides about CUDA, CUDA_HOME about its toolkit,
TORCH_CUDA_ARCH_LIST about its architectures. No GPU is needed. Without PyTorch or a compiler the package installs all
the same, with its pure-Python backends; robustfast.backends() then says what was missing here.
"""

import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from glob import glob
from pathlib import Path

import setuptools
from setuptools import Distribution, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CUDA_ARCHITECTURES = "8.0;9.0a;10.0+PTX"  # unless TORCH_CUDA_ARCH_LIST names others
# No operation of the kernels looks at errno or floating-point traps, and with them loops do not vectorise.
CXX_FLAGS = [
    "-O3",
    "-std=c++20",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp-simd",
    "-fvisibility=hidden",
    "-g0",
    "-Wall",
]
NVCC_FLAGS = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "--threads=2"]
MINIMUM_TORCH = "0x020a000000000000"  # the stable ABI of 2.10: one binary for that release and all later ones


def torch_problem() -> str | None:
    """Why nothing can be compiled against PyTorch, or None."""
    try:
        import torch
    except ImportError as error:
        return f"PyTorch was not installed ({error})"
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        return f"PyTorch was {torch.__version__}, older than 2.10"
    return None


def compiler() -> list[str]:
    """The C++ compiler's command and arguments. PyTorch quotes CXX as one word, and puts a ccache in front itself."""
    if "CXX" not in os.environ:
        return [found for found in ("c++", "g++", "clang++") if shutil.which(found)][:1]
    words = shlex.split(os.environ["CXX"])
    return words[1:] if words and Path(words[0]).name in ("ccache", "sccache") else words


def pybind11_problem() -> str | None:
    """Why robustfast._C cannot be a module of Python, or None."""
    try:
        import pybind11  # noqa: F401
    except ImportError as error:
        return f"pybind11 was not installed ({error})"
    return None


def compiler_problem() -> str | None:
    """Why nothing can be compiled, or None."""
    command = compiler()
    if command and shutil.which(command[0]):
        return None
    if "CXX" in os.environ:
        return f"CXX={os.environ['CXX']!r} is not a command"
    return "no C++ compiler was found (g++ or clang++; CXX takes another command)"


def toolkit_problem(home: Path, cuda: str) -> str | None:
    """Why PyTorch's CUDA version cannot be compiled for with the toolkit in this folder, or None."""
    nvcc = home / "bin/nvcc"
    for needed in (nvcc, home / "include/cuda_runtime_api.h"):
        if not needed.exists():
            return f"{needed} is not there"
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder, "probe.cu")
        probe.write_text("#include <cuda_runtime.h>\n#include <string>\n__global__ void probe() {}\n")
        trial = [nvcc, "-std=c++20", "-c", probe, "-o", Path(folder, "probe.o")]
        version, done = (subprocess.run(c, capture_output=True, text=True) for c in ([nvcc, "--version"], trial))
    release = re.search(r"release (\d+)", version.stdout)
    if release is None or release[1] != cuda.split(".")[0]:
        return f"{nvcc} is of CUDA {release[1] if release else '?'}, PyTorch of {cuda}"
    return f"{nvcc} compiles nothing: {(done.stderr or done.stdout).strip()[-300:]}" if done.returncode else None


def cuda_problem() -> str | None:
    """Why the CUDA kernels cannot be compiled, or None; CUDA_HOME is set then."""
    import torch

    choice = os.environ.get("ROBUSTFAST_BUILD_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        sys.exit(f"ROBUSTFAST_BUILD_CUDA: expected auto, 0 or 1, got {choice!r}")
    if choice == "0":
        return "ROBUSTFAST_BUILD_CUDA was 0"
    problem = find_toolkit(torch.version.cuda) if torch.version.cuda else f"PyTorch {torch.__version__} has no CUDA"
    if problem and choice == "1":
        sys.exit(f"ROBUSTFAST_BUILD_CUDA=1: {problem}")
    return problem


def find_toolkit(cuda: str) -> str | None:
    """Sets CUDA_HOME to the first toolkit that fits; where none does, why not."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc")  # perhaps a wrapper, whose folder has no headers
    beside_nvcc = [str(Path(path).parents[1]) for path in (nvcc, nvcc and os.path.realpath(nvcc)) if path]
    guesses = [*beside_nvcc, "/usr/local/cuda", *sorted(glob("/usr/local/cuda-*"), reverse=True)]
    problems = []
    for home in [named] if named else dict.fromkeys(guesses):
        problem = toolkit_problem(Path(home), cuda)
        if problem is None:
            os.environ["CUDA_HOME"] = home
            return None
        problems.append(problem)
    return "; ".join(problems) + " (CUDA_HOME names a toolkit's folder)"


def extension(with_cuda: bool, arguments: list[str]):
    import pybind11
    import torch
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    sources = sorted(glob("csrc/cpu/*.cpp") + glob("csrc/ops/*.cpp"))
    # Texts are for the host compiler alone: nvcc hands what it is given to a shell once more.
    cxx_flags = [*CXX_FLAGS, *arguments, f'-DRF_TORCH_VERSION="{torch.__version__}"']
    options = {
        "include_dirs": [str(ROOT / "csrc"), pybind11.get_include()],
        "define_macros": [("TORCH_TARGET_VERSION", MINIMUM_TORCH)],
        "extra_compile_args": {"cxx": cxx_flags, "nvcc": NVCC_FLAGS},
        "extra_link_args": [*arguments, "-s"],
    }
    if with_cuda:
        architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
        options["define_macros"].append(("USE_CUDA", None))
        cxx_flags.append(f'-DRF_CUDA_ARCHITECTURES="{architectures.replace(";", " ")}"')
        return CUDAExtension("robustfast._C", sources + sorted(glob("csrc/cuda/*.cu")), **options)
    return CppExtension("robustfast._C", [s for s in sources if "cuda" not in os.path.basename(s)], **options)


class BinaryDistribution(Distribution):
    """Tagged for this machine, and built by build_ext, even where nothing can be compiled: what is missing is said."""

    def has_ext_modules(self) -> bool:
        return True


def recording(base: type[build_ext], missing: dict[str, str | None]) -> type[build_ext]:
    """The command that builds the extension and writes what was missing beside it."""

    class Build(base):  # type: ignore[misc, valid-type]
        def run(self) -> None:
            in_source = self.inplace or getattr(self, "editable_mode", False)
            folder = (ROOT if in_source else Path(self.build_lib)) / "robustfast"
            for old in folder.glob("_C.*so"):  # of another Python, it would be imported in place of the new one
                old.unlink()
            if self.extensions:
                super().run()
            names = runpy.run_path(str(ROOT / "robustfast/extension.py"))
            record = {"missing": missing, "sources": names["digest"](ROOT / "csrc")}
            folder.mkdir(parents=True, exist_ok=True)
            (folder / names["RECORD"]).write_text(json.dumps(record, indent=2) + "\n")

    return Build


def build_options() -> dict:
    problem = torch_problem() or pybind11_problem() or compiler_problem()
    missing = {"cpu": problem, "cuda": problem or cuda_problem()}
    python, torch = platform.python_version(), getattr(sys.modules.get("torch"), "__version__", "none")
    versions = f"Python {python}, setuptools {setuptools.__version__}, PyTorch {torch}, compiler {compiler()}"
    print(f"robustfast: {versions}, CUDA_HOME {os.environ.get('CUDA_HOME')}", file=sys.stderr)
    for kernels, reason in missing.items():
        print(f"robustfast: {kernels} kernels: {f'left out: {reason}' if reason else 'included'}", file=sys.stderr)
    if problem:
        return {"cmdclass": {"build_ext": recording(build_ext, missing)}}
    os.environ["CXX"], *arguments = compiler()
    # The stable interface passes C types only, so that any compiler will do.
    os.environ.setdefault("TORCH_DONT_CHECK_COMPILER_ABI", "1")
    from torch.utils.cpp_extension import BuildExtension

    return {
        "ext_modules": [extension(missing["cuda"] is None, arguments)],
        "cmdclass": {"build_ext": recording(BuildExtension, missing)},
    }


if __name__ == "__main__":
    # The licence stands here and not in pyproject.toml, where releases of setuptools disagree about its form.
    setup(license="Apache-2.0", distclass=BinaryDistribution, **build_options())
