"""Checks and measures every backend on this machine's GPU; gpu_check.sh builds and runs the tests first.

    python benchmarks/gpu_check.py                        # on a GPU
    TRITON_INTERPRET=1 python benchmarks/gpu_check.py --device cpu   # the same code at tiny sizes

Accuracy against the reference in float64, beside that of the reference in the same dtype; the same bits from run to
run; CUDA graphs replayed with other inputs, labels, seeds and state; times against the reference, torch.compile of it
and a loop over the classes, and against a floor of bytes over the measured copy bandwidth plus flops over the measured
matrix rate. Every backend has a process of its own, which no other's failure reaches, and so have the baselines. What
is known is in the JSON file after every result; one table comes last.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from baselines import loop_loss

from robustfast import backends, functional
from robustfast.backends import home

RESULTS = Path(__file__).parent / "results"
BASELINES = "baselines"  # the reference, torch.compile of it and a loop over the classes
SECONDS_OF_A_PART = 110
NORMALIZATION = {"mean": (0.485, 0.456, 0.406), "pixel_std": (0.229, 0.224, 0.225)}

Result = tuple[dict, Callable[[], dict]]  # what a row is about, and the measurement of the rest


@dataclass
class Sizes:
    """What to check and to time: (N, D, K) of losses, shapes of images."""

    accuracy: tuple = ((64, 128, 10), (1000, 512, 300), (700, 77, 1500))
    graph: tuple = ((64, 128, 10), (1000, 512, 300), (20000, 64, 300))  # each way of sorting labels
    loss: tuple = (
        ((64, 128, 10), "float32"),
        ((4096, 512, 1000), "bfloat16"),
        ((8192, 2048, 1000), "bfloat16"),
        ((8192, 2048, 1000), "float32"),
    )
    margin: tuple | None = (4096, 512, 1_000_000)
    images: tuple | None = (512, 3, 224, 224)
    matrix: int = 8192
    copy: int = 1 << 31


TINY = Sizes(((20, 12, 10),), (), (((20, 12, 10), "float32"),), (16, 8, 50), (2, 3, 8, 8), 64, 1 << 16)

# For tools that watch every access: what is computed, and nothing timed.
CHECKS = Sizes(((64, 128, 10), (200, 77, 150), (9000, 16, 40)), (), (), None, None, 64, 1 << 16)


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
    same = torch.equal(*words)
    return {"same_words": same, "error_of_normals": error, "ok": same and error <= 1e-5}


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
    return {"ok": same}


def time_loss(machine: Machine, part: str, size, dtype: torch.dtype) -> Iterator[Result]:
    n, dim, classes = size
    batches = [make_batch(size, dtype, machine.device.type, seed) for seed in range(3 if machine.gpu else 1)]
    present = len(batches[0][2].unique())
    floor = 7 * n * dim * dtype.itemsize / machine.copy_rate + 4 * present * classes * dim / machine.matrix_rate

    def result(name: str, measure: Callable) -> Result:
        what = {"time": "loss", "backend": name, "size": size, "dtype": str(dtype)}

        def row():
            seconds = measure()
            return {"us": seconds * 1e6, "floor_us": floor * 1e6, "times_floor": seconds / floor}

        return what, row

    def steps(loss):
        return [lambda batch=batch: forward_backward(loss, batch) for batch in batches]

    name = "reference" if part == BASELINES else part
    loss = loss_of(name)
    yield result(name, lambda: machine.time(*steps(loss)))
    if not machine.gpu:
        return
    yield result(f"{name} graph", lambda: machine.time(*(machine.graph(step) for step in steps(loss))))
    if part == BASELINES:
        compiled = torch.compile(loss, fullgraph=True, dynamic=False)
        yield result("compile", lambda: machine.time(*steps(compiled)))
        loop = lambda f, g, y, w, b, m, s: loop_loss(f, g, y, w, b, m.to(f.dtype), s)  # noqa: E731
        yield result("class loop", lambda: machine.time(*steps(loop)[:1], rounds=2))


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
    return {"us": seconds * 1e6, "with_backward_us": whole * 1e6, "tflops": rate / 1e12,
            "of_matrix_rate": rate / machine.matrix_rate, "extra_mib": extra}  # fmt: skip


def time_noise(machine: Machine, backend: str, shape) -> dict:
    images = torch.randint(256, shape, dtype=torch.uint8, device=machine.device)
    seed = torch.zeros((), dtype=torch.int64, device=machine.device)
    seconds = machine.time(
        lambda: functional.noisy_pair(images, 0.06, **NORMALIZATION, seed=seed, dtype=torch.bfloat16, backend=backend)
    )
    rate = images.numel() * (1 + 2 * 2) / seconds
    return {"us": seconds * 1e6, "gbps": rate / 1e9, "of_copy_rate": rate / machine.copy_rate}


def results(machine: Machine, part: str, device: str, sizes: Sizes) -> Iterator[Result]:
    """What a part has to find out: for each, what it is, and a function that measures the rest of its row."""
    backend = "reference" if part == BASELINES else part
    if part != BASELINES:
        for size in sizes.accuracy:
            for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                what = {"check": "accuracy", "backend": backend, "size": size, "dtype": str(dtype)}
                yield what, lambda size=size, dtype=dtype: check_accuracy(backend, size, dtype, device)
        yield {"check": "noise", "backend": backend}, lambda: check_noise(backend, device)
        for size in sizes.graph:
            what = {"check": "graph", "backend": backend, "size": size}
            yield what, lambda size=size: check_graph(machine, backend, size)
    for size, dtype in sizes.loss:
        yield from time_loss(machine, part, size, getattr(torch, dtype))
    if part != BASELINES and sizes.margin:
        what = {"time": "margin", "backend": backend, "size": sizes.margin, "dtype": "torch.bfloat16"}
        yield what, lambda: time_margin(machine, backend, sizes.margin)
    if sizes.images:
        what = {"time": "noisy_pair", "backend": backend, "size": sizes.images, "dtype": "uint8 -> bfloat16"}
        yield what, lambda: time_noise(machine, backend, sizes.images)


def measured(what: dict, measure: Callable) -> dict:
    """The row of a result; a failure is one as well, so that it does not hide the rest."""
    try:
        return what | measure()
    except Exception as error:
        return what | {"ok": False, "error": repr(error)[:500]}


def run_part(part: str, device: str, sizes: Sizes, out: Path) -> None:
    machine = Machine(device, sizes)
    rows: list[dict] = []
    for what, measure in results(machine, part, device, sizes):
        rows.append(measured(what, measure))
        write(out, {"machine": describe(machine), "results": rows})


def run_parts(report: dict, parts: list[str], device: str, out: Path) -> None:
    """Adds each part's results to the report."""
    for part in parts:
        of_part = out.with_suffix(f".{part}.partial")
        command = [sys.executable, __file__, "--device", device, "--part", part, "--out", of_part]
        status: int | str = "stopped"
        try:
            status = subprocess.run(command, timeout=SECONDS_OF_A_PART).returncode
        except subprocess.TimeoutExpired:
            status = f"stopped after {SECONDS_OF_A_PART} s"
        finally:
            if of_part.exists():
                found = json.loads(of_part.read_text())
                report["machine"] = report["machine"] or found["machine"]
                report["results"] += found["results"]
                of_part.unlink()
            if status != 0:
                report["results"].append({"check": "process", "backend": part, "ok": False, "status": status})
            write(out, report)


def write(out: Path, report: dict) -> None:
    partial = out.with_name(out.name + ".new")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    partial.replace(out)


def describe(machine: Machine) -> dict:
    command = ["git", "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, cwd=RESULTS.parent).stdout.strip()
    except OSError:  # no git
        commit = ""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "device": torch.cuda.get_device_name() if machine.gpu else platform.processor() or platform.machine(),
        "torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton_version,
        "python": platform.python_version(), "commit": commit or os.environ.get("COMMIT"),
        "copy_gbps": machine.copy_rate / 1e9, "bf16_tflops": machine.matrix_rate / 1e12,
    }  # fmt: skip


def table(report: dict) -> str:
    machine = report["machine"]
    if machine is None:
        return "nothing was measured"
    lines = [
        f"{machine['device']}, torch {machine['torch']}, triton {machine['triton']}: "
        f"copy {machine['copy_gbps']:.0f} GB/s, bf16 {machine['bf16_tflops']:.0f} TFLOP/s"
    ]
    if report["status"]:
        lines.append("exit codes: " + ", ".join(f"{name} {code}" for name, code in report["status"].items()))
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
    parser.add_argument("--status", nargs="*", default=[], metavar="STEP=CODE", help="how earlier steps ended")
    parser.add_argument("--part", help="a backend, or baselines: only this, in this process")
    parser.add_argument("--checks", action="store_true", help="with --part: time nothing")
    options = parser.parse_args()
    if options.checks and not options.part:
        parser.error("--checks goes with --part")
    sizes = Sizes() if options.device == "cuda" else TINY
    if options.part:
        return run_part(options.part, options.device, CHECKS if options.checks else sizes, options.out)
    reasons = {name: reason for name, reason in backends().items() if name != "reference"}
    usable = [name for name, reason in reasons.items() if reason is None and home(name) == options.device]
    report = {"machine": None, "backends": reasons, "results": []}
    report["status"] = dict(status.split("=") for status in options.status)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # what is known is printed all the same
    try:
        run_parts(report, [*usable, BASELINES], options.device, options.out)
    finally:
        print(table(report))


if __name__ == "__main__":
    main()
