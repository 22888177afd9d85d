"""Optional dependencies: a missing one says which extra of the package brings it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needed(extra: str = "train") -> Iterator[None]:
    """Imports of optional packages stand under this; a missing one is a ModuleNotFoundError that says what to do."""
    try:
        yield
    except ModuleNotFoundError as error:
        module = str(error.name).partition(".")[0]
        package = {"sklearn": "scikit-learn", "PIL": "pillow"}.get(module, module)
        hint = f"{package} is not installed; install it with: pip install '.[{extra}]'"
        raise ModuleNotFoundError(hint, name=error.name) from error
