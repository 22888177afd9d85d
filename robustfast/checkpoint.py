"""Checkpoints of sharded models that load on another number of ranks, or are refused as a whole.

torch.distributed.checkpoint writes and reshards. A checkpoint is written beside its place and then renamed, with a
checksum of each file, which are all compared before anything is loaded.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from robustfast import collectives, disk, ranks
from robustfast.sharded import ShardedDiscriminativeLoss

CHECKSUMS = "checksums.json"


def save_checkpoint(state: dict[str, Any], folder: str | os.PathLike[str], process_group: Any = None) -> None:
    """Write ``state`` as a checkpoint of torch.distributed.checkpoint; every rank calls this.

    Args:
        state: nested dicts of tensors, DTensors and what can be pickled, as ``state_dict()`` of models and
            :func:`optimizer_state` give them. Plain tensors are taken to be the same on all ranks.
        folder: on a file system that all ranks share. One that is there is replaced once the new one is complete.
        process_group: a torch.distributed group; all ranks where None.

    Raises:
        OSError: the files cannot be written; then a checkpoint that was there still is.
    """
    from torch.distributed.checkpoint import FileSystemWriter, save

    folder, group = Path(folder), _group(process_group)
    part = folder.with_name(folder.name + ".part")
    ranks.first(lambda: _begin(part), group)
    save(state, storage_writer=FileSystemWriter(part), process_group=group, no_dist=group is None)
    checksums = _agree(_checksums(part, group), group)
    ranks.first(lambda: _complete(part, folder, checksums), group)


def _begin(part: Path) -> None:
    shutil.rmtree(part, ignore_errors=True)  # of a run that was interrupted
    disk.make_folder(part)


def _complete(part: Path, folder: Path, checksums: list[dict[str, str]]) -> None:
    disk.write_json(part / CHECKSUMS, {name: value for some in checksums for name, value in some.items()})
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(part, folder)
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(state: dict[str, Any], folder: str | os.PathLike[str], process_group: Any = None) -> None:
    """Fill the tensors of ``state`` in place from a checkpoint, whatever ranks and shards it was written by.

    Tensors of ``model.state_dict()`` are the model's own. Every rank calls this.

    Args:
        state: as for :func:`save_checkpoint`, with the names and global shapes of the checkpoint, or some of them.
        folder: where :func:`save_checkpoint` wrote.
        process_group: a torch.distributed group; all ranks where None.

    Raises:
        ValueError: on every rank, and no tensor has changed: a file was cut short, edited or is missing, or a name is
            not in the checkpoint or has another shape there.
    """
    from torch.distributed.checkpoint import CheckpointException, FileSystemReader, load

    folder, group = Path(folder), _group(process_group)
    try:
        expected, found, problem = disk.read_json(folder / CHECKSUMS), _checksums(folder, group), None
    except (OSError, ValueError) as error:
        expected, found, problem = {}, {}, error
    everything = _agree((found, problem), group)
    for _, problem in everything:
        if problem is not None:
            raise ValueError(f"{folder}: expected a checkpoint of save_checkpoint: {problem}") from problem
    actual = {name: value for some, _ in everything for name, value in some.items()}
    wrong = sorted(name for name in expected if actual.get(name) != expected[name])
    if wrong:
        raise ValueError(f"{folder}: not as it was written, cut short, edited or missing: {', '.join(wrong)}")
    try:
        load(state, storage_reader=FileSystemReader(folder), process_group=group, no_dist=group is None)
    except CheckpointException as error:  # which is no Exception
        first, _ = next(iter(error.failures.values()))
        raise ValueError(f"{folder}: {first}") from error


def optimizer_state(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """The optimizer's state by parameters' names, as torch.distributed.checkpoint's, for :func:`save_checkpoint`.

    What an optimizer keeps for a parameter of a ShardedDiscriminativeLoss is sharded like that parameter.
    """
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    state: dict[str, Any] = dict(get_optimizer_state_dict(model, optimizer))
    sharded = _sharded_parameters(model)

    def shard(name: str, value: Any) -> Any:
        head, shape = sharded.get(name, (None, None))
        return head.as_shard(value) if head is not None and getattr(value, "shape", None) == shape else value

    of_parameters = {
        name: {key: shard(name, value) for key, value in kept.items()} for name, kept in state["state"].items()
    }
    return state | {"state": of_parameters}


def set_optimizer_state(model: nn.Module, optimizer: Any, state: dict[str, Any]) -> None:
    """Give the optimizer the state that :func:`load_checkpoint` has filled, of :func:`optimizer_state`."""
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    sharded = _sharded_parameters(model)

    def local(name: str, value: Any) -> Any:
        return value.to_local() if name in sharded and hasattr(value, "to_local") else value

    of_parameters = {
        name: {key: local(name, value) for key, value in kept.items()} for name, kept in state["state"].items()
    }
    set_optimizer_state_dict(model, optimizer, state | {"state": of_parameters})


def _sharded_parameters(model: nn.Module) -> dict[str, tuple[ShardedDiscriminativeLoss, torch.Size]]:
    """Those of the sharded losses in the model, by the names that torch.distributed.checkpoint has for them."""
    return {
        prefix + name: (head, parameter.shape)
        for prefix, head in _unwrapped(model)
        if isinstance(head, ShardedDiscriminativeLoss)
        for name, parameter in head.named_parameters()
    }


def _unwrapped(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules and their prefixes, without the names that DistributedDataParallel and torch.compile add."""
    yield prefix, module
    adds_name = isinstance(module, DistributedDataParallel) or hasattr(module, "_orig_mod")
    for name, child in module.named_children():
        yield from _unwrapped(child, prefix if adds_name else f"{prefix}{name}.")


def _group(process_group: Any) -> Any:
    if process_group is None and dist.is_available() and dist.is_initialized():
        return dist.group.WORLD
    return process_group


def _checksums(folder: Path, group: Any) -> dict[str, str]:
    """Of this rank's share of the files."""
    files = sorted(path for path in folder.iterdir() if path.name != CHECKSUMS)
    return {path.name: _sha256(path) for path in files[collectives.rank(group) :: collectives.size(group)]}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _agree(mine: Any, group: Any) -> list[Any]:
    """What every rank has to say, once all of them have."""
    found = [mine] * collectives.size(group)
    if group is not None:
        dist.all_gather_object(found, mine, group=group)
    return found
