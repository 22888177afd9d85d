"""Files written beside their place and then renamed: an interruption never leaves half a file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a file beside ``path``, bring it to the disk, then put it in place in one step."""
    part = path.with_name(path.name + ".part")
    write(part)
    with open(part, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, path)


def write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    replace(path, lambda part: part.write_text(text))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())
