"""Images of any size, streamed from folders."""

import numpy as np
import pytest
import torch
from PIL import Image

from robustfast.evaluation.folders import ImageFolder


def write(path, width, height, mode="RGB", seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), mode)
    image.save(path, **options)
    return image


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "cat/b.jpg", 40, 25)
    write(tmp_path / "cat/a.png", 30, 61, "RGBA")
    write(tmp_path / "dog/c.JPEG", 24, 24, "L")
    write(tmp_path / "dog/d.png", 5, 300)
    (tmp_path / "dog/notes.txt").write_text("left out")
    return tmp_path


def test_every_image_is_resized_and_cut(folder):
    images = ImageFolder(folder, 16, 20)
    assert images.classes == ("cat", "dog")
    assert [name.split(b"/")[1] for name in images.names] == [b"a.png", b"b.jpg", b"c.JPEG", b"d.png"]
    expected = Image.open(folder / "cat/b.jpg").convert("RGB").resize((32, 20), Image.Resampling.BILINEAR)
    pixels, label, id_ = images[1]
    assert (label, id_) == (0, 1) and pixels.dtype == torch.uint8
    assert np.array_equal(pixels.permute(1, 2, 0), np.asarray(expected.crop((8, 2, 24, 18))))
    for size in (1, 3, 10):
        parts = list(images.batches(size))
        assert torch.equal(torch.cat([part[2] for part in parts]), torch.arange(4))
        assert torch.equal(torch.cat([part[0] for part in parts]), torch.stack([images[i][0] for i in range(4)]))
    assert torch.cat([labels for _, labels, _ in images.batches(3)]).tolist() == [0, 0, 1, 1]
    assert ImageFolder(folder, 224).resize == 256
    loader = torch.utils.data.DataLoader(images, batch_size=3)
    assert torch.equal(next(iter(loader))[0], next(images.batches(3))[0])


def test_mistakes_name_the_file(folder, tmp_path):
    file = folder / "dog/d.png"
    for content in (file.read_bytes()[:-200], b"", b"text"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"dog/d\.png: not an image that can be read"):
            list(ImageFolder(folder, 16).batches(8))
    (tmp_path / "empty/a").mkdir(parents=True)
    for place, message in (("empty", "at least 2 classes, got 1"), ("nowhere", "no such folder")):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            ImageFolder(tmp_path / place, 16)
    (tmp_path / "empty/b").mkdir()
    with pytest.raises(ValueError, match=r"expected images CLASS/\*\.png or \*\.jpg, found none"):
        ImageFolder(tmp_path / "empty", 16)
    with pytest.raises(ValueError, match=r"resize: expected at least size \(16\), got 8"):
        ImageFolder(folder, 16, 8)
