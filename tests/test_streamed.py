"""Training on folders of images that stay on the disk."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from robustfast.commands import runs
from robustfast.evaluation.folders import ImageFolder
from robustfast.training import data, load_classifier, train
from robustfast.training.setup import prepare

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def config(tiny, pictures):
    return replace(
        tiny, data=pictures, size=12, crop=0, workers=0, epochs=1, noise_view="independent", threads=1, batch_size=16
    )


def folder_of(config):
    return Path(config.data.partition(":")[2])


def cuts(config, epoch, order):
    """Both views of the training pool's images by their position, read in this order, in parts of 7."""
    train = data.load(config.data, config.size, config.workers).train
    parts = torch.tensor(order).split(7)
    views = zip(*train.augmented(parts, config, epoch), strict=True)
    back = torch.tensor(order).argsort()
    return [torch.cat(view)[back] for view in views]


def test_cuts_are_a_function_of_seed_epoch_view_and_image(config):
    order = list(range(48))
    clean, noisy = cuts(config, 3, order)
    assert clean.shape == (48, 3, 12, 12) and clean.dtype == torch.uint8
    again = cuts(replace(config, workers=2), 3, order[::-1])
    assert torch.equal(again[0], clean) and torch.equal(again[1], noisy)
    for other in (noisy, cuts(config, 4, order)[0], cuts(replace(config, seed=1), 3, order)[0]):
        assert (other != clean).flatten(1).any(1).float().mean() > 0.9
    (alone,) = cuts(replace(config, noise_view="same"), 3, order)
    assert torch.equal(alone, clean)


def test_a_cut_is_a_part_of_its_image(config, tmp_path):
    """An image whose red is its row and whose green is its column: where a cut was taken can be read from it."""
    height, width = 180, 240
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([rows, columns, 0 * rows], 2).astype(np.uint8)
    for part in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(60):
                Image.fromarray(pixels).save(tmp_path / part / name / f"{i}.png")
    config = replace(config, data=f"folder:{tmp_path}", size=60, crop_area=0.25, noise_view="same")
    (found,) = cuts(config, 0, list(range(120)))
    top, bottom = (found[:, 0, row].float().mean(1) for row in (0, -1))
    left, right = (found[:, 1, :, column].float().mean(1) for column in (0, -1))
    high, wide = ((far - near).abs() * 60 / 59 for near, far in ((top, bottom), (left, right)))
    share, shape = high * wide / (height * width), wide / high
    assert share.min() > 0.23 and share.max() < 1.02 and share.max() - share.min() > 0.6
    assert shape.min() > 0.74 and shape.max() < 1.36 and shape.max() - shape.min() > 0.4
    assert 0.3 < (left > right).float().mean() < 0.7, "half of them mirrored"
    assert (cuts(replace(config, flip=False), 0, [0, 5])[0][:, 1].float().diff(dim=2) >= 0).all()
    assert top.min() < 5 and (top - bottom).max() < 0 and bottom.max() > height - 6


def test_training_and_test_on_streamed_images(config, pictures, tmp_path):
    results = train(replace(config, epochs=3, crop_area=0.5), tmp_path / "run")
    assert results["data"] == {"classes": ["dark", "light"], "image": [3, 12, 12], "train": 36, "validation": 12,
                               "test": 12}  # fmt: skip
    assert results["test"][0]["accuracy"] > 0.9
    folder = ImageFolder(folder_of(config) / "test", 12)
    pixels, labels, _ = next(folder.batches(12))
    classifier = load_classifier(tmp_path / "run")
    right = (classifier(pixels).argmax(1) == labels).double().mean().item()
    assert right == pytest.approx(results["test"][0]["accuracy"])
    options = runs.Options("quick")
    found = runs.evaluate(runs.of_run(tmp_path / "run", options), tmp_path / "evaluation", options)
    assert found.summary["settings"][0]["accuracy"] == pytest.approx(right)


def test_normalisation_and_identity(config):
    loaded = data.load(config.data, 12)
    pixels = torch.stack([ImageFolder(folder_of(config) / "train", 12)[i][0] for i in range(48)])
    mean, pixel_std = data.channel_statistics(pixels)
    assert data.normalization(loaded.train) == {"mean": mean, "pixel_std": pixel_std}
    half = loaded.train.take(torch.arange(0, 48, 2))
    assert torch.equal(torch.cat(list(half.read(torch.arange(24).split(5)))), pixels[::2])
    assert half.labels.tolist() == [0] * 12 + [1] * 12
    prints = {data.load(config.data, 12).fingerprint(), loaded._replace(train=half).fingerprint()}
    assert len(prints) == 2 and loaded.fingerprint() in prints


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_a_broken_file_is_named(config, tmp_path, workers, ending):
    shutil.copytree(folder_of(config), tmp_path / "data")
    config = replace(config, data=f"folder:{tmp_path / 'data'}", workers=workers)
    setup = prepare(config)
    file = tmp_path / "data" / "train" / "light" / f"{'43'[ending == 'jpg']}.{ending}"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(ValueError, match=rf"^{file}: not an image that can be read: ") as error:
        list(setup.train.augmented(torch.arange(36).split(8), config, 0))
        list(setup.validation.read([torch.arange(12)]))
    assert "\n" not in str(error.value)


def test_sixteen_bits_are_not_cut_off(config, tmp_path):
    shutil.copytree(folder_of(config), tmp_path / "data")
    Image.fromarray(np.full((20, 20), 40000, np.uint16)).save(tmp_path / "data" / "train" / "dark" / "0.png")
    with pytest.raises(ValueError, match=r"dark/0\.png: not an image .*: expected 8 bits per channel, got .* I;16"):
        prepare(replace(config, data=f"folder:{tmp_path / 'data'}", validation=0.1))


def test_val_is_the_test_set_where_there_is_no_other(config, tmp_path):
    shutil.copytree(folder_of(config), tmp_path / "data")
    (tmp_path / "data" / "test").rename(tmp_path / "data" / "val")
    assert len(data.load(f"folder:{tmp_path / 'data'}", 12).test.labels) == 12
    shutil.rmtree(tmp_path / "data" / "val" / "dark")
    assert data.load(f"folder:{tmp_path / 'data'}", 12).test.labels.tolist() == [1] * 6
    (tmp_path / "data" / "val" / "grey").mkdir()
    with pytest.raises(ValueError, match=r"val: classes that train does not have: grey"):
        data.load(f"folder:{tmp_path / 'data'}", 12)


def test_settings_that_exclude_each_other(config, tiny):
    with pytest.raises(ValueError, match=r"^crop: streamed images are cut at random by crop_area, got 2 pixels"):
        prepare(replace(config, crop=2))
    with pytest.raises(ValueError, match=r"^size: images are resized of folder:DIR alone, got 12 for npz:"):
        prepare(replace(tiny, size=12, crop=0))
    with pytest.raises(ValueError, match=r"as in .*\.(png|jpg), got .*; with --size they are resized"):
        prepare(replace(config, size=0))


def test_a_folder_of_one_size_may_hold_jpeg(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 9, 8, 3), dtype=np.uint8)
    for part in ("train", "test"):
        for i, name in enumerate(("a", "b")):
            (tmp_path / part / name).mkdir(parents=True)
            Image.fromarray(pixels[i]).save(tmp_path / part / name / "0.jpg", quality=95)
            Image.fromarray(pixels[i]).save(tmp_path / part / name / "1.png")
    train = data.load(f"folder:{tmp_path}").train
    assert train.pixels.shape == (4, 3, 9, 8) and torch.equal(
        train.pixels[1], torch.from_numpy(pixels[0]).permute(2, 0, 1)
    )
    decoded = np.asarray(Image.open(tmp_path / "train" / "b" / "0.jpg"))
    assert torch.equal(train.pixels[2], torch.from_numpy(decoded.copy()).permute(2, 0, 1))
