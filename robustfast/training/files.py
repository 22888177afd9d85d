"""Files of a run, each written beside its place and then renamed: an interruption never leaves half a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustfast.disk import replace
from robustfast.extras import needed

with needed():
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

FORMAT = 1
STATE = "state.pt"
MODEL = "model.safetensors"
RESULTS = "results.json"


def save_checkpoint(run: Path, epoch: int, tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
    """Write the state after ``epoch`` epochs: ``tensors`` as safetensors, ``rest`` for torch.load(weights_only=True).

    state.pt is the commit: it is written last and names the epoch whose tensors belong to it.
    """
    current = _tensor_file(run, epoch)
    replace(current, lambda part: save_file(tensors, part))
    replace(run / STATE, lambda part: torch.save({"format": FORMAT, "epoch": epoch, **rest}, part))
    for old in run.glob("tensors-*.safetensors"):
        if old != current:
            old.unlink()


def load_state(run: Path) -> dict[str, Any]:
    """``rest`` of the last checkpoint that was written whole, and its ``epoch``.

    Raises:
        FileNotFoundError: there is none.
        ValueError: another version of the package wrote it.
    """
    state = torch.load(run / STATE, weights_only=True, map_location="cpu")
    if state["format"] != FORMAT:
        raise ValueError(f"{run / STATE}: expected format {FORMAT}, got {state['format']}")
    return state


def load_tensors(run: Path, epoch: int) -> dict[str, Tensor]:
    """``tensors`` of the checkpoint after that epoch."""
    return load_file(_tensor_file(run, epoch))


def _tensor_file(run: Path, epoch: int) -> Path:
    return run / f"tensors-{epoch:05d}.safetensors"


def save_model(path: Path, weights: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Weights, with what is needed to use them as JSON in the file's header."""
    replace(path, lambda part: save_file(weights, part, metadata={"robustfast": json.dumps(about)}))


def load_model(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(weights, about) of :func:`save_model`.

    Raises:
        ValueError: the file has no header of ours.
    """
    with safe_open(path, framework="pt") as file:
        about = (file.metadata() or {}).get("robustfast")
    if about is None:
        raise ValueError(f"{path}: not a model that robustfast saved")
    return load_file(path), json.loads(about)
