"""The noise against plain PyTorch, eager and compiled.

    pytest benchmarks/bench_noise.py

Beside pytest-benchmark's table every line gives the bytes that the op must move (one read of its input, one write of
each result) per second, and their share of what a copy of a tensor moves on this machine.
"""

from functools import cache
from itertools import cycle
from time import perf_counter

import pytest
import torch

from robustfast import functional as F

LAST_LEVEL_CACHE = 64 << 20  # inputs rotate through at least as many bytes
IMAGENET, CIFAR, FEATURES = (256, 3, 224, 224), (128, 3, 32, 32), (4096, 512)
NORMALIZATION = {"mean": (0.485, 0.456, 0.406), "pixel_std": (0.229, 0.224, 0.225)}
CHANNELS_LAST = {"memory_format": torch.channels_last}


def noisy_pair(images, seed, backend):
    return F.noisy_pair(images, 0.06, **NORMALIZATION, seed=seed, backend=backend)


def gaussian_noise(input, seed, backend):
    return (F.gaussian_noise(input, 0.1, seed=seed, clip=None, backend=backend),)


# Group: op, shape, dtype of the input, memory format.
GROUPS = {
    "noisy_pair 256x3x224x224": (noisy_pair, IMAGENET, torch.uint8, {}),
    "noisy_pair 256x3x224x224 channels last": (noisy_pair, IMAGENET, torch.uint8, CHANNELS_LAST),
    "noisy_pair 128x3x32x32": (noisy_pair, CIFAR, torch.uint8, {}),
    "gaussian_noise 256x3x224x224": (gaussian_noise, IMAGENET, torch.float32, {}),
    "gaussian_noise 4096x512 float32": (gaussian_noise, FEATURES, torch.float32, {}),
    "gaussian_noise 4096x512 bfloat16": (gaussian_noise, FEATURES, torch.bfloat16, {}),
}


def eager(op):
    return lambda input, seed: op(input, seed, "reference")


def compiled(op):
    return torch.compile(eager(op), fullgraph=True, dynamic=False)


def cpu(op):
    return lambda input, seed: op(input, seed, "cpu")


@cache
def copy_rate():
    """Bytes read and written in a second by a copy of a tensor larger than any cache, in memory written before."""
    source, target = torch.ones(2, 64 << 20)
    times = []
    for _ in range(10):
        start = perf_counter()
        target.copy_(source)
        times.append(perf_counter() - start)
    return 2 * source.nbytes / min(times)


def make_inputs(shape, dtype, memory_format):
    first = torch.randint(0, 256, shape, dtype=torch.uint8)
    first = (first if dtype == torch.uint8 else (first / 255).to(dtype)).contiguous(**memory_format)
    return [first.clone() for _ in range(-(-LAST_LEVEL_CACHE // first.nbytes))]


@pytest.mark.parametrize("implementation", [eager, compiled, cpu])
@pytest.mark.parametrize("group", GROUPS)
def test_noise(group, implementation, benchmark, capsys):
    op, shape, dtype, memory_format = GROUPS[group]
    inputs = make_inputs(shape, dtype, memory_format)
    run, rotation, seed = implementation(op), cycle(inputs), torch.tensor(1)
    benchmark.group = group
    large = inputs[0].numel() > 10**7
    rounds = 100 if not large else 3 if implementation is eager else 20
    benchmark.pedantic(lambda: run(next(rotation), seed), rounds=rounds, warmup_rounds=1 + rounds // 10)
    moved = inputs[0].nbytes + sum(result.nbytes for result in run(inputs[0], seed))
    rate = moved / benchmark.stats.stats.min
    benchmark.extra_info |= {"GB/s": rate / 1e9, "of copy": rate / copy_rate()}
    with capsys.disabled():
        print(
            f"\n{group:40} {implementation.__name__:8} {1e3 * benchmark.stats.stats.min:9.3f} ms"
            f" {rate / 1e9:7.2f} GB/s, {rate / copy_rate():6.1%} of a copy's {copy_rate() / 1e9:.1f} GB/s"
        )
