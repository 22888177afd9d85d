"""Data sets, their splits, and augmentation."""

import io
import shutil
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from robustfast.training import data
from robustfast.training.augment import Placements, draw_placements, place

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 3, 8, 9), dtype=np.uint8)
LABELS = np.array([0, 1, 2, 0, 1, 2])


def save(path, **changes):
    arrays = {"x_train": PIXELS, "y_train": LABELS, "x_test": PIXELS[:3], "y_test": LABELS[:3]} | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return f"npz:{path}"


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    loaded = data.load("digits")
    assert loaded.train.pixels.shape == (1198, 1, 8, 8) and loaded.test.pixels.shape == (599, 1, 8, 8)
    assert loaded.train.pixels.dtype == torch.float32 and loaded.train.labels.dtype == torch.int64
    rows = {image.numpy().tobytes() for part in loaded[:2] for image in part.pixels}
    assert rows == {(image / 16).astype(np.float32).tobytes() for image in load_digits().images}
    shares = loaded.test.labels.bincount() / (loaded.test.labels.bincount() + loaded.train.labels.bincount())
    assert (shares - 1 / 3).abs().max() < 0.005


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_npz_layouts_and_dtypes(tmp_path, layout, dtype):
    x = PIXELS if dtype == np.uint8 else (PIXELS / 255).astype(dtype)
    x = x if layout == "NCHW" else np.moveaxis(x, 1, 3)
    loaded = data.load(save(tmp_path / "a.npz", x_train=x, x_test=x[:3], y_train=LABELS.astype(np.uint8)))
    expected = torch.from_numpy(PIXELS) if dtype == np.uint8 else torch.from_numpy((PIXELS / 255).astype(np.float32))
    torch.testing.assert_close(loaded.train.pixels, expected, rtol=0, atol=0)
    assert loaded.train.labels.tolist() == LABELS.tolist() and loaded.classes == ("0", "1", "2")


def test_npz_grey_images_need_no_channel_axis(tmp_path):
    loaded = data.load(save(tmp_path / "a.npz", x_train=PIXELS[:, 0], x_test=PIXELS[:3, 0]))
    assert loaded.train.pixels.shape == (6, 1, 8, 9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, "no y_test; it holds x_train, y_train, x_test"),
        ({"x_train": PIXELS.astype(np.int16)}, "x_train: expected uint8 or floating images, got int16"),
        ({"x_train": PIXELS / 128}, r"x_train: expected floating images in \[0, 1\]"),
        ({"x_train": np.full(PIXELS.shape, np.nan)}, r"x_train: expected floating images in \[0, 1\], got nan"),
        ({"x_train": PIXELS[:, :, :, :3]}, r"x_train: expected .* where one of the two is 1 or 3, got \(6, 3, 8, 3\)"),
        ({"x_train": PIXELS[:, :2]}, r"x_train: expected .* got \(6, 2, 8, 9\)"),
        ({"x_train": PIXELS[:, 0, 0]}, r"x_train: expected .* got \(6, 9\)"),
        ({"x_train": PIXELS[:5]}, r"y_train: expected as many integers as there are images, .* shape \(5, 3, 8, 9\)"),
        ({"y_train": LABELS.astype(float)}, "y_train: expected as many integers .* got float64"),
        ({"y_train": LABELS[:, None]}, r"y_train: expected .* got int64 \(6, 1\)"),
        ({"y_train": LABELS - 1}, "y_train: expected labels from 0, got -1"),
        ({"y_test": LABELS[:3] + 1}, "y_test: expected labels below the number of classes in training, 3, got 3"),
        ({"y_test": LABELS[:3].astype(np.uint64) + 2**63}, "y_test: expected labels .* 3, got 9223372036854775810"),
        ({"y_train": LABELS * 10**12}, "y_train: expected labels below the number of training images, 6, got 2000000"),
        ({"x_train": PIXELS[:, :, :0]}, "x_train: expected images of at least one pixel, got 0x9"),
        ({"x_train": np.float32(3)}, r"y_train: expected as many integers .* images of shape \(\)"),
        ({"y_train": LABELS * 0, "y_test": LABELS[:3] * 0}, "expected at least 2 classes, got 1"),
        (
            {"x_test": PIXELS[:3, :, :7]},
            r"expected test images like the training images, .*\(3, 8, 9\), got .*\(3, 7, 9\)",
        ),
        ({"x_test": PIXELS[:3] / 255.0}, "expected test images like the training images, torch.uint8"),
        ({"x_test": PIXELS[:0], "y_test": LABELS[:0]}, "y_test: expected .* at least 1"),
        ({"x_train": np.array([{}] * 6)}, "x_train: cannot be read: pickled objects are never loaded"),
    ],
)
def test_npz_errors_name_the_array(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        data.load(save(tmp_path / "a.npz", **changes))


@pytest.mark.parametrize("damage", ["crc", "deflate", "header", "size", "magic"])
def test_damaged_arrays_are_named(tmp_path, damage):
    """x_train.npy inside of the archive with its checksum, its compressed stream, its header or its shape broken."""
    path = tmp_path / "a.npz"
    arrays = {"y_train": LABELS, "x_test": PIXELS[:3], "y_test": LABELS[:3]}
    (np.savez_compressed if damage == "deflate" else np.savez)(path, x_train=PIXELS, **arrays)
    content = path.read_bytes()
    if damage in ("crc", "deflate"):
        place = content.index(PIXELS.tobytes()[:8]) if damage == "crc" else 200
        path.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
    else:
        stream = io.BytesIO()
        np.save(stream, PIXELS)
        member = stream.getvalue()
        broken = {
            "header": member.replace(b"'shape'", b"{shape("),
            "size": member.replace(b"(6, 3, 8, 9), }            ", b"(6, 3, 8, 700000000000), } "),
            "magic": b"text" + member,
        }[damage]
        assert broken != member
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x_train.npy", broken)
            for name, array in arrays.items():
                stream = io.BytesIO()
                np.save(stream, array)
                archive.writestr(f"{name}.npy", stream.getvalue())
    with pytest.raises(ValueError, match=rf"^{path}: x_train: (cannot be read: .|expected)") as error:
        data.load(f"npz:{path}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("labels", [LABELS + 1, np.array([0, 1, 4, 0, 1, 4])])
def test_classes_without_images_are_said(tmp_path, labels):
    missing = "0" if 0 not in labels else "2, 3"
    with pytest.warns(UserWarning, match=rf"a\.npz: no training images of class {missing}; labels count from 0"):
        data.load(save(tmp_path / "a.npz", y_train=labels, y_test=labels[:3]))


@pytest.mark.parametrize("content", [b"", b"no archive at all", b"PK\x03\x04 half an archive"])
def test_a_file_that_is_no_npz(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.npz: expected an \.npz file, as numpy\.savez writes it$"):
        data.load(f"npz:{tmp_path / 'a.npz'}")


def test_a_single_array_is_no_npz(tmp_path):
    np.save(tmp_path / "a.npy", PIXELS)
    with pytest.raises(ValueError, match=r"expected an \.npz file"):
        data.load(f"npz:{tmp_path / 'a.npy'}")


@pytest.mark.parametrize("source", ["mnist", "npz", "npz:", "folder:", "idx:", "zip:a"])
def test_unknown_sources(source):
    with pytest.raises(
        ValueError, match="data: expected digits, npz:FILE, folder:DIR, cifar10:DIR, svhn:DIR or idx:DIR"
    ):
        data.load(source)


@pytest.mark.parametrize("source", ["npz:nowhere.npz", "folder:nowhere"])
def test_missing_sources(source):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        data.load(source)


def write_png(path, array, mode=None):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path)


@pytest.fixture
def folder(tmp_path):
    """Two classes, two grey training images and one test image each."""
    for label, name in enumerate(("cat", "dog")):
        for part, count in (("train", 2), ("test", 1)):
            for index in range(count):
                write_png(tmp_path / part / name / f"{index}.png", PIXELS[2 * label + index, 0])
    return tmp_path


def test_folder_of_grey_images(folder):
    loaded = data.load(f"folder:{folder}")
    assert loaded.classes == ("cat", "dog")
    assert loaded.train.labels.tolist() == [0, 0, 1, 1] and loaded.test.labels.tolist() == [0, 1]
    assert torch.equal(loaded.train.pixels, torch.from_numpy(PIXELS[:4, :1]))


def test_one_colour_image_makes_a_folder_rgb(folder):
    colour = np.moveaxis(PIXELS[5], 0, 2)
    write_png(folder / "train" / "dog" / "9.png", np.concatenate([colour, colour[..., :1]], 2))  # RGBA
    loaded = data.load(f"folder:{folder}")
    assert torch.equal(loaded.train.pixels[-1], torch.from_numpy(PIXELS[5]))
    assert torch.equal(loaded.train.pixels[0], torch.from_numpy(PIXELS[0, :1]).expand(3, -1, -1))


def test_folder_errors_name_the_place(folder):
    write_png(folder / "test" / "cow" / "0.png", PIXELS[0, 0])
    with pytest.raises(ValueError, match="classes that train does not have: cow"):
        data.load(f"folder:{folder}")
    write_png(folder / "train" / "cow" / "0.png", PIXELS[0, 0, :7])
    with pytest.raises(ValueError, match=r"dog.0\.png: expected \(7, 9\) pixels|cow.0\.png: expected \(8, 9\) pixels"):
        data.load(f"folder:{folder}")
    write_png(folder / "train" / "cow" / "0.png", PIXELS[0, 0].astype(np.uint16))
    with pytest.raises(ValueError, match=r"0\.png: expected 8 bits per channel, got 16"):
        data.load(f"folder:{folder}")
    write_png(folder / "train" / "cow" / "0.png", PIXELS[0, 0])
    whole = (folder / "train" / "cow" / "0.png").read_bytes()
    for content in (b"", b"not an image", whole[:30], whole[:60], whole[:-20].replace(b"IDAT", b"IDAX")):
        (folder / "train" / "cow" / "0.png").write_bytes(content)
        with pytest.raises(ValueError, match=r"cow.0\.png: not an image that can be read: "):
            data.load(f"folder:{folder}")


def test_sixteen_bits_of_colour_are_not_cut_to_eight(folder):
    """Pillow writes no such file, and reads it as RGB of 8 bits."""
    path = folder / "train" / "dog" / "0.png"
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 9, 8, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(8 * (1 + 54)))),
              (b"IEND", b"")]  # fmt: skip
    body = b"".join(
        struct.pack(">I", len(rest)) + name + rest + struct.pack(">I", zlib.crc32(name + rest)) for name, rest in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    with pytest.raises(ValueError, match=rf"^{path}: expected 8 bits per channel, got 16$"):
        data.load(f"folder:{folder}")


def test_a_huge_image_is_not_decoded(folder):
    from PIL import Image

    path = folder / "train" / "cat" / "0.png"
    Image.new("1", (20000, 20000)).save(path)
    with pytest.raises(ValueError, match=rf"^{path}: not an image that can be read: .*decompression bomb"):
        data.load(f"folder:{folder}")


@pytest.mark.parametrize("size", [0, 12])
def test_files_that_are_left_out_are_said(folder, size):
    for name in ("a.gif", "b.gif", "c.gif", "d.gif", "e.TXT"):
        (folder / "train" / "dog" / name).touch()
    with pytest.warns(UserWarning, match=r"train.dog: a\.gif, b\.gif, c\.gif and 2 more left out: not named \*\.png"):
        assert len(data.load(f"folder:{folder}", size).train.labels) == 4


@pytest.mark.parametrize("size", [0, 12])
def test_hidden_files_and_folders_are_passed_over(folder, size):
    """As macOS and notebooks leave them beside images and classes."""
    for part in ("train", "test"):
        (folder / part / ".ipynb_checkpoints").mkdir()
    (folder / "train" / "dog" / "._0.png").write_bytes(b"no image")
    (folder / "train" / "dog" / ".DS_Store").touch()
    loaded = data.load(f"folder:{folder}", size)
    assert loaded.classes == ("cat", "dog") and len(loaded.train.labels) == 4


@pytest.mark.parametrize("size", [0, 12])
def test_a_class_without_training_images_is_named(folder, size):
    (folder / "train" / "cow").mkdir()
    with pytest.raises(ValueError, match=r"cow: expected images \*\.png or \*\.jpg, found none"):
        data.load(f"folder:{folder}", size)


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_folder_without_its_parts_is_named(folder, part):
    shutil.rmtree(folder / part)
    with pytest.raises(FileNotFoundError, match=rf"^{folder}: expected folders train and test .*, no {part}$"):
        data.load(f"folder:{folder}")


def test_fingerprint_sees_every_pixel_and_label(tmp_path):
    changed = PIXELS.copy()
    changed[5, 2, 7, 8] ^= 1
    sources = [{}, {"x_train": changed}, {"y_train": LABELS[[0, 1, 2, 0, 2, 1]]}, {"x_test": PIXELS[3:]}]
    prints = [data.load(save(tmp_path / "a.npz", **changes)).fingerprint() for changes in (*sources, {})]
    assert len(set(prints)) == len(sources) and prints[0] == prints[-1]


@given(st.lists(st.integers(4, 30), min_size=2, max_size=5), st.floats(0.2, 0.8), st.integers(0, 2**63 - 1))
def test_stratified_split(counts, share, seed):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    rest, held_out = data.stratified_split(labels, share, seed)
    assert torch.cat([rest, held_out]).sort().values.tolist() == list(range(len(labels)))
    assert rest.tolist() == sorted(rest.tolist()) and held_out.tolist() == sorted(held_out.tolist())
    wanted = (share * torch.tensor(counts)).round().long()
    assert labels[held_out].bincount(minlength=len(counts)).tolist() == wanted.tolist()


def test_splits_depend_on_the_seed_alone():
    labels = torch.arange(100) % 4
    first, again, other = (data.stratified_split(labels, 0.3, seed)[1].tolist() for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_a_split_needs_both_sides(share):
    with pytest.raises(ValueError, match="cannot hold out"):
        data.stratified_split(torch.arange(10) % 2, share, 0)


def test_channel_statistics():
    mean, std = data.channel_statistics(torch.from_numpy(PIXELS))
    np.testing.assert_allclose(mean, (PIXELS / 255).mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, (PIXELS / 255).std((0, 2, 3)), rtol=1e-12)
    assert data.channel_statistics(torch.full((2, 1, 3, 3), 0.5)) == ((0.5,), (1.0,))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_place_is_pad_crop_mirror(dtype):
    images, padding = torch.from_numpy(PIXELS).to(dtype), 2
    places = Placements(torch.tensor([0, 1, 2, 3, 4, 2]), torch.tensor([4, 0, 2, 1, 3, 2]), torch.arange(6) % 2 == 1)
    for image, placed, (top, left, mirrored) in zip(
        images, place(images, places, padding), zip(*places, strict=True), strict=True
    ):
        crop = F.pad(image, (padding,) * 4)[:, top : top + 8, left : left + 9]
        assert torch.equal(placed, crop.flip(2) if mirrored else crop)
    assert torch.equal(
        place(images[2:4], places.take(torch.tensor([2, 3])), padding), place(images, places, padding)[2:4]
    )


def test_placements_are_uniform():
    places = draw_placements(5000, 1, True, torch.Generator().manual_seed(0))
    corners = (3 * places.top + places.left).bincount(minlength=9)
    assert len(corners) == 9 and (corners / 5000 - 1 / 9).abs().max() < 0.02
    assert abs(places.mirrored.float().mean() - 0.5) < 0.02
    still = draw_placements(50, 0, False, torch.Generator().manual_seed(0))
    assert not any(part.any() for part in still)
