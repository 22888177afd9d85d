"""Images of any size in folders, streamed from the disk: none is held longer than its batch."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from robustfast.evaluation.models import positive
from robustfast.extras import needed

ENDINGS = (".png", ".jpg", ".jpeg")


class ImageFolder:
    """PNG and JPEG files ``DIR/CLASS/*``, as RGB of one size; a dataset for torch.utils.data.DataLoader too.

    Each image is scaled so that its shorter side is ``resize``, bilinear with antialiasing, and its middle is cut out.
    Classes are the folders in alphabetical order; ids count the files in the order of their classes and names.

    Args:
        path: the folder.
        size: height and width of the results.
        resize: length of the shorter side before the cut, 8/7 of ``size`` by default, as in 256 and 224.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it has no images or fewer than 2 classes; or, when it is read, a file is broken.
    """

    def __init__(self, path: Path, size: int, resize: int | None = None) -> None:
        positive("size", size)
        self.size, self.resize = size, resize or round(size * 8 / 7)
        if self.resize < size:
            raise ValueError(f"resize: expected at least size ({size}), got {resize}")
        if not path.is_dir():
            raise FileNotFoundError(f"{path}: no such folder")
        self.classes = tuple(sorted(entry.name for entry in path.iterdir() if entry.is_dir()))
        if len(self.classes) < 2:
            raise ValueError(f"{path}: expected a folder for each of at least 2 classes, got {len(self.classes)}")
        self.files = [
            (file, label)
            for label, name in enumerate(self.classes)
            for file in sorted((path / name).iterdir())
            if file.suffix.lower() in ENDINGS
        ]
        if not self.files:
            raise ValueError(f"{path}: expected images CLASS/*.png or *.jpg, found none")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        """(pixels uint8 (3, size, size), label, id)."""
        file, label = self.files[index]
        return self._read(file), label, index

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Batches (pixels, labels, ids) in the order of the ids."""
        for first in range(0, len(self), batch_size):
            pixels, labels, ids = zip(*(self[i] for i in range(first, min(first + batch_size, len(self)))), strict=True)
            yield torch.stack(pixels), torch.tensor(labels), torch.tensor(ids)

    def _read(self, file: Path) -> Tensor:
        with needed("evaluate"):
            from PIL import Image
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(file, formats=["PNG", "JPEG"]) as opened:
                    image = opened.convert("RGB")
        except Exception as error:  # Pillow has OSError, SyntaxError, ValueError and more for a broken file
            raise ValueError(f"{file}: not an image that can be read: {error}") from error
        scale = self.resize / min(image.size)
        width, height = (max(self.size, round(side * scale)) for side in image.size)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        image = image.crop((left, top, left + self.size, top + self.size))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
