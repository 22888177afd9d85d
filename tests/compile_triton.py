"""Compiles the Triton kernels that problems launch, for a GPU that need not be there, and prints reports as JSON.

The launchers run as they would on the GPU, on CPU tensors that nothing computes; each launch is caught, and compiled
with the specialisations Triton would give it. Usage: compile_triton.py TARGET < list of problems, TARGET of TARGETS;
or compile_triton.py kinds: nothing is compiled, and printed is how many kernels would be, for each way of sorting.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import ClassVar

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from robustfast.ops import DISTRIBUTIONS
from robustfast.reference import Settings
from robustfast.triton_ops import device, loss, noise, search, steps

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), "ampere"),
    "sm_90": (GPUTarget("cuda", 90, 32), "hopper"),
    "sm_100": (GPUTarget("cuda", 100, 32), "blackwell"),
    "sm_120": (GPUTarget("cuda", 120, 32), "ampere"),
    "gfx942": (GPUTarget("hip", "gfx942", 64), "amd"),
}
MATRIX = {
    "sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "sm_120": "mma.sync", "gfx942": "v_mfma",
}  # fmt: skip
SEED = torch.zeros((), dtype=torch.int64)


def launch_loss(n: int, dim: int, classes: int, dtype: str, weight_dtype: str | None = None, norm: int = 2) -> None:
    """Forward and backward on arrays of these sizes."""
    features = torch.empty(n, dim, dtype=getattr(torch, dtype))
    weight = torch.empty(classes, dim, dtype=getattr(torch, weight_dtype or dtype))
    wide = torch.float64 if features.dtype == torch.float64 else torch.float32
    state = torch.empty(classes, dim, dtype=wide), torch.empty(classes, dtype=torch.bool)
    target, bias = torch.zeros(n, dtype=torch.int64), weight[:, 0].contiguous()
    value, _, *saved = loss.discriminative_loss(
        features, features, target, weight, bias, *state, list(Settings()), None, norm, True, -100
    )
    loss.discriminative_loss_backward(
        value, features, features, *saved, classes, weight.dtype, bias.dtype, norm, [True] * 4
    )


def launch_steps(n: int, dim: int, classes: int, dtype: str, rows: int, norm: int = 2) -> None:
    """Each step alone, with tables of so many rows; the search with each row's own class in W, elsewhere or unknown."""
    features = torch.empty(n, dim, dtype=getattr(torch, dtype))
    wide = torch.float64 if features.dtype == torch.float64 else torch.float32
    weight, target = torch.empty(classes, dim, dtype=features.dtype), torch.zeros(n, dtype=torch.int64)
    table, of_row, row = torch.empty(rows, dim, dtype=wide), torch.empty(rows, dtype=wide), torch.empty(rows).int()
    steps.class_sums(features, target, rows, -100)
    steps.class_pulls(features, features, target, table, of_row, list(Settings()), None, norm, -100)
    for places in (None, row):
        steps.margin_search(table, table, of_row, weight, weight[:, 0], places)
    steps.finish(table, table, table, of_row, of_row, table, of_row, table, of_row, row, list(Settings()), None, norm)


def launch_noise(shape: list[int], dtype: str, out: str, per_sample: bool = False) -> None:
    images = torch.empty(shape, dtype=getattr(torch, dtype))
    mean, each = torch.ones(shape[1]), torch.ones(shape[0])
    settings = (0.1, each if per_sample else None, SEED, None, 0, each.long() if per_sample else None, 0.0, 1.0)
    clean, noisy = noise.noisy_pair(images, mean, mean, *settings, getattr(torch, out))
    if images.is_floating_point():
        noise.noisy_pair_backward(clean, noisy, images, mean, *settings)
        gaussian, uniform = (DISTRIBUTIONS.index(name) for name in ("gaussian", "uniform"))
        noise.add_noise_backward(images, noise.add_noise(images, gaussian, *settings), gaussian, *settings)
        noise.add_noise(images, uniform, *settings)


def launch_noise_of_epochs(batches: int) -> None:
    """Batches of other sizes with other draws, ids and scales, which are slices that begin anywhere."""
    images, mean = torch.empty(64, 3, 8, 8), torch.ones(4)[1:]
    ids, scales = torch.zeros(64, dtype=torch.int64), torch.ones(64)
    for n in range(1, batches + 1):
        batch, own = images[n : 2 * n], slice(n, 2 * n)
        settings = (0.1 * n, scales[own], SEED, ids[own], n, None, 0.0, 1.0)
        noise.noisy_pair(batch, mean, mean, *settings, torch.float32)
        noise.add_noise(batch, 0, 0.1 * n, None, SEED, ids[own], 0, ids[own], 0.0, 1.0)
    for quads in range(1, batches + 1):
        noise.philox_words(SEED, quads - 1, quads, 3 * quads)


def caught_launches(problems: list[dict], family: str) -> list[tuple[JITFunction, tuple, dict]]:
    launches = []

    def catch(self, *args, grid, warmup, **kwargs):
        launches.append((self, args, kwargs))

    loss.processor = search.processor = steps.processor = lambda _: device.Processor(132, family)
    noise.has_nvidia_instructions = lambda _: family != "amd"
    JITFunction.run = catch
    told_by = {"batches": launch_noise_of_epochs, "shape": launch_noise, "rows": launch_steps}
    for problem in problems:
        next((launcher for name, launcher in told_by.items() if name in problem), launch_loss)(**problem)
    return launches


class Kernel:
    """Stands for a compiled kernel, and takes no arguments that Triton would compile another one for."""

    def __init__(self, kernel: JITFunction, args: tuple, options: dict) -> None:
        assert "enable_fp_fusion" in options, f"{kernel.__name__}: whether sums are fused is left to Triton's version"
        nested = [part for arg in args if isinstance(arg, tuple) for part in arg if isinstance(part, tuple)]
        assert not nested, f"{kernel.__name__}: Triton 3.6 loses constants of a tuple in a tuple in an else"
        self.binder = create_function_from_signature(kernel.signature, kernel.params, make_backend(TARGETS["sm_90"][0]))
        self.specialization = self.binder(*args, **options)[1]
        self.made.add(f"{kernel.__name__} {self.specialization}")

    made: ClassVar[set[str]] = set()

    def __getitem__(self, grid: tuple[int, int, int]):
        return self.launch

    def launch(self, *args) -> None:
        assert self.binder(*args)[1] == self.specialization


def kernels_for_batches(sizes: list[int]) -> int:
    """How many kernels batches of these sizes need, in slices that begin anywhere, of labels too."""
    JITFunction.run = lambda self, *args, grid, warmup, **options: Kernel(self, args, options)
    loss.processor = search.processor = lambda _: device.Processor(132, "hopper")
    device._compiled.clear()
    Kernel.made.clear()
    classes, dim = 1000, 64
    weight, target = torch.empty(classes, dim), torch.zeros(max(sizes) + 9, dtype=torch.int64)
    state = torch.empty(classes, dim), torch.empty(classes, dtype=torch.bool)
    features = torch.empty(max(sizes) + 9, dim)
    for first, n in enumerate(sizes):
        f, y = features[first : first + n], target[first : first + n]
        value, _, *saved = loss.discriminative_loss(
            f, f, y, weight, None, *state, list(Settings()), None, 2, True, -100
        )
        loss.discriminative_loss_backward(value, f, f, *saved, classes, f.dtype, f.dtype, 2, [True] * 4)
    return len(Kernel.made)


def kernels_for_others() -> int:
    """As many for arguments that need their own: other dtypes, strides, alignments, and none."""
    weight, state = torch.empty(300, 77), (torch.empty(300, 77), torch.empty(300, dtype=torch.bool))
    every = torch.empty(40, 160)
    for f in (every[:, :77], every[:, 1:78], every[:, :154:2], every[:, :77].half(), every[:1, :77].expand(40, 77)):
        for g in (None, f, f.contiguous()):
            for y in (torch.zeros(40, dtype=torch.uint8), torch.zeros(80, dtype=torch.int32)[::2]):
                for bias in (None, weight[:, 0].contiguous(), torch.empty(300).half(), torch.empty(301)[1:]):
                    for ignore in (-100, 2**40):
                        arguments = f, g, y, weight, bias, *state, list(Settings()), None, 2, True, ignore
                        value, _, *saved = loss.discriminative_loss(*arguments)
                        wanted = [True, g is not None, True, bias is not None]
                        dtypes = weight.dtype, weight.dtype if bias is None else bias.dtype
                        loss.discriminative_loss_backward(value, f, g, *saved, 300, *dtypes, 2, wanted)
    return len(Kernel.made)


def unique_sources(launches, target: GPUTarget) -> dict[str, tuple[ASTSource, dict]]:
    """By name and everything that is compiled in: the specialisations Triton's own launch would choose."""
    backend = make_backend(target)
    sources = {}
    for kernel, args, kwargs in launches:
        binder = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, options = binder(*args, **kwargs)
        _, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, options)
        key = f"{kernel.__name__} {signature} {constants} {attributes} {options}"
        sources[key] = ASTSource(kernel, signature, constants, attributes), options
    return sources


def report(source: ASTSource, options: dict, name: str) -> dict:
    compiled = triton.compile(source, target=TARGETS[name][0], options=options)
    constants = named_constants(source).items()
    tile = {key: value for key, value in constants if key.startswith(("BLOCK", "SLICE", "SUM", "PRECISION"))}
    types = sorted({t for t in flat(source.signature.values()) if t.startswith(("*fp", "*bf"))})
    result = {"kernel": source.fn.__name__, "types": types, "tile": tile, "shared": compiled.metadata.shared,
              "warps": compiled.metadata.num_warps}  # fmt: skip
    if name == "gfx942":
        text = compiled.asm["amdgcn"]
        registers, spills = (int(re.search(rf"\.vgpr_{x}:\s*(\d+)", text)[1]) for x in ("count", "spill_count"))
    else:
        text = compiled.asm["ptx"]
        registers, spills = resources(compiled.asm["cubin"])
    return result | {"registers": registers, "spills": spills, "matrix": text.count(MATRIX[name])}


def flat(types):
    """Types one by one; an argument that is a tuple has a tuple of them."""
    for each in types:
        yield from flat(each) if isinstance(each, tuple) else (each,)


def named_constants(source: ASTSource) -> dict:
    names = list(source.signature)
    return {names[path[0]]: value for path, value in source.constants.items() if len(path) == 1}


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of stack and local memory, from the assembler's own report."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text).groups()
    return int(registers), int(stack) + int(local)


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") != "1", "kernels are compiled here, not interpreted"
    name = sys.argv[1]
    if name == "kinds":
        ways = [
            [500 + i for i in range(13)],
            [*range(1000, 1009), 1016, 1024, 2000],
            [20001, 20002, 20004, 20016, 30000],
        ]
        print(json.dumps([*(kernels_for_batches(sizes) for sizes in ways), kernels_for_others()]))
        sys.exit()
    target, family = TARGETS[name]
    sources = unique_sources(caught_launches(json.load(sys.stdin), family), target)
    print(json.dumps([report(source, options, name) for source, options in sources.values()]))
