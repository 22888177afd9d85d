"""Labelled images from scikit-learn's digits, from an .npz file or from folders of PNG files, all held in memory."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from robustfast.extras import needed
from robustfast.streams import generator

CHANNELS = (1, 3)  # grey and RGB


class Images(NamedTuple):
    """Images and labels: pixels (N, C, H, W), uint8 or float32 in [0, 1]; labels (N,), int64 in 0..K-1."""

    pixels: Tensor
    labels: Tensor

    def take(self, index: Tensor) -> Images:
        return Images(self.pixels[index], self.labels[index])

    def to(self, device: torch.device) -> Images:
        return Images(self.pixels.to(device), self.labels.to(device))


class DataSet(NamedTuple):
    """A training pool, from which validation is split, a test set, and the names of the classes."""

    train: Images
    test: Images
    classes: tuple[str, ...]

    def fingerprint(self) -> str:
        """A hash of every pixel and label: a run is resumed on the data it began with."""
        digest = hashlib.blake2b(digest_size=16)
        for tensor in (*self.train, *self.test):
            digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()


def load(source: str) -> DataSet:
    """The data set that ``digits``, ``npz:FILE`` or ``folder:DIR`` names; see :func:`npz` and :func:`folder`.

    Raises:
        ValueError: the name is none of these, or the data is not as described there.
        FileNotFoundError: there is no such file or folder.
    """
    kind, _, path = source.partition(":")
    if source == "digits":
        return digits()
    if kind == "npz" and path:
        return npz(Path(path))
    if kind == "folder" and path:
        return folder(Path(path))
    raise ValueError(f"data: expected digits, npz:FILE or folder:DIR, got {source!r}")


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
    greatest in y_train.

    Raises:
        ValueError: an array is missing or otherwise; pickled objects are never loaded.
    """
    with _open_npz(path) as arrays:
        missing = [name for name in ("x_train", "y_train", "x_test", "y_test") if name not in arrays]
        if missing:
            raise ValueError(f"{path}: no {', '.join(missing)}; it holds {', '.join(arrays) or 'nothing'}")
        train, test = (_npz_part(path, arrays, part) for part in ("train", "test"))
    return _checked(path, DataSet(train, test, tuple(map(str, range(int(train.labels.max()) + 1)))))


def _open_npz(path: Path) -> np.lib.npyio.NpzFile:
    try:
        arrays = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: expected an .npz file: {error}") from error
    if not isinstance(arrays, np.lib.npyio.NpzFile):
        raise ValueError(f"{path}: expected an .npz file, got a single array")
    return arrays


def _npz_part(path: Path, arrays: np.lib.npyio.NpzFile, part: str) -> Images:
    x, y = (_read_array(path, arrays, f"{letter}_{part}") for letter in "xy")
    if y.ndim != 1 or y.dtype.kind not in "iu" or len(y) != len(x) or len(y) == 0:
        raise ValueError(
            f"{path}: y_{part}: expected as many integers as there are images, at least 1, "
            f"got {y.dtype} {y.shape} for {len(x)} images"
        )
    if y.min() < 0:
        raise ValueError(f"{path}: y_{part}: expected labels from 0, got {y.min()}")
    return Images(_pixels(f"{path}: x_{part}", x), torch.from_numpy(y.astype(np.int64)))


def _read_array(path: Path, arrays: np.lib.npyio.NpzFile, name: str) -> np.ndarray:
    try:
        return arrays[name]
    except ValueError as error:
        raise ValueError(f"{path}: {name}: {error}") from error


def _pixels(name: str, x: np.ndarray) -> Tensor:
    if x.dtype != np.uint8 and x.dtype.kind != "f":
        raise ValueError(f"{name}: expected uint8 or floating images, got {x.dtype}")
    if x.dtype.kind == "f":
        x = x.astype(np.float32)
        if not (x.min(initial=0) >= 0 and x.max(initial=0) <= 1):
            raise ValueError(f"{name}: expected floating images in [0, 1], got {x.min()} to {x.max()}")
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and (x.shape[1] in CHANNELS) != (x.shape[3] in CHANNELS):
        x = x if x.shape[1] in CHANNELS else np.moveaxis(x, 3, 1)
    else:
        raise ValueError(
            f"{name}: expected (N, H, W), or (N, H, W, C) or (N, C, H, W) where one of the two is 1 or 3, got {x.shape}"
        )
    return torch.from_numpy(np.ascontiguousarray(x))


def folder(path: Path) -> DataSet:
    """Images ``train/CLASS/*.png`` and ``test/CLASS/*.png``, all of one size.

    Classes are the folders of ``train``, in alphabetical order. Images are grey where every file is (8 bits or 1),
    else RGB; transparency is dropped.

    Raises:
        ValueError: a folder has no images, a file is no image of 8 bits, sizes differ, or test has other classes.
    """
    classes = tuple(sorted(entry.name for entry in (path / "train").iterdir() if entry.is_dir()))
    unknown = {entry.name for entry in (path / "test").iterdir() if entry.is_dir()} - set(classes)
    if unknown:
        raise ValueError(f"{path / 'test'}: classes that train does not have: {', '.join(sorted(unknown))}")
    files = {part: list(_files(path / part, classes)) for part in ("train", "test")}
    modes = {_mode(file) for part in files.values() for file, _ in part}
    mode = "L" if modes <= {"1", "L"} else "RGB"
    train, test = (_read_files(path / part, found, mode) for part, found in files.items())
    return _checked(path, DataSet(train, test, classes))


def _files(part: Path, classes: tuple[str, ...]) -> Iterator[tuple[Path, int]]:
    for label, name in enumerate(classes):
        found = sorted((part / name).glob("*.png"))
        if not found and part.name == "train":
            raise ValueError(f"{part / name}: expected images *.png, found none")
        yield from ((file, label) for file in found)


def _mode(file: Path) -> str:
    with needed():
        from PIL import Image, UnidentifiedImageError
    try:
        with Image.open(file) as image:
            mode = image.mode
    except UnidentifiedImageError as error:
        raise ValueError(f"{file}: not an image") from error
    if mode.startswith(("I", "F")):
        raise ValueError(f"{file}: expected 8 bits per channel, got mode {mode}")
    return mode


def _read_files(part: Path, files: list[tuple[Path, int]], mode: str) -> Images:
    from PIL import Image

    if not files:
        raise ValueError(f"{part}: expected images CLASS/*.png, found none")
    arrays = []
    for file, _ in files:
        with Image.open(file) as image:
            arrays.append(np.asarray(image.convert(mode)))
        if arrays[-1].shape != arrays[0].shape:
            raise ValueError(
                f"{file}: expected {arrays[0].shape[:2]} pixels as in {files[0][0]}, got {arrays[-1].shape[:2]}"
            )
    return Images(_pixels(str(part), np.stack(arrays)), torch.tensor([label for _, label in files]))


def _checked(path: Path, data: DataSet) -> DataSet:
    train, test, classes = data
    if train.pixels.shape[1:] != test.pixels.shape[1:] or train.pixels.dtype != test.pixels.dtype:
        raise ValueError(
            f"{path}: expected test images like the training images, {train.pixels.dtype} "
            f"{tuple(train.pixels.shape[1:])}, got {test.pixels.dtype} {tuple(test.pixels.shape[1:])}"
        )
    if len(classes) < 2:
        raise ValueError(f"{path}: expected at least 2 classes, got {len(classes)}")
    if test.labels.max() >= len(classes):
        raise ValueError(f"{path}: test has label {int(test.labels.max())}, training only 0..{len(classes) - 1}")
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
