"""Finds the compiled extension robustfast._C; where there is none, says why.

Imports nothing but the standard library: setup.py runs this file by itself.
"""

from __future__ import annotations

import hashlib
import json
import sys
from functools import cache
from importlib import import_module, metadata
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RECORD = "_build.json"  # setup.py writes it beside the extension: what was missing, and the digest of csrc
BUILD = "pip install --no-build-isolation ."


def digest(csrc: Path) -> str:
    """Of all sources of the extension, to know whether it was built from them."""
    found = hashlib.sha256()
    for path in sorted(path for path in csrc.rglob("*") if path.is_file()):
        found.update(f"{path.relative_to(csrc).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return found.hexdigest()


@cache
def problem() -> str | None:
    """Imports robustfast._C: None, or why that cannot be and what to do."""
    if PathFinder.find_spec("robustfast._C", [str(HERE)]) is None:
        reason = _adopt_installed()
        if reason is not None:
            return f"{reason}: {BUILD}"
    try:
        import_module("robustfast._C")
    except ImportError as error:
        return f"robustfast._C cannot be loaded ({error}); build it again: {BUILD}"
    return None


def without_cuda() -> str:
    """Why the extension, which is there, has no CUDA kernels, and what to do."""
    folder = Path(str(import_module("robustfast._C").__file__)).parent
    reason = _record(folder)["missing"]["cuda"] if (folder / RECORD).exists() else None
    because = f" ({reason})" if reason else ""
    return f"the extension was built without CUDA{because}; build it again with ROBUSTFAST_BUILD_CUDA=1"


def _adopt_installed() -> str | None:
    """In a clone where nothing is built, takes the extension of the robustfast that is installed; else says why not."""
    installed = _installed()
    built = HERE if (HERE / RECORD).exists() else installed
    if built is None:
        return f"robustfast._C is not built in {HERE}; build it"
    record = _record(built)
    if record["missing"]["cpu"] is not None:
        return f"robustfast._C was not built, since {record['missing']['cpu']}; then build it again"
    if built == HERE:
        return f"robustfast._C is gone from {HERE}; build it again"
    if record["sources"] != digest(HERE.parent / "csrc"):
        return f"{built} was built from other sources than those beside {HERE}; build it again"
    sys.modules["robustfast"].__path__.append(str(built))
    return None


def _record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / RECORD).read_text())


def _installed() -> Path | None:
    """The folder of an installed robustfast that this one is imported in place of."""
    folders = [Path(str(found.locate_file("robustfast"))) for found in metadata.distributions(name="robustfast")]
    elsewhere = find_spec("robustfast._C")  # of an editable installation
    if elsewhere is not None:
        folders.insert(0, Path(str(elsewhere.origin)).parent)
    return next((folder for folder in folders if (folder / RECORD).exists() and folder.resolve() != HERE), None)
