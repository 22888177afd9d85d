"""Whether a backend is right: against float64, from run to run, and where only a GPU can tell."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.distributed as dist

from benchmarks.gpu_check.batches import fresh, in_float64, relative_error, same_bits
from benchmarks.gpu_check.machine import ROOT, Machine
from benchmarks.gpu_check.sizes import Sizes
from robustfast import DiscriminativeLoss, functional
from robustfast.bench.cases import forward_backward, loss_of, make_batch
from robustfast.bench.measure import captured
from robustfast.searches import RATES, Rates

Row = tuple[dict, Callable[[], dict]]  # what a row is about, and the measurement of the rest
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def checks(machine: Machine, backend: str, sizes: Sizes) -> Iterator[Row]:
    device = machine.device.type
    for size in sizes.accuracy:
        for dtype in DTYPES:
            yield about("accuracy", backend, size, dtype), partial(accuracy, backend, size, dtype, device)
    yield about("noise", backend), partial(noise, backend, device)
    for size in sizes.sums:
        yield about("sums", backend, size), partial(sums, backend, size, device)
    for size in sizes.graph:
        yield about("graph", backend, size), partial(graph, backend, size)
    for size in sizes.stream:
        yield about("stream", backend, size), partial(stream, backend, size)
        yield about("second device", backend, size), partial(second_device, backend, size)
    if sizes.stream:
        yield about("assertion", backend), partial(assertion, backend)
    for what in sizes.beyond_32_bits:
        yield about(f"more than 2^31 elements, {what}", backend), partial(searched, {}, BEYOND_32_BITS[what], backend)
    if backend == "cuda":
        for size in sizes.accuracy:
            for dtype in DTYPES[:3]:
                entry = {(torch.cuda.get_device_capability()[0], dtype): Rates(own=1.0, triton=0.0)}
                row = about("accuracy, Triton's search", backend, size, dtype)
                yield row, partial(searched, entry, accuracy, backend, size, dtype, device)


def about(check: str, backend: str, size: tuple = (), dtype: torch.dtype | None = None) -> dict:
    row = {"check": check, "backend": backend, "size": size}
    return row if dtype is None else row | {"dtype": str(dtype)}


def searched(entries: dict, check: Callable[..., dict], *arguments) -> dict:
    """A check where the table of searches has these entries; with none the loss has its backend's own."""
    with patch.dict(RATES, entries, clear=True):
        return check(*arguments)


def accuracy(backend: str, size, dtype: torch.dtype, device: str) -> dict:
    """Errors of the loss, and of loss and gradients, beside those of the reference in the same dtype."""
    batch = make_batch(size, dtype, device)
    expected = forward_backward(loss_of("reference"), fresh(in_float64(batch)))
    result = forward_backward(loss_of(backend), fresh(batch))
    again = forward_backward(loss_of(backend), fresh(batch))
    eager = forward_backward(loss_of("reference"), fresh(batch))
    errors = relative_error(result[:1], expected[:1]), relative_error(eager[:1], expected[:1])
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5}.get(dtype, 1e-3)
    same = same_bits(result, again)
    return {
        "loss_error": errors[0], "eager_loss_error": errors[1], "all_error": relative_error(result, expected),
        "eager_all_error": relative_error(eager, expected), "same_bits": same,
        "ok": errors[0] <= errors[1] + tolerance and (same or backend == "reference"),
    }  # fmt: skip


def noise(backend: str, device: str) -> dict:
    x = torch.rand(4, 3, 33, 20, device=device) if device == "cuda" else torch.rand(1, 2, 4, 5)
    seed, both = torch.tensor(3, device=device), (backend, "reference")
    words = [functional.philox_words(seed, 5, 1, 100, backend=name) for name in both]
    normals = [functional.gaussian_noise(x, 1.0, seed=seed, clip=None, backend=name) for name in both]
    error = (normals[0] - normals[1]).abs().max().item()
    same = torch.equal(*words)
    return {"same_words": same, "error_of_normals": error, "ok": same and error <= 1e-5}


def sums(backend: str, size, device: str) -> dict:
    """The loss by its steps, with this machine's collectives of one rank between them, and captured in a graph."""
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)

    def loss(input, input_noise, target, weight, bias, centroids, seen):
        module = DiscriminativeLoss(*weight.shape, backend=backend, process_group=dist.group.WORLD, exchange="sums")
        module.centroids, module.seen = centroids, seen
        return module(input, input_noise, target, SimpleNamespace(weight=weight, bias=bias))

    batch = make_batch(size, torch.float32, device)
    expected = forward_backward(loss_of("reference"), fresh(in_float64(batch)))
    error = relative_error(forward_backward(loss, batch), expected)
    return {"all_error": error, "ok": error <= 1e-4 and (device == "cpu" or replays_alike(loss, size))}


def graph(backend: str, size) -> dict:
    same = replays_alike(loss_of(backend), size)
    seed, x = torch.zeros((), dtype=torch.int64, device="cuda"), torch.rand(8, 100, device="cuda")
    noisy = []
    replay = captured(lambda: noisy.append(functional.gaussian_noise(x, 0.1, seed=seed, backend=backend)))
    for value in (1, 2**40):
        seed.fill_(value)
        replay()
        same &= torch.equal(noisy[-1], functional.gaussian_noise(x, 0.1, seed=value, backend=backend))
    return {"ok": same}


def replays_alike(loss: Callable[..., torch.Tensor], size) -> bool:
    """One graph replayed on three batches of other features, labels, classifiers and state, against eager steps."""
    static = make_batch(size, torch.float32, "cuda")
    results = []

    def step():
        results[:] = forward_backward(loss, static)

    replay = captured(step)
    same = True
    for seed in (1, 2, 3):
        batch = make_batch(size, torch.float32, "cuda", seed)
        overwrite(static, batch)
        replay()
        eager = forward_backward(loss, batch)
        same &= same_bits((*results, *static[5:]), (*eager, *batch[5:]))
    return same


@torch.no_grad()
def overwrite(tensors, others) -> None:
    for tensor, other in zip(tensors, others, strict=True):
        tensor.copy_(other)


def stream(backend: str, size) -> dict:
    """On a side stream, behind work that still runs when the step is launched: the default stream's results."""
    batch = make_batch(size, torch.float32, "cuda")
    expected_batch = fresh(batch)
    expected = forward_backward(loss_of(backend), expected_batch)
    late = fresh(make_batch(size, torch.float32, "cuda", seed=1))
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)
        overwrite(late, batch)
        results = forward_backward(loss_of(backend), late)
    torch.cuda.synchronize()
    return {"ok": same_bits((*results, *late[5:]), (*expected, *expected_batch[5:]))}


def second_device(backend: str, size) -> dict:
    """On a GPU that is not the current one."""
    if torch.cuda.device_count() < 2:
        return {"ok": True, "skipped": "one GPU"}
    batch = make_batch(size, torch.float32, "cuda")
    expected = forward_backward(loss_of(backend), fresh(batch))
    return {"ok": same_bits(forward_backward(loss_of(backend), fresh(batch, "cuda:1")), expected)}


ASSERTION = """
import sys, torch
from robustfast.bench.cases import loss_of, make_batch
batch = make_batch((64, 128, 10), torch.float32, "cuda")
batch[2][7] = 10
loss_of(sys.argv[1])(*batch)
torch.cuda.synchronize()
"""


def assertion(backend: str) -> dict:
    """A label out of range ends the process, which has to be another one, with a device assertion."""
    done = subprocess.run([sys.executable, "-c", ASSERTION, backend], capture_output=True, text=True, cwd=ROOT)
    said = "device-side assert" in done.stderr
    return {"ok": done.returncode != 0 and said} | ({} if said else {"stderr": done.stderr[-500:]})


def many_classes(backend: str) -> dict:
    """Classes and gradients behind element 2^31 of W; no class before them can win, so a small W has the results."""
    dim, last = 2048, 1000
    count = 2**31 // dim + 2 * last
    if why := lacks_memory(12 * count * dim):
        return why
    small = make_batch((64, dim, last), torch.bfloat16, "cuda")
    large = [t.detach() for t in small]
    large[2] = large[2] + count - last
    for k, fill in ((3, 0.0), (4, -1e30), (5, 0.0), (6, 0)):
        large[k] = torch.full((count, *small[k].shape[1:]), fill, dtype=small[k].dtype, device="cuda")
        large[k][-last:] = small[k].detach()
    return compare(backend, small, large, [slice(None), slice(None), slice(-last, None), slice(-last, None)])


def many_samples(backend: str) -> dict:
    """Samples behind element 2^31 of the features; all before them are ignored."""
    dim, last = 2048, 1000
    count = 2**31 // dim + 2 * last
    if why := lacks_memory(10 * count * dim):
        return why
    small = make_batch((last, dim, 100), torch.bfloat16, "cuda")
    large = [t.detach().clone() for t in small]
    for k, fill in ((0, 0.0), (1, 0.0), (2, -100)):
        large[k] = torch.full((count, *small[k].shape[1:]), fill, dtype=small[k].dtype, device="cuda")
        large[k][-last:] = small[k].detach()
    return compare(backend, small, large, [slice(-last, None), slice(-last, None), slice(None), slice(None)])


BEYOND_32_BITS = {"classes": many_classes, "samples": many_samples}


def lacks_memory(needed: int) -> dict | None:
    free = torch.cuda.mem_get_info()[0]
    if free > needed:
        return None
    return {"ok": True, "skipped": f"needs {needed / 2**30:.0f} GiB of memory, {free / 2**30:.0f} are free"}


def compare(backend: str, small, large, last: list[slice]) -> dict:
    """The large problem's results, of which those of the small one are the last, and the others zero."""
    expected = forward_backward(loss_of(backend), small)
    for k in (0, 1, 3, 4):
        large[k].requires_grad_()
    value, *grads = forward_backward(loss_of(backend), large)
    error = relative_error((value, *(g[part] for g, part in zip(grads, last, strict=True))), expected)
    others = sum(g[: g.shape[0] - e.shape[0]].count_nonzero().item() for g, e in zip(grads, expected[1:], strict=True))
    return {"all_error": error, "not_zero": others, "ok": error <= 1e-2 and others == 0}
