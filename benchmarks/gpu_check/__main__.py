"""Builds, checks and measures everything on this machine's NVIDIA GPU.

    python -m benchmarks.gpu_check                # all three stages, in the repository's root
    python -m benchmarks.gpu_check cuda           # one of them: cuda, triton, tests; the report keeps the others

It needs PyTorch and, as far as they are to be checked, nvcc, Triton, pytest and compute-sanitizer; no network. Each
stage ends within 9 minutes (--seconds; 0: no limit) and prints what its steps may take. Every backend has processes of
its own, which no other's failure reaches. build/gpu_check/gpu_check.json holds all that is known after every step: the
file to send back. One table comes last. The exit code is 1 where a step failed or a check does not hold.

    TRITON_INTERPRET=1 python -m benchmarks.gpu_check cpu --device cpu --seconds 0    # the same code at tiny sizes
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu_check.machine import ROOT, versions
from benchmarks.gpu_check.parts import WARM_PROCESSES, write
from benchmarks.gpu_check.table import COMPILE_AHEAD, failures, table

SECONDS_OF_A_STAGE = 540
# Tests that run on a GPU where there is one. The property test goes over all backends without naming any.
TESTS = ("test_loss.py", "test_loss_calls.py", "test_loss_edges.py", "test_steps.py", "test_searches.py",
         "test_global_batch.py", "test_noise.py", "test_noise_arguments.py", "test_pytorch.py", "test_module.py",
         "test_triton.py")  # fmt: skip
ON_A_GPU = "cuda or triton or gpu or kernels_are_the_reference"


@dataclass
class Step:
    """Commands that run side by side; ``seconds`` of a stage's SECONDS_OF_A_STAGE."""

    name: str
    seconds: int
    commands: list[list[str]]
    environment: dict[str, str] = field(default_factory=dict)


class Stages:
    """The steps of each stage; ``out`` gets the files of their parts."""

    def __init__(self, device: str, out: Path):
        self.device, self.out = device, out

    def part(self, name: str, *options: str) -> list[str]:
        of_part = self.out / f"{name}.partial"
        command = [sys.executable, "-m", "benchmarks.gpu_check.parts", name, "--device", self.device]
        return [*command, "--out", str(of_part), *options]

    def cuda(self) -> Iterator[Step]:
        architectures = {"ROBUSTFAST_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST")
                         or this_gpu()}  # fmt: skip
        yield Step("build", 180, [[sys.executable, "setup.py", "build_ext", "--inplace"]], architectures)
        yield Step("cuda.checks", 160, [self.part("cuda.checks")])
        yield Step("cuda.timings", 180, [self.part("cuda.timings")])

    def triton(self) -> Iterator[Step]:
        names = ("triton.timings", "triton.checks", "baselines.timings")
        warm = [self.part(name, "--warm", str(i)) for name in names for i in range(WARM_PROCESSES)]
        yield Step(COMPILE_AHEAD, 150, warm)
        yield Step("triton.checks", 120, [self.part("triton.checks")])
        yield Step("triton.timings", 130, [self.part("triton.timings")])
        yield Step("baselines.timings", 130, [self.part("baselines.timings")])

    def tests(self) -> Iterator[Step]:
        has_xdist = subprocess.run([sys.executable, "-c", "import xdist"], stderr=subprocess.DEVNULL).returncode == 0
        pytest = [sys.executable, "-m", "pytest", "-q", "-rf", "--tb=short", "--no-header", "-p", "no:cacheprovider"]
        files = [f"tests/{name}" for name in TESTS]
        yield Step("pytest", 240, [[*pytest, *(("-n", "8") if has_xdist else ()), *files, "-k", ON_A_GPU]])
        if shutil.which("compute-sanitizer"):
            ours = ("--kernel-name", "kns=robustfast", "--error-exitcode", "9")  # their names hold the namespace
            for tool in ("memcheck", "racecheck"):
                watch = ["compute-sanitizer", "--tool", tool, *ours]
                yield Step(tool, 150, [[*watch, *self.part("cuda.checks", "--watched")]])

    def cpu(self) -> Iterator[Step]:
        for name in ("cpu.checks", "cpu.timings", "triton.checks", "triton.timings", "baselines.timings"):
            yield Step(name, 108, [self.part(name)])


def this_gpu() -> str:
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}" + "a" * (major >= 9)


def run(step: Step, seconds: float | None, out: Path) -> int | str:
    """0, the first other exit code, or that time was up. What the commands print is in a log, and its end here."""
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | step.environment | {"PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"}
    log, start, status = out / f"{step.name.replace(' ', '_')}.log", time.monotonic(), 0
    with log.open("w") as text:
        running = [subprocess.Popen(command, stdout=text, stderr=text, env=environment, cwd=ROOT)
                   for command in step.commands]  # fmt: skip
        try:
            for process in running:
                left = None if seconds is None else max(0.0, seconds - (time.monotonic() - start))
                status = status or process.wait(left)
        except subprocess.TimeoutExpired:
            status = f"stopped after {seconds:.0f} s"
        finally:
            for process in running:
                process.kill()
    if status != 0:
        print(f"{step.name} ended with {status}:\n" + "\n".join(log.read_text().splitlines()[-25:]))
    return status


def not_usable() -> dict[str, str]:
    """In a process of its own: this one has to see the extension that a step builds, not what was there before."""
    code = "import json, robustfast; print(json.dumps({k: v for k, v in robustfast.backends().items() if v}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    return json.loads(done.stdout) if done.returncode == 0 else {"robustfast": done.stderr[-500:]}


def run_stage(steps: Callable[[], Iterator[Step]], seconds: float, stage: dict, save: Callable[[], None], out: Path):
    """Run the steps one after another, none beyond its share nor all beyond ``seconds``, and add what they found."""
    start = time.monotonic()
    for step in steps():
        share = step.seconds * seconds / SECONDS_OF_A_STAGE
        left = seconds - (time.monotonic() - start)
        print(f"   {step.name}: at most {min(share, left):.0f} s" if seconds else f"   {step.name}", flush=True)
        stage["status"][step.name] = run(step, min(share, left) if seconds else None, out)
        for found in sorted(out.glob("*.partial")):
            part = json.loads(found.read_text())
            stage["machine"] |= part["machine"]
            stage["results"] += part["results"]
            found.unlink()
        save()
    stage["not_usable"] = not_usable()
    save()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", default=[], help="cuda, triton, tests; all of them where none is named")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=ROOT / "build/gpu_check")
    parser.add_argument("--seconds", type=float, default=SECONDS_OF_A_STAGE, help="of a stage; 0: as long as it takes")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    stages, file = Stages(options.device, options.out), options.out / "gpu_check.json"
    machine = versions(options.device)
    print("\n".join(f"{name}: {value}" for name, value in machine.items()), flush=True)
    report = json.loads(file.read_text()) if file.exists() else {"stages": {}}
    failed = False
    for name in options.stages or ("cuda", "triton", "tests"):
        stage: dict = {"machine": dict(machine), "not_usable": {}, "status": {}, "results": []}
        report["stages"][name] = stage
        print(f"stage {name}:", flush=True)
        run_stage(getattr(stages, name), options.seconds, stage, lambda: write(file, report), options.out)
        failed |= bool(failures(stage))
    print(table(report))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
