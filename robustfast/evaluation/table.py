"""A table of what happened to each image: columns of equal length in one .npz file, one row an image, ordered by id.

The same columns give the same bytes. numpy.load reads the file; its entry ``about`` holds JSON as bytes.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from robustfast import disk

Columns = dict[str, np.ndarray]
ABOUT = "about"
ID = "id"


def write(path: Path, columns: Columns, about: dict[str, Any]) -> None:
    """Put the table in place in one step."""
    entries = {ABOUT: np.frombuffer(json.dumps(about, sort_keys=True).encode(), dtype=np.uint8), **columns}
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for name in sorted(entries):
            array = io.BytesIO()
            np.lib.format.write_array(array, np.ascontiguousarray(entries[name]), allow_pickle=False)
            file.writestr(zipfile.ZipInfo(name + ".npy"), array.getvalue())  # dated 1980: no clock in the bytes
    disk.write(path, content.getvalue())


def read(path: Path) -> tuple[Columns, dict[str, Any]]:
    """(columns, about) of a table.

    Raises:
        OSError: there is no such file.
        ValueError: it is no table of ours, or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            columns = {name: file[name] for name in file.files}
        about = json.loads(columns.pop(ABOUT).tobytes())
        rows = len(columns[ID])
    except (zipfile.BadZipFile, ValueError, KeyError, EOFError, AttributeError) as error:
        raise ValueError(f"{path}: not a table of evaluated images, or damaged: {error}") from error
    if any(len(column) != rows for column in columns.values()):
        raise ValueError(f"{path}: columns of different lengths")
    return columns, about


def join(parts: Sequence[Columns]) -> Columns:
    """The rows of all parts, ordered by id.

    Raises:
        ValueError: an id is there twice, or the parts have different columns.
    """
    if any(part.keys() != parts[0].keys() for part in parts):
        raise ValueError("parts of the table have different columns")
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.argsort(columns[ID], kind="stable")
    ids = columns[ID][order]
    if (repeated := ids[1:][ids[1:] == ids[:-1]]).size:
        raise ValueError(f"image ids: expected each once, got {repeated[0]} twice")
    return {name: column[order] for name, column in columns.items()}
