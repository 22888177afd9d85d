"""Shapes and dtypes of the ops' results, for torch.compile and opcheck: one set for every backend's library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from robustfast.checks import state_dtype


def discriminative_loss(input, input_noise, target, weight, bias, centroids, seen, *settings):
    n, dim = input.shape
    rows = torch.sym_min(n, weight.shape[0])
    wide = state_dtype(input)
    return (
        input.new_empty((), dtype=wide),  # loss
        input.new_empty(5, dtype=wide),  # variance, margin, regularization, compactness, alignment
        input.new_empty(n, dtype=torch.int32),  # slot
        input.new_empty((2, n), dtype=wide),  # pull
        input.new_empty((3, rows, dim), dtype=wide),  # tables
        input.new_empty((2, rows), dtype=torch.int32),  # classes
        input.new_empty(rows, dtype=wide),  # boundary_bias
    )


def discriminative_loss_backward(
    grad_loss, input, input_noise, weight, bias, slot, pull, tables, classes, boundary_bias, norm, wanted
):
    like = (input, input_noise, weight, bias)
    return tuple(t.new_empty(t.shape) if want else input.new_empty(0) for t, want in zip(like, wanted, strict=True))


def noise(input, *settings):
    return torch.empty_like(input)


def noise_backward(grad, input, *settings):
    return torch.empty_like(input)


def noisy_pair(images, std, mean, pixel_std, seed, sample_ids, draw, low, high, dtype):
    return torch.empty_like(images, dtype=dtype), torch.empty_like(images, dtype=dtype)


def noisy_pair_backward(grad_clean, grad_noisy, images, *settings):
    return torch.empty_like(images)


def philox_words(seed, sample_id, draw, quads):
    return seed.new_empty((quads, 4))


FAKES: dict[str, Callable[..., Any]] = {
    "discriminative_loss": discriminative_loss,
    "discriminative_loss_backward": discriminative_loss_backward,
    "gaussian_noise": noise,
    "gaussian_noise_backward": noise_backward,
    "uniform_noise": noise,
    "uniform_noise_backward": noise_backward,
    "noisy_pair": noisy_pair,
    "noisy_pair_backward": noisy_pair_backward,
    "philox_words": philox_words,
}


def register(library: str) -> None:
    for name, fake in FAKES.items():
        torch.library.register_fake(f"{library}::{name}", fake)
