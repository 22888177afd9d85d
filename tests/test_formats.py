"""Published data sets: small files in their true formats, and damaged ones."""

import gzip
import pickle
import struct

import numpy as np
import pytest
import torch
from scipy.io import savemat

from robustfast.training import data

RNG = np.random.default_rng(0)


def write_cifar(folder, suffix, n=4):
    """Returns the pixels and labels of all five training batches."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = RNG.integers(0, 256, (6, n, 3072), dtype=np.uint8)
    labels = RNG.integers(0, 10, (6, n), dtype=np.uint8)
    labels[0, 0] = 9
    for i, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        if suffix == ".bin":
            (folder / f"{name}.bin").write_bytes(np.column_stack((labels[i], pixels[i])).tobytes())
        else:
            content = {b"data": pixels[i], b"labels": labels[i].tolist(), b"batch_label": b"a batch"}
            (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    return pixels, labels


@pytest.mark.parametrize(
    ("suffix", "inside"), [(".bin", "cifar-10-batches-bin"), ("", "cifar-10-batches-py"), ("", "")]
)
def test_cifar10(tmp_path, suffix, inside):
    pixels, labels = write_cifar(tmp_path / inside, suffix)
    loaded = data.load(f"cifar10:{tmp_path}")
    assert loaded.train.pixels.dtype == torch.uint8 and loaded.train.pixels.shape == (20, 3, 32, 32)
    assert np.array_equal(loaded.train.pixels.flatten(1), pixels[:5].reshape(20, 3072))
    assert np.array_equal(loaded.test.labels, labels[5]) and loaded.train.labels.dtype == torch.int64
    assert loaded.classes[9] == "truck" and len(loaded.classes) == 10


class Malicious:
    def __reduce__(self):
        return print, ("run",)


def test_damaged_cifar10_is_named_and_no_code_of_a_pickle_runs(tmp_path, capsys):
    write_cifar(tmp_path / "bin", ".bin")
    file = tmp_path / "bin/data_batch_3.bin"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"data_batch_3\.bin: expected records of 3073 bytes, got 12287 bytes"):
        data.load(f"cifar10:{tmp_path / 'bin'}")
    write_cifar(tmp_path / "py", "")
    file = tmp_path / "py/data_batch_2"
    whole = file.read_bytes()
    for content in (
        whole[:-50],
        b"",
        pickle.dumps(Malicious()),
        pickle.dumps({b"data": Malicious()}),
        pickle.dumps([1]),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="data_batch_2: not a batch of CIFAR-10, or damaged"):
            data.load(f"cifar10:{tmp_path / 'py'}")
    assert capsys.readouterr().out == ""
    file.write_bytes(pickle.dumps({b"data": np.zeros((3, 5), np.uint8), b"labels": [0] * 3}))
    with pytest.raises(ValueError, match=r"data_batch_2: expected uint8 data \(N, 3072\)"):
        data.load(f"cifar10:{tmp_path / 'py'}")
    file.unlink()
    with pytest.raises(ValueError, match="data_batch_2: no such file"):
        data.load(f"cifar10:{tmp_path / 'py'}")


def test_svhn(tmp_path):
    images = {part: RNG.integers(0, 256, (32, 32, 3, n), dtype=np.uint8) for part, n in (("train", 6), ("test", 3))}
    for part, x in images.items():
        savemat(tmp_path / f"{part}_32x32.mat", {"X": x, "y": np.array([10, 1, 2, 3, 4, 9])[: x.shape[3], None]})
    loaded = data.load(f"svhn:{tmp_path}")
    assert loaded.train.labels.tolist() == [0, 1, 2, 3, 4, 9] and loaded.test.labels.tolist() == [0, 1, 2]
    assert np.array_equal(loaded.train.pixels[5, 2], images["train"][:, :, 2, 5])
    file = tmp_path / "test_32x32.mat"
    for content in (file.read_bytes()[:-200], b"", b"text"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"test_32x32\.mat: not SVHN's cropped digits, or damaged"):
            data.load(f"svhn:{tmp_path}")
    savemat(file, {"X": np.zeros((32, 32, 3, 2)), "y": np.ones((2, 1))})
    with pytest.raises(ValueError, match=r"test_32x32\.mat: expected X uint8"):
        data.load(f"svhn:{tmp_path}")


def write_idx(folder, name, array, zipped=True):
    content = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    if zipped:
        (folder / f"{name}-ubyte.gz").write_bytes(gzip.compress(content))
    else:
        (folder / f"{name}-ubyte").write_bytes(content)
    return content


@pytest.mark.parametrize("zipped", [True, False])
def test_idx(tmp_path, zipped):
    images = RNG.integers(0, 256, (5, 28, 27), dtype=np.uint8)
    labels = np.array([0, 3, 2, 1, 3], dtype=np.uint8)
    for part in ("train", "t10k"):
        write_idx(tmp_path, f"{part}-images-idx3", images, zipped)
        write_idx(tmp_path, f"{part}-labels-idx1", labels, zipped)
    loaded = data.load(f"idx:{tmp_path}")
    assert np.array_equal(loaded.test.pixels[:, 0], images) and loaded.train.labels.tolist() == labels.tolist()
    assert loaded.classes == ("0", "1", "2", "3")


def test_damaged_idx_is_named(tmp_path):
    labels = np.array([0, 1, 1], dtype=np.uint8)
    for part in ("train", "t10k"):
        content = write_idx(tmp_path, f"{part}-images-idx3", np.zeros((3, 4, 4), np.uint8))
        write_idx(tmp_path, f"{part}-labels-idx1", labels)
    file = tmp_path / "t10k-images-idx3-ubyte.gz"
    whole = file.read_bytes()
    for damaged, message in (
        (whole[:-9], "not a gzipped file, or cut short"),
        (b"text", "not a gzipped file, or cut short"),
        (gzip.compress(content[:-3]), r"expected values of shape \(3, 4, 4\), got 45 bytes: cut short"),
        (gzip.compress(b"\0\0\x0d\3" + content[4:]), "expected the header of an idx file of bytes in 3 dimensions"),
        (gzip.compress(b""), "expected the header"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"t10k-images-idx3-ubyte\.gz: {message}"):
            data.load(f"idx:{tmp_path}")
    file.write_bytes(whole)
    write_idx(tmp_path, "t10k-labels-idx1", labels[:2])
    with pytest.raises(ValueError, match="t10k: 3 images, but 2 labels"):
        data.load(f"idx:{tmp_path}")
    write_idx(tmp_path, "t10k-labels-idx1", labels + 5)
    with pytest.raises(ValueError, match="expected labels 0 to 1, got 5 to 6"):
        data.load(f"idx:{tmp_path}")
    (tmp_path / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte\.gz: no such file"):
        data.load(f"idx:{tmp_path}")
