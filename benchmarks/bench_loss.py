"""The loss, forward and backward in float32, against plain PyTorch: eager, compiled, and looping over classes.

pytest benchmarks/bench_loss.py                      # the table at the end gives the speedups
pytest benchmarks/bench_loss.py --results NAME       # and writes benchmarks/results/NAME.json
"""

from itertools import cycle

import pytest
import torch
from baselines import loop_loss

from robustfast import functional, reference

LAST_LEVEL_CACHE = 64 << 20  # inputs rotate through at least as many bytes
SIZES = {(64, 128, 10): 8000, (4096, 512, 1000): 60, (8192, 2048, 1000): 12}  # (N, D, K): rounds


def eager(*tensors):
    return reference.discriminative_loss(*tensors).loss


def compiled(*tensors):
    return compiled_eager(*tensors)


compiled_eager = torch.compile(eager, fullgraph=True, dynamic=False)


def cpu(*tensors):
    return functional.discriminative_loss(*tensors, backend="cpu").loss


def make_batch(n, dim, classes):
    f, weight = torch.randn(n, dim), torch.randn(classes, dim)
    leaves = (f.requires_grad_(), (f.detach() + 0.1 * torch.randn(n, dim)).requires_grad_(), weight.requires_grad_())
    f, g, weight = leaves
    return f, g, torch.randint(classes, (n,)), weight, torch.randn(classes, requires_grad=True)


def step(loss, batch, state):
    for tensor in batch:
        tensor.grad = None
    loss(*batch, *state).backward()


CASES = [(size, loss) for size in SIZES for loss in (eager, compiled, cpu)] + [((4096, 512, 1000), loop_loss)]


@pytest.mark.parametrize(
    "size, loss", CASES, ids=lambda value: getattr(value, "__name__", None) or "x".join(map(str, value))
)
def test_loss(size, loss, benchmark):
    torch.manual_seed(0)
    n, dim, classes = size
    count = min(16, -(-LAST_LEVEL_CACHE // (8 * n * dim)))
    batches = cycle([make_batch(*size) for _ in range(count)])
    state = torch.zeros(classes, dim), torch.zeros(classes, dtype=torch.bool)
    benchmark.group = f"loss N={n} D={dim} K={classes}"
    rounds, warmup = (2, 1) if loss is loop_loss else (SIZES[size], 3)
    benchmark.pedantic(lambda: step(loss, next(batches), state), rounds=rounds, warmup_rounds=warmup)
