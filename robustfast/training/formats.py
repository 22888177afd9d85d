"""Published data sets as they are distributed: CIFAR-10, SVHN, and MNIST and its like; read from local folders.

A file that is missing, cut short or otherwise than its format is an error that names it.
"""

from __future__ import annotations

import gzip
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from robustfast.extras import needed
from robustfast.training.data import DataSet, Images

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
RECORD = 1 + 3 * 32 * 32  # bytes of an image in CIFAR-10's binary files: its label, then red, green and blue rows


def cifar10(path: Path) -> DataSet:
    """CIFAR-10's binary version (``data_batch_1.bin`` to ``_5.bin``, ``test_batch.bin``), or its pickled one.

    Of pickles nothing is built but arrays, lists, strings and dicts; anything else in them is an error.

    Raises:
        ValueError: neither version is there whole.
    """
    folder = next((f for f in (path, path / "cifar-10-batches-bin", path / "cifar-10-batches-py")
                   if any(f.glob("data_batch_1*"))), path)  # fmt: skip
    binary = (folder / "data_batch_1.bin").exists()
    read, ending = (_cifar_binary, ".bin") if binary else (_cifar_pickled, "")
    parts = [read(_found(folder / f"data_batch_{i}{ending}")) for i in range(1, 6)]
    pixels, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
    return DataSet(
        _images(pixels, labels, folder, 10), _images(*read(_found(folder / f"test_batch{ending}")), folder, 10), CIFAR10
    )


def _cifar_binary(file: Path) -> tuple[np.ndarray, np.ndarray]:
    content = np.fromfile(file, dtype=np.uint8)
    if not len(content) or len(content) % RECORD:
        raise ValueError(f"{file}: expected records of {RECORD} bytes, got {len(content)} bytes: cut short?")
    records = content.reshape(-1, RECORD)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]


class _Arrays(pickle.Unpickler):
    """Builds arrays and plain values alone: a pickle may name any function, and these are the ones that may run."""

    numpy: ClassVar[dict[str, Any]] = {
        "_reconstruct": np.empty(0).__reduce__()[0],
        "ndarray": np.ndarray,
        "dtype": np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "numpy" and name in self.numpy:
            return self.numpy[name]
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes for Python 2
            return lambda text, encoding: text.encode("latin1")
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed")


def _cifar_pickled(file: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with open(file, "rb") as opened:
            content = _Arrays(opened, encoding="bytes").load()
        data, labels = np.asarray(content[b"data"]), np.asarray(content[b"labels"])
    except OSError:
        raise
    except Exception as error:  # a damaged pickle raises anything
        raise ValueError(f"{file}: not a batch of CIFAR-10, or damaged: {error}") from error
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != RECORD - 1 or labels.shape != data.shape[:1]:
        raise ValueError(f"{file}: expected uint8 data (N, {RECORD - 1}) and N labels, got {data.dtype} {data.shape}")
    return data.reshape(-1, 3, 32, 32), labels


def svhn(path: Path) -> DataSet:
    """SVHN's cropped digits, ``train_32x32.mat`` and ``test_32x32.mat``; their label 10 stands for 0."""
    train, test = (_svhn_part(_found(path / f"{part}_32x32.mat")) for part in ("train", "test"))
    return DataSet(train, test, tuple(map(str, range(10))))


def _svhn_part(file: Path) -> Images:
    with needed("evaluate"):
        from scipy.io import loadmat
    try:
        content = loadmat(file)
        x, y = content["X"], content["y"]
    except Exception as error:  # SciPy has many words for a damaged file
        raise ValueError(f"{file}: not SVHN's cropped digits, or damaged: {error}") from error
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[2] != 3 or y.size != x.shape[3]:
        raise ValueError(f"{file}: expected X uint8 (H, W, 3, N) and N labels y, got {x.dtype} {x.shape}, {y.shape}")
    return _images(x.transpose(3, 2, 0, 1), y.ravel() % 10, file, 10)


def idx(path: Path) -> DataSet:
    """MNIST's format: ``train-images-idx3-ubyte``, ``t10k-labels-idx1-ubyte`` and so on, gzipped or not."""
    parts = []
    for part in ("train", "t10k"):
        images, labels = (_idx_file(path, f"{part}-{name}-ubyte", dims) for name, dims in
                          (("images-idx3", 3), ("labels-idx1", 1)))  # fmt: skip
        if len(images) != len(labels):
            raise ValueError(f"{path}: {part}: {len(images)} images, but {len(labels)} labels")
        parts.append((images[:, None], labels))
    classes = int(parts[0][1].max()) + 1
    train, test = (_images(*part, path, classes) for part in parts)
    return DataSet(train, test, tuple(map(str, range(classes))))


def _idx_file(path: Path, name: str, dims: int) -> np.ndarray:
    plain = path / name
    file = plain if plain.exists() else _found(path / f"{name}.gz")
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{file}: not a gzipped file, or cut short: {error}") from error
    header = 4 + 4 * dims
    if len(content) < header or content[:4] != bytes((0, 0, 8, dims)):
        raise ValueError(f"{file}: expected the header of an idx file of bytes in {dims} dimensions")
    shape = struct.unpack(f">{dims}I", content[4:header])
    if len(content) - header != np.prod(shape, dtype=np.int64) or not len(content[header:]):
        raise ValueError(f"{file}: expected values of shape {shape}, got {len(content) - header} bytes: cut short?")
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)


def _found(file: Path) -> Path:
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    return file


def _images(pixels: np.ndarray, labels: np.ndarray, place: Path, classes: int) -> Images:
    labels = labels.astype(np.int64)
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"{place}: expected labels 0 to {classes - 1}, got {labels.min()} to {labels.max()}")
    return Images(torch.from_numpy(np.array(pixels, order="C")), torch.from_numpy(labels))


FORMATS: dict[str, Callable[[Path], DataSet]] = {"cifar10": cifar10, "svhn": svhn, "idx": idx}
