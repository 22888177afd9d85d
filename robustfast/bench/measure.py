"""Timing on a machine that drifts: steps in turn, medians, ratios within a round, ceilings of the same run."""

from __future__ import annotations

import ctypes
import os
import platform
import random
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import TypeVar

import torch
from torch import Tensor

import robustfast

# What holds a machine to AVX2: the kernels, PyTorch, its compiler, its libraries.
HELD_TO_AVX2 = {
    "ROBUSTFAST_CPU_ISA": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "TORCHINDUCTOR_CPP_MARCH": "haswell",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}

Step = Callable[[], object]
Result = TypeVar("Result")


def last_level_cache(told: Path = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")) -> int:
    """Bytes that inputs rotate through at least: those of the processor's largest cache, more than any GPU's."""
    kibibytes = int(told.read_text().rstrip("K\n")) if told.exists() else 0
    return max(64 << 20, kibibytes << 10)


LAST_LEVEL_CACHE = last_level_cache()


@dataclass(frozen=True)
class Spread:
    """Median of a quantity, and its 20th and 80th percentiles."""

    median: float
    p20: float
    p80: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return Spread(values[0], values[0], values[0])
        fifths = quantiles(values, n=5, method="inclusive")
        return Spread(median(values), fifths[0], fifths[3])


class Rotation:
    """A step on one batch after the other, so that no batch is still in the cache when its turn comes."""

    def __init__(self, step: Callable[..., object], batches: Sequence) -> None:
        self.step, self.batches, self.turn = step, batches, 0

    def __call__(self) -> object:
        self.turn += 1
        return self.step(self.batches[self.turn % len(self.batches)])


def copies_past_cache(bytes_of_one: int, most: int = 16) -> int:
    """How many batches of this size a rotation needs."""
    return min(most, -(-LAST_LEVEL_CACHE // max(1, bytes_of_one)))


def elapsed(step: Step, device: torch.device) -> float:
    """Seconds of one call; on a GPU from event to event, on its current stream."""
    if device.type == "cpu":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def interleave(
    steps: dict[str, Step], device: torch.device, seconds: float, most: int = 2000
) -> tuple[dict[str, list[float | None]], dict[str, int | None]]:
    """Times of each step, round by round, and its peak memory: a round calls each of them once, in an order drawn anew.

    A first call of each warms up, a second one shows its cost and the memory it needs. A step so slow that it would
    take more than its equal share of ``seconds`` is left out of later rounds (None there) once it has been timed as
    often as ``seconds`` allow, three times at most; the call that showed the cost is the only one where more would not
    do. There are at least five rounds.
    """
    cost, peaks = {}, {}
    for name, step in steps.items():
        step()
        cost[name], peaks[name] = peak_memory(partial(elapsed, step, device), device)
    share = seconds / len(steps)
    fast = [name for name in steps if 3 * cost[name] <= share] or [min(cost, key=cost.__getitem__)]
    rounds = int(min(most, max(5, share * len(fast) / max(1e-9, sum(cost[name] for name in fast)))))
    limits = {name: rounds if name in fast else max(1, min(3, int(seconds / cost[name]))) for name in steps}
    times: dict[str, list[float | None]] = {name: [] for name in steps}
    names, order = list(steps), random.Random(0)
    for i in range(rounds):
        for name in order.sample(names, len(names)):
            if limits[name] == 1:
                times[name].append(None if i else cost[name])
            else:
                times[name].append(elapsed(steps[name], device) if i < limits[name] else None)
    return times, peaks


def ratios(peer: Sequence[float | None], ours: Sequence[float | None]) -> list[float]:
    """peer / ours in each round that timed both: what the machine does to a round it does to both."""
    return [a / b for a, b in zip(peer, ours, strict=True) if a is not None and b is not None]


# Ceilings.


def copy_rate(device: torch.device, size: int | None = None) -> float:
    """Bytes read and written in a second by a copy of a tensor larger than any cache, in memory written before."""
    size = size or (1 << 30 if device.type == "cuda" else 256 << 20)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    target.copy_(source)
    return 2 * size / min(elapsed(lambda: target.copy_(source), device) for _ in range(10))


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """Floating-point operations in a second of PyTorch's product of two square matrices."""
    size = size or (8192 if device.type == "cuda" else 1024)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    a @ b
    return 2 * size**3 / min(elapsed(lambda: a @ b, device) for _ in range(10))


class NullFunction(torch.autograd.Function):
    """What calling any autograd Function costs: takes the same arguments, computes nothing."""

    @staticmethod
    def forward(ctx, result: Tensor, grads: tuple[Tensor | None, ...], *leaves: Tensor):
        ctx.grads = grads
        return result.view_as(result)

    @staticmethod
    def backward(ctx, grad):
        return None, None, *ctx.grads


def captured(step: Step) -> Step:
    """The step in a CUDA graph; call it to replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


# Memory.


def peak_memory(call: Callable[[], Result], device: torch.device) -> tuple[Result, int | None]:
    """What a call returns, and the bytes that it needs at its peak beyond what was there before.

    None where the system does not tell.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before
    resident = _restart_peak()
    result = call()
    return result, None if resident is None else max(0, _resident("VmHWM") - resident)


def _restart_peak() -> int | None:
    """Bytes resident now, from which the process's peak starts again."""
    try:
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
            trim(0)  # memory that earlier calls left would hide what this one takes
        Path("/proc/self/clear_refs").write_text("5")
        return _resident("VmRSS")
    except (OSError, StopIteration):
        return None


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


# Where it was measured.


def environment(device: torch.device) -> dict:
    """Device, instruction set, versions, commit and date of a measurement."""
    info: dict = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "robustfast": robustfast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
    }
    if device.type == "cuda":
        return info | {"cuda": torch.version.cuda}
    if robustfast.backends()["cpu"] is None:
        from robustfast import _C

        info["instruction_set"] = _C.build_info()["instruction_set"]
    if limits := {name: os.environ[name] for name in HELD_TO_AVX2 if name in os.environ}:
        info["limits"] = limits
    return info | {"threads": torch.get_num_threads(), "cores": os.cpu_count()}


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def commit() -> str | None:
    """The checkout's commit, with + where its files differ from it; None outside of one."""
    here = Path(__file__).resolve().parent
    try:
        revision = _git(here, "rev-parse", "HEAD")
        return revision + ("+" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(where: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=where, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@contextmanager
def interruptible() -> Iterator[list[bool]]:
    """Ctrl-C ends the measuring, not what comes after it; the list is not empty then."""
    interrupted: list[bool] = []
    try:
        yield interrupted
    except KeyboardInterrupt:
        interrupted.append(True)
