"""How fast a backend is: beside a floor, which is the bytes that have to move over the measured copy bandwidth plus the
flops that have to be done over the measured matrix rate, and beside plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.gpu_check.checks import Row
from benchmarks.gpu_check.machine import Machine
from benchmarks.gpu_check.sizes import Sizes
from robustfast import functional, steps
from robustfast.bench.baselines import loop_loss
from robustfast.bench.cases import NORMALIZATION, forward_backward, loss_of, make_batch
from robustfast.bench.measure import captured, peak_memory


def timings(machine: Machine, backend: str, sizes: Sizes) -> Iterator[Row]:
    if sizes.margin:
        what = {"time": "margin", "backend": backend, "size": sizes.margin, "dtype": "torch.bfloat16"}
        yield what, partial(time_margin, machine, backend, sizes.margin)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            what = {"time": "search", "backend": backend, "size": sizes.margin, "dtype": str(dtype)}
            yield what, partial(time_search, machine, backend, sizes.margin, dtype)
    for size, dtype in sizes.loss:
        yield from time_loss(machine, backend, size, getattr(torch, dtype), loss_of(backend))
    yield from time_images(machine, backend, sizes)


def baselines(machine: Machine, sizes: Sizes) -> Iterator[Row]:
    """The reference, torch.compile of it, and a loop over the classes."""
    compiled = torch.compile(loss_of("reference"), fullgraph=True, dynamic=False)
    for size, name in sizes.loss:
        dtype = getattr(torch, name)
        yield from time_loss(machine, "reference", size, dtype, loss_of("reference"))
        if machine.gpu:
            yield from time_loss(machine, "compile", size, dtype, compiled, graph=False)
            yield from time_loss(machine, "class loop", size, dtype, loop, graph=False, rounds=2)
    yield from time_images(machine, "reference", sizes)


def loop(f, g, target, weight, bias, centroids, seen):
    return loop_loss(f, g, target, weight, bias, centroids.to(f.dtype), seen)


def time_loss(machine: Machine, name: str, size, dtype, loss: Callable, graph=True, rounds=None) -> Iterator[Row]:
    n, dim, num_classes = size

    def measure(form: str) -> dict:
        batches = [make_batch(size, dtype, machine.device.type, seed) for seed in range(3 if machine.gpu else 1)]
        present = len(batches[0][2].unique())
        floor = 7 * n * dim * dtype.itemsize / machine.copy_rate
        floor += 4 * present * num_classes * dim / machine.matrix_rate
        steps = [partial(forward_backward, loss, batch) for batch in batches]
        if form == "kernels":
            return {"kernels": machine.kernels(steps[0])}
        if form == "graph":
            steps = [captured(step) for step in steps]
        seconds = machine.time(*(steps[:1] if rounds else steps), rounds=rounds)
        return {"us": seconds * 1e6, "floor_us": floor * 1e6, "times_floor": seconds / floor}

    for form in ("eager", "graph", "kernels") if machine.gpu and graph else ("eager",):
        what = {"time": "loss", "backend": name if form == "eager" else f"{name} {form}", "size": size}
        yield what | {"dtype": str(dtype)}, partial(measure, form)


def time_margin(machine: Machine, backend: str, size) -> dict:
    """The loss where nearly all of it is the margin, forward and backward, and its memory beside dW."""
    _, dim, num_classes = size
    batch = make_batch(size, torch.bfloat16, machine.device.type)
    loss = loss_of(backend)
    present = len(batch[2].unique())
    with torch.no_grad():
        seconds = machine.time(lambda: loss(*batch), rounds=5)
    extra = None
    if machine.gpu:
        _, peak = peak_memory(lambda: forward_backward(loss, batch), machine.device)
        extra = (peak - batch[3].nbytes) / 2**20
    whole = machine.time(lambda: forward_backward(loss, batch), rounds=5)
    rate = 4 * present * num_classes * dim / seconds
    return {"us": seconds * 1e6, "with_backward_us": whole * 1e6, "tflops": rate / 1e12,
            "of_matrix_rate": rate / machine.matrix_rate, "extra_mib": extra}  # fmt: skip


def time_search(machine: Machine, backend: str, size, dtype) -> dict:
    """margin_search as a step, of which robustfast/searches.py has a table."""
    rows, dim, num_classes = size
    _, _, _, weight, bias, *_ = (t.detach() for t in make_batch((1, dim, num_classes), dtype, machine.device.type))
    mu, classes = torch.randn(rows, dim, device=machine.device), torch.arange(rows, device=machine.device).int()
    classes %= num_classes
    search = steps.of(backend).margin_search
    seconds = machine.time(lambda: search(mu, None, None, weight, bias, classes), rounds=5)
    major = torch.cuda.get_device_capability()[0] if machine.gpu else 0
    return {"us": seconds * 1e6, "seconds_an_operation": seconds / (4 * rows * num_classes * dim), "capability": major}


def time_images(machine: Machine, backend: str, sizes: Sizes) -> Iterator[Row]:
    if sizes.images:
        what = {"time": "noisy_pair", "backend": backend, "size": sizes.images, "dtype": "uint8 -> bfloat16"}
        yield what, partial(time_noise, machine, backend, sizes.images)


def time_noise(machine: Machine, backend: str, shape) -> dict:
    images = torch.randint(256, shape, dtype=torch.uint8, device=machine.device)
    seed = torch.zeros((), dtype=torch.int64, device=machine.device)
    seconds = machine.time(
        lambda: functional.noisy_pair(images, 0.06, **NORMALIZATION, seed=seed, dtype=torch.bfloat16, backend=backend)
    )
    rate = images.numel() * (1 + 2 * 2) / seconds
    return {"us": seconds * 1e6, "gbps": rate / 1e9, "of_copy_rate": rate / machine.copy_rate}
