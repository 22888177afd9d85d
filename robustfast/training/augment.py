"""Random crops and mirrored images on whole batches of tensors, one placement per sample and epoch."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Placements(NamedTuple):
    """For each of N images the corner of its crop in the padded image, int64 (N,), and whether it is mirrored, bool."""

    top: Tensor
    left: Tensor
    mirrored: Tensor

    def take(self, index: Tensor) -> Placements:
        return Placements(self.top[index], self.left[index], self.mirrored[index])

    def to(self, device: torch.device) -> Placements:
        return Placements(*(part.to(device) for part in self))


def draw_placements(count: int, padding: int, flip: bool, generator: torch.Generator) -> Placements:
    """Corners uniform on 0..2 padding, mirrored with probability 1/2 if ``flip`` holds."""
    top, left = torch.randint(2 * padding + 1, (2, count), generator=generator)
    mirrored = torch.randint(2, (count,), generator=generator).bool() & flip
    return Placements(top, left, mirrored)


def place(images: Tensor, placements: Placements, padding: int) -> Tensor:
    """Pad (N, C, H, W) with zeros, crop each image to its old size at its corner, then mirror it left to right."""
    n, channels, height, width = images.shape
    device = images.device
    top, left, mirrored = (part.unsqueeze(1) for part in placements)
    column = torch.arange(width, device=device)
    rows = top + torch.arange(height, device=device)
    columns = left + torch.where(mirrored, width - 1 - column, column)
    sample = torch.arange(n, device=device).view(-1, 1, 1, 1)
    channel = torch.arange(channels, device=device).view(1, -1, 1, 1)
    padded = F.pad(images, (padding,) * 4)
    return padded[sample, channel, rows.view(n, 1, height, 1), columns.view(n, 1, 1, width)]
