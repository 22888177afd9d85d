"""The noise: known answers, and the same numbers wherever, however and in whatever company they are made."""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import SLOW, USABLE
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from robustfast import functional as F
from robustfast.backends import home, ops
from robustfast.ops import DISTRIBUTIONS

HALVES = [torch.float16, torch.bfloat16]
FLOATING = [torch.float32, torch.float64, *HALVES]
NOISES = [F.gaussian_noise, F.uniform_noise]
# How far normals are from exact ones: GPUs' own logarithm, sine and cosine err by up to 2^-21.
NORMALS_WITHIN = {"reference": 2e-6, "cpu": 2e-6, "emulated": 4e-6, "cuda": 4e-6, "triton": 4e-6}
MEAN, PIXEL_STD = (0.49, 0.48, 0.45), (0.2, 0.25, 0.3)
NORMALIZATION = {"mean": MEAN, "pixel_std": PIXEL_STD}
# Planes of several pieces and a rest that is no multiple of a quad; small planes; more channels than a tile has.
SHAPES = [(3, 3, 41, 37), (2, 5, 3, 3), (2, 1100, 2, 1), (2, 300, 9, 7), (1, 70, 29, 31), (1, 1, 1, 1)]
# For backends that take milliseconds a quad: one and less a sample, planes of whole quads and not, more than two tiles.
SMALL_SHAPES = [(3, 2, 5, 5), (2, 3, 4, 4), (1, 2, 37, 60), (2, 4, 8, 8), (1, 1, 1, 1)]
FLAT_SHAPES = [(5,), (3, 1), (260, 2), (2, 1024), (2, 1025), (2, 2, 3, 4, 4), (0, 3, 4, 4)]
FORMATS = [torch.contiguous_format, torch.channels_last]

# Counter, key -> words: the known answers of Philox4x32-10.
KNOWN = [
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]  # fmt: skip


every_noise = pytest.mark.parametrize("noise", NOISES)


def of_shapes(backends, more=()):
    """A test for each backend and each of its shapes."""
    cases = [(name, shape) for name in backends for shape in [*(SMALL_SHAPES if name in SLOW else SHAPES), *more]]
    return pytest.mark.parametrize(("every_backend", "shape"), cases, indirect=["every_backend"], ids=str)


KERNELS = [name for name in USABLE if name != "reference"]


@pytest.fixture
def backend(every_backend):
    return every_backend


def cut_off(dtype, backend):
    """What Triton's interpreter cuts off bfloat16 where GPUs round."""
    return torch.finfo(dtype).eps if dtype == torch.bfloat16 and backend == "triton" and backend in SLOW else 0


def few(backend, number, fewer):
    """How many numbers a test of this backend makes."""
    return fewer if backend in SLOW else number


def philox(counter, key):
    """Philox4x32-10 in Python's integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        high0, low0 = divmod(c0 * 0xD2511F53, 2**32)
        high1, low1 = divmod(c2 * 0xCD9E8D57, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def box_muller(words):
    """Float64 normals (..., 4) of words (..., 4)."""
    bits = (words >> 8).double()
    u, v = (bits[..., 0::2] + 1) * 2.0**-24, bits[..., 1::2] * 2.0**-24
    radius, angle = (-2 * u.log()).sqrt(), 2 * math.pi * v
    return torch.stack((radius * angle.cos(), radius * angle.sin()), -1).flatten(-2)


def pure(noise, shape, scale=1.0, **arguments):
    """The noise alone."""
    backend = arguments["backend"]
    return noise(torch.zeros(shape, device=home(backend)), scale, clip=None, **arguments)


# ---- words ----


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_oracle_gives_the_known_answers(counter, key, words):
    assert philox(counter, key) == words


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_scalar_philox_gives_the_known_answers(counter, key, words):
    _C = pytest.importorskip("robustfast._C")
    assert tuple(_C.philox4x32(counter, key)) == words


def test_first_known_answer(backend):
    assert tuple(F.philox_words(0, 0, 0, 1, backend=backend)[0].tolist()) == KNOWN[0][2]


@pytest.mark.parametrize(
    ("seed", "sample_id", "draw"),
    [
        (0, 0, 0),
        (2**63 - 1, 2**63 - 1, 2**32 - 1),
        (0x299F31D0A4093822, 0x13198A2E85A308D3, 0x03707344),
        (1 << 32, 1 << 32, 1 << 31),
    ],
)
@pytest.mark.parametrize("quads", [0, 1, 15, 37])
def test_words(backend, seed, sample_id, draw, quads):
    words = F.philox_words(seed, sample_id, draw, quads, backend=backend)
    counters = [(q, sample_id % 2**32, sample_id >> 32, draw) for q in range(quads)]
    key = (seed % 2**32, seed >> 32)
    assert words.dtype == torch.int64 and words.shape == (quads, 4)
    assert list(map(tuple, words.tolist())) == [philox(counter, key) for counter in counters]


def test_many_words_equal_the_reference(kernels):
    arguments = (0x0123456789ABCDEF, 2**40 + 3, 7, few(kernels, 200_003, 3003))
    expected = F.philox_words(*arguments, backend="reference")
    assert torch.equal(F.philox_words(*arguments, backend=kernels).cpu(), expected)


# ---- numbers ----


def test_normals(backend):
    quads = few(backend, 250_000, 2500)
    words = F.philox_words(11, 0, 3, quads, backend=backend)
    normals = pure(F.gaussian_noise, (1, 4 * quads), seed=11, draw=3, backend=backend)
    torch.testing.assert_close(normals.double(), box_muller(words).view(1, -1), rtol=0, atol=NORMALS_WITHIN[backend])


def test_normals_of_a_uniform_next_to_one(backend):
    """Among the words of this sample is one for which u is 1 - 2^-24, where the logarithm is close to 0."""
    words = F.philox_words(11, 1373, 0, 2500, backend=backend)
    assert ((words[:, ::2] >> 8) + 1).max() == 2**24 - 1
    ids = torch.tensor([1373], device=words.device)
    normals = pure(F.gaussian_noise, (1, 10000), seed=11, sample_ids=ids, backend=backend)
    torch.testing.assert_close(normals.double(), box_muller(words).view(1, -1), rtol=0, atol=NORMALS_WITHIN[backend])


def test_uniforms(backend):
    words = F.philox_words(11, 5, 3, 1000, backend=backend)
    ids = torch.tensor([5], device=words.device)
    uniforms = pure(F.uniform_noise, (1, 4000), seed=11, draw=3, sample_ids=ids, backend=backend)
    exact = ((words >> 8).double() + 0.5) * 2.0**-23 - 1
    assert torch.equal(uniforms.double(), exact.view(1, -1))
    assert uniforms.abs().max() < 1


def test_normals_of_extreme_words():
    _C = pytest.importorskip("robustfast._C")
    edge = 2**24 - 1
    radii = [0, 1, 2, 1000, 2**23 - 1, 2**23, 0xB504F2, 0xB504F3, 0xB504F4, edge - 2, edge - 1, edge]
    angles = [(turn + step) % 2**24 for turn in range(0, 2**24, 2**21) for step in (-1, 0, 1)]
    for u, v in itertools.product(radii, angles):
        words = torch.tensor([u << 8 | 0xFF, v << 8 | 0xFF, 0, 0])
        expected = box_muller(words)[:2].tolist()
        assert _C.box_muller(*words[:2].tolist()) == pytest.approx(expected, rel=0, abs=1.2e-6), (u, v)
    assert _C.box_muller(edge << 8, 12345 << 8) == [0, 0]  # u = 1


def test_normals_are_standard_normal(backend):
    x = pure(F.gaussian_noise, (10, few(backend, 100_000, 1000)), seed=1, backend=backend).flatten().double().cpu()
    n = x.numel()
    assert abs(x.mean()) < 4 / n**0.5
    assert abs(x.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((x**3).mean()) < 4 * (15 / n) ** 0.5
    assert abs((x**4).mean() - 3) < 4 * (96 / n) ** 0.5
    assert distance(torch.special.ndtr(x)) < 1.95 / n**0.5


def test_uniforms_are_uniform(backend):
    x = pure(F.uniform_noise, (10, few(backend, 100_000, 1000)), seed=1, backend=backend).flatten().double().cpu()
    n = x.numel()
    assert abs(x.mean()) < 4 * (1 / 3 / n) ** 0.5
    assert distance((x + 1) / 2) < 1.95 / n**0.5


def distance(probability):
    """Kolmogorov's distance of a sample's distribution function, given at the sample, from its empirical one."""
    ordered = probability.sort().values
    return (ordered - (torch.arange(ordered.numel()) + 0.5) / ordered.numel()).abs().max()


@every_noise
def test_elements_samples_draws_and_seeds_are_uncorrelated(noise, backend):
    n = few(backend, 40_000, 2000)
    rows = [*pure(noise, (2, n), seed=1, backend=backend)]  # samples 0 and 1
    rows += [pure(noise, (1, n), seed=1, draw=1, backend=backend)[0], pure(noise, (1, n), seed=2, backend=backend)[0]]
    rows += [rows[0].roll(shift) for shift in (1, 2, 3)]
    correlation = torch.corrcoef(torch.stack(rows)) - torch.eye(len(rows), device=rows[0].device)
    assert correlation.abs().max() < 4.5 / n**0.5


# ---- a value depends on seed, sample id, draw and position alone ----


@every_noise
def test_split_of_the_batch_changes_no_bit(noise, backend):
    x = torch.rand(7, 3, *few(backend, (23, 19), (5, 3)), device=home(backend))
    ids = torch.tensor([4, 2**40, 0, 7, 7, 1, 2**63 - 1], device=x.device)
    whole = noise(x, 0.1, seed=3, draw=9, sample_ids=ids, backend=backend)
    parts = [slice(0, 1), slice(1, 5), slice(5, 7)]
    again = [noise(x[part], 0.1, seed=3, draw=9, sample_ids=ids[part], backend=backend) for part in parts]
    assert torch.equal(whole, torch.cat(again))


@every_noise
def test_default_ids_count_from_zero(noise, backend):
    x = torch.rand(5, 10, device=home(backend))
    ids = torch.arange(5, device=x.device)
    assert torch.equal(noise(x, 1, seed=2, backend=backend), noise(x, 1, seed=2, sample_ids=ids, backend=backend))


@every_noise
@of_shapes(USABLE)
def test_memory_format_changes_no_bit(noise, shape, backend):
    x = torch.rand(shape, device=home(backend))
    plain = noise(x, 0.3, seed=5, backend=backend)
    n, c, h, w = shape
    views = {
        "channels last": x.contiguous(memory_format=torch.channels_last),
        "strided": torch.rand(n, c, h, 2 * w, device=x.device)[..., ::2].copy_(x),
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "batch last": x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    }
    for name, view in views.items():
        noisy = noise(view, 0.3, seed=5, backend=backend)
        assert torch.equal(noisy, plain), name
        assert x.numel() == 1 or noisy.stride() == torch.empty_like(view).stride(), name


@every_noise
@pytest.mark.parametrize("memory_format", FORMATS)
def test_zero_strides(noise, memory_format, backend):
    shape = (4, 3, *few(backend, (17, 13), (5, 3)))
    one = torch.rand(1, *shape[1:], device=home(backend)).contiguous(memory_format=memory_format)
    expanded = [one.expand(shape), one[:, :1].expand(shape), one[:, :, :1, :1].expand(shape)]
    for x in expanded:
        noisy = noise(x, 0.3, seed=5, backend=backend)
        assert torch.equal(noisy, noise(x.contiguous(), 0.3, seed=5, backend=backend))


@pytest.mark.parametrize("shape", [(3, 3, 41, 37), (1, 1, 300, 301), (300, 7)])
def test_threads_change_no_bit(shape, kernels):
    if kernels in SLOW:
        pytest.skip("runs in one thread")
    threads = torch.get_num_threads()
    x = torch.rand(shape, device=home(kernels))
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(F.gaussian_noise(x, 0.3, seed=5, backend=kernels))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@every_noise
@pytest.mark.parametrize("dtype", FLOATING)
def test_noise_is_the_same_in_every_dtype(noise, dtype, backend):
    alone = pure(noise, (2, 1030), 0.7, seed=8, backend=backend)
    x = torch.rand(2, 1030, device=alone.device).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    noisy = noise(x, 0.7, seed=8, clip=None, backend=backend)
    assert noisy.dtype == dtype
    within = {"rtol": cut_off(dtype, backend), "atol": 0}
    torch.testing.assert_close(noisy, (x.to(wide) + alone).to(dtype), **within)
    clipped = noise(x, 0.7, seed=8, clip=(-0.25, 1.5), backend=backend)
    torch.testing.assert_close(clipped, (x.to(wide) + alone).clamp(-0.25, 1.5).to(dtype), **within)


@every_noise
@of_shapes(KERNELS, FLAT_SHAPES)
def test_noise_equals_the_reference(noise, shape, backend):
    x = torch.rand(shape, device=home(backend))
    ids = torch.arange(shape[0], device=x.device) * 3 + 2**35
    expected = noise(x, 0.3, seed=21, draw=4, sample_ids=ids, backend="reference")
    actual = noise(x, 0.3, seed=21, draw=4, sample_ids=ids, backend=backend)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0.5 * NORMALS_WITHIN[backend])


def test_any_shape_and_order_of_dimensions(kernels):
    @settings(max_examples=few(kernels, 40, 10), deadline=None)
    @given(data=st.data())
    def agree(data):
        sizes = data.draw(st.lists(st.integers(0, few(kernels, 9, 4)), min_size=1, max_size=5))
        order = data.draw(st.permutations(range(len(sizes))))
        back = [order.index(d) for d in range(len(sizes))]
        x = torch.rand([sizes[d] for d in order], device=home(kernels)).permute(back)
        step = data.draw(st.integers(1, 2))
        x = x[..., ::step]
        noisy = F.gaussian_noise(x, 0.3, seed=21, backend=kernels)
        expected = F.gaussian_noise(x.contiguous(), 0.3, seed=21, backend="reference")
        torch.testing.assert_close(noisy, expected, rtol=0, atol=0.5 * NORMALS_WITHIN[kernels])
        assert noisy.stride() == torch.empty_like(x).stride()

    agree()


cpu_only = pytest.mark.skipif("cpu" not in USABLE, reason="there are no CPU kernels")

ISA_SCRIPT = """
import sys, torch
from robustfast import _C, functional as F
x = torch.linspace(0, 1, 3 * 2 * 1517).view(2, 3, 41, 37)
out = {"isa": _C.build_info()["instruction_set"], "words": F.philox_words(5, 1, 2, 1000, backend="cpu")}
for layout in (torch.contiguous_format, torch.channels_last):
    y = x.contiguous(memory_format=layout)
    out[f"gaussian {layout}"] = F.gaussian_noise(y, 1, seed=3, clip=None, backend="cpu")
    out[f"uniform {layout}"] = F.uniform_noise(y, 1, seed=3, clip=None, backend="cpu")
    out[f"half {layout}"] = F.uniform_noise(y.half(), 1, seed=3, backend="cpu")
for shape in ((1, 9 << 20), (3, (3 << 20) + 1)):  # large: with samples aligned, and not
    z = F.uniform_noise(torch.zeros(shape), 1, seed=3, clip=None, backend="cpu")
    out[f"large {shape}"] = (z.view(torch.int32).long() * torch.arange(z.shape[1])).sum(1)
torch.save(out, sys.argv[1])
"""


@cpu_only
def test_instruction_sets_agree(tmp_path):
    from robustfast import _C

    available = _C.build_info()["instruction_sets"]
    available = available[: available.index(_C.build_info()["instruction_set"]) + 1]
    results = []
    for isa in available:
        environment = os.environ | {"ROBUSTFAST_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run([sys.executable, "-c", ISA_SCRIPT, tmp_path / isa], check=True, env=environment, cwd=tmp_path)
        results.append(torch.load(tmp_path / isa))
        assert results[-1].pop("isa") == isa
    for isa, result in zip(available[1:], results[1:], strict=True):
        for name, value in result.items():
            if name.startswith("gaussian"):  # Box-Muller's polynomials are contracted to FMA where there is FMA
                torch.testing.assert_close(value, results[0][name], rtol=0, atol=1e-6, msg=f"{isa} {name}")
            else:
                assert torch.equal(value, results[0][name]), f"{isa} {name}"
    for name in results[-1]:
        assert len(available) < 3 or torch.equal(results[-1][name], results[-2][name]), f"both with FMA: {name}"


# ---- clip ----


@every_noise
@pytest.mark.parametrize("dtype", FLOATING)
def test_no_noise_gives_the_input_clipped(noise, dtype, backend):
    x = torch.linspace(-2, 2, 1999, device=home(backend)).to(dtype).view(1, -1)
    assert torch.equal(noise(x, 0, seed=1, backend=backend), x.clamp(0, 1))
    assert torch.equal(noise(x, 0, seed=1, clip=None, backend=backend), x)
    assert torch.equal(noise(x, 0.0, seed=1, clip=(-1, -1), backend=backend), torch.full_like(x, -1))


@every_noise
@pytest.mark.parametrize("dtype", FLOATING)
def test_nan_and_inf(noise, dtype, backend):
    x = torch.tensor([[math.nan, math.inf, -math.inf] * 7], dtype=dtype, device=home(backend))
    clipped = torch.tensor([[math.nan, 1, 0] * 7], dtype=dtype, device=x.device)
    torch.testing.assert_close(noise(x, 0.1, seed=1, backend=backend), clipped, equal_nan=True, rtol=0, atol=0)
    unclipped = noise(x, 0.1, seed=1, clip=None, backend=backend)
    torch.testing.assert_close(unclipped, x, equal_nan=True, rtol=0, atol=0)


# ---- half types: noisy_pair of (0, 1) normalization converts and does nothing else ----


def convert(x, dtype):
    """x (any number of floats) as `dtype`, by the CPU kernels."""
    images = x.view(1, 1, 1, -1)
    return F.noisy_pair(images, 0, mean=(0,), pixel_std=(1,), clip=None, seed=0, dtype=dtype, backend="cpu")[0].view(-1)


@cpu_only
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
@pytest.mark.parametrize("half", HALVES)
def test_every_half_is_widened_exactly(half, wide):
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(half)
    torch.testing.assert_close(convert(x, wide), x.to(wide), equal_nan=True, rtol=0, atol=0)


@cpu_only
@pytest.mark.parametrize("half", HALVES)
def test_every_half_survives_a_round_trip(half):
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(half)
    back = F.gaussian_noise(x.view(1, -1), 0, seed=0, clip=None, backend="cpu").view(-1)
    assert torch.equal(back.isnan(), x.isnan())
    kept = ~x.isnan() & (x != 0)  # -0 + 0 = 0
    assert torch.equal(back.view(torch.int16)[kept], x.view(torch.int16)[kept])


@cpu_only
@pytest.mark.parametrize("half", HALVES)
def test_floats_are_rounded_to_nearest_even(half):
    random = torch.randint(-(2**31), 2**31, (2_000_000,), generator=torch.Generator().manual_seed(0))
    # Every half, every midpoint of two halves, and the floats around both.
    halves = torch.arange(2**15).to(torch.int16).view(half).float()
    midpoints = (halves[:-1].double() + halves[1:].double()).div(2).float()
    near = torch.cat((halves, midpoints)).view(torch.int32).long()
    edges = torch.cat([near + step for step in (-1, 0, 1)])
    bits = torch.cat((random, edges, edges ^ -(2**31), torch.arange(2**16)))
    x = bits.to(torch.int32).view(torch.float32)
    torch.testing.assert_close(convert(x, half), x.to(half), equal_nan=True, rtol=0, atol=0)


# ---- noisy_pair ----


def images_of(dtype, shape, device):
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    return images if dtype == torch.uint8 else (images.double() / 255).to(dtype)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("image_dtype", [torch.uint8, *FLOATING])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_pair_is_both_views_normalised(image_dtype, dtype, memory_format, backend):
    shape = (3, 3, *few(backend, (41, 37), (6, 5)))
    images = images_of(image_dtype, shape, home(backend)).contiguous(memory_format=memory_format)
    pair = F.noisy_pair(images, 0.1, **NORMALIZATION, seed=4, draw=1, dtype=dtype, backend=backend)
    wide = torch.promote_types(dtype, torch.float32)
    x = images.to(wide) / 255 if image_dtype == torch.uint8 else images.to(wide)
    noisy = F.gaussian_noise(x, 0.1, seed=4, draw=1, backend=backend)
    mean, pixel_std = (torch.tensor(c, device=x.device).to(wide).view(3, 1, 1) for c in (MEAN, PIXEL_STD))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    rtol = torch.finfo(dtype).eps if dtype in HALVES else tolerance
    for view, expected in zip(pair, (x, noisy), strict=True):
        assert view.dtype == dtype and view.stride() == images.stride()
        torch.testing.assert_close(view, ((expected - mean) / pixel_std).to(dtype), rtol=rtol, atol=tolerance)


@pytest.mark.parametrize("memory_format", FORMATS)
@of_shapes(KERNELS)
def test_pair_equals_the_reference(shape, memory_format, backend):
    images = images_of(torch.uint8, shape, home(backend)).contiguous(memory_format=memory_format)
    channels = torch.linspace(0.2, 0.8, shape[1], device=images.device)
    arguments = {"mean": channels, "pixel_std": channels.flip(0), "seed": 6}
    pair = F.noisy_pair(images, 0.06, **arguments, backend=backend)
    expected = F.noisy_pair(images, 0.06, **arguments, backend="reference")
    for view, other in zip(pair, expected, strict=True):
        torch.testing.assert_close(view, other, rtol=1e-6, atol=2e-6)
        assert view.stride() == images.stride()


def test_pair_of_other_layouts(backend):
    images = images_of(torch.uint8, (2, 3, 9, 7), home(backend))
    expected = F.noisy_pair(images, 0.1, **NORMALIZATION, seed=4, backend=backend)
    for view in (
        images.transpose(2, 3).contiguous().transpose(2, 3),
        images.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3),
    ):
        pair = F.noisy_pair(view, 0.1, **NORMALIZATION, seed=4, backend=backend)
        assert all(map(torch.equal, pair, expected))
        assert pair[0].stride() == pair[1].stride() == torch.empty_like(view).stride()
    gray = images[:, :1].expand(2, 3, 9, 7)
    pair = F.noisy_pair(gray, 0.1, **NORMALIZATION, seed=4, backend=backend)
    assert all(map(torch.equal, pair, F.noisy_pair(gray.contiguous(), 0.1, **NORMALIZATION, seed=4, backend=backend)))


def test_pair_reads_strided_channel_numbers(backend):
    images = images_of(torch.float32, (2, 3, 4, 4), home(backend))
    one = torch.tensor([0.5], device=images.device).expand(3)
    pair = F.noisy_pair(images, 0.1, mean=one, pixel_std=one, seed=4, backend=backend)
    expected = F.noisy_pair(images, 0.1, mean=(0.5,) * 3, pixel_std=(0.5,) * 3, seed=4, backend=backend)
    assert all(map(torch.equal, pair, expected))


# ---- gradients ----


@every_noise
@pytest.mark.parametrize("clip", [(0.0, 1.0), None])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_gradient_of_noise(noise, clip, memory_format, backend):
    x = torch.rand(2, 3, 5, 3, dtype=torch.float64, device=home(backend)).contiguous(memory_format=memory_format)
    x.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: noise(x, 0.4, seed=3, clip=clip, backend=backend), x, fast_mode=backend in SLOW
    )


@pytest.mark.parametrize("memory_format", FORMATS)
def test_gradient_of_pair(memory_format, backend):
    x = torch.rand(2, 3, 5, 3, dtype=torch.float64, device=home(backend)).contiguous(memory_format=memory_format)
    arguments = {**NORMALIZATION, "seed": 3, "dtype": torch.float64, "backend": backend}
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: F.noisy_pair(x, 0.4, **arguments), x, fast_mode=backend in SLOW)


@every_noise
@pytest.mark.parametrize("dtype", FLOATING)
def test_gradient_passes_up_to_the_bounds(noise, dtype, backend):
    x = torch.tensor([[-1.0, 0.0, 0.5, 1.0, 2.0] * 5], dtype=dtype, device=home(backend), requires_grad=True)
    grad = torch.arange(1.0, 26, device=x.device).to(dtype).view(1, -1)
    noise(x, 0, seed=1, backend=backend).backward(grad)
    assert x.grad.dtype == dtype
    assert torch.equal(x.grad, grad * torch.tensor([0, 1, 1, 1, 0] * 5, device=x.device))


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("image_dtype", FLOATING)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_gradient_of_pair_equals_the_reference(image_dtype, dtype, memory_format, kernels):
    shape = (3, 3, *few(kernels, (41, 37), (6, 5)))
    images = images_of(image_dtype, shape, home(kernels)).contiguous(memory_format=memory_format)
    grads = []
    for name in (kernels, "reference"):
        x = images.clone().requires_grad_()
        clean, noisy = F.noisy_pair(x, 0.3, **NORMALIZATION, seed=4, dtype=dtype, backend=name)
        weights = torch.linspace(-1, 1, clean.numel(), device=x.device).view(clean.shape).to(dtype)
        (clean * weights).sum().backward(retain_graph=True)
        (noisy * weights.flip(0)).sum().backward()
        grads.append(x.grad)
    tolerance = {torch.float16: 1e-2, torch.bfloat16: 1e-1}
    atol = max(tolerance.get(image_dtype, 1e-5), tolerance.get(dtype, 1e-5))
    # Where the sum is as near to a bound as normals are to each other, either gradient is right.
    noisy = F.gaussian_noise(images.double(), 0.3, seed=4, clip=None, backend="reference")
    clear = torch.minimum(noisy.abs(), (noisy - 1).abs()) > 1e-5
    torch.testing.assert_close(grads[0][clear], grads[1][clear], rtol=0, atol=atol)


def test_gradient_of_one_view_alone(backend):
    x = torch.rand(2, 3, 4, 4, device=home(backend), requires_grad=True)
    clean, _ = F.noisy_pair(x, 0.3, **NORMALIZATION, seed=4, backend=backend)
    clean.sum().backward()
    expected = (1 / torch.tensor(PIXEL_STD, device=x.device)).view(3, 1, 1).expand_as(x)
    torch.testing.assert_close(x.grad, expected)


def test_compiled_gradients_are_once_differentiable(kernels):
    x = torch.rand(2, 8, device=home(kernels), requires_grad=True)
    (grad,) = torch.autograd.grad(
        F.gaussian_noise(x, 0.3, seed=4, backend=kernels).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once differentiable"):
        grad.sum().backward()


def test_reference_is_twice_differentiable():
    x = torch.rand(2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: F.gaussian_noise(x, 0.3, seed=4, backend="reference").square(), x)


def test_integer_images_need_no_gradient(backend):
    images = images_of(torch.uint8, (2, 3, 4, 4), home(backend))
    mean = torch.tensor(MEAN, device=images.device)
    assert not any(
        view.requires_grad
        for view in F.noisy_pair(images, 0.1, mean=mean, pixel_std=PIXEL_STD, seed=0, backend=backend)
    )


# ---- as PyTorch ops ----


@pytest.mark.parametrize("memory_format", FORMATS)
def test_opcheck(kernels, memory_format):
    device = home(kernels)
    seed, ids = torch.tensor(7, device=device), torch.tensor([5, 1], device=device)
    x = torch.rand(2, 3, 5, 7, device=device).contiguous(memory_format=memory_format)
    mean, pixel_std = torch.tensor(MEAN, device=device), torch.tensor(PIXEL_STD, device=device)
    library = ops(kernels)
    each = torch.tensor([0.1, 0.2], device=device)
    one, own = (0.1, None, seed, ids, 3, None, 0.0, 1.0), (0.0, each, seed, None, 0, ids, -math.inf, math.inf)
    for distribution in range(len(DISTRIBUTIONS)):
        opcheck(library.add_noise, (x, distribution, *one))
        opcheck(library.add_noise, (x.half(), distribution, *own))
        opcheck(library.add_noise, (x.transpose(2, 3), distribution, *own))
        opcheck(library.add_noise, (x[:1].expand(2, 3, 5, 7), distribution, *one))
        opcheck(library.add_noise_out, (x, distribution, *one, torch.empty_like(x)))
        opcheck(library.add_noise_backward, (x, x, distribution, *one))
    for images, dtype in ((x, torch.float64), ((x * 255).byte(), torch.bfloat16)):
        opcheck(library.noisy_pair, (images, mean, pixel_std, *one, dtype))
        views = torch.empty_like(images, dtype=dtype), torch.empty_like(images, dtype=dtype)
        opcheck(library.noisy_pair_out, (images, mean, pixel_std, *own, *views))
    opcheck(library.noisy_pair_backward, (x, x, x, pixel_std, *own))
    opcheck(library.philox_words, (seed, 1, 2, 9))


def test_compile_without_a_break(kernels):
    def views(images, x, seed):
        clean, noisy = F.noisy_pair(images, 0.1, **NORMALIZATION, seed=seed, backend=kernels)
        return clean * F.gaussian_noise(x, 0.2, seed=seed, backend=kernels) + F.uniform_noise(
            noisy, 0.3, seed=3, backend=kernels
        )

    device = home(kernels)
    images = images_of(torch.uint8, (2, 3, 5, 7), device)
    seed = torch.tensor(7, device=device)
    compiled = torch.compile(views, backend="aot_eager", fullgraph=True)
    results, grads = [], []
    for function in (views, compiled):
        x = torch.linspace(0, 1, images.numel(), device=device).view(images.shape).requires_grad_()
        results.append(function(images, x, seed))
        results[-1].sum().backward()
        grads.append(x.grad)
    assert torch.equal(*results) and torch.equal(*grads)


# ---- seeds ----


@every_noise
def test_manual_seed_governs_noise_without_a_seed(noise, backend):
    x = torch.zeros(3, 100, device=home(backend))
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append([noise(x, 1, clip=None, backend=backend) for _ in range(2)])
    assert torch.equal(draws[0][0], draws[1][0]) and torch.equal(draws[0][1], draws[1][1])
    assert not torch.equal(draws[0][0], draws[0][1]) and not torch.equal(draws[0][0], draws[2][0])


@every_noise
@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_seed_in_a_tensor(noise, seed, backend):
    x = torch.rand(3, 50, device=home(backend))
    tensor = torch.tensor(seed, device=x.device)
    assert torch.equal(noise(x, 1, seed=tensor, backend=backend), noise(x, 1, seed=seed, backend=backend))


def test_seeds_ids_and_draws_matter(backend):
    base = {"seed": 1, "draw": 2, "sample_ids": torch.tensor([3], device=home(backend))}
    changes = [{}, {"seed": 1 + (1 << 32)}, {"draw": 3}, {"sample_ids": base["sample_ids"] + (1 << 32)}]
    values = [pure(F.gaussian_noise, (1, 64), **(base | change), backend=backend) for change in changes]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(values, 2))


# ---- empty batches, errors ----


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (2, 0, 4, 4)])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_empty(shape, memory_format, backend):
    x = torch.rand(shape, device=home(backend)).contiguous(memory_format=memory_format).requires_grad_()
    for noise in NOISES:
        noisy = noise(x, 0.1, seed=0, backend=backend)
        noisy.sum().backward()
        assert noisy.shape == x.grad.shape == shape
    channels = (0.5,) * shape[1]
    for view in F.noisy_pair(x, 0.1, mean=channels, pixel_std=channels, seed=0, backend=backend):
        assert view.shape == shape
        view.sum().backward(retain_graph=True)


X = torch.rand(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("name", "error", "arguments"),
    [
        ("seed", ValueError, {"seed": -1}),
        ("seed", ValueError, {"seed": 2**63}),
        ("seed", ValueError, {"seed": 1.5}),
        ("seed", ValueError, {"seed": torch.tensor(-1)}),
        ("seed", ValueError, {"seed": torch.tensor([1])}),
        ("seed", TypeError, {"seed": torch.tensor(1, dtype=torch.int32)}),
        ("sample_ids", ValueError, {"sample_ids": torch.tensor([0, -1])}),
        ("sample_ids", ValueError, {"sample_ids": torch.tensor([0])}),
        ("sample_ids", TypeError, {"sample_ids": torch.tensor([0.0, 1.0])}),
        ("sample_ids", TypeError, {"sample_ids": [0.0, 1.0]}),
        ("sample_ids", TypeError, {"sample_ids": "01"}),
        ("draw", ValueError, {"draw": -1}),
        ("draw", ValueError, {"draw": 2**32}),
        ("scale", ValueError, {"scale": -0.1}),
        ("scale", ValueError, {"scale": math.inf}),
        ("scale", ValueError, {"scale": math.nan}),
        ("clip", ValueError, {"clip": (1.0, 0.0)}),
        ("clip", ValueError, {"clip": (0.0, math.nan)}),
        ("input", TypeError, {"input": X.int()}),
        ("input", TypeError, {"input": [1.0]}),
        ("input", ValueError, {"input": torch.tensor(1.0)}),
    ],
)
def test_errors_name_the_argument(name, error, arguments, backend):
    arguments = {"input": X, "scale": 0.1, "seed": 0, "backend": backend} | arguments
    x, scale = arguments.pop("input"), arguments.pop("scale")
    with pytest.raises(error, match="^" + ("std" if name == "scale" else name)):
        F.gaussian_noise(x, scale, **arguments)
    with pytest.raises(error, match="^" + ("epsilon" if name == "scale" else name)):
        F.uniform_noise(x, scale, **arguments)
    if x is X:
        with pytest.raises(error, match="^" + ("std" if name == "scale" else name)):
            F.noisy_pair(x, scale, **NORMALIZATION, **arguments)


@pytest.mark.parametrize(
    ("name", "error", "arguments"),
    [
        ("images", TypeError, {"images": X.int()}),
        ("images", ValueError, {"images": X[0]}),
        ("mean", ValueError, {"mean": (0.5,)}),
        ("pixel_std", ValueError, {"pixel_std": torch.ones(2)}),
        ("dtype", TypeError, {"dtype": torch.int32}),
    ],
)
def test_errors_of_pair(name, error, arguments, backend):
    arguments = {"images": X, "std": 0.1, **NORMALIZATION, "seed": 0, "backend": backend} | arguments
    with pytest.raises(error, match=f"^{name}"):
        F.noisy_pair(arguments.pop("images"), arguments.pop("std"), **arguments)


@pytest.mark.parametrize("arguments", [(0, -1, 0, 1), (0, 0, 2**32, 1), (0, 0, 0, -1), (-1, 0, 0, 1)])
def test_errors_of_words(arguments, backend):
    with pytest.raises(ValueError, match=r"^seed|^sample_id, draw, quads"):
        F.philox_words(*arguments, backend=backend)
