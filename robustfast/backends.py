"""Which implementations of the ops there are, which of them can run here, and which one an input takes."""

from __future__ import annotations

import importlib.util
import os
import re
from functools import cache
from types import SimpleNamespace

import torch

from robustfast import extension
from robustfast.ops import OPS, define
from robustfast.reference import constant_when_compiled

define("robustfast")
extension.problem()  # imports the extension, which implements the ops

# A backend's ops are those of this library.
LIBRARIES = {"cuda": "robustfast", "triton": "robustfast_triton", "cpu": "robustfast"}
# What "auto" tries on a device type, fastest first.
AUTO = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}


def backends() -> dict[str, str | None]:
    """The backends "cuda", "triton", "cpu" and "reference": None where one is usable here, else the reason why not."""
    return {name: why_not(name) for name in (*LIBRARIES, "reference")}


@cache
def why_not(name: str) -> str | None:
    """None if the backend can run on this machine, else what is missing and what to do."""
    if name == "reference":
        return None
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed: pip install triton"
        if not torch.cuda.is_available() and not _interpreting():
            return "no GPU is visible to PyTorch (TRITON_INTERPRET=1 runs the kernels slowly on the CPU)"
        return None
    if extension.problem() is not None:
        return extension.problem()
    if name == "cuda":
        from robustfast import _C

        architectures = _C.build_info()["cuda_architectures"]
        if not architectures:
            return extension.without_cuda()
        if not torch.cuda.is_available():
            return "no GPU is visible to PyTorch"
        major, minor = torch.cuda.get_device_capability()
        if not any(has_code_for(architecture, (major, minor)) for architecture in architectures):
            built = ", ".join(architectures)
            return f"the extension was built for {built}; build it again with TORCH_CUDA_ARCH_LIST={major}.{minor}"
    return None


def has_code_for(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether an entry of TORCH_CUDA_ARCH_LIST, such as 8.0, 9.0a or 10.0+PTX, runs on a GPU of this capability."""
    entry = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", architecture)
    if entry is None:
        return True  # a name: PyTorch knows what it stands for
    compiled = int(entry[1]), int(entry[2])
    if entry[3]:  # features that other GPUs, later ones too, do not promise
        return capability == compiled
    return capability >= compiled and (entry[4] is not None or capability[0] == compiled[0])


@constant_when_compiled
def resolve(backend: str, device_type: str, op: str) -> str:
    """The backend that runs ``op`` on tensors of this device type.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: the backend asked for by name cannot run here, or not on this device.
    """
    chosen, reason = _choice(backend, device_type)
    if reason is None and chosen != "reference" and torch._C._are_functorch_transforms_active():
        reason = "kernels do not run inside torch.func (vmap, grad, jacrev, ...); take backend='reference' there"
    if reason is not None:
        raise RuntimeError(f"backend={backend!r} cannot run {op}: {reason}")
    return chosen


@cache
def _choice(backend: str, device_type: str) -> tuple[str, str | None]:
    """The backend that is meant, its ops loaded, or why it cannot run."""
    if backend == "auto":
        usable = (name for name in AUTO.get(device_type, ()) if why_not(name) is None)
        backend = next(usable, "reference")
    if backend == "reference":
        return backend, None
    if backend not in LIBRARIES:
        raise ValueError(f"backend: expected auto, {', '.join((*LIBRARIES, 'reference'))}, got {backend!r}")
    reason = why_not(backend)
    if reason is None and device_type != home(backend):
        reason = f"it runs on {home(backend)} tensors, got {device_type} tensors"
    if reason is None:
        ops(backend)
    return backend, reason


def home(backend: str) -> str:
    """The device type that a backend's tensors are on; "cpu" for those that take any."""
    return "cuda" if backend == "cuda" or (backend == "triton" and not _interpreting()) else "cpu"


_loaded: dict[str, SimpleNamespace] = {}


def ops(backend: str) -> SimpleNamespace:
    """The registered ops of a backend, by name: after `resolve` a look-up, which torch.compile can trace."""
    return _loaded.get(backend) or _load(backend)


def _load(backend: str) -> SimpleNamespace:
    if backend == "triton":
        import robustfast.triton_ops  # noqa: F401  registers its library, and only now imports triton
    library = getattr(torch.ops, LIBRARIES[backend])
    _loaded[backend] = SimpleNamespace(**{name: getattr(library, name).default for name in OPS})
    return _loaded[backend]


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
