"""Random numbers as functions of (seed, purpose, epoch): no generator runs through training, so none needs saving."""

from __future__ import annotations

import hashlib

import torch


def stream(seed: int, *purpose: object) -> int:
    """A seed in 0..2**63-1 for one purpose, such as ("order", epoch), of the run with this seed."""
    digest = hashlib.blake2b(repr((seed, *purpose)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, *purpose: object) -> torch.Generator:
    """A CPU generator at the start of that stream."""
    return torch.Generator().manual_seed(stream(seed, *purpose))
