"""What the noise functions take: numbers or tensors of them, one or each sample's own; buffers; what they refuse."""

import math
import warnings

import numpy as np
import pytest
import torch
import torch._dynamo.utils
from conftest import USABLE

from robustfast import functional as F
from robustfast import noise as arguments
from robustfast.backends import home, ops

NORMALIZATION = {"mean": (0.49, 0.48, 0.45), "pixel_std": (0.2, 0.25, 0.3)}
FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture
def backend(every_backend):
    return every_backend


@pytest.fixture
def device(backend):
    return home(backend)


def noisy_view(images, std, **options):
    return F.noisy_pair(images, std, **NORMALIZATION, **options)[1]


every_noise = pytest.mark.parametrize("noise", [F.gaussian_noise, F.uniform_noise, noisy_view])


# ---- scale and draw in tensors ----


@every_noise
@pytest.mark.parametrize("memory_format", FORMATS)
def test_one_number_in_a_tensor(noise, memory_format, backend, device):
    x = torch.rand(3, 3, 5, 7, device=device).contiguous(memory_format=memory_format)
    expected = noise(x, 0.3, draw=2**32 - 1, seed=4, backend=backend)
    for scale in (torch.tensor(0.3, device=device), torch.tensor([0.1, 0.3], device=device, dtype=torch.float64)[1]):
        for draw in (torch.tensor(2**32 - 1, device=device), torch.tensor([[5, 2**32 - 1]], device=device)[0, 1]):
            assert torch.equal(noise(x, scale, draw=draw, seed=4, backend=backend), expected)
    assert torch.equal(noise(x, 0.3, draw=torch.tensor(2**32 - 1, device=device), seed=4, backend=backend), expected)


@every_noise
@pytest.mark.parametrize("shape", [(5, 3, 4, 4), (5, 3, 3, 5)])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_each_sample_has_its_own(noise, shape, memory_format, backend, device):
    x = torch.rand(shape, device=device).contiguous(memory_format=memory_format).requires_grad_()
    scales = torch.rand(5, 2, device=device)[:, 0]  # strided
    draws, ids = torch.tensor([7, 0, 2**32 - 1, 7, 1], device=device), torch.arange(10, device=device)[::2]
    options = {"seed": 4, "backend": backend}
    together = noise(x, scales, draw=draws, sample_ids=ids, **options)
    (grad,) = torch.autograd.grad(together.square().sum(), x)
    alone, grads = [], []
    for i in range(5):
        one = x.detach()[i : i + 1].requires_grad_()
        alone.append(noise(one, scales[i].item(), draw=draws[i].item(), sample_ids=ids[i : i + 1], **options))
        grads += torch.autograd.grad(alone[-1].square().sum(), one)
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(grad, torch.cat(grads))


def test_one_for_all_beside_one_for_each(backend, device):
    x = torch.zeros(4, 10, device=device)
    draws = torch.arange(4, device=device)
    noisy = F.gaussian_noise(x, torch.tensor(2.0, device=device), draw=draws, clip=None, seed=1, backend=backend)
    expected = F.gaussian_noise(x, torch.full((4,), 2.0, device=device), draw=draws, clip=None, seed=1, backend=backend)
    assert torch.equal(noisy, expected)
    assert torch.equal(F.gaussian_noise(x[:0], draws[:0].float(), draw=draws[:0], seed=1, backend=backend), x[:0])


def test_the_reference_differentiates_by_the_scale():
    x, std = torch.rand(3, 40), torch.tensor([0.1, 0.2, 0.3], requires_grad=True)
    noisy = F.gaussian_noise(x, std, seed=1, backend="reference")
    noise = F.gaussian_noise(torch.zeros(3, 40), 1.0, seed=1, clip=None, backend="reference")
    noisy.sum().backward()
    inside = (noisy > 0) & (noisy < 1)
    torch.testing.assert_close(std.grad, (noise * inside).sum(1))


@every_noise
def test_kernels_refuse_a_scale_that_wants_a_gradient(noise, kernels):
    device = home(kernels)
    std = torch.tensor(0.1, device=device, requires_grad=True)
    x = torch.rand(2, 3, 4, 4, device=device)
    with pytest.raises(ValueError, match=r"^(std|epsilon): .* gives no gradient to it: take backend='reference'"):
        noise(x, std, seed=1, backend=kernels)
    with torch.no_grad():
        noise(x, std, seed=1, backend=kernels)
    noise(x, std.detach(), seed=1, backend=kernels)


def test_nan_gets_no_gradient(backend, device):
    x = torch.tensor([[math.nan, 0.5]], device=device, requires_grad=True)
    F.gaussian_noise(x, 0, seed=1, backend=backend).backward(torch.ones_like(x))
    assert x.grad.tolist() == [[0, 1]]


def test_an_unknown_distribution_is_an_error(kernels):
    device = home(kernels)
    x, seed = torch.rand(2, 8, device=device), torch.tensor(1, device=device)
    with pytest.raises(Exception, match="no such distribution"):
        ops(kernels).add_noise(x, 2, 0.1, None, seed, None, 0, None, 0.0, 1.0)


# ---- what else is taken ----


def test_numbers_of_numpy_and_lists():
    x = torch.rand(3, 10)
    expected = F.gaussian_noise(x, 0.5, seed=3, draw=2, sample_ids=torch.tensor([4, 0, 2]))
    for scale in (np.float64(0.5), np.float32(0.5), np.float16(0.5)):
        for integer in (np.int64, np.uint8, int):
            for ids in ([4, 0, 2], (4, 0, 2), np.array([4, 0, 2]), torch.tensor([4, 0, 2], dtype=torch.int32)):
                noisy = F.gaussian_noise(x, scale, seed=integer(3), draw=integer(2), sample_ids=ids)
                assert torch.equal(noisy, expected)
    assert torch.equal(F.gaussian_noise(x, 1, clip=(np.float32(0), 1), seed=3), F.gaussian_noise(x, 1.0, seed=3))


def test_a_generator_in_the_place_of_a_seed(backend, device):
    x = torch.rand(2, 8, device=device)
    state = torch.get_rng_state()
    first, again, other = (
        F.gaussian_noise(x, 0.1, generator=torch.Generator(device).manual_seed(seed), backend=backend)
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_largest_scale_gives_finite_noise(backend, device):
    x = torch.zeros(1, 200_000 if backend in ("reference", "cpu") else 4000, device=device)
    for noise in (F.gaussian_noise, F.uniform_noise):
        assert noise(x, arguments.LARGEST_SCALE, seed=1, clip=None, backend=backend).isfinite().all()


X = torch.rand(2, 3, 4, 4)


@every_noise
@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "std: expected a number from 0 to 1e\\+37, got 1e\\+300", {"std": 1e300}),
        (ValueError, "std: expected a number from 0 to 1e\\+37, got 1e\\+39", {"std": 1e39}),
        (ValueError, "std: expected a number from 0 to 1e\\+37, got 1000", {"std": 10**400}),
        (TypeError, "std: expected a number or a tensor, got str", {"std": "0.1"}),
        (TypeError, "std: expected a number or a tensor, got NoneType", {"std": None}),
        (TypeError, "std: expected torch.float32 or .*, got torch.int64", {"std": torch.tensor(1)}),
        (ValueError, r"std: expected shape \(\) or, .*, \(2,\), got \(3,\)", {"std": torch.rand(3)}),
        (ValueError, r"std: expected shape \(\) or, .*, \(2,\), got \(2, 1, 1, 1\)", {"std": torch.rand(2, 1, 1, 1)}),
        (ValueError, "std: expected numbers from 0 to 1e\\+37, got -1", {"std": torch.tensor([0.5, -1.0])}),
        (ValueError, "std: expected numbers from 0 to 1e\\+37, got nan", {"std": torch.tensor(math.nan)}),
        (ValueError, "std: expected a tensor on cpu, got one on meta", {"std": torch.rand(2, device="meta")}),
        (ValueError, "draw: expected an int, 0 <= draw < 2\\*\\*32, .*, got 1.5", {"draw": 1.5}),
        (TypeError, "draw: expected torch.int64 or .*, got torch.float32", {"draw": torch.tensor(1.0)}),
        (ValueError, r"draw: expected shape \(\) or, .*, \(2,\), got \(1,\)", {"draw": torch.tensor([1])}),
        (ValueError, "draw: expected numbers from 0 to .*, got 4294967296", {"draw": torch.tensor([1, 2**32])}),
        (ValueError, "draw: expected numbers from 0 to .*, got -1", {"draw": torch.tensor(-1)}),
        (ValueError, r"clip: expected None or \(low, high\) .*, got \(None, 1\)", {"clip": (None, 1)}),
        (ValueError, r"clip: expected None or \(low, high\) .*, got 3", {"clip": 3}),
        (ValueError, r"clip: expected None or \(low, high\) .*, got \(0, 1, 2\)", {"clip": (0, 1, 2)}),
        (ValueError, r"clip: expected None or \(low, high\) .*, got \(0, 1000", {"clip": (0, 10**400)}),
        (ValueError, "generator: .* in the place of a seed, got both", {"generator": torch.Generator()}),
        (TypeError, "sample_ids: expected integers, got list", {"sample_ids": [[1], [2, 3]]}),
    ],
)
def test_errors_name_the_cause(noise, error, message, options):
    options = {"std": 0.1, "seed": 1} | options
    message = message.replace("std", "epsilon") if noise is F.uniform_noise else message
    with pytest.raises(error, match=f"^{message}"):
        noise(X, options.pop("std"), **options)


@pytest.mark.parametrize(
    "keyword, values", [("pixel_std", (0.2, 0, 0.3)), ("pixel_std", (0.2, math.inf, 0.3)), ("mean", (math.nan, 0, 0))]
)
def test_channels_that_would_give_no_numbers(keyword, values):
    with pytest.raises(ValueError, match=rf"^{keyword}: expected finite numbers, .* got \("):
        F.noisy_pair(torch.rand(2, 3, 4, 4), 0.1, **(NORMALIZATION | {keyword: values}))


def test_one_mean_for_all_channels_is_refused():
    for name in NORMALIZATION:
        with pytest.raises(TypeError, match=f"^{name}: expected a number for each of the 3 channels, got 0.5"):
            F.noisy_pair(X, 0.1, **NORMALIZATION | {name: 0.5})


# ---- warnings ----


@pytest.fixture
def unwarned():
    before = arguments._warned.copy()
    arguments._warned.clear()
    yield
    arguments._warned.update(before)


@every_noise
def test_a_scale_of_0_to_255_warns_once(noise, unwarned):
    with pytest.warns(UserWarning, match="(std|epsilon) = 25 is more than the range of 1 .* 0 to 255") as warned:
        F.gaussian_noise(X, 25) if noise is F.gaussian_noise else noise(X, 25)
    assert len(warned) == 1 and warned[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        noise(X, 25)


@pytest.mark.parametrize("images, low, high", [(X * 255 + 1, 1, 255), ((X - 0.5) / 0.2, -2, 2)])
def test_images_beyond_their_range_warn_once(images, low, high, unwarned):
    with pytest.warns(UserWarning, match="images: expected floats from 0 to 1, got") as warned:
        F.noisy_pair(images, 0.1, **NORMALIZATION)
    assert len(warned) == 1 and warned[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        F.noisy_pair(images, 0.1, **NORMALIZATION)


def test_what_is_in_range_warns_not(unwarned):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        F.noisy_pair(X, 1, **NORMALIZATION)
        F.noisy_pair((X * 255).byte(), 1, **NORMALIZATION)
        F.noisy_pair(X[:0], 1, **NORMALIZATION)
        F.gaussian_noise(X, 25, clip=None)
        F.gaussian_noise(X * 255, 25, clip=(0, 255))


# ---- buffers ----


def calls():
    """Functions of (images, out, options) for one tensor each."""
    yield lambda x, out, **options: F.gaussian_noise(x, 0.3, seed=1, out=out, **options)
    yield lambda x, out, **options: F.uniform_noise(x, 0.3, seed=1, out=out, **options)


@pytest.mark.parametrize("call", list(calls()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_out(call, dtype, backend, device):
    x = torch.rand(2, 3, 5, 4, device=device).to(dtype)
    for source in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        expected = call(source, None, backend=backend)
        for out in (
            torch.full_like(x, 7),
            torch.empty_like(x, memory_format=torch.channels_last),
            torch.empty(2, 3, 4, 5, device=device, dtype=dtype).transpose(2, 3),
            torch.empty(2, 3, 5, 8, device=device, dtype=dtype)[..., ::2],
        ):
            version, address, strides = out._version, out.data_ptr(), out.stride()
            assert call(source, out, backend=backend) is out
            assert torch.equal(out, expected) and (out.data_ptr(), out.stride()) == (address, strides)
            assert out._version > version


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_out_of_pair(dtype, backend, device):
    images = torch.randint(256, (2, 3, 5, 4), dtype=torch.uint8, device=device)
    options = NORMALIZATION | {"seed": 1, "dtype": dtype, "backend": backend}
    expected = F.noisy_pair(images, 0.3, **options)
    both = torch.empty(2, 2, 3, 5, 4, device=device, dtype=dtype)
    last = torch.empty(2, 3, 5, 4, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    for out in ((both[0], both[1]), (last, both[0]), (both[0], last), (both[0], torch.empty_like(last)[..., ::1])):
        clean, noisy = F.noisy_pair(images, 0.3, **options, out=out)
        assert clean is out[0] and noisy is out[1]
        assert all(map(torch.equal, out, expected))


@pytest.mark.parametrize("call", list(calls()))
def test_out_has_the_rules_of_autograd(call, backend, device):
    x, out = torch.rand(2, 8, device=device), torch.empty(2, 8, device=device)
    for tensors in ((x.clone().requires_grad_(), out), (x, out.clone().requires_grad_())):
        with pytest.raises(RuntimeError, match=r"^out: functions with out= give no gradient"):
            call(*tensors, backend=backend)
        with torch.no_grad():
            call(*tensors, backend=backend)
    scale = torch.tensor(0.1, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"^out: functions with out= give no gradient"):
        F.gaussian_noise(x, scale, out=out, backend=backend)
    # A buffer that backward needs must not be written in between.
    y = out.clone().requires_grad_()
    loss = (y * out).sum()
    call(x, out, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_out_in_inference_mode(backend, device):
    with torch.inference_mode():
        x = torch.rand(2, 8, device=device)
        out = torch.empty_like(x)
        assert torch.equal(F.gaussian_noise(x, 0.1, seed=1, out=out, backend=backend), out)


@pytest.mark.parametrize(
    ("error", "message", "out"),
    [
        (TypeError, "out: expected torch.float32, got torch.float64", torch.empty(2, 3, 4, 4).double()),
        (TypeError, "out: expected a tensor, got list", [X]),
        (ValueError, r"out: expected shape \(2, 3, 4, 4\), got \(2, 3, 4, 5\)", torch.empty(2, 3, 4, 5)),
        (ValueError, "out: expected a tensor on cpu, got one on meta", torch.empty(2, 3, 4, 4, device="meta")),
        (ValueError, "out: expected elements of their own", torch.empty(1, 3, 4, 4).expand(2, 3, 4, 4)),
        (ValueError, "out: expected memory of its own", X),
    ],
)
def test_errors_of_out(error, message, out):
    with pytest.raises(error, match=f"^{message}"):
        F.gaussian_noise(X, 0.1, out=out)


@pytest.mark.parametrize("out", [X, (X,), (torch.empty_like(X), X), (torch.empty_like(X),) * 3])
def test_errors_of_out_of_pair(out):
    with pytest.raises((TypeError, ValueError), match=r"^out"):
        F.noisy_pair(X, 0.1, **NORMALIZATION, out=out)
    one = torch.empty_like(X)
    with pytest.raises(ValueError, match=r"^out\[1\]: expected memory of its own"):
        F.noisy_pair(X, 0.1, **NORMALIZATION, out=(one, one))


# ---- torch.compile: how many graphs ----


def graphs(function, values, *, dynamic=None, compiler="aot_eager", grad=False):
    """How many graphs the calls take, which give what they give without a compiler."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(function, backend=compiler, fullgraph=True, dynamic=dynamic)
    for value in values:
        x, y = (X.clone().requires_grad_(grad) for _ in range(2))
        result, expected = compiled(x, value), function(y, value)
        assert torch.equal(result, expected)
        if grad:
            result.sum().backward()
            expected.sum().backward()
            assert torch.equal(x.grad, y.grad)
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


CPU_FLOORS = [name for name in ("reference", "cpu") if name in USABLE]
COMPILED_CALLS = [("reference", F.gaussian_noise, True)]
if "cpu" in USABLE:
    COMPILED_CALLS += [("cpu", noise, grad) for noise in (F.gaussian_noise, noisy_view) for grad in (False, True)]


@pytest.mark.parametrize(("floor", "noise", "grad"), COMPILED_CALLS)
def test_epochs_take_two_graphs(floor, noise, grad):
    def epoch(x, draw):
        return noise(x, 0.1, seed=3, draw=draw, backend=floor)

    assert graphs(epoch, range(100), grad=grad) <= 2
    assert graphs(epoch, range(2, 10), dynamic=True, grad=grad) == 1
    assert graphs(epoch, map(torch.tensor, range(10)), grad=grad) == 1


@pytest.mark.parametrize(("floor", "noise", "grad"), COMPILED_CALLS)
def test_a_scheduled_scale_takes_two_graphs(floor, noise, grad):
    def step(x, scale):
        return noise(x, scale, seed=3, draw=1, backend=floor)

    schedule = [0.01 * i for i in range(40)]
    assert graphs(step, schedule, grad=grad) <= 2
    assert graphs(step, schedule[1:], dynamic=True, grad=grad) == 1
    assert graphs(step, map(torch.tensor, schedule[:5]), grad=grad) == 1
    assert graphs(step, [torch.rand(2) for _ in range(5)], grad=grad) == 1


@pytest.mark.skipif(torch.__version__ < (2, 12), reason="older Inductors compile again for each value of a float")
def test_a_schedule_under_inductor():
    if "cpu" not in USABLE:
        pytest.skip("of the kernels")

    def step(x, value):
        return F.gaussian_noise(x, 0.01 * value, seed=3, draw=2, backend="cpu")

    assert graphs(step, [0.5 + i for i in range(8)], compiler="inductor") <= 2


@pytest.mark.parametrize("floor", CPU_FLOORS)
def test_compile_with_out(floor):
    def step(x, out):
        F.gaussian_noise(x, 0.1, seed=3, backend=floor, out=out)
        return out + 1

    out, expected = torch.empty_like(X), F.gaussian_noise(X, 0.1, seed=3, backend=floor)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(X, out), expected + 1)
    assert torch.equal(out, expected)
