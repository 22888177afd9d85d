"""The machine: its versions, its clock, and the two ceilings that times are compared with."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch

from robustfast.bench import measure

ROOT = Path(__file__).resolve().parents[2]


class Machine:
    """Times on the device; ``rounds`` calls each, 1 for a run that only has to have happened."""

    def __init__(self, device: str, rounds: int = 30):
        self.device, self.gpu, self.rounds = torch.device(device), device == "cuda", rounds
        self.copy_rate = self.matrix_rate = 1.0

    def measure_ceilings(self, copied_bytes: int, matrix: int) -> dict:
        """The bandwidth of a copy, bytes read and written, and the rate of a bfloat16 product of random matrices."""
        self.copy_rate = measure.copy_rate(self.device, copied_bytes)
        self.matrix_rate = measure.matrix_rate(self.device, torch.bfloat16, matrix)
        return {"copy_gbps": self.copy_rate / 1e9, "bf16_tflops": self.matrix_rate / 1e12}

    def time(self, *steps: Callable, rounds: int | None = None) -> float:
        """Median seconds of a call; several steps are called in turn, so that inputs do not stay in the cache."""
        rounds = min(rounds or self.rounds, self.rounds)
        for step in steps if rounds > 3 else steps[:1]:
            step()
        if not self.gpu:
            return min(measure.elapsed(step, self.device) for step in steps)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
        torch.cuda.synchronize()
        events[0].record()
        for i in range(rounds):
            steps[i % len(steps)]()
            events[i + 1].record()
        torch.cuda.synchronize()
        return median(a.elapsed_time(b) for a, b in pairwise(events)) / 1e3

    def kernels(self, step: Callable) -> dict[str, float]:
        """Microseconds of each kernel of a step, by PyTorch's profiler."""
        step()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step()
            torch.cuda.synchronize()
        return {event.key[:120]: event.self_device_time_total for event in profile.key_averages()}


def versions(device: str) -> dict:
    """What a result depends on beside the code."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "device": gpus[0] if device == "cuda" else platform.processor() or platform.machine(), "gpus": len(gpus),
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        "torch": torch.__version__, "cuda": torch.version.cuda, "nvcc": output("nvcc", "--version").split("\n")[-1],
        "triton": triton_version, "python": platform.python_version(),
        "commit": output("git", "rev-parse", "HEAD") or os.environ.get("COMMIT"),
    }  # fmt: skip


def output(*command: str) -> str:
    """What a command prints, nothing where there is no such command."""
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.strip()
