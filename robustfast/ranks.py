"""The processes that torchrun starts: which of them this one is, and the little that they do together.

Without a process group there is one rank, and everything here works.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Result = TypeVar("Result")
LOST = ("gloo/transport", "Application timeout")  # in what gloo says of a rank that has gone


@contextmanager
def joined(timeout: float = 600.0) -> Iterator[None]:
    """The process group of torchrun, where this is one of its ranks: gloo, and NCCL for tensors on GPUs.

    Each rank has the GPU of its LOCAL_RANK.

    Args:
        timeout: seconds after which a rank that waits for another one gives up.

    Raises:
        ConnectionError: the ranks cannot meet, or another one has gone.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(seconds=timeout))
    except dist.DistError as error:
        place = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
        reason = str(error).partition("\n")[0]
        raise ConnectionError(f"MASTER_ADDR:MASTER_PORT: the ranks cannot meet at {place} ({reason})") from error
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or any(name in str(error) for name in LOST)):
            raise
        reason = str(error).partition("\n")[0]
        raise ConnectionError(
            f"another rank has ended, or has not answered for {timeout:g} s: what it said comes first ({reason})"
        ) from error
    finally:
        dist.destroy_process_group()


def count(group: Any = None) -> int:
    """How many ranks there are, in all or in a group."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def rank(group: Any = None) -> int:
    """This one's number; rank 0 writes and prints."""
    return dist.get_rank(group) if count(group) > 1 else 0


def share(items: Tensor) -> Tensor:
    """This rank's part of the rows of ``items``; the ranks' parts differ by one row at most."""
    return items.tensor_split(count())[rank()]


def first(function: Callable[[], Result], group: Any = None) -> Result:
    """What ``function()`` returns or raises on rank 0, on every rank; it is called there alone."""
    if count(group) == 1:
        return function()
    outcome: list = [None, None]
    if rank(group) == 0:
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, group=group, group_src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def add(tensor: Tensor) -> Tensor:
    """``tensor``, to which that of every other rank is added in place."""
    if count() > 1:
        dist.all_reduce(tensor)
    return tensor


def as_on_first(module: torch.nn.Module) -> None:
    """Give the module's buffers the values of rank 0's: BatchNorm's statistics are each rank's own."""
    if count() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)
