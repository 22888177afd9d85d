"""The method in plain PyTorch: what every kernel is checked against and measured against.

Nothing here loops over classes or waits for the device, and everything can be differentiated twice. Arguments are
those of :mod:`robustfast.functional`, which also checks them. Equations: arXiv 2405.18499, as its code computes them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Settings(NamedTuple):
    """The numbers that a loss is made with, in the one order in which they go down to the kernels."""

    delta_var: float = 0.5
    delta_dist: float = 3.0
    alpha: float = 1.0
    beta: float = 1.0
    gamma: float = 0.001
    momentum: float = 0.99


class Terms(NamedTuple):
    """The loss and what it is made of, 0-d tensors in float32 (float64 for float64 features).

    Only ``loss`` carries gradient. ``loss = alpha * variance + beta * margin + gamma * regularization``.
    """

    loss: Tensor
    variance: Tensor
    margin: Tensor
    regularization: Tensor
    compactness: Tensor
    alignment: Tensor


def discriminative_loss(
    input: Tensor,
    input_noise: Tensor | None,
    target: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    centroids: Tensor,
    seen: Tensor,
    *,
    norm: int = 2,
    update_state: bool = True,
    ignore_index: int = -100,
    **settings: float,
) -> Terms:
    """See :func:`robustfast.functional.discriminative_loss`; ``settings`` are those of :class:`Settings`."""
    s = Settings(**settings)
    with torch.autocast(input.device.type, enabled=False):
        dtype = centroids.dtype
        features, weight = input.to(dtype), weight.to(dtype)
        noisy = None if input_noise is None else input_noise.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        rows = group(target, weight.shape[0], ignore_index)
        mu, momentum_mu = class_centroids(features, rows, centroids, seen, s.momentum)
        variance_, compactness, alignment = variance(features, noisy, momentum_mu, rows, s.delta_var, norm)
        margin_ = margin(mu, weight, bias, rows, s.delta_dist)
        regularization_ = regularization(momentum_mu, rows, norm)
        loss = s.alpha * variance_ + s.beta * margin_ + s.gamma * regularization_
        if update_state and torch.is_grad_enabled():
            write_state(momentum_mu.detach(), rows, centroids, seen)
    return Terms(loss, *(term.detach() for term in (variance_, margin_, regularization_, compactness, alignment)))


class Rows(NamedTuple):
    """The classes of a batch as the rows of a table: R = min(N, K) rows, those of absent classes without samples."""

    slot: Tensor  # (N,) int64, the row of each sample; R for an ignored one
    classes: Tensor  # (R,) int64, the class of each row; any class where the row has no samples
    samples: Tensor  # (R,) int64, n_c
    present: Tensor  # (R,) bool, n_c > 0
    num_present: Tensor  # () int64, P, but 1 where P = 0

    def mean(self, per_row: Tensor) -> Tensor:
        """(1/P) sum over the classes present."""
        return per_row.masked_fill(~self.present, 0).sum() / self.num_present


def group(target: Tensor, num_classes: int, ignore_index: int) -> Rows:
    """Give each class in the batch a row, so that no table is larger than the batch."""
    labels = torch.where(target == ignore_index, num_classes, target.long())
    size = min(labels.numel(), num_classes)
    if size == num_classes:
        slot, classes = labels, torch.arange(num_classes, device=labels.device)
    else:
        ordered, order = labels.sort(stable=True)
        first = torch.ones_like(ordered, dtype=torch.bool)
        first[1:] = ordered[1:] != ordered[:-1]
        rank = torch.where(ordered == num_classes, size, first.cumsum(0) - 1)
        slot = rank.scatter(0, order, rank)
        classes = rank.new_zeros(size + 1).scatter(0, rank, ordered)[:-1]
    samples = slot.new_zeros(size + 1).scatter_add(0, slot, torch.ones_like(slot))[:-1]
    present = samples > 0
    return Rows(slot, classes, samples, present, present.sum().clamp(min=1))


def class_centroids(
    features: Tensor, rows: Rows, centroids: Tensor, seen: Tensor, momentum: float
) -> tuple[Tensor, Tensor]:
    """mu_c = (1/n_c) sum of the class's features, and m_c = mu_c if c is new, else (1 - rho) mu_c + rho m_prev_c."""
    sums = features.new_zeros(rows.samples.numel() + 1, features.shape[1]).index_add(0, rows.slot, features)[:-1]
    mu = sums / rows.samples.clamp(min=1).unsqueeze(1)
    previous, known = read_state(centroids, rows.classes), read_state(seen, rows.classes)
    blended = (1 - momentum) * mu + momentum * previous
    return mu, torch.where(known.unsqueeze(1), blended, mu)


def read_state(table: Tensor, classes: Tensor) -> Tensor:
    """Rows of the state as they are now.

    Plain indexing would do in eager mode, but torch.compile would repeat it in the backward, where the state has moved
    on; a scatter it does not repeat.
    """
    return table.new_zeros((classes.numel(), *table.shape[1:])).index_copy(
        0, torch.arange(classes.numel(), device=classes.device), table[classes]
    )


def variance(
    features: Tensor, noisy: Tensor | None, centers: Tensor, rows: Rows, delta_var: float, norm: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Variance, and its parts: compactness of the clean features, alignment of the noisy ones, both about m_c."""
    compactness = squared_hinge(features, centers, rows, delta_var, norm)
    if noisy is None:
        return compactness, compactness, torch.zeros_like(compactness)
    alignment = squared_hinge(noisy, centers, rows, delta_var, norm)
    return (compactness + alignment) / 2, compactness, alignment


def squared_hinge(features: Tensor, centers: Tensor, rows: Rows, delta_var: float, norm: int) -> Tensor:
    """(1/P) sum_c (1/n_c) sum_{y_i=c} max(||f_i - m_c||_p - delta_v, 0)^2."""
    if centers.shape[0] == 0:
        return features.sum()
    counted = rows.slot < centers.shape[0]
    slot = torch.where(counted, rows.slot, 0)
    residual = (features - centers[slot]).masked_fill(~counted.unsqueeze(1), 0)
    hinge = torch.relu(p_norm(residual, norm) - delta_var)
    return (hinge.square() / rows.samples[slot].clamp(min=1) * counted).sum() / rows.num_present


def p_norm(r: Tensor, norm: int) -> Tensor:
    """||r||_p over the last dimension, p in {1, 2}, with derivative 0 (of every order) at r = 0."""
    if norm == 1:
        return r.abs().sum(-1)
    square = r.square().sum(-1)
    zero = square == 0
    return square.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)


def regularization(centers: Tensor, rows: Rows, norm: int) -> Tensor:
    """(1/P) sum_c ||m_c||_p."""
    return rows.mean(p_norm(centers, norm))


def margin(mu: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows, delta_dist: float) -> Tensor:
    """(1/P) sum_c max_{i != c} max(delta_d + ((W_i - W_c) . mu_c + b_i - b_c) / ||W_i - W_c||_2, 0).

    The winner i is found without gradient and its score computed again, so that backward touches two rows of W a class.
    """
    classes = rows.classes
    winner, has_boundary = nearest_boundary(mu, weight, bias, classes)
    normal = weight[winner] - weight[classes]
    distance = p_norm(normal, 2)
    has_boundary = has_boundary & (distance != 0)
    logit = (normal * mu).sum(1)
    if bias is not None:
        logit = logit + bias[winner] - bias[classes]
    score = logit / distance.masked_fill(~has_boundary, 1)
    return rows.mean(torch.relu(delta_dist + score).masked_fill(~has_boundary, 0))


@torch.no_grad()
def nearest_boundary(mu: Tensor, weight: Tensor, bias: Tensor | None, classes: Tensor) -> tuple[Tensor, Tensor]:
    """The class i whose boundary with c scores highest (lowest index on ties), and whether any W_i differs from W_c."""
    logits = mu @ weight.T
    if bias is not None:
        logits = logits + bias
    own = logits.gather(1, classes.unsqueeze(1))
    square = weight.square().sum(1)
    distance2 = square + square[classes].unsqueeze(1) - 2 * (weight[classes] @ weight.T)
    scores = (logits - own) / distance2.clamp(min=torch.finfo(mu.dtype).tiny).sqrt()
    keys = row_keys(weight)
    best, winner = scores.masked_fill(keys == keys[classes].unsqueeze(1), -math.inf).max(1)
    return winner, best != -math.inf


def row_keys(weight: Tensor) -> Tensor:
    """A 64-bit key of each row's bits: equal rows have equal keys, which their rounded distance cannot tell.

    A sum modulo 2^64 of the bits times odd numbers, so exact in any order; two different rows collide about once in
    2^60 pairs.
    """
    bits = (weight + 0.0).view(torch.int32 if weight.dtype == torch.float32 else torch.int64).long()
    column = torch.arange(1, weight.shape[1] + 1, device=weight.device)
    mixed = column * -7046029254386353131  # 0x9E3779B97F4A7C15, the golden ratio's multiplier
    return (bits * ((mixed ^ (mixed >> 29)) * -4658895280553007687 | 1)).sum(1)


@torch.no_grad()
def write_state(centers: Tensor, rows: Rows, centroids: Tensor, seen: Tensor) -> None:
    """centroids_c <- m_c and seen_c <- True for the classes of the batch, except where m_c is not finite."""
    # Rows without samples repeat the first row, so that no two rows write different values to one class.
    row = torch.arange(rows.classes.numel(), device=rows.classes.device) * rows.present
    write = (rows.present & centers.isfinite().all(1))[row]
    classes = rows.classes[row]
    centroids[classes] = torch.where(write.unsqueeze(1), centers[row], centroids[classes])
    seen[classes] = seen[classes] | write


def philox_words(seed: Tensor, sample_ids: Tensor, draw: int, quads: int) -> Tensor:
    """Philox4x32-10 words (N, quads, 4), int64, of key ``seed`` and counters (q, sample id, draw)."""
    mask = 0xFFFFFFFF
    c0 = torch.arange(quads, device=seed.device).expand(sample_ids.numel(), quads)
    c1, c2 = ((word & mask).unsqueeze(1).expand_as(c0) for word in (sample_ids, sample_ids >> 32))
    c3 = torch.full_like(c0, draw)
    k0, k1 = seed & mask, (seed >> 32) & mask
    for _ in range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # the low 64 bits are right although the sign is not
        c0, c2 = ((product1 >> 32) & mask) ^ c1 ^ k0, ((product0 >> 32) & mask) ^ c3 ^ k1
        c1, c3 = product1 & mask, product0 & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return torch.stack((c0, c1, c2, c3), -1)


def normals(words: Tensor) -> Tensor:
    """Box-Muller: four float32 normals from four words (..., 4)."""
    bits = words >> 8
    u, v = (bits[..., 0::2] + 1).float() * 2.0**-24, bits[..., 1::2].float() * 2.0**-24
    radius, angle = (-2 * u.log()).sqrt(), 2 * math.pi * v
    return torch.stack((radius * angle.cos(), radius * angle.sin()), -1).flatten(-2)


def uniforms(words: Tensor) -> Tensor:
    """Float32 uniforms on (-1, 1): 2 ((w >> 8) + 0.5) 2^-24 - 1, which float32 holds exactly."""
    return ((words >> 8) - 2**23 + 0.5).float() * 2.0**-23


def gaussian_noise(
    input: Tensor,
    std: float,
    *,
    seed: Tensor,
    sample_ids: Tensor | None = None,
    draw: int = 0,
    clip: tuple[float, float] | None = (0.0, 1.0),
) -> Tensor:
    """See :func:`robustfast.functional.gaussian_noise`."""
    return _add_noise(input, std, normals, seed, sample_ids, draw, clip)


def uniform_noise(
    input: Tensor,
    epsilon: float,
    *,
    seed: Tensor,
    sample_ids: Tensor | None = None,
    draw: int = 0,
    clip: tuple[float, float] | None = (0.0, 1.0),
) -> Tensor:
    """See :func:`robustfast.functional.uniform_noise`."""
    return _add_noise(input, epsilon, uniforms, seed, sample_ids, draw, clip)


def noisy_pair(
    images: Tensor,
    std: float,
    *,
    mean: Tensor,
    pixel_std: Tensor,
    seed: Tensor,
    sample_ids: Tensor | None = None,
    draw: int = 0,
    clip: tuple[float, float] | None = (0.0, 1.0),
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """See :func:`robustfast.functional.noisy_pair`."""
    wide = torch.promote_types(dtype, torch.float32)
    clean = images.to(wide) if images.is_floating_point() else images.to(wide) / 255
    noisy = gaussian_noise(clean, std, seed=seed, sample_ids=sample_ids, draw=draw, clip=clip)
    mean, pixel_std = (channel.to(wide).view(-1, 1, 1) for channel in (mean, pixel_std))
    clean, noisy = (((view - mean) / pixel_std).to(dtype) for view in (clean, noisy))
    return clean, noisy


def _add_noise(input, scale, distribution, seed, sample_ids, draw, clip):
    if sample_ids is None:
        sample_ids = torch.arange(input.shape[0], device=input.device)
    size = math.prod(input.shape[1:])
    noise = distribution(philox_words(seed, sample_ids, draw, -(-size // 4))).flatten(1)[:, :size].view(input.shape)
    noisy = input.to(torch.promote_types(input.dtype, torch.float32)) + scale * noise
    return (noisy if clip is None else noisy.clamp(*clip)).to(input.dtype)
