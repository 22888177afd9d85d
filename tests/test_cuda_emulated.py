"""The CUDA backend's own kernels, launchers and bindings, compiled by g++ and run on the CPU: see cuda_emulation/.

What this cannot show is what PTX wrappers do on the device (their counterparts are written after NVIDIA's description),
races that a fixed order of threads hides, and speed.
"""

import os

import pytest
import torch
from loss_cases import assert_matches_float64, random_case, run

from robustfast import functional

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
HALF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


pytestmark = pytest.mark.usefixtures("emulated")


# One block takes the first three; the others cross every tile of the margin, of packs and of teams.
@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("dtype", [*TOLERANCE, *HALF])
@pytest.mark.parametrize(
    "n, dim, classes",
    [(1, 1, 2), (33, 17, 6), (64, 128, 10), (600, 41, 13), (600, 40, 150), (90, 24, 520), (70, 2200, 3)],
)
def test_sizes(n, dim, classes, dtype, norm):
    assert_matches_float64(random_case(n, dim, classes, dtype=dtype), "emulated", norm=norm, momentum=0.9)


@pytest.mark.parametrize("classes", [300, 40])
def test_sort_of_more_than_a_tile(classes):
    assert_matches_float64(random_case(9000, 4, classes, dtype=torch.float64), "emulated")


def test_sort_in_three_passes():
    f, g, target, *rest = random_case(30, 4, 66000)
    target[:2] = torch.tensor([0, 65999])
    assert_matches_float64((f, g, target, *rest), "emulated")


@pytest.mark.parametrize("argument", [0, 2, 3, 4])
def test_an_unknown_dtype_is_an_error(argument):
    tensors = list(random_case(40, 8, 5))
    tensors[argument] = tensors[argument].to(torch.int32 if argument != 2 else torch.float32)
    loss = torch.ops.robustfast_emulated.discriminative_loss
    with pytest.raises(ValueError, match="dtype that it does not take"):
        loss(*tensors, [0.5, 3.0, 1.0, 1.0, 0.001, 0.99], None, 2, False, -100)


@pytest.mark.parametrize("n", [40, 700])
def test_order_of_threads_and_blocks_changes_no_bit(n, monkeypatch):
    tensors = random_case(n, 40, 12)
    forward = run(tensors, "emulated")
    monkeypatch.setitem(os.environ, "ROBUSTFAST_EMULATION_ORDER", "reverse")
    backward = run(tensors, "emulated")
    assert all(torch.equal(value, backward[name]) for name, value in forward.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 10), (2, 3, 8, 8), (3, 3, 5, 7), (2, 4, 8, 8), (2, 2, 3, 4, 4), (0, 3, 4, 4)])
@pytest.mark.parametrize("op", ["gaussian_noise", "uniform_noise"])
def test_noise(op, shape, dtype):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    ids = torch.arange(shape[0]) * 3 + 2**33
    layouts = [x, x.contiguous(memory_format=torch.channels_last)] if len(shape) == 4 else [x, x.expand(shape)]
    for layout in (*layouts, x[:1].expand(shape) if shape[0] else x):
        results = []
        for backend in ("reference", "emulated"):
            leaf = layout.clone().requires_grad_()
            noisy = getattr(functional, op)(leaf, 0.4, seed=5, sample_ids=ids, draw=2, backend=backend)
            noisy.backward(layout)
            results.append((noisy.detach(), leaf.grad))
        for expected, actual in zip(*results, strict=True):
            step = HALF.get(dtype, 2e-6)
            torch.testing.assert_close(actual, expected, rtol=step, atol=step)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (3, 3, 5, 7), (2, 4, 4, 4), (2, 1, 4, 8)])
@pytest.mark.parametrize("images_dtype", [torch.uint8, torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_noisy_pair(shape, images_dtype, dtype):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    images = (x * 255).to(torch.uint8) if images_dtype == torch.uint8 else x.to(images_dtype)
    mean, pixel_std = torch.linspace(0.3, 0.6, shape[1]), torch.linspace(0.5, 1.5, shape[1])
    for memory_format in (torch.contiguous_format, torch.channels_last):
        results = []
        for backend in ("reference", "emulated"):
            leaf = images.clone(memory_format=memory_format).requires_grad_(images.is_floating_point())
            views = functional.noisy_pair(leaf, 0.2, mean=mean, pixel_std=pixel_std, seed=9, dtype=dtype,
                                          backend=backend)  # fmt: skip
            if leaf.requires_grad:
                sum((view * x).sum() for view in views).backward()
            results.append([view.detach() for view in views] + [leaf.grad] * leaf.requires_grad)
        for expected, actual in zip(*results, strict=True):
            step = max(HALF.get(actual.dtype, 5e-6), HALF.get(dtype, 0))
            torch.testing.assert_close(actual, expected, rtol=2 * step, atol=2 * step)


def test_words():
    arguments = (2**62 + 12345, 2**40 + 5, 2**32 - 1, 300)
    expected = functional.philox_words(*arguments, backend="reference")
    assert torch.equal(functional.philox_words(*arguments, backend="emulated"), expected)
