"""The device a kernel runs on, and the tiles and launch options that fit it."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton

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


def row_tile(dim: int, itemsize: int, family: str, rows: int = 64, kib: int = 16, least_warps: int = 1) -> RowTile:
    """At most ``rows`` rows, of so many KiB of wide values or of one row, on enough warps to hold them in registers.

    Two programs fit on a multiprocessor where values have 4 bytes and are addressed by 16 bytes at once, rather than
    one by one.
    """
    block_d = max(16, triton.next_power_of_2(dim))
    block_n = max(1, min(rows, kib * 1024 // itemsize // block_d))
    num_warps = max(least_warps, min(16 if block_d > 4096 else 8, block_n * block_d * itemsize // 1024))
    programs = 2 if itemsize == 4 and num_warps > 4 and dim % 16 == 0 else 1
    return RowTile(block_n, block_d, registers(num_warps, family, programs))
