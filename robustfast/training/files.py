"""The files of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from robustfast.disk import write
from robustfast.extras import needed
from robustfast.training.checksum import checksum

with needed():
    import safetensors
    import safetensors.torch

FORMAT = 2
STATE = "state.safetensors"
MODEL = "model.safetensors"
RESULTS = "results.json"


def holds_run(folder: Path) -> bool:
    """Whether a file of a run lies there."""
    return any((folder / name).exists() for name in (STATE, MODEL, RESULTS))


def remove_run(folder: Path) -> None:
    """Delete the files of a run, its results first: what is left at any moment still belongs together."""
    for name in (RESULTS, MODEL, STATE):
        (folder / name).unlink(missing_ok=True)


def save(path: Path, kind: str, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Write tensors, and JSON about them, as a safetensors file with a checksum over both.

    Args:
        kind: "state" or "model": :func:`load` takes the one for nothing but itself.
    """
    text = json.dumps({"kind": kind, "format": FORMAT, **about}, allow_nan=False)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"robustfast": text, "checksum": _checksum(tensors, text)}
    write(path, safetensors.torch.save(tensors, metadata))


def load(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, about) of :func:`save`, on the CPU.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is cut short, changed, of another kind or of another version of the package; names the file.
    """
    content = path.read_bytes()
    try:
        tensors = safetensors.torch.load(content)
        metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        text, expected = metadata["robustfast"], metadata["checksum"]
        about = json.loads(text)
        written = {"kind": about["kind"], "format": about["format"]}
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a {kind} that robustfast saved, or cut short") from error
    if written != {"kind": kind, "format": FORMAT}:
        raise ValueError(f"{path}: expected a {kind} of format {FORMAT}, got {written['kind']} of {written['format']}")
    if _checksum(tensors, text) != expected:
        raise ValueError(f"{path}: damaged: its content does not fit its checksum")
    return tensors, about


def _checksum(tensors: dict[str, Tensor], text: str) -> str:
    return checksum((tensors[name] for name in sorted(tensors)), "\n".join((text, *sorted(tensors))))
