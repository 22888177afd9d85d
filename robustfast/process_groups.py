"""Whose batches count as one: what a module's ``process_group`` stands for."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from robustfast import ranks


def resolve(process_group: Any) -> Any:
    """The torch.distributed group that a module's ``process_group`` stands for now; None for this rank alone."""
    if process_group is None:
        if ranks.count() > 1 and not torch.compiler.is_compiling():
            _warn_of_ranks_apart()
        return None
    if process_group is False:
        return None
    if process_group is True or (isinstance(process_group, str) and process_group == "world"):
        return dist.group.WORLD if ranks.count() > 1 else None
    if isinstance(process_group, dist.device_mesh.DeviceMesh):
        if process_group.ndim != 1:
            dimensions = process_group.mesh_dim_names or process_group.ndim
            raise ValueError(f"process_group: expected a mesh of one dimension, as mesh['data'] is, got {dimensions}")
        process_group = process_group.get_group()
    if process_group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"process_group: expected a group of which this process, rank {dist.get_rank()}, is a member")
    if not isinstance(process_group, dist.ProcessGroup):
        expected = "'world' (or True), a group of torch.distributed, a DeviceMesh, None or False"
        raise TypeError(f"process_group: expected {expected}, got {process_group!r}")
    return process_group


def portable(process_group: Any) -> Any:
    """What another process can read of it: the group of all ranks by its name, no other group."""
    if process_group is None or isinstance(process_group, (bool, str)):
        return process_group
    if dist.is_initialized() and process_group is dist.group.WORLD:
        return "world"
    warnings.warn(
        "a process group does not leave its process: where this DiscriminativeLoss is loaded, set its process_group",
        stacklevel=3,
    )
    return None


@cache
def _warn_of_ranks_apart() -> None:
    warnings.warn(
        "DiscriminativeLoss trains in several ranks without a process_group: each rank's centroids are of its own"
        " batches and drift apart. process_group='world' makes the ranks' batches count as one; False says that this is"
        " meant",
        stacklevel=4,
    )


def training_group(module: Any) -> Any:
    """The group of ``module.process_group`` where the module trains; None in eval mode and under no_grad."""
    return resolve(module.process_group) if module.training and torch.is_grad_enabled() else None


def mean(values: Tensor, group: Any, counted: Tensor | None = None) -> Tensor:
    """This rank's share of the mean of ``values`` (N,) over the batches of a group, whatever their sizes.

    The mean of the shares over the ranks, and of their gradients, which DistributedDataParallel takes, is that mean.
    Without a group it is the plain mean.

    Args:
        counted: bool (N,): the samples that count; the values of others are 0.
    """
    if group is None:
        return values.mean()
    count = torch.tensor(len(values)) if counted is None else counted.sum()
    count = count.to(values.device, torch.float64)
    dist.all_reduce(count, group=group)
    return values.sum() * (dist.get_world_size(group) / count.clamp(min=1)).to(values.dtype)
