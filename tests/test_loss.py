"""What every backend computes: the published code's cases, float64, autograd and the reference."""

import pytest
import torch
from conftest import SLOW
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import (
    GOLDEN,
    RELATIVE,
    assert_close,
    assert_matches_float64,
    golden_steps,
    in_float64,
    random_case,
    rounding,
    run,
)

from robustfast import functional
from robustfast.backends import home


@pytest.fixture
def backend(every_backend):
    return every_backend


@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize("case", GOLDEN)
def test_golden(case, dtype, backend, device):
    for tensors, keywords, expected in golden_steps(case, dtype, device):
        actual = run(tensors, backend, **keywords)
        assert_close(actual, expected, RELATIVE[dtype])
        for state, new in zip(tensors[5:], (actual["centroids"], actual["seen"]), strict=True):
            state.copy_(new)


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("with_noise, with_bias", [(True, True), (False, False)])
def test_gradcheck(norm, with_noise, with_bias, backend, device):
    size = (7, 3, 3) if backend in SLOW else (14, 5, 4)
    f, g, target, weight, bias, centroids, seen = random_case(*size, dtype=torch.float64, device=device)

    def loss(f, g, weight, bias):
        keywords = dict(norm=norm, delta_var=1.0, gamma=0.3, momentum=0.7, update_state=False, backend=backend)
        return functional.discriminative_loss(
            f, g if with_noise else None, target, weight, bias if with_bias else None, centroids, seen, **keywords
        ).loss

    leaves = [t.requires_grad_() for t in (f, g, weight, bias)]
    used = [True, with_noise, True, with_bias]
    used_leaves = [leaf for leaf, use in zip(leaves, used, strict=True) if use]

    def of_used(*tensors):
        given = iter(tensors)
        return loss(*(next(given) if use else leaf for leaf, use in zip(leaves, used, strict=True)))

    assert torch.autograd.gradcheck(of_used, used_leaves, fast_mode=backend in SLOW)


def test_reference_is_twice_differentiable():
    # Class 0 has one sample and is new, so its feature is its own centroid: the norm is taken at 0.
    f, g, target, weight, bias, centroids, seen = random_case(9, 4, 3, dtype=torch.float64)
    target[:] = torch.tensor([0, 1, 1, 1, 1, 2, 2, 2, 2])
    seen[0] = False

    def loss(f, g, weight, bias):
        return functional.discriminative_loss(
            f, g, target, weight, bias, centroids, seen, update_state=False, backend="reference"
        ).loss

    leaves = [t.requires_grad_() for t in (f, g, weight, bias)]
    assert torch.autograd.gradgradcheck(loss, leaves)
    grad = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    second = torch.autograd.grad(sum(part.square().sum() for part in grad), leaves)
    assert all(part.isfinite().all() for part in second)


def test_kernels_say_that_they_are_once_differentiable(backend, device):
    if backend == "reference":
        pytest.skip("the reference is differentiable twice")
    f, *rest = random_case(device=device)
    loss = functional.discriminative_loss(f.requires_grad_(), *rest, backend=backend).loss
    (grad,) = torch.autograd.grad(loss, f, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once differentiable; .* backend='reference'"):
        grad.square().sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("with_noise, with_bias", [(False, True), (True, False), (False, False)])
def test_without_noise_or_bias_and_with_ignored_samples(with_noise, with_bias, dtype, way):
    f, g, target, weight, bias, *state = way.case(dtype=dtype)
    target[::3] = -100
    tensors = (f, g if with_noise else None, target, weight, bias if with_bias else None, *state)
    assert_matches_float64(tensors, way.backend)


@pytest.mark.parametrize("labels", ["one class", "all ignored", "skewed"])
def test_label_distributions(labels, way):
    f, g, target, *rest = way.case()
    fill = {"one class": 4, "all ignored": -100}.get(labels)
    target = torch.full_like(target, fill) if fill is not None else torch.where(target > 6, target, 2)
    assert_matches_float64((f, g, target, *rest), way.backend)


def layouts(tensor):
    """The same values with other strides."""
    if tensor.dim() == 1:
        return {"sliced": torch.stack([tensor, tensor], 1)[:, 0], "strided": tensor.repeat_interleave(3)[::3]}
    wider = torch.cat([tensor, tensor], 1)
    return {
        "transposed": tensor.t().contiguous().t(),
        "sliced": wider[:, : tensor.shape[1]],
        "strided": torch.stack([tensor, tensor], 2)[:, :, 0],
        "rows": tensor.repeat_interleave(2, 0)[::2],
    }


@pytest.mark.parametrize("layout", ["transposed", "sliced", "strided", "rows"])
def test_strides(layout, way):
    tensors = way.case(dtype=torch.float64)
    other = tuple(layouts(t).get(layout, t) for t in tensors[:5]) + tensors[5:]
    assert_close(run(other, way.backend), run(tensors, way.backend), 1e-12)
    assert_matches_float64(other, way.backend)


def test_zero_strides(way):
    f, g, target, weight, bias, *state = way.case(dtype=torch.float64)
    expanded = (
        f[:1].expand_as(f),
        g[:1].expand_as(g),
        target[:1].expand_as(target),
        weight,
        bias[:1].expand_as(bias),
        *state,
    )
    dense = tuple(t.contiguous() for t in expanded)
    assert_close(run(expanded, way.backend), run(dense, way.backend), 1e-12)
    assert_matches_float64(expanded, way.backend)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_label_dtypes(dtype, way):
    tensors = way.case(dtype=torch.float64, num_classes=min(way.num_classes, 100))
    narrow = (*tensors[:2], tensors[2].to(dtype), *tensors[3:])
    assert_close(run(narrow, way.backend), run(tensors, way.backend), 0)


def test_kernel_is_the_reference(backend):
    if backend == "reference":
        pytest.skip("it is what the others are compared with")
    device = "cuda" if home(backend) == "cuda" else "cpu"
    examples = {"triton": 15, "emulated": 50}[backend] if backend in SLOW else 150
    most = 60 if backend in SLOW else 150

    @settings(max_examples=examples, deadline=None)
    @given(
        n=st.integers(0, 40),
        dim=st.integers(1, most),
        classes=st.integers(2, most),
        present=st.integers(1, most),
        norm=st.sampled_from([1, 2]),
        noise=st.booleans(),
        bias=st.booleans(),
        ignored=st.floats(0, 1),
        label=st.sampled_from([torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]),
        delta_dist=st.floats(-4, 6),
        seed=st.integers(0, 2**20),
    )
    def agree(n, dim, classes, present, norm, noise, bias, ignored, label, delta_dist, seed):
        tensors = list(random_case(n, dim, classes, dtype=torch.float64, seed=seed))
        generator = torch.Generator().manual_seed(seed)
        ignore = 255 if label == torch.uint8 else -1
        target = tensors[2] % min(present, torch.iinfo(label).max + 1)  # no label that its dtype cannot hold
        target[torch.rand(n, generator=generator) < ignored] = ignore
        tensors[2] = target.to(label)
        tensors[1], tensors[4] = tensors[1] if noise else None, tensors[4] if bias else None
        keywords = dict(norm=norm, ignore_index=ignore, delta_dist=delta_dist, delta_var=1.0, gamma=0.1, momentum=0.8)
        moved = [None if t is None else t.to(device) for t in tensors]
        assert_close(run(moved, backend, **keywords), run(tensors, "reference", **keywords), 1e-9, absolute=1e-12)

    agree()


# Of the features, the weight and the bias.
MIXED = [
    (torch.float32, torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16, torch.float16),
    (torch.float16, torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.float32, torch.float64, torch.float16),
]


@pytest.mark.parametrize("dtypes", MIXED)
@pytest.mark.parametrize("norm", [1, 2])
def test_narrow_dtypes_against_float64(dtypes, norm, backend, device):
    dtype, weight_dtype, bias_dtype = dtypes
    size = (60, 48, 70) if backend in SLOW else (200, 96, 130)
    options = dict(dtype=dtype, weight_dtype=weight_dtype, bias_dtype=bias_dtype, seed=3, device=device)
    tensors = random_case(*size, **options)
    keywords = dict(norm=norm, delta_var=1.0, gamma=0.1)
    actual = run(tensors, backend, **keywords)
    exact = run(in_float64(tensors), "reference", **keywords)
    assert actual["grad_input"].dtype == actual["grad_input_noise"].dtype == dtype
    assert (actual["grad_weight"].dtype, actual["grad_bias"].dtype) == (weight_dtype, bias_dtype)
    assert actual["loss"].dtype == actual["centroids"].dtype == torch.float32
    for name, value in exact.items():
        if value.dtype == torch.bool:
            assert torch.equal(actual[name], value)
            continue
        result = actual[name].dtype
        rounded = (value.to(result).double() - value).abs().max()  # of the exact result, in its own dtype
        if rounding(result, backend) > torch.finfo(result).eps / 2:
            rounded = torch.finfo(result).eps * value.abs().max()
        error = (actual[name].double() - value).abs().max()
        assert error <= rounded + 1e-5 * value.abs().max(), name


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_weight_and_bias_of_other_dtypes(weight_dtype, bias_dtype, way):
    tensors = way.case(dtype=torch.float16, weight_dtype=weight_dtype, bias_dtype=bias_dtype)
    grads = run(tensors, way.backend)
    assert (grads["grad_weight"].dtype, grads["grad_bias"].dtype) == (weight_dtype, bias_dtype)
    assert_matches_float64(tensors, way.backend)


@pytest.mark.parametrize("skew", [False, True])
def test_runs_agree_to_the_bit(skew, backend, device):
    if backend == "reference":
        pytest.skip("plain PyTorch sums in any order")
    n, dim, classes = (300, 20, 40) if backend in SLOW else (1500, 40, 130)
    tensors = list(random_case(n, dim, classes, seed=5, device=device))
    if skew:  # one class with most of the samples
        tensors[2][: n * 4 // 5] = 3
    first = run(tensors, backend)
    for _ in range(3):
        again = run(tensors, backend)
        assert all(torch.equal(first[name], again[name]) for name in first)
