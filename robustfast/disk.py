"""Files written beside their place and then renamed: an interruption never leaves half a file."""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any


def check_folder(folder: Path) -> None:
    """OSError naming the folder unless files can be written there, or where it would have to be made."""
    try:
        nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        raise OSError(error.errno, f"cannot be written to: {error.strerror}", str(folder)) from error


def make_folder(folder: Path) -> None:
    """Make the folder where it is missing and see that files can be written there; OSError naming it if not."""
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)


def write(path: Path, content: bytes) -> None:
    """Put ``content`` in place in one step; OSError naming ``path`` if that fails, and then nothing is left behind."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    write(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in that file; ValueError naming the file if there is none."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON, or cut short: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(content).__name__}")
    return content
