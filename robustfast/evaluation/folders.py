"""Images of any size in folders, streamed from the disk: none is held longer than its batch."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustfast.evaluation.models import positive
from robustfast.extras import needed

FORMATS = {"PNG": (".png",), "JPEG": (".jpg", ".jpeg")}
ENDINGS = tuple(ending for endings in FORMATS.values() for ending in endings)


class ImageFolder:
    """PNG and JPEG files ``DIR/CLASS/*``, as RGB of one size; a dataset for torch.utils.data.DataLoader too.

    Each image is scaled so that its shorter side is ``resize``, bilinear with antialiasing, and its middle is cut out.
    Classes are the folders in alphabetical order; ids count the files in the order of their classes and names. What is
    hidden, with a dot before its name, is passed over; other files are left out with a warning.

    Args:
        path: the folder.
        size: height and width of the results.
        resize: length of the shorter side before the cut, 8/7 of ``size`` by default, as in 256 and 224.
        classes: the classes' names, where they are another folder's; those without files here are missing.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it has no images, fewer than 2 classes or others than ``classes``; or, when it is read, a file is
            broken.
    """

    def __init__(self, path: Path, size: int, resize: int | None = None, classes: Sequence[str] | None = None) -> None:
        positive(size=size)
        self.path, self.size, self.resize = path, size, resize or round(size * 8 / 7)
        if self.resize < size:
            raise ValueError(f"resize: expected at least size ({size}), got {resize}")
        if not path.is_dir():
            raise FileNotFoundError(f"{path}: no such folder")
        found = class_names(path)
        self.classes = tuple(classes or found)
        if len(self.classes) < 2:
            raise ValueError(f"{path}: expected a folder for each of at least 2 classes, got {len(self.classes)}")
        if unknown := sorted(set(found) - set(self.classes)):
            raise ValueError(f"{path}: classes that train does not have: {', '.join(unknown)}")
        files = [image_files(path / name) if name in found else [] for name in self.classes]
        # Arrays, not lists: worker processes then share them with this one, however many millions there are.
        places = zip(self.classes, files, strict=True)
        self.names = np.array([os.fsencode(f"{name}/{file}") for name, of_class in places for file in of_class])
        self.labels = np.repeat(np.arange(len(files)), [len(of_class) for of_class in files])
        if not len(self.names):
            raise ValueError(f"{path}: expected images CLASS/*.png or *.jpg, found none")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        """(pixels uint8 (3, size, size), label, id)."""
        return self.middle(self.picture(index)), int(self.labels[index]), index

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Batches (pixels, labels, ids) in the order of the ids."""
        for first in range(0, len(self), batch_size):
            pixels, labels, ids = zip(*(self[i] for i in range(first, min(first + batch_size, len(self)))), strict=True)
            yield torch.stack(pixels), torch.tensor(labels), torch.tensor(ids)

    def picture(self, index: int) -> Any:
        """The image of that id as Pillow's, RGB of its own size."""
        with opened(self.path / os.fsdecode(self.names[index])) as image:
            if image.mode[0] in "IF":  # which Pillow would cut off at 255
                raise ValueError(f"expected 8 bits per channel, got Pillow's mode {image.mode}")
            return image.convert("RGB")

    def middle(self, picture: Any) -> Tensor:
        """The middle of a picture, uint8 (3, size, size)."""
        scale = self.resize / min(picture.size)
        width, height = (max(self.size, round(side * scale)) for side in picture.size)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        picture = picture.resize((width, height), resample=BILINEAR)
        return as_tensor(picture.crop((left, top, left + self.size, top + self.size)))


BILINEAR = 2  # Pillow's Image.Resampling.BILINEAR, which antialiases


def as_tensor(picture: Any) -> Tensor:
    """uint8 (C, H, W) of Pillow's image, H, W."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """Pillow's image of a PNG or JPEG file; whatever is wrong with it is a ValueError naming it."""
    with needed("evaluate"):
        from PIL import Image
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=list(FORMATS)) as image:
                yield image
    except Exception as error:  # Pillow has OSError, SyntaxError, ValueError and more for a broken file
        raise ValueError(f"{file}: not an image that can be read: {error}") from error


def class_names(path: Path) -> list[str]:
    """The folders there, but for hidden ones: notebooks and file managers leave such beside the classes."""
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith("."))


def image_files(path: Path) -> list[str]:
    """Names of the PNG and JPEG files of a class, but for hidden ones; a warning of others."""
    names = sorted(entry.name for entry in os.scandir(path) if not entry.name.startswith("."))
    found = [name for name in names if name.lower().endswith(ENDINGS)]
    if len(found) < len(names):
        left_out = some([name for name in names if not name.lower().endswith(ENDINGS)])
        warnings.warn(f"{path}: {left_out} left out: not named *.png or *.jpg", stacklevel=2)
    return found


def some(names: Sequence[str]) -> str:
    """The names, the first few of many."""
    rest = f" and {len(names) - 3} more" if len(names) > 4 else ""
    return ", ".join(names[:3] if rest else names) + rest
