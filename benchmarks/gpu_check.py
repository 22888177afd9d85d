"""Checks and measures every backend on this machine's GPU; gpu_check.sh builds and runs the tests first.

    python benchmarks/gpu_check.py                        # on a GPU
    TRITON_INTERPRET=1 python benchmarks/gpu_check.py --device cpu   # the same code at tiny sizes

Accuracy against the reference in float64, beside that of the reference in the same dtype; the same bits from run to
run; CUDA graphs replayed with other inputs, labels, seeds and state; times against the reference, torch.compile of it
and a loop over the classes, and against a floor of bytes over the measured copy bandwidth plus flops over the measured
matrix rate. One table comes last; everything is in a JSON file.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from baselines import loop_loss

from robustfast import backends, functional
from robustfast.backends import home

RESULTS = Path(__file__).parent / "results"
NORMALIZATION = {"mean": (0.485, 0.456, 0.406), "pixel_std": (0.229, 0.224, 0.225)}


@dataclass
class Sizes:
    """What to check and to time: (N, D, K) of losses, shapes of images."""

    accuracy: list = field(default_factory=lambda: [(64, 128, 10), (1000, 512, 300), (700, 77, 1500)])
    loss: list = field(
        default_factory=lambda: [
            ((64, 128, 10), "float32"),
            ((4096, 512, 1000), "bfloat16"),
            ((8192, 2048, 1000), "bfloat16"),
            ((8192, 2048, 1000), "float32"),
        ]
    )
    margin: tuple = (4096, 512, 1_000_000)
    images: tuple = (512, 3, 224, 224)
    matrix: int = 8192
    copy: int = 1 << 31


TINY = Sizes([(20, 12, 10)], [((20, 12, 10), "float32")], (16, 8, 50), (2, 3, 8, 8), 64, 1 << 16)


class Machine:
    """Times on the device, and its two ceilings."""

    def __init__(self, device: str, sizes: Sizes):
        self.device, self.gpu = torch.device(device), device == "cuda"
        self.rounds = 30 if self.gpu else 1
        a = torch.empty(sizes.copy, dtype=torch.uint8, device=device)
        b = torch.randint(256, (sizes.copy,), dtype=torch.uint8, device=device)
        self.copy_rate = 2 * sizes.copy / self.time(lambda: a.copy_(b))
        m = torch.randn(sizes.matrix, sizes.matrix, device=device, dtype=torch.bfloat16)
        self.matrix_rate = 2 * sizes.matrix**3 / self.time(lambda: m @ m)

    def time(self, *steps: Callable, rounds: int | None = None) -> float:
        """Median seconds of a call; several steps are called in turn, so that inputs do not stay in the cache."""
        rounds = rounds or self.rounds
        for step in steps if rounds > 3 else steps[:1]:
            step()
        if not self.gpu:
            return min(elapsed(step) for step in steps)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
        torch.cuda.synchronize()
        events[0].record()
        for i in range(rounds):
            steps[i % len(steps)]()
            events[i + 1].record()
        torch.cuda.synchronize()
        return median(a.elapsed_time(b) for a, b in pairwise(events)) / 1e3

    def graph(self, step: Callable) -> Callable:
        """The step captured in a CUDA graph; call it to replay."""
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


def elapsed(step: Callable) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def make_batch(size, dtype, device, seed=0):
    """(f, g, target, weight, bias, centroids, seen) of random numbers."""
    n, dim, classes = size
    generator = torch.Generator(device).manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator, device=device)  # noqa: E731
    f = normal(n, dim)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    arrays = (f, f + 0.3 * normal(n, dim), normal(classes, dim), normal(classes))
    f, g, weight, bias = (array.to(dtype).requires_grad_() for array in arrays)
    target = torch.randint(classes, (n,), generator=generator, device=device)
    return f, g, target, weight, bias, normal(classes, dim).to(wide), normal(classes) > 0


def forward_backward(loss: Callable, batch) -> tuple[torch.Tensor, ...]:
    f, g, _, weight, bias, *_ = batch
    value = loss(*batch)
    return value.detach(), *torch.autograd.grad(value, (f, g, weight, bias))


def loss_of(backend: str) -> Callable:
    return lambda *batch: functional.discriminative_loss(*batch, backend=backend).loss


def fresh_state(batch):
    return *batch[:5], batch[5].clone(), batch[6].clone()


def relative_error(actual, expected) -> float:
    """Largest over the results of max |actual - expected| / max |expected|; inf where something is not finite."""
    worst = 0.0
    for a, e in zip(actual, expected, strict=True):
        error = ((a.double() - e.double()).abs().max() / e.double().abs().max().clamp(min=1e-30)).item()
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


def check_accuracy(backend: str, size, dtype: torch.dtype, device: str) -> dict:
    """Errors of the loss, and of loss and gradients, beside those of the reference in the same dtype."""
    batch = make_batch(size, dtype, device)
    exact = [t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in batch]
    expected = forward_backward(loss_of("reference"), fresh_state(exact))
    result = forward_backward(loss_of(backend), fresh_state(batch))
    again = forward_backward(loss_of(backend), fresh_state(batch))
    eager = forward_backward(loss_of("reference"), fresh_state(batch))
    errors = relative_error(result[:1], expected[:1]), relative_error(eager[:1], expected[:1])
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5}.get(dtype, 1e-3)
    return {
        "check": "accuracy", "backend": backend, "size": size, "dtype": str(dtype),
        "loss_error": errors[0], "eager_loss_error": errors[1], "all_error": relative_error(result, expected),
        "eager_all_error": relative_error(eager, expected),
        "same_bits": all(torch.equal(a, b) for a, b in zip(result, again, strict=True)),
        "ok": errors[0] <= errors[1] + tolerance,
    }  # fmt: skip


def check_noise(backend: str, device: str) -> dict:
    x = torch.rand(4, 3, 33, 20, device=device) if device == "cuda" else torch.rand(1, 2, 4, 5)
    seed, both = torch.tensor(3, device=device), (backend, "reference")
    words = [functional.philox_words(seed, 5, 1, 100, backend=name) for name in both]
    noise = [functional.gaussian_noise(x, 1.0, seed=seed, clip=None, backend=name) for name in both]
    error = (noise[0] - noise[1]).abs().max().item()
    return {"check": "noise", "backend": backend, "same_words": torch.equal(*words), "error": error,
            "ok": torch.equal(*words) and error <= 1e-5}  # fmt: skip


def check_graph(machine: Machine, backend: str, size) -> dict:
    """One graph replayed on three batches of other features, labels, classifiers and state, against eager steps."""
    static = make_batch(size, torch.float32, "cuda")
    results = []

    def step():
        results[:] = forward_backward(loss_of(backend), static)

    replay = machine.graph(step)
    same = True
    for seed in (1, 2, 3):
        batch = make_batch(size, torch.float32, "cuda", seed)
        with torch.no_grad():
            for target, source in zip(static, batch, strict=True):
                target.copy_(source)
        replay()
        eager = forward_backward(loss_of(backend), batch)
        same &= all(torch.equal(a, b) for a, b in zip((*results, *static[5:]), (*eager, *batch[5:]), strict=True))
    seed, x = torch.zeros((), dtype=torch.int64, device="cuda"), torch.rand(8, 100, device="cuda")
    noise = []
    replay = machine.graph(lambda: noise.append(functional.gaussian_noise(x, 0.1, seed=seed, backend=backend)))
    for value in (1, 2**40):
        seed.fill_(value)
        replay()
        same &= torch.equal(noise[-1], functional.gaussian_noise(x, 0.1, seed=value, backend=backend))
    return {"check": "graph", "backend": backend, "size": size, "ok": same}


def time_loss(machine: Machine, usable: list[str], size, dtype: torch.dtype) -> list[dict]:
    n, dim, classes = size
    batches = [make_batch(size, dtype, machine.device.type, seed) for seed in range(3 if machine.gpu else 1)]
    present = len(batches[0][2].unique())
    floor = 7 * n * dim * dtype.itemsize / machine.copy_rate + 4 * present * classes * dim / machine.matrix_rate
    losses = {name: loss_of(name) for name in (*usable, "reference")}
    rows = []

    def measured(name, measure):
        what = {"time": "loss", "backend": name, "size": size, "dtype": str(dtype)}

        def row():
            seconds = measure()
            return what | {"us": seconds * 1e6, "floor_us": floor * 1e6, "times_floor": seconds / floor}

        guarded(rows, what, row)

    def steps(loss):
        return [lambda batch=batch: forward_backward(loss, batch) for batch in batches]

    for name, loss in losses.items():
        measured(name, lambda loss=loss: machine.time(*steps(loss)))
        if machine.gpu:
            measured(f"{name} graph", lambda loss=loss: machine.time(*(machine.graph(step) for step in steps(loss))))
    if machine.gpu:
        compiled = torch.compile(losses["reference"], fullgraph=True)
        measured("compile", lambda: machine.time(*steps(compiled)))
        loop = lambda f, g, y, w, b, m, s: loop_loss(f, g, y, w, b, m.to(f.dtype), s)  # noqa: E731
        measured("class loop", lambda: machine.time(*steps(loop)[:1], rounds=2))
    return rows


def time_margin(machine: Machine, backend: str, size) -> dict:
    """The loss where nearly all of it is the margin, forward and backward, and its memory beside dW."""
    _, dim, classes = size
    batch = make_batch(size, torch.bfloat16, machine.device.type)
    loss = loss_of(backend)
    present = len(batch[2].unique())
    with torch.no_grad():
        seconds = machine.time(lambda: loss(*batch), rounds=5)
    extra = None
    if machine.gpu:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        grads = forward_backward(loss, batch)
        extra = (torch.cuda.max_memory_allocated() - before - grads[3].nbytes) / 2**20
    whole = machine.time(lambda: forward_backward(loss, batch), rounds=5)
    rate = 4 * present * classes * dim / seconds
    return {"time": "margin", "backend": backend, "size": size, "dtype": "torch.bfloat16", "us": seconds * 1e6,
            "with_backward_us": whole * 1e6, "tflops": rate / 1e12, "of_matrix_rate": rate / machine.matrix_rate,
            "extra_mib": extra}  # fmt: skip


def time_noise(machine: Machine, backend: str, shape) -> dict:
    images = torch.randint(256, shape, dtype=torch.uint8, device=machine.device)
    seed = torch.zeros((), dtype=torch.int64, device=machine.device)
    seconds = machine.time(
        lambda: functional.noisy_pair(images, 0.06, **NORMALIZATION, seed=seed, dtype=torch.bfloat16, backend=backend)
    )
    rate = images.numel() * (1 + 2 * 2) / seconds
    return {"time": "noisy_pair", "backend": backend, "size": shape, "dtype": "uint8 -> bfloat16", "us": seconds * 1e6,
            "gbps": rate / 1e9, "of_copy_rate": rate / machine.copy_rate}  # fmt: skip


def guarded(rows: list[dict], what: dict, measure: Callable) -> None:
    """A failure is a row as well, so that one backend's does not hide the rest."""
    try:
        result = measure()
        rows += result if isinstance(result, list) else [result]
    except Exception as error:
        rows.append(what | {"ok": False, "error": repr(error)[:500]})


def run(device: str, sizes: Sizes) -> dict:
    reasons = {name: reason for name, reason in backends().items() if name != "reference"}
    usable = [name for name, reason in reasons.items() if reason is None and home(name) == device]
    machine = Machine(device, sizes)
    rows: list[dict] = []
    for backend in usable:
        for size in sizes.accuracy:
            for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                what = {"check": "accuracy", "backend": backend, "size": size, "dtype": str(dtype)}
                guarded(rows, what, lambda b=backend, s=size, d=dtype: check_accuracy(b, s, d, device))
        guarded(rows, {"check": "noise", "backend": backend}, lambda b=backend: check_noise(b, device))
        if machine.gpu:
            guarded(rows, {"check": "graph", "backend": backend},
                    lambda b=backend: check_graph(machine, b, sizes.accuracy[0]))  # fmt: skip
    for size, dtype in sizes.loss:
        guarded(rows, {"time": "loss"}, lambda s=size, d=dtype: time_loss(machine, usable, s, getattr(torch, d)))
    for backend in usable:
        guarded(rows, {"time": "margin", "backend": backend}, lambda b=backend: time_margin(machine, b, sizes.margin))
    for backend in (*usable, "reference"):
        what = {"time": "noisy_pair", "backend": backend}
        guarded(rows, what, lambda b=backend: time_noise(machine, b, sizes.images))
    return {"machine": describe(machine), "backends": reasons, "results": rows}


def describe(machine: Machine) -> dict:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent)
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "device": torch.cuda.get_device_name() if machine.gpu else platform.processor() or platform.machine(),
        "torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton_version,
        "python": platform.python_version(), "commit": commit.stdout.strip() or None,
        "copy_gbps": machine.copy_rate / 1e9, "bf16_tflops": machine.matrix_rate / 1e12,
    }  # fmt: skip


def table(report: dict) -> str:
    machine = report["machine"]
    lines = [
        f"{machine['device']}, torch {machine['torch']}, triton {machine['triton']}: "
        f"copy {machine['copy_gbps']:.0f} GB/s, bf16 {machine['bf16_tflops']:.0f} TFLOP/s"
    ]
    lines += [f"{name:10} not usable: {reason}" for name, reason in report["backends"].items() if reason is not None]
    checks = [row for row in report["results"] if "check" in row]
    lines.append(f"checks: {sum(row['ok'] for row in checks)} of {len(checks)} pass")
    for row in checks:
        if not row["ok"] or row.get("same_bits") is False:
            lines.append("  FAILED " + json.dumps(row))
    for row in (row for row in report["results"] if "time" in row):
        size = "x".join(map(str, row.get("size", ())))
        dtype = row.get("dtype", "").removeprefix("torch.")
        name = f"{row['time']:10} {size:18} {dtype:18} {row.get('backend', ''):16}"
        if "error" in row:
            lines.append(f"{name} {row['error'][:80]}")
            continue
        notes = [f"{row[key]:.2f} {text}" for key, text in NOTES.items() if row.get(key) is not None]
        lines.append(f"{name} {row['us']:10.1f} us  {', '.join(notes)}")
    return "\n".join(lines)


NOTES = {
    "times_floor": "x floor", "of_matrix_rate": "of the matrix rate", "of_copy_rate": "of the copy bandwidth",
    "extra_mib": "MiB beside dW",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu_check.json")
    parser.add_argument("--build", type=int, help="exit status of the build, for the report")
    parser.add_argument("--tests", type=int, help="exit status of the tests, for the report")
    options = parser.parse_args()
    report = run(options.device, Sizes() if options.device == "cuda" else TINY)
    report |= {"build_status": options.build, "tests_status": options.tests}
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))


if __name__ == "__main__":
    main()
