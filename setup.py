"""Builds robustfast._C: CPU kernels always, CUDA kernels where a CUDA build of PyTorch and nvcc are found.

ROBUSTFAST_BUILD_CUDA=auto|0|1 decides about CUDA; TORCH_CUDA_ARCH_LIST about its architectures. No GPU is needed.
Without PyTorch or a compiler the package installs all the same, with its pure-Python backends.
"""

import os
import shutil
import sys
from glob import glob

from setuptools import setup

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


def wants_cuda() -> bool:
    from torch.utils.cpp_extension import CUDA_HOME
    from torch.version import cuda

    choice = os.environ.get("ROBUSTFAST_BUILD_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        sys.exit(f"ROBUSTFAST_BUILD_CUDA: expected auto, 0 or 1, got {choice!r}")
    missing = "a CUDA build of PyTorch" if cuda is None else "nvcc (set CUDA_HOME)" if CUDA_HOME is None else None
    if choice == "1" and missing:
        sys.exit(f"ROBUSTFAST_BUILD_CUDA=1 needs {missing}")
    return choice != "0" and not missing


def extension():
    import pybind11
    import torch
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    sources = sorted(glob("csrc/cpu/*.cpp") + glob("csrc/ops/*.cpp"))
    # Texts are for g++ alone: nvcc hands what it is given to a shell once more.
    cxx_flags = [*CXX_FLAGS, f'-DRF_TORCH_VERSION="{torch.__version__}"']
    options = {
        "include_dirs": [os.path.abspath("csrc"), pybind11.get_include()],
        "define_macros": [("TORCH_TARGET_VERSION", MINIMUM_TORCH)],
        "extra_compile_args": {"cxx": cxx_flags, "nvcc": NVCC_FLAGS},
        "extra_link_args": ["-s"],
    }
    if wants_cuda():
        architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
        options["define_macros"].append(("USE_CUDA", None))
        cxx_flags.append(f'-DRF_CUDA_ARCHITECTURES="{architectures.replace(";", " ")}"')
        return CUDAExtension("robustfast._C", sources + sorted(glob("csrc/cuda/*.cu")), **options)
    return CppExtension("robustfast._C", [s for s in sources if "cuda" not in os.path.basename(s)], **options)


def build_options() -> dict:
    compiler = os.environ.get("CXX", "g++").split()[0]
    try:
        from torch.utils.cpp_extension import BuildExtension
    except ImportError:
        print("robustfast: PyTorch is not installed; building without compiled kernels", file=sys.stderr)
        return {}
    if shutil.which(compiler) is None:
        print(f"robustfast: no compiler {compiler}; building without compiled kernels", file=sys.stderr)
        return {}
    return {"ext_modules": [extension()], "cmdclass": {"build_ext": BuildExtension}}


setup(**build_options())
