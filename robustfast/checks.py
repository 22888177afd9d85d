"""Argument checks, made once, in front of every backend: each error names the argument, what came and what was due."""

from __future__ import annotations

import math
import operator
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from robustfast.reference import Settings, is_static, readable, transformed

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WAYS_TO_WHOLE = (
    "leave fc to the root's fully_shard and call the loss in its forward, or shard fc with reshard_after_forward=False,"
    " or call fc.unshard() before, or pass .full_tensor() of both with process_group given (docs/pytorch.md)"
)
LABELS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
WIDENED_LABELS = (torch.uint16, torch.uint32)  # with which PyTorch computes little


def wide_dtype(input: Tensor) -> torch.dtype:
    """The dtype of statistics and state: float64 for float64 features, float32 for all others."""
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def integer_labels(target: Tensor) -> Tensor:
    """Labels as the ops take them: those of other integer dtypes are widened."""
    if not isinstance(target, Tensor) or target.dtype in WIDENED_LABELS:
        of_dtype("target", target, (*LABELS, *WIDENED_LABELS))
        return target.long()
    if target.is_floating_point() or target.dim() == 2:
        raise TypeError(
            f"target: expected torch.int64 or another integer dtype and shape (N,), got {target.dtype} of shape"
            f" {tuple(target.shape)}; soft labels are not supported (mixup takes two calls: docs/guide.md)"
        )
    return target


def classifier(fc: Any, input: Tensor, num_classes: int, dim: int) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the classifier of a loss for ``num_classes`` and ``dim`` features."""
    if type(fc) is not nn.Linear or "forward" in fc.__dict__:
        _affine(fc, input)
    own: dict[str, Any] = fc._parameters if type(fc) is nn.Linear else {}
    if "weight" in own and "bias" in own:
        weight, bias = own["weight"], own["bias"]  # where a module itself looks last and slowly
    else:
        weight, bias = fc.weight, fc.bias
    if weight.shape != (num_classes, dim) or not isinstance(input, Tensor) or input.shape[1:] != (dim,):
        of_dtype("input", input, FLOATING)
        if input.dim() == 2 and input.shape[1] != dim:
            raise ValueError(f"dim: the loss was made with dim={dim}, got input of {input.shape[1]} features")
        if weight.dim() == 2 and weight.shape[0] != num_classes:
            raise ValueError(f"num_classes: the loss was made for {num_classes}, got a classifier of {weight.shape[0]}")
    return weight, bias


_affine_modules: WeakSet[nn.Module] = WeakSet()


def _affine(fc, input: Tensor) -> None:
    """A TypeError unless fc is weight and bias and nothing more: a module that computes itself is tried, once."""
    weight: Any = getattr(fc, "weight", None)
    of_another = isinstance(fc, nn.Module) and (nn.parameter.is_lazy(weight) or getattr(weight, "ndim", 2) != 2)
    if of_another or not (isinstance(weight, Tensor) and hasattr(fc, "bias")):
        expected = "an nn.Linear, or an object with weight (num_classes, dim) and bias (num_classes,) or None"
        raise TypeError(f"fc: expected {expected}, got {type(fc).__name__}")
    if not isinstance(fc, nn.Module) or fc in _affine_modules or torch.compiler.is_compiling() or transformed():
        return
    if input.dim() != 2 or not len(input):
        return
    if type(fc).forward is not nn.Linear.forward or "forward" in fc.__dict__:
        bias: Any = 0 if fc.bias is None else fc.bias
        some = input[:4].detach().to(weight.dtype)
        with torch.no_grad():
            logits, affine = fc(some).float(), (some @ weight.T + bias).float()
        off = float((logits - affine).abs().max() / affine.abs().max().clamp(min=1e-30))
        if not off < 0.05:
            raise TypeError(
                f"fc: expected a classifier that is input @ weight.T + bias, got {type(fc).__name__}, whose logits are"
                f" off by {off:.2g} of the largest; functional.discriminative_loss takes the weight and bias of the"
                " affine classifier that the margin is meant for"
            )
    _affine_modules.add(fc)


def discriminative_loss(input, input_noise, target, weight, bias, centroids, seen, least: int = 2) -> Tensor:
    """The target of a batch as the ops take it. ``least`` classes at least, or fewer where others have them."""
    if not torch.compiler.is_compiling() and _fit(input, input_noise, target, weight, bias, centroids, seen, least):
        return target
    target = integer_labels(target)
    of_dtype("input", input, FLOATING)
    if input.dim() != 2:
        raise ValueError(f"input: expected shape (N, D), got {tuple(input.shape)}")
    n, dim = input.shape
    if input_noise is not None:
        _like("input_noise", input_noise, (input.dtype,), (n, dim), input)
    _like("target", target, LABELS, (n,), input)
    _whole("weight", weight)
    of_dtype("weight", weight, FLOATING)
    if weight.dim() != 2 or weight.shape[0] < least:
        raise ValueError(f"weight: expected shape (K, D) with at least {least} classes, got {tuple(weight.shape)}")
    classes = weight.shape[0]
    of_shape("weight", weight, (classes, dim), input)
    if bias is not None:
        _whole("bias", bias)
        _like("bias", bias, FLOATING, (classes,), input)
    wide = wide_dtype(input)
    if centroids.dtype != wide and centroids.dtype in FLOATING:
        given = f"got {centroids.dtype} beside {input.dtype} features"
        call = "double" if wide == torch.float64 else "float"
        raise TypeError(f"centroids: expected {wide}, {given}; call .{call}() on the loss")
    _like("centroids", centroids, (wide,), (classes, dim), input)
    _like("seen", seen, (torch.bool,), (classes,), input)
    if not (centroids.is_contiguous() and seen.is_contiguous()):
        raise ValueError("centroids, seen: expected contiguous tensors, which the step can write to")
    return target


def _fit(input, input_noise, target, weight, bias, centroids, seen, least: int) -> bool:
    """Whether one look at all of them finds nothing to complain of or to convert; what there is, others find and name.

    A small batch's step is so short that looking at one after the other is a noticeable part of it.
    """
    try:
        dtype, shape, device, table = input.dtype, input.shape, input.device, weight.shape
        (n, dim), (classes, width) = shape, table
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return (
            dtype in FLOATING
            and weight.dtype in FLOATING
            and target.dtype in LABELS
            and centroids.dtype == wide
            and seen.dtype == torch.bool
            and width == dim
            and classes >= least
            and target.shape == (n,)
            and centroids.shape == table
            and seen.shape == (classes,)
            and target.device == weight.device == centroids.device == seen.device == device
            and centroids.is_contiguous()
            and seen.is_contiguous()
            and not hasattr(weight, "full_tensor")
            and (
                input_noise is None
                or (input_noise.dtype == dtype and input_noise.shape == shape and input_noise.device == device)
            )
            and (
                bias is None
                or (
                    bias.dtype in FLOATING
                    and bias.shape == (classes,)
                    and bias.device == device
                    and not hasattr(bias, "full_tensor")
                )
            )
        )
    except (AttributeError, TypeError, ValueError):  # not a tensor, or not a matrix
        return False


def linear_cross_entropy(input, weight, target, bias, label_smoothing) -> None:
    """Of a batch and the classifier, or the part of it that this rank has."""
    of_dtype("input", input, FLOATING)
    if input.dim() != 2:
        raise ValueError(f"input: expected shape (N, D), got {tuple(input.shape)}")
    of_dtype("target", target, LABELS)
    of_shape("target", target, (input.shape[0],), input)
    _whole("weight", weight)
    of_dtype("weight", weight, FLOATING)
    if weight.dim() != 2:
        raise ValueError(f"weight: expected shape (K, D), got {tuple(weight.shape)}")
    of_shape("weight", weight, (weight.shape[0], input.shape[1]), input)
    if bias is not None:
        of_dtype("bias", bias, FLOATING)
        of_shape("bias", bias, (weight.shape[0],), input)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected a number from 0 to 1, got {label_smoothing!r}")


def loss_settings(settings: Settings, norm: int, ignore_index: int = -100) -> None:
    if norm not in (1, 2):
        raise ValueError(f"norm: expected 1 or 2, got {norm!r}")
    compiling = torch.compiler.is_compiling()
    if compiling or not _all_finite(settings):
        for name, value in zip(Settings._fields, settings, strict=True):
            if not compiling or is_static(value):
                _finite(name, value)
    if not 0 <= settings.momentum <= 1:
        raise ValueError(f"momentum: expected a number from 0 to 1, got {settings.momentum!r}")
    if not isinstance(ignore_index, int) or not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index: expected an int of 64 bits, got {ignore_index!r}")


def _all_finite(settings: Settings) -> bool:
    """One look at all of them; False also where one is no number."""
    try:
        return math.isfinite(sum(settings))
    except TypeError:
        return False


def _finite(name: str, value: float) -> None:
    try:
        finite = math.isfinite(value)
    except TypeError:
        raise TypeError(f"{name}: expected a number, got {value!r}") from None
    if not finite:
        raise ValueError(f"{name}: expected a finite number, got {value!r}")


def whole(name: str, value: Any, least: int) -> int:
    """The value as an int, which NumPy and PyTorch have of types of their own."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an int, got {value!r}") from None
    if number < least:
        raise ValueError(f"{name}: expected at least {least}, got {value!r}")
    return number


def state(centroids: Tensor, seen: Tensor) -> None:
    """Of a step that moves the state: a change of it must show to those who differentiate what they made of it."""
    if not torch.compiler.is_compiling() and (centroids.is_inference() or seen.is_inference()):
        raise ValueError(
            "centroids, seen: expected tensors that were made outside of torch.inference_mode, whose changes autograd "
            "sees, got inference tensors; clone() them outside of it"
        )


def labels(target: Tensor, num_classes: int, ignore_index: int) -> None:
    """IndexError for a label out of range on the CPU, a device assertion (as in F.cross_entropy) elsewhere."""
    if transformed():
        return  # vmap has no values to look at; indexing has errors of its own
    wrong = wrong_labels(target, num_classes, ignore_index)
    if not readable(target):
        torch._assert_async(~wrong.any(), f"target: a label is outside 0..{num_classes - 1}")
    elif wrong.any():
        position = int(wrong.nonzero()[0])
        raise IndexError(
            f"target: label {int(target[position])} at position {position} is outside 0..{num_classes - 1}"
            f" and is not ignore_index ({ignore_index})"
        )


def wrong_labels(target: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """(N,) bool: neither a class nor ignored."""
    labels = target.long()  # both bounds and ignore_index may lie outside of target's own dtype
    return (labels != ignore_index) & ((labels < 0) | (labels >= num_classes))


def _whole(name: str, tensor: Tensor) -> None:
    if hasattr(tensor, "full_tensor"):
        raise TypeError(f"{name}: expected a plain tensor, got a DTensor (FSDP2, tensor parallel); {WAYS_TO_WHOLE}")


def of_dtype(name: str, tensor: Tensor, expected: tuple[torch.dtype, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in expected:
        raise TypeError(f"{name}: expected {' or '.join(map(str, expected))}, got {tensor.dtype}")


def of_shape(name: str, tensor: Tensor, expected: tuple[int, ...], like: Tensor) -> None:
    if tensor.shape != expected:
        raise ValueError(f"{name}: expected shape {tuple(expected)}, got {tuple(tensor.shape)}")
    if tensor.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device}, got one on {tensor.device}")


def _like(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...], like: Tensor) -> None:
    """Both checks at once: of a small batch's step they are a noticeable part."""
    if not (
        isinstance(tensor, Tensor) and tensor.dtype in dtypes and tensor.shape == shape and tensor.device == like.device
    ):
        of_dtype(name, tensor, dtypes)
        of_shape(name, tensor, shape, like)
