"""What checks do with batches and results."""

from __future__ import annotations

import math

import torch


def fresh(batch, device=None):
    """Copies of a batch's tensors, so that a step moves no state but its own."""
    return [t.detach().clone().to(device or t.device).requires_grad_(t.requires_grad) for t in batch]


def in_float64(batch):
    return [t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in batch]


def same_bits(results, others) -> bool:
    return all(torch.equal(a, b.to(a.device)) for a, b in zip(results, others, strict=True))


def relative_error(actual, expected) -> float:
    """Largest over the results of max |actual - expected| / max |expected|; inf where something is not finite."""
    worst = 0.0
    for a, e in zip(actual, expected, strict=True):
        error = ((a.double() - e.double()).abs().max() / e.double().abs().max().clamp(min=1e-30)).item()
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst
