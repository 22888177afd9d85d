"""Batches of random numbers and one step on them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from robustfast import functional


def make_batch(size, dtype, device, seed=0):
    """(input, input_noise, target, weight, bias, centroids, seen) for (N, D, K)."""
    n, dim, num_classes = size
    generator = torch.Generator(device).manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator, device=device)  # noqa: E731
    f = normal(n, dim)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    arrays = (f, f + 0.3 * normal(n, dim), normal(num_classes, dim), normal(num_classes))
    f, g, weight, bias = (array.to(dtype).requires_grad_() for array in arrays)
    target = torch.randint(num_classes, (n,), generator=generator, device=device)
    return f, g, target, weight, bias, normal(num_classes, dim).to(wide), normal(num_classes) > 0


def fresh(batch, device=None):
    """Copies of a batch's tensors, so that a step moves no state but its own."""
    return [t.detach().clone().to(device or t.device).requires_grad_(t.requires_grad) for t in batch]


def in_float64(batch):
    return [t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in batch]


def loss_of(backend: str) -> Callable:
    return lambda *batch: functional.discriminative_loss(*batch, backend=backend).loss


def forward_backward(loss: Callable, batch) -> tuple[torch.Tensor, ...]:
    f, g, _, weight, bias, *_ = batch
    value = loss(*batch)
    return value.detach(), *torch.autograd.grad(value, (f, g, weight, bias))


def same_bits(results, others) -> bool:
    return all(torch.equal(a, b.to(a.device)) for a, b in zip(results, others, strict=True))


def relative_error(actual, expected) -> float:
    """Largest over the results of max |actual - expected| / max |expected|; inf where something is not finite."""
    worst = 0.0
    for a, e in zip(actual, expected, strict=True):
        error = ((a.double() - e.double()).abs().max() / e.double().abs().max().clamp(min=1e-30)).item()
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst
