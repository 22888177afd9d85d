"""Training images that stay on the disk: read, cut and mirrored by worker processes, batch by batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from robustfast.evaluation.folders import BILINEAR, ImageFolder, as_tensor
from robustfast.streams import generator
from robustfast.training.config import Config


class Files(NamedTuple):
    """Some of a folder's images: what :class:`robustfast.training.data.Images` is of images in memory."""

    folder: ImageFolder
    ids: Tensor  # (N,) of the folder
    labels: Tensor  # (N,), int64, on the device that images are read to
    workers: int

    @classmethod
    def all_of(cls, folder: ImageFolder, workers: int) -> Files:
        return cls(folder, torch.arange(len(folder)), torch.from_numpy(folder.labels), workers)

    @property
    def image(self) -> tuple[int, ...]:
        """(C, H, W)."""
        return (3, self.folder.size, self.folder.size)

    @property
    def block(self) -> int:
        """How many images are evaluated at a time."""
        return 256

    def take(self, index: Tensor) -> Files:
        return self._replace(ids=self.ids[index], labels=self.labels[index])

    def to(self, device: torch.device) -> Files:
        return self._replace(labels=self.labels.to(device))

    def hashed(self) -> tuple[Tensor, ...]:
        """What tells these images from others: their names, and where they lie by class."""
        names = self.folder.names[self.ids.numpy()]
        return torch.from_numpy(names.view(np.uint8)), self.labels

    def read(self, parts: Sequence[Tensor]) -> Iterator[Tensor]:
        """The pixels of each part, int64 positions: uint8 (n, 3, size, size), the middle of each image."""
        return (views[:, 0] for views in self._loaded(parts, partial(middle, self.folder), 1))

    def augmented(self, parts: Sequence[Tensor], config: Config, epoch: int) -> Iterator[list[Tensor]]:
        """The pixels of each part, as each of ``config.views`` has them in that epoch."""
        cut = partial(random_cuts, self.folder.size, config, epoch)
        return (list(views.unbind(1)) for views in self._loaded(parts, cut, len(config.views)))

    def _loaded(self, parts: Sequence[Tensor], cut: Callable[[Any, int], Tensor], views: int) -> Iterator[Tensor]:
        """For each part uint8 (n, views, 3, size, size) on the device."""
        device = self.labels.device
        loader = DataLoader(
            _Cuts(self.folder, cut),
            batch_sampler=[self.ids[part.cpu()].tolist() for part in parts],
            num_workers=self.workers,
            collate_fn=partial(_together, (views, *self.image)),
            pin_memory=device.type == "cuda",
        )
        for pixels in loader:
            if isinstance(pixels, Exception):
                raise pixels
            yield pixels.to(device, non_blocking=True)


class _Cuts(Dataset):
    """``cut(picture, id)`` of a folder's pictures; of one that cannot be read the error, to be raised by the reader."""

    def __init__(self, folder: ImageFolder, cut: Callable[[Any, int], Tensor]) -> None:
        self.folder, self.cut = folder, cut

    def __getitem__(self, index: int) -> Tensor | Exception:
        try:
            return self.cut(self.folder.picture(index), index)
        except (ValueError, ModuleNotFoundError) as error:
            return error


def _together(shape: tuple[int, ...], cuts: list[Tensor | Exception]) -> Tensor | Exception:
    errors = [cut for cut in cuts if isinstance(cut, Exception)]
    if errors:
        return errors[0]
    return torch.stack(cuts) if cuts else torch.empty((0, *shape), dtype=torch.uint8)  # type: ignore[arg-type]


def middle(folder: ImageFolder, picture: Any, sample_id: int) -> Tensor:
    """The picture's middle as its only view, (1, 3, size, size)."""
    return folder.middle(picture).unsqueeze(0)


def random_cuts(size: int, config: Config, epoch: int, picture: Any, sample_id: int) -> Tensor:
    """A random part of the picture for each of ``config.views``, (views, 3, size, size), uint8.

    It has ``config.crop_area`` to 1 of the area, and 3:4 to 4:3 of a square's shape; half of them are mirrored where
    ``config.flip`` holds. All that is random is a function of (seed, view, epoch, sample).
    """
    return torch.stack([_random_cut(size, config, picture, ("cut", view, epoch, sample_id)) for view in config.views])


def _random_cut(size: int, config: Config, picture: Any, purpose: tuple[object, ...]) -> Tensor:
    area, shape, across, down, mirrored = torch.rand(5, generator=generator(config.seed, *purpose)).tolist()
    width, height = picture.size
    area = width * height * (config.crop_area + (1 - config.crop_area) * area)
    shape = math.exp((2 * shape - 1) * math.log(4 / 3))
    wide, high = min(math.sqrt(area * shape), width), min(math.sqrt(area / shape), height)
    left, top = across * (width - wide), down * (height - high)
    box = (left, top, min(left + wide, width), min(top + high, height))
    pixels = as_tensor(picture.resize((size, size), resample=BILINEAR, box=box))
    return pixels.flip(2) if config.flip and mirrored < 0.5 else pixels
