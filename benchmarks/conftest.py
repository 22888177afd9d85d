"""A table of speedups after every run of benchmarks, and its JSON where --results names one."""

import json
import os
import platform
import subprocess
from collections import defaultdict
from pathlib import Path

import torch

import robustfast

# What limits instruction sets: kernels', PyTorch's, its compiler's, its libraries'.
LIMITS = ("ROBUSTFAST_CPU_ISA", "ATEN_CPU_CAPABILITY", "TORCHINDUCTOR_CPP_MARCH", "MKL_ENABLE_INSTRUCTIONS",
          "ONEDNN_MAX_CPU_ISA")  # fmt: skip
BASELINES = ("eager", "compiled", "loop_loss")


def pytest_addoption(parser):
    parser.addoption("--results", help="write the speedups to benchmarks/results/NAME.json")


def speedups(benchmarks):
    """{group: {implementation: best seconds}} with, for each kernel, its speedup over each baseline of the group."""
    groups = defaultdict(dict)
    for benchmark in benchmarks:
        implementation = next(v for v in benchmark.params.values() if callable(v)).__name__
        groups[benchmark.group][implementation] = {"seconds": benchmark.stats.min, "median": benchmark.stats.median}
    for times in groups.values():
        for name, entry in times.items():
            if name not in BASELINES:
                entry["speedup"] = {
                    other: times[other]["seconds"] / entry["seconds"] for other in BASELINES if other in times
                }
    return dict(groups)


def environment():
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    info: dict = {"torch": torch.__version__, "python": platform.python_version(), "commit": commit}
    if limits := {name: os.environ[name] for name in LIMITS if name in os.environ}:
        info |= {"limits": limits}
    return info | {"threads": torch.get_num_threads(), "cores": os.cpu_count(), "processor": processor()}


def processor():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    if robustfast.backends()["cpu"] is None:
        from robustfast import _C

        name += f", kernels use {_C.build_info()['instruction_set']}"
    return name


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    if session is None or not session.benchmarks:
        return
    groups = speedups(session.benchmarks)
    terminalreporter.section("speedups (best of the rounds)")
    for group, times in groups.items():
        terminalreporter.line(group)
        for name, entry in times.items():
            ratios = ", ".join(f"{ratio:.1f}x {other}" for other, ratio in entry.get("speedup", {}).items())
            terminalreporter.line(f"    {name:10} {1e3 * entry['seconds']:10.3f} ms  {ratios}")
    if name := config.getoption("--results"):
        path = Path(__file__).parent / "results" / f"{name}.json"
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"environment": environment(), "groups": groups}, indent=1) + "\n")
        partial.replace(path)
        terminalreporter.line(f"written: {path}")
