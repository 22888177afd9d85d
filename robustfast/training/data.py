"""Labelled images from scikit-learn's digits, from an .npz file or from folders of PNG and JPEG files.

They are held in memory, but for folders whose images are resized: those are streamed (see
:mod:`robustfast.training.streamed`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from robustfast.evaluation.folders import ImageFolder, class_names, image_files, opened, some
from robustfast.evaluation.noise import BATCH
from robustfast.extras import needed
from robustfast.streams import generator
from robustfast.training.augment import draw_placements, place
from robustfast.training.checksum import checksum
from robustfast.training.config import Config
from robustfast.training.streamed import Files

CHANNELS = (1, 3)  # grey and RGB
SOURCES = "digits, npz:FILE, folder:DIR, cifar10:DIR, svhn:DIR or idx:DIR"


class Images(NamedTuple):
    """Images and labels in memory: pixels (N, C, H, W), uint8 or float32 in [0, 1]; labels (N,), int64 in 0..K-1."""

    pixels: Tensor
    labels: Tensor

    @property
    def image(self) -> tuple[int, ...]:
        """(C, H, W)."""
        return tuple(self.pixels.shape[1:])

    @property
    def block(self) -> int:
        """How many images are evaluated at a time."""
        return BATCH

    def take(self, index: Tensor) -> Images:
        return Images(self.pixels[index], self.labels[index])

    def to(self, device: torch.device) -> Images:
        return Images(self.pixels.to(device), self.labels.to(device))

    def hashed(self) -> tuple[Tensor, ...]:
        """What tells these images from others."""
        return tuple(self)

    def read(self, parts: Sequence[Tensor]) -> Iterator[Tensor]:
        """The pixels of each part, int64 positions."""
        return (self.pixels[part] for part in parts)

    def augmented(self, parts: Sequence[Tensor], config: Config, epoch: int) -> Iterator[list[Tensor]]:
        """The pixels of each part, as each of ``config.views`` has them in that epoch."""
        placements = [
            draw_placements(
                len(self.labels), config.crop, config.flip, generator(config.seed, "places", view, epoch)
            ).to(self.pixels.device)
            for view in config.views
        ]
        for part in parts:
            pixels = self.pixels[part]
            moved = config.crop or config.flip
            yield [place(pixels, places.take(part), config.crop) if moved else pixels for places in placements]


class DataSet(NamedTuple):
    """A training pool, from which validation is split, a test set, and the names of the classes."""

    train: Images | Files
    test: Images | Files
    classes: tuple[str, ...]

    def fingerprint(self) -> str:
        """A hash of every pixel and label, of files their names: a run is resumed on the data it began with."""
        return checksum((*self.train.hashed(), *self.test.hashed()))


def load(source: str, size: int = 0, workers: int = 0) -> DataSet:
    """The data set that ``digits``, ``npz:FILE``, ``folder:DIR``, ``cifar10:DIR``, ``svhn:DIR`` or ``idx:DIR`` names.

    See :func:`npz`, :func:`folder`, :func:`streamed_folder` and :mod:`robustfast.training.formats`.

    Args:
        size: of ``folder:DIR``: its images are streamed, resized and cut to this side; 0: held in memory as they are.
        workers: processes that read streamed images.

    Warns:
        UserWarning: classes without training images, and files that are left out.

    Raises:
        ValueError: the name is none of these, or the data is not as described there; names the file.
        FileNotFoundError: there is no such file or folder.
    """
    kind, _, path = source.partition(":")
    if size and kind != "folder":
        raise ValueError(f"size: images are resized of folder:DIR alone, got {size} for {source}")
    if size and path:
        return streamed_folder(Path(path), size, workers)
    if source == "digits":
        return digits()
    if kind == "npz" and path:
        return npz(Path(path))
    if kind == "folder" and path:
        return folder(Path(path))
    from robustfast.training.formats import FORMATS  # which is made of this module

    if kind in FORMATS and path:
        return FORMATS[kind](Path(path))
    raise ValueError(f"data: expected {SOURCES}, got {source!r}")


def digits() -> DataSet:
    """1797 handwritten digits, 8x8 in 17 greys, that scikit-learn carries: a fixed third is the test set."""
    with needed():
        from sklearn.datasets import load_digits
    pixels, labels = load_digits(return_X_y=True)
    images = Images(torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16, torch.from_numpy(labels).long())
    train, test = stratified_split(images.labels, 1 / 3, seed=0)
    return DataSet(images.take(train), images.take(test), tuple(map(str, range(10))))


def npz(path: Path) -> DataSet:
    """Arrays x_train, y_train, x_test, y_test of an .npz file.

    Images are uint8, or floating in [0, 1], of shape (N, H, W), (N, H, W, C) or (N, C, H, W); C is 1 or 3, and it is
    the one axis of the two that has such a size. Labels are integers of shape (N,), 0..K-1, where K - 1 is the
    greatest in y_train and K at most the number of training images.

    Raises:
        ValueError: an array is missing, damaged or otherwise; pickled objects are never loaded.
    """
    with _open_npz(path) as arrays:
        missing = [name for name in ("x_train", "y_train", "x_test", "y_test") if name not in arrays]
        if missing:
            raise ValueError(f"{path}: no {', '.join(missing)}; it holds {', '.join(arrays) or 'nothing'}")
        train = _npz_part(path, arrays, "train")
        num_classes = int(train.labels.max()) + 1
        test = _npz_part(path, arrays, "test", num_classes)
    return _checked(path, DataSet(train, test, tuple(map(str, range(num_classes)))))


def _open_npz(path: Path) -> np.lib.npyio.NpzFile:
    try:
        arrays = np.load(path, allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # whatever NumPy and zipfile say of bytes that are neither's
        raise ValueError(f"{path}: expected an .npz file, as numpy.savez writes it") from error
    if not isinstance(arrays, np.lib.npyio.NpzFile):
        raise ValueError(f"{path}: expected an .npz file, got a single array")
    return arrays


def _npz_part(path: Path, arrays: np.lib.npyio.NpzFile, part: str, num_classes: int | None = None) -> Images:
    x, y = (_read_array(path, arrays, f"{letter}_{part}") for letter in "xy")
    if x.ndim == 0 or y.ndim != 1 or y.dtype.kind not in "iu" or len(y) != len(x) or len(y) == 0:
        raise ValueError(
            f"{path}: y_{part}: expected as many integers as there are images, at least 1, "
            f"got {y.dtype} {y.shape} for images of shape {x.shape}"
        )
    lowest, highest = int(y.min()), int(y.max())
    if lowest < 0:
        raise ValueError(f"{path}: y_{part}: expected labels from 0, got {lowest}")
    if highest >= (num_classes or len(y)):
        limit = f"classes in training, {num_classes}" if num_classes else f"training images, {len(y)}"
        raise ValueError(f"{path}: y_{part}: expected labels below the number of {limit}, got {highest}")
    return Images(_pixels(f"{path}: x_{part}", x), torch.from_numpy(y.astype(np.int64)))


def _read_array(path: Path, arrays: np.lib.npyio.NpzFile, name: str) -> np.ndarray:
    try:
        array = arrays[name]
    except Exception as error:  # a wrong checksum, a broken header or stream, a size beyond the memory
        pickled = isinstance(error, ValueError) and "allow_pickle" in str(error)
        reason = "pickled objects are never loaded" if pickled else " ".join(str(error).split())
        raise ValueError(f"{path}: {name}: cannot be read: {reason or type(error).__name__}") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path}: {name}: expected an array")
    return array


def _pixels(name: str, x: np.ndarray) -> Tensor:
    if x.dtype != np.uint8 and x.dtype.kind != "f":
        raise ValueError(f"{name}: expected uint8 or floating images, got {x.dtype}")
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and (x.shape[1] in CHANNELS) != (x.shape[3] in CHANNELS):
        x = x if x.shape[1] in CHANNELS else np.moveaxis(x, 3, 1)
    else:
        raise ValueError(
            f"{name}: expected (N, H, W), or (N, H, W, C) or (N, C, H, W) where one of the two is 1 or 3, got {x.shape}"
        )
    if 0 in x.shape[2:]:
        raise ValueError(f"{name}: expected images of at least one pixel, got {x.shape[2]}x{x.shape[3]}")
    if x.dtype.kind == "f":
        x = x.astype(np.float32)
        if np.isnan(x).any():
            raise ValueError(f"{name}: expected floating images in [0, 1], got nan")
        if x.min() < 0 or x.max() > 1:
            raise ValueError(f"{name}: expected floating images in [0, 1], got {x.min()} to {x.max()}")
    return torch.from_numpy(np.ascontiguousarray(x))


def folder(path: Path) -> DataSet:
    """Images ``train/CLASS/*`` and ``test/CLASS/*``, PNG and JPEG, all of one size; ``val`` where there is no ``test``.

    Classes are the folders of ``train``, in alphabetical order. Images are grey where every file is (8 bits or 1),
    else RGB; transparency is dropped. Other files are left out, with a warning.

    Raises:
        FileNotFoundError: there is no folder ``train`` or ``test``.
        ValueError: a folder has no images, a file is no image of 8 bits, sizes differ, or test has other classes.
    """
    places = train_and_test(path)
    classes = tuple(class_names(places[0]))
    unknown = set(class_names(places[1])) - set(classes)
    if unknown:
        raise ValueError(f"{places[1]}: classes that train does not have: {', '.join(sorted(unknown))}")
    parts = [list(_files(part, classes)) for part in places]
    _refuse_empty(places[0], classes, [label for _, label in parts[0]])
    mode = _common_mode([file for files in parts for file, _ in files])
    train, test = (_read_files(part, files, mode) for part, files in zip(places, parts, strict=True))
    return _checked(path, DataSet(train, test, classes))


def streamed_folder(path: Path, size: int, workers: int) -> DataSet:
    """As :func:`folder`, but of files of any size, read when they are needed, as RGB of (size, size).

    Raises:
        FileNotFoundError: there is no folder ``train`` or ``test``.
        ValueError: a folder has no images, or test has other classes.
    """
    train, test = train_and_test(path)
    of_train = ImageFolder(train, size)
    _refuse_empty(train, of_train.classes, of_train.labels)
    of_test = ImageFolder(test, size, classes=of_train.classes)
    return _checked(path, DataSet(Files.all_of(of_train, workers), Files.all_of(of_test, workers), of_train.classes))


def train_and_test(path: Path) -> tuple[Path, Path]:
    """The folders of training and of test images; FileNotFoundError where one is missing."""
    test = "val" if (path / "val").is_dir() and not (path / "test").is_dir() else "test"
    for part in ("train", test):
        if not (path / part).is_dir():
            raise FileNotFoundError(f"{path}: expected folders train and test with a folder for each class, no {part}")
    return path / "train", path / test


def _files(part: Path, classes: tuple[str, ...]) -> Iterator[tuple[Path, int]]:
    for label, name in enumerate(classes):
        files = image_files(part / name) if (part / name).is_dir() else []
        yield from ((part / name / file, label) for file in files)


def _refuse_empty(train: Path, classes: tuple[str, ...], labels: Sequence[int] | np.ndarray) -> None:
    """A ValueError naming the folder of a class that has no image, which could be nothing but a mistake."""
    counts = np.bincount(np.asarray(labels, np.int64), minlength=len(classes))
    if not counts.all():
        raise ValueError(f"{train / classes[counts.argmin()]}: expected images *.png or *.jpg, found none")


def _common_mode(files: list[Path]) -> str:
    """L if all are grey, else RGB. Read from the headers, which have to agree on the size before one is decoded."""
    headers = [_header(file) for file in files]
    for file, (size, _) in zip(files, headers, strict=True):
        if size != headers[0][0]:
            raise ValueError(
                f"{file}: expected {headers[0][0]} pixels as in {files[0]}, got {size}; with --size they are resized"
            )
    return "L" if all(mode in ("1", "L") for _, mode in headers) else "RGB"


def _header(file: Path) -> tuple[tuple[int, int], str]:
    """(height, width) and mode of a file of 8 bits or less; Pillow would cut more of a PNG to 8 without a word."""
    with opened(file) as image:
        width, height = image.size
        mode, kind = image.mode, image.format
    with open(file, "rb") as content:
        depth = content.read(25)[24] if kind == "PNG" else 8
    if depth > 8:
        raise ValueError(f"{file}: expected 8 bits per channel, got {depth}")
    return (height, width), mode


def _read_files(part: Path, files: list[tuple[Path, int]], mode: str) -> Images:
    if not files:
        raise ValueError(f"{part}: expected images CLASS/*.png or *.jpg, found none")
    arrays = []
    for file, _ in files:
        with opened(file) as image:
            arrays.append(np.asarray(image.convert(mode)))
    return Images(_pixels(str(part), np.stack(arrays)), torch.tensor([label for _, label in files]))


def _checked(path: Path, data: DataSet) -> DataSet:
    train, test, classes = data
    if (
        isinstance(train, Images)
        and isinstance(test, Images)
        and (train.image != test.image or train.pixels.dtype != test.pixels.dtype)
    ):
        raise ValueError(
            f"{path}: expected test images like the training images, {train.pixels.dtype} "
            f"{train.image}, got {test.pixels.dtype} {test.image}"
        )
    if len(classes) < 2:
        raise ValueError(f"{path}: expected at least 2 classes, got {len(classes)}")
    counts = train.labels.bincount(minlength=len(classes))
    if empty := [name for name, count in zip(classes, counts, strict=True) if count == 0]:
        warnings.warn(f"{path}: no training images of class {some(empty)}; labels count from 0", stacklevel=2)
    return data


def stratified_split(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Positions (rest, held out) of the labels (N,), ascending: of each class, ``share`` is held out, rounded.

    Raises:
        ValueError: nothing would be held out, or nothing left of a class.
    """
    shuffled = torch.randperm(labels.numel(), generator=generator(seed, "split"))
    order = shuffled[labels[shuffled].argsort(stable=True)]
    counts = labels.bincount()
    rank = torch.arange(labels.numel()) - (counts.cumsum(0) - counts)[labels[order]]
    wanted = (share * counts).round().long()
    if wanted.sum() == 0 or (wanted == counts)[counts > 0].any():
        raise ValueError(
            f"cannot hold out {share:g} of classes of {counts.tolist()} images and have some on both sides"
        )
    held_out = rank < wanted[labels[order]]
    return order[~held_out].sort().values, order[held_out].sort().values


def channel_statistics(pixels: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of images in [0, 1] (uint8: of x / 255); 1 for a constant channel."""
    scale = 1.0 if pixels.is_floating_point() else 255.0
    channels = pixels.transpose(0, 1).flatten(1)
    stds, means = zip(*(torch.std_mean(channel.double() / scale, correction=0) for channel in channels), strict=True)
    return tuple(map(float, means)), tuple(float(std) or 1.0 for std in stds)


def normalization(images: Images | Files) -> dict[str, tuple[float, ...]]:
    """``mean`` and ``pixel_std`` of each channel over all images in memory, or over 512 of streamed ones."""
    if isinstance(images, Images):
        pixels = images.pixels
    else:
        some = torch.arange(len(images.labels))[:: -(-len(images.labels) // 512)]
        pixels = torch.cat(list(images.read(some.split(images.block))))
    mean, pixel_std = channel_statistics(pixels)
    return {"mean": mean, "pixel_std": pixel_std}
