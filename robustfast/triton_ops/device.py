"""The device a kernel runs on, the tiles and options that fit it, and the launch."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Of kernels whose sums the compiler may fuse into multiply-adds; Triton's own default changes between versions.
FUSED = {"enable_fp_fusion": True}


class Processor(NamedTuple):
    """What the tiles are made for."""

    multiprocessors: int
    family: str  # "hopper" (sm_90), "blackwell" (sm_100), "ampere" (sm_80 and all other NVIDIA GPUs) or "amd"


@cache
def processor(device: torch.device) -> Processor:
    if device.type == "cpu":
        return Processor(1, "ampere")
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return Processor(properties.multi_processor_count, "amd")
    family = {9: "hopper", 10: "blackwell"}.get(properties.major, "ampere")
    return Processor(properties.multi_processor_count, family)


# Triton's own functions of these names take a microsecond each.
def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def registers(num_warps: int, family: str, programs: int = 1) -> dict:
    """Launch options for so many warps that share a multiprocessor's registers with as many of other programs.

    NVIDIA's assembler, given no bound, spills a few of them to fit one more program there.
    """
    options = {"num_warps": num_warps, **FUSED}
    if family != "amd":
        options["maxnreg"] = min(255, 2048 // programs // num_warps)
    return options


class RowTile(NamedTuple):
    """A tile of BLOCK_N rows, each with all of its D features at once, and how to launch it."""

    block_n: int
    block_d: int
    options: dict


@cache
def row_tile(dim: int, itemsize: int, family: str, rows: int = 64, kib: int = 16, least_warps: int = 1) -> RowTile:
    """At most ``rows`` rows, of so many KiB of wide values or of one row, on enough warps to hold them in registers.

    Two programs fit on a multiprocessor where values have 4 bytes and are addressed by 16 bytes at once, rather than
    one by one.
    """
    block_d = max(16, next_power_of_2(dim))
    block_n = max(1, min(rows, kib * 1024 // itemsize // block_d))
    num_warps = max(least_warps, min(16 if block_d > 4096 else 8, block_n * block_d * itemsize // 1024))
    programs = 2 if itemsize == 4 and num_warps > 4 and dim % 16 == 0 else 1
    return RowTile(block_n, block_d, registers(num_warps, family, programs))


_compiled: dict[tuple, Any] = {}


def kind_of(*arguments: Any) -> tuple:
    """What Triton would compile a kernel anew for: of tensors their dtype, device, strides and alignment."""
    return tuple(
        [
            (a.dtype, a.get_device(), a.stride(), a.data_ptr() % 16 == 0) if isinstance(a, Tensor) else a
            for a in arguments
        ]
    )


def launch(kernel: Any, grid: tuple[int, ...], kind: tuple, *arguments: Any, **options: Any) -> None:
    """``kernel[grid](*arguments, **options)``, without a look at each argument where one of this kind was launched.

    Triton's own launch takes 10 to 20 us to find what it has compiled. Everything that it specialises on must follow
    from ``kind`` and the options, which have the kernel's constants in their order.
    """
    key = kernel.fn, kind, *options.values()
    compiled = _compiled.get(key)
    if compiled is None:
        compiled = kernel[grid](*arguments, **options)
        if compiled is not None:  # as it is in the interpreter
            _compiled[key] = compiled
    else:
        constants = [options[name] for name in constants_of(kernel)]
        compiled[(*grid, 1, 1)[:3]](*arguments, *constants)


@cache
def constants_of(kernel: Any) -> list[str]:
    return [parameter.name for parameter in kernel.params if parameter.is_constexpr]
