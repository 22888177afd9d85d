"""The ops that every backend implements: their names, schemas and the shapes of their results stand here alone.

docs/ops.md says what they compute. A backend's library gets all of them by :func:`define`; implementations are
registered before or after that, by C++ or by :meth:`torch.library.Library.impl`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from robustfast.checks import wide_dtype
from robustfast.reference import Terms


class Op(NamedTuple):
    schema: str
    fake: Callable[..., Any]  # results without values, for torch.compile and opcheck


def discriminative_loss(input: Tensor, input_noise, target, weight: Tensor, *rest) -> tuple[Tensor, ...]:
    n, dim = input.shape
    rows = torch.sym_min(n, weight.shape[0])
    wide = wide_dtype(input)
    return (
        input.new_empty((), dtype=wide),  # loss
        input.new_empty(len(Terms._fields) - 1, dtype=wide),  # terms
        input.new_empty(n, dtype=torch.int32),  # slot
        input.new_empty((2, n), dtype=wide),  # pull
        input.new_empty((3, rows, dim), dtype=wide),  # tables
        input.new_empty((2, rows), dtype=torch.int32),  # classes
        input.new_empty(rows, dtype=wide),  # boundary_bias
    )


def gradients(
    input: Tensor, num_classes: int, weight_dtype: torch.dtype, bias_dtype: torch.dtype, wanted: Sequence[bool]
) -> tuple[Tensor, ...]:
    """Memory for the gradients of input, input_noise, weight and bias; (0,) in the same dtype where not wanted."""
    n, dim = input.shape
    results = (
        ((n, dim), input.dtype),
        ((n, dim), input.dtype),
        ((num_classes, dim), weight_dtype),
        ((num_classes,), bias_dtype),
    )
    return tuple(
        input.new_empty(shape if want else (0,), dtype=dtype)
        for (shape, dtype), want in zip(results, wanted, strict=True)
    )


def discriminative_loss_backward(
    grad_loss, input, input_noise, slot, pull, tables, classes, boundary_bias, num_classes, weight_dtype, bias_dtype,
    norm, wanted,
) -> tuple[Tensor, ...]:  # fmt: skip
    return gradients(input, num_classes, weight_dtype, bias_dtype, wanted)


def class_sums(input: Tensor, target, num_classes, ignore_index) -> Tensor:
    return input.new_empty((num_classes, input.shape[1] + 1), dtype=wide_dtype(input))


def class_pulls(input: Tensor, input_noise, target, centroid: Tensor, *rest) -> tuple[Tensor, ...]:
    n = input.shape[0]
    return (
        input.new_empty(n, dtype=torch.int32),  # slot
        centroid.new_empty((2, n)),  # pull
        centroid.new_empty(centroid.shape),  # pull_sum
        centroid.new_empty(2),  # terms
    )


def margin_search(mu: Tensor, *rest) -> tuple[Tensor, Tensor]:
    rows = mu.shape[0]
    return mu.new_empty(rows), mu.new_empty(rows, dtype=torch.int32)


def finish(mu: Tensor, centroid, pull_sum, counts: Tensor, *rest) -> tuple[Tensor, ...]:
    return (
        mu.new_empty(mu.shape),  # mu_grad
        mu.new_empty(mu.shape),  # boundary_grad
        mu.new_empty(counts.shape),  # boundary_bias
        mu.new_empty(counts.shape, dtype=torch.int32),  # winner
        mu.new_empty(len(Terms._fields) - 4),  # terms, but the loss, the variance and its two parts
    )


def add_noise(input: Tensor, *settings) -> Tensor:
    return torch.empty_like(input)


def add_noise_backward(grad: Tensor, input: Tensor, *settings) -> Tensor:
    return torch.empty_like(input)


def noisy_pair(images: Tensor, mean: Tensor, pixel_std: Tensor, *settings) -> tuple[Tensor, Tensor]:
    dtype = settings[-1]
    return torch.empty_like(images, dtype=dtype), torch.empty_like(images, dtype=dtype)


def noisy_pair_backward(grad_clean, grad_noisy, images: Tensor, *settings) -> Tensor:
    return torch.empty_like(images)


def no_result(*settings) -> None:
    pass


def philox_words(seed: Tensor, sample_id, draw, quads) -> Tensor:
    return seed.new_empty((quads, 4))


DISTRIBUTIONS = ("gaussian", "uniform")  # an op's `distribution` is the place here
# robustfast.noise.Noise
_NOISE = (
    "float scale, Tensor? scales, Tensor seed, Tensor? sample_ids, SymInt draw, Tensor? draws, float low, float high"
)
OPS = {
    "discriminative_loss": Op(
        "(Tensor input, Tensor? input_noise, Tensor target, Tensor weight, Tensor? bias, Tensor(a!) centroids, "
        "Tensor(b!) seen, float[] settings, Tensor? scheduled, int norm, bool update_state, int ignore_index) "
        "-> (Tensor loss, Tensor terms, Tensor slot, Tensor pull, Tensor tables, Tensor classes, Tensor boundary_bias)",
        discriminative_loss,
    ),
    "discriminative_loss_backward": Op(
        "(Tensor grad_loss, Tensor input, Tensor? input_noise, Tensor slot, Tensor pull, Tensor tables, "
        "Tensor classes, Tensor boundary_bias, SymInt num_classes, ScalarType weight_dtype, ScalarType bias_dtype, "
        "int norm, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
        discriminative_loss_backward,
    ),
    "class_sums": Op(
        "(Tensor input, Tensor target, SymInt num_classes, int ignore_index) -> Tensor",
        class_sums,
    ),
    "class_pulls": Op(
        "(Tensor input, Tensor? input_noise, Tensor target, Tensor centroid, Tensor sample_share, float[] settings, "
        "Tensor? scheduled, int norm, int ignore_index) "
        "-> (Tensor slot, Tensor pull, Tensor pull_sum, Tensor terms)",
        class_pulls,
    ),
    "margin_search": Op(
        "(Tensor mu, Tensor? weight_c, Tensor? bias_c, Tensor weight, Tensor? bias, Tensor? classes=None, "
        "Tensor? present=None) -> (Tensor score, Tensor winner)",
        margin_search,
    ),
    "finish": Op(
        "(Tensor mu, Tensor centroid, Tensor pull_sum, Tensor counts, Tensor tau, Tensor weight_c, Tensor? bias_c, "
        "Tensor weight_w, Tensor? bias_w, Tensor winner, float[] settings, Tensor? scheduled, int norm) "
        "-> (Tensor mu_grad, Tensor boundary_grad, Tensor boundary_bias, Tensor winner, Tensor terms)",
        finish,
    ),
    "add_noise": Op(f"(Tensor input, int distribution, {_NOISE}) -> Tensor", add_noise),
    "add_noise_out": Op(f"(Tensor input, int distribution, {_NOISE}, Tensor(a!) out) -> ()", no_result),
    "add_noise_backward": Op(f"(Tensor grad, Tensor input, int distribution, {_NOISE}) -> Tensor", add_noise_backward),
    "noisy_pair": Op(
        f"(Tensor images, Tensor mean, Tensor pixel_std, {_NOISE}, ScalarType dtype) -> (Tensor clean, Tensor noisy)",
        noisy_pair,
    ),
    "noisy_pair_out": Op(
        f"(Tensor images, Tensor mean, Tensor pixel_std, {_NOISE}, Tensor(a!) clean, Tensor(b!) noisy) -> ()",
        no_result,
    ),
    "noisy_pair_backward": Op(
        f"(Tensor grad_clean, Tensor grad_noisy, Tensor images, Tensor pixel_std, {_NOISE}) -> Tensor",
        noisy_pair_backward,
    ),
    "philox_words": Op("(Tensor seed, int sample_id, int draw, int quads) -> Tensor", philox_words),
}
STEPS = {"class_sums", "class_pulls", "margin_search", "finish"}  # of the loss

_defined: dict[str, torch.library.Library] = {}  # a library lives as long as this object


def define(name: str) -> torch.library.Library:
    """The library ``torch.ops.<name>`` with all ops defined: made at the first call, the same one afterwards."""
    if name not in _defined:
        library = _defined[name] = torch.library.Library(name, "DEF")
        for op, (schema, fake) in OPS.items():
            library.define(op + schema, tags=(torch.Tag.pt2_compliant_tag,))
            torch.library.register_fake(f"{name}::{op}", fake, lib=library)
    return _defined[name]
