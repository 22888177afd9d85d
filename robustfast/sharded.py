"""The loss and its classifier for more classes than one device holds: each rank has a block of the classes.

All ranks' features are gathered, so that every rank knows the classes of the global batch as rows of small tables. What
the tables need of W, b and the state is fetched from the ranks that have it; each rank searches the winners among its
own classes, the best of all ranks' are fetched, and from there on all ranks compute the same loss. A rank keeps the
gradients of its own samples and of its own classes, and writes its own part of the state: backward needs no collective.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from robustfast import checks, collectives, distributed, functional, reference, steps
from robustfast.autograd import once_differentiable
from robustfast.backends import resolve
from robustfast.checks import wide_dtype
from robustfast.cross_entropy import cross_entropy, linear_cross_entropy
from robustfast.reference import Settings, Terms
from robustfast.shards import Block, best_of_ranks, fetch, gather_batch


class ShardedLossFunction(torch.autograd.Function):
    """(loss, terms), as DiscriminativeLossFunction, of the batches of all ranks and the blocks of all ranks."""

    @staticmethod
    def forward(
        ctx, backend, input, input_noise, target, weight, bias, centroids, seen, block, settings, scheduled, norm,
        update_state, ignore_index, max_batch,
    ):  # fmt: skip
        step = steps.of(backend)
        with torch.autocast(input.device.type, enabled=False):
            batch = gather_batch(input, input_noise, target, block.group, ignore_index, max_batch)
            checks.labels(batch.target, block.num_classes, ignore_index)
            groups = reference.group(batch.target, block.num_classes, ignore_index)
            rows, wide = len(groups.classes), wide_dtype(input)
            label = groups.slot.masked_fill(groups.slot == rows, -1)
            counts = groups.counts.to(wide)
            s = steps.as_settings(settings, scheduled)

            biases = () if bias is None else (bias,)
            weight_c, previous, known, *bias_c = fetch(block, groups.classes, (weight, centroids, seen, *biases), wide)
            mu = step.class_sums(batch.input, label, rows, -1)[:, :-1] / counts.clamp(min=1).unsqueeze(1)
            tau = torch.where(known > 0, 1 - s.momentum, 1)
            centroid = torch.where(known.unsqueeze(1) > 0, tau.unsqueeze(1) * mu + s.momentum * previous, mu)
            if update_state:
                write_block(block, groups, centroid, centroids, seen)

            sample_share = groups.taken / (groups.present * counts.clamp(min=1))
            slot, pull, pull_sum, (compactness, alignment) = step.class_pulls(
                batch.input, batch.input_noise, label, centroid, sample_share, settings, scheduled, norm, -1
            )
            winner = winners(step, block, mu, weight_c, bias_c, weight, bias)
            weight_w, *bias_w = fetch(block, winner, (weight, *biases), wide)
            mu_grad, boundary_grad, boundary_bias, winner, (margin, regularization) = step.finish(
                mu, centroid, pull_sum, counts, tau, weight_c, *(bias_c or [None]), weight_w, *(bias_w or [None]),
                winner, settings, scheduled, norm,
            )  # fmt: skip
            variance = compactness if input_noise is None else (compactness + alignment) / 2
            loss = s.alpha * variance + s.beta * margin + s.gamma * regularization
        ...
