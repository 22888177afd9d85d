"""Optional dependencies: a missing one says which extra of the package brings it."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def needed(extra: str = "train") -> Iterator[None]:
    """Imports of optional packages stand under this; a missing one is a ModuleNotFoundError that says what to do."""
    try:
        yield
    except ModuleNotFoundError as error:
        module = str(error.name).partition(".")[0]
        package = {"sklearn": "scikit-learn", "PIL": "pillow"}.get(module, module)
        what = package if extra == package else f"'.[{extra}]'"
        hint = f"{package} is not installed; install it with: pip install {what}"
        raise ModuleNotFoundError(hint, name=error.name) from error


def imported(name: str) -> Any:
    """What ``package.module:name`` names, where the working directory counts as a place of modules."""
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return getattr(importlib.import_module(module), attribute)
