"""linear_cross_entropy is F.cross_entropy of F.linear, whoever computes it and however few logits exist at a time."""

import pytest
import torch
import torch.nn.functional as F
from loss_cases import in_float64

from robustfast import cross_entropy
from robustfast.functional import linear_cross_entropy
from robustfast.shards import Block


def own(input, weight, target, bias=None, *, ignore_index=-100, label_smoothing=0.0):
    """This package's way, also where PyTorch has one."""
    block = Block.of(len(weight), None)
    return cross_entropy.cross_entropy(input, target, weight, bias, block, label_smoothing, ignore_index)


def values(function, f, weight, target, bias, **options):
    leaves = [None if t is None else t.detach().requires_grad_() for t in (f, weight, bias)]
    value = function(leaves[0], leaves[1], target, leaves[2], **options)
    (3 * value).backward()
    return [value.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]


def plain(input, weight, target, bias, **options):
    return F.cross_entropy(F.linear(input, weight, bias), target, **options)


def case(n=7, num_classes=13, dim=5, dtype=torch.float64, weight_dtype=None):
    tensors = [torch.randn(*shape, dtype=torch.float64) for shape in ((n, dim), (num_classes, dim), (num_classes,))]
    f, weight, bias = (t.to(d) for t, d in zip(tensors, (dtype, *[weight_dtype or dtype] * 2), strict=True))
    target = torch.randint(num_classes, (n,))
    target[1:2] = -100
    return f, weight, target, bias


WAYS = pytest.mark.parametrize("function", [linear_cross_entropy, own])


@WAYS
@pytest.mark.parametrize("logits", [1, 20, 2**24])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("sizes", [(7, 13, 5), (1, 1, 1), (0, 4, 3), (2, 4, 3)])
def test_equals_cross_entropy_of_the_logits(function, logits, label_smoothing, sizes, monkeypatch):
    monkeypatch.setattr(cross_entropy, "LOGITS", logits)
    f, weight, target, bias = case(*sizes)
    for some_bias in (bias, None):
        actual = values(function, f, weight, target, some_bias, label_smoothing=label_smoothing)
        expected = values(plain, f, weight, target, some_bias, label_smoothing=label_smoothing)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14, equal_nan=True)


@WAYS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, None])
def test_narrow_dtypes_are_added_up_in_float32(function, dtype, weight_dtype):
    f, weight, target, bias = case(300, 700, 40, dtype, weight_dtype)
    value, *grads = values(function, f, weight, target, bias)
    assert value.dtype == torch.float32 and grads[0].dtype == dtype and grads[1].dtype == weight.dtype
    expected = values(plain, *in_float64((f, weight, target, bias)))
    for actual, exact in zip([value, *grads], expected, strict=True):
        error = (actual.double() - exact).abs().max() / exact.abs().max()
        assert error < max(1e-5, torch.finfo(dtype).eps)


@WAYS
def test_nothing_that_counts(function):
    f, weight, _, bias = case()
    value, *grads = values(function, f, weight, torch.full((7,), -100), bias)
    assert value.isnan() and not any(grad.any() for grad in grads)


@WAYS
def test_ignored_samples_may_hold_anything(function):
    f, weight, target, bias = case()
    expected = values(function, f, weight, target, bias, label_smoothing=0.1)
    f[1] = torch.nan
    torch.testing.assert_close(values(function, f, weight, target, bias, label_smoothing=0.1), expected)


@WAYS
def test_a_class_of_probability_zero(function):
    f, weight, target, bias = case()
    bias[3] = -torch.inf
    target = target.masked_fill(target == 3, 4)
    actual, expected = (values(way, f, weight, target, bias) for way in (function, plain))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


@WAYS
def test_backward_twice_and_another_ignore_index(function):
    f, weight, target, bias = case()
    target = target.clamp(min=3).int()
    leaf = f.clone().requires_grad_()
    value = function(leaf, weight, target, bias, ignore_index=3)
    torch.testing.assert_close(value, plain(f, weight, target.long(), bias, ignore_index=3))
    value.backward(retain_graph=True)
    first = leaf.grad.clone()
    value.backward()
    torch.testing.assert_close(leaf.grad, 2 * first)


def test_errors_name_the_argument():
    f, weight, target, bias = case()
    for error, match, arguments, options in [
        (ValueError, r"input: expected shape \(N, D\)", (f[0], weight, target, bias), {}),
        (ValueError, r"weight: expected shape \(13, 5\), got \(13, 4\)", (f, weight[:, 1:], target, bias), {}),
        (ValueError, r"bias: expected shape \(13,\), got \(12,\)", (f, weight, target, bias[1:]), {}),
        (
            ValueError,
            "label_smoothing: expected a number from 0 to 1, got 2",
            (f, weight, target, bias),
            {"label_smoothing": 2},
        ),
        (TypeError, "target: expected torch.int64 or another integer dtype", (f, weight, target.float(), bias), {}),
        (IndexError, r"label 13 at position 0 is outside 0\.\.12", (f, weight, target.clamp(min=13), bias), {}),
    ]:
        with pytest.raises(error, match=match):
            linear_cross_entropy(*arguments, **options)


def test_under_autocast():
    f, weight, target, bias = case(dtype=torch.float32)
    expected = values(linear_cross_entropy, f, weight, target, bias)
    with torch.autocast("cpu", torch.bfloat16):
        actual = values(linear_cross_entropy, f, weight, target, bias)
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02)
