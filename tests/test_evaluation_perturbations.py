"""Perturbations: what each does, what it depends on, and what it refuses."""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from evaluated_models import images
from PIL import Image

from robustfast.evaluation import PERTURBATIONS, perturb
from robustfast.evaluation.perturbations import parameters_of
from robustfast.functional import gaussian_noise, uniform_noise


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_depends_on_seed_id_and_draw_alone(name):
    x = images(6, 3, 16)
    ids = torch.tensor([5, 2, 9, 2**40, 0, 7])
    kept = x.clone()
    whole = perturb(x, name, 3, seed=4, sample_ids=ids, draw=2)
    assert torch.equal(x, kept), "the images given are left alone"
    assert whole.shape == x.shape and whole.dtype == x.dtype and whole.min() >= 0 and whole.max() <= 1
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    for batch in order.split(4):
        part = perturb(x[batch], name, 3, seed=4, sample_ids=ids[batch], draw=2)
        torch.testing.assert_close(part, whole[batch], rtol=0, atol=0)
    draws = torch.tensor([2, 2, 0, 1, 2, 5])
    each = perturb(x, name, 3, seed=4, sample_ids=ids, draw=draws)
    assert torch.equal(each[:2], whole[:2]) and torch.equal(
        each[3], perturb(x[3:4], name, 3, seed=4, sample_ids=ids[3:4], draw=1)[0]
    )
    channels_last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(perturb(channels_last, name, 3, seed=4, sample_ids=ids, draw=2), whole)
    again = perturb(x, name, 3, seed=5, sample_ids=ids, draw=2)
    fixed = name in ("down-up", "gaussian-blur", "brightness", "contrast", "jpeg")
    assert torch.equal(again, whole) == fixed
    assert torch.equal(perturb(x, name, 3, seed=4, sample_ids=ids, draw=3), whole) == fixed


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_severity_grows_and_no_images_are_none(name):
    x = images(8, 3, 16)
    moved = [(perturb(x, name, severity) - x).square().mean().item() for severity in (1, 2, 3, 4, 5)]
    assert moved == sorted(moved) and moved[0] > 0
    assert perturb(x[:0], name, 3).shape == (0, 3, 16, 16)
    assert perturb(x.half(), name, 3).dtype == torch.float16 and perturb(x.double(), name, 3).dtype == torch.float64


def test_noise_is_the_packages():
    x, ids = images(), torch.arange(3, 15)
    given = {"seed": 7, "sample_ids": ids, "draw": 5}
    assert torch.equal(perturb(x, "gaussian", std=0.2, **given), gaussian_noise(x, 0.2, **given))
    assert torch.equal(perturb(x, "uniform", epsilon=0.2, **given), uniform_noise(x, 0.2, **given))
    noisy = perturb(x, "requantised", std=0.2, **given)
    assert torch.equal(noisy, (gaussian_noise(x, 0.2, **given) * 255).round() / 255)


def test_authors_parameters_and_combined():
    x = images(4, 3, 80)
    assert torch.equal(perturb(x, "gaussian", "authors"), gaussian_noise(x, 50 / 255, seed=0))
    assert torch.equal(perturb(x, "uniform", "authors"), uniform_noise(x, 50 / 255, seed=0))
    down = F.interpolate(F.interpolate(x, (27, 27), mode="bilinear"), (80, 80), mode="bilinear")
    torch.testing.assert_close(perturb(x, "down-up", "authors"), down)
    both = perturb(x, "combined", "authors")
    assert torch.equal(both, perturb(gaussian_noise(x, 40 / 255, seed=0), "occlusion", patches=20, size=70))
    assert parameters_of("occlusion", "authors", 80, {}) == {"patches": 20, "size": 70}


def test_occlusion_paints_squares_anywhere():
    x = torch.full((400, 1, 6, 5), 0.5)
    one = perturb(x, "occlusion", patches=1, size=2, fill=1.0) == 1
    assert (one.flatten(1).sum(1) == 4).all()
    corners = {(int(rows.min()), int(columns.min())) for rows, columns in (m[0].nonzero().T for m in one)}
    assert corners == {(top, left) for top in range(5) for left in range(4)}
    assert torch.equal(perturb(x, "occlusion", patches=0, size=2), x)
    assert (perturb(x[:, :, :5], "occlusion", patches=1, size=5) == 0).all()


def test_salt_and_pepper_shares():
    changed = perturb(torch.full((1, 1, 400, 400), 0.5), "salt-and-pepper", amount=0.2)
    assert abs((changed == 0).float().mean() - 0.1) < 0.005 and abs((changed == 1).float().mean() - 0.1) < 0.005


@pytest.mark.parametrize("rate", [0.0, 0.3, 4.0, 30.0])
def test_poisson_is_poisson(rate):
    from scipy import stats

    photons = 60.0
    counts = perturb(torch.full((1, 1, 300, 300), rate / photons), "poisson", photons=photons).double() * photons
    assert torch.equal(counts, counts.round()) or (counts - counts.round()).abs().max() < 1e-5
    for k in range(int(rate) + 3):
        share, expected = float((counts.round() <= k).double().mean()), stats.poisson.cdf(k, rate)
        assert abs(share - expected) < 4 * (expected * (1 - expected) / 90_000) ** 0.5 + 1e-12


def test_poisson_by_a_table_is_poisson():
    x = (images(3, 3, 16) * 255).round() / 255
    few = perturb(x, "poisson", photons=300)
    many = torch.cat((x, images(3, 3, 16)))
    assert len(x.unique()) < 1024 < len(many.unique())
    assert torch.equal(perturb(many, "poisson", photons=300)[:3], few)


def test_blurs_keep_constants_and_the_mean():
    flat = torch.full((2, 3, 9, 7), 0.3)
    for name in ("gaussian-blur", "motion-blur"):
        torch.testing.assert_close(perturb(flat, name, 5), flat)
    point = torch.zeros(1, 1, 21, 21)
    point[0, 0, 10, 10] = 1
    blurred = perturb(point, "gaussian-blur", sigma=1.5)
    offset = torch.arange(-10, 11.0)
    variance = (blurred[0, 0].sum(1) * offset**2).sum()
    assert abs(blurred.sum() - 1) < 1e-5 and abs(variance - 1.5**2) < 0.01
    line = perturb(point.expand(200, 1, 21, 21), "motion-blur", length=6)
    torch.testing.assert_close(line.sum((1, 2, 3)), torch.ones(200), rtol=0, atol=1e-5)
    width = (line.sum(2)[:, 0] * offset**2).sum(1), (line.sum(3)[:, 0] * offset**2).sum(1)
    assert (width[0] > width[1] - 1e-4).all(), "the angle is within 45 degrees of the horizontal"
    assert torch.equal(perturb(flat, "gaussian-blur", sigma=0), flat)


def test_jpeg_is_pillows():
    x = images(2, 3, 16)
    file = io.BytesIO()
    pixels = (x[1] * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(file, "jpeg", quality=30)
    expected = torch.from_numpy(np.asarray(Image.open(file)).copy()).permute(2, 0, 1) / 255
    assert torch.equal(perturb(x, "jpeg", quality=30)[1], expected)
    assert perturb(images(), "jpeg", quality=30).shape == (12, 1, 8, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: perturb(x, "fog", 1), "name: expected one of gaussian, .*, got 'fog'"),
        (lambda x: perturb(x, "gaussian"), "gaussian: expected a severity, or std"),
        (lambda x: perturb(x, "gaussian", 6), "severity: expected 1 to 5, 'authors' or None, got 6"),
        (lambda x: perturb(x, "jpeg", "authors"), "severity: the authors have no jpeg"),
        (lambda x: perturb(x, "gaussian", 1, sigma=2), "gaussian: has std, got sigma"),
        (lambda x: perturb(x, "occlusion", "authors"), "size: expected a patch of at most 8 pixels, .* got 70"),
        (lambda x: perturb(x, "occlusion", patches=1, size=2.5), "size: expected a whole number"),
        (lambda x: perturb(x, "down-up", factor=0), "factor: expected 0 < factor <= 1, got 0"),
        (lambda x: perturb(x, "jpeg", quality=0), "quality: expected a whole number from 1 to 100"),
        (lambda x: perturb(images(2, 2), "jpeg", 1), "expected 1 or 3 channels for JPEG, got 2"),
        (lambda x: perturb(x * 2 - 0.5, "gaussian", 1), r"images: expected values in \[0, 1\], got -0.*inside"),
        (lambda x: perturb(x * torch.nan, "gaussian", 1), r"images: expected values in \[0, 1\], got nan"),
        (lambda x: perturb((x * 255).byte(), "gaussian", 1), "images: expected torch.float32 .* got torch.uint8"),
        (lambda x: perturb(x[0], "gaussian", 1), r"images: expected shape \(N, C, H, W\), got \(1, 8, 8\)"),
        (lambda x: perturb(x, "occlusion", 1, seed=-1), "seed: expected an int, 0 <= seed"),
        (lambda x: perturb(x, "gaussian", 1, sample_ids=-torch.arange(12)), "sample_ids: expected ids >= 0, got -11"),
        (lambda x: perturb(x, "occlusion", 1, draw=-1), "draw: expected 0 <= draw"),
        (lambda x: perturb(x, "gaussian", 1, sample_ids=torch.arange(3)), r"sample_ids: expected shape \(12,\)"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(images())
