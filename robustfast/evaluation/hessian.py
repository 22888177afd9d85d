"""Curvature of the loss in input space, per image: l(x) is the cross entropy of one image, H its Hessian in x.

Pixels count in [0, 1] unless ``pixel_std`` is given: then in units of x / pixel_std, as normalised images have them.
The published estimate (:func:`curvature`) depends on its step where the network is piecewise linear, because the step
crosses kinks of the ReLUs; the exact spectrum (:func:`input_hessian_spectrum`) does not see them at all, and the
curvature of the loss smoothed by noise (:func:`smoothed_trace`) counts them at a scale that it names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from robustfast.evaluation.models import Model, above_zero, in_batches, logits_of, positive
from robustfast.functional import gaussian_noise, uniform_noise
from robustfast.noise import check_channels

JACOBIAN_BYTES = 2**28  # of the Jacobians held at a time; beyond it classes are taken in chunks


class Estimate(NamedTuple):
    """A mean over draws of the noise and its standard error, float64 (N,) each."""

    value: Tensor
    standard_error: Tensor


def curvature(
    model: Model, images: Tensor, labels: Tensor, *, draws: int = 20, step: float = 1e-2,
    pixel_std: Sequence[float] | None = None, seed: int = 0, sample_ids: Tensor | None = None, batch_size: int = 256,
) -> Tensor:  # fmt: skip
    """The published estimate: mean_j ||(grad l(x + step g_j) - grad l(x)) / step||^2, g_j ~ N(0, I).

    It tends to ||H||_F^2 where l is smooth on the scale of the step. l is the loss of one image: the published notebook
    takes the mean over the batch, which divides the result by the square of the batch's size.

    Args:
        model: maps images (N, C, H, W) in [0, 1] to logits (N, K), differentiably.
        images, labels: (N, C, H, W) floating in [0, 1], and their classes (N,).
        draws: g_j is draw j of the noise with this seed and these ids.
        step: h, in units of the images, or of x / pixel_std where that is given, as in the paper.
        pixel_std: the channels' deviations: the result is in units of the normalised pixels.

    Returns:
        float64 (N,).

    Raises:
        TypeError, ValueError: an argument or what the model returns is not as described.
    """
    above_zero(step=step)
    positive(draws=draws)

    def measure(images: Tensor, labels: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        scale = _pixel_scale(pixel_std, images)
        center = _gradient(model, images, labels)
        total = torch.zeros(len(images), dtype=torch.float64, device=images.device)
        for draw in range(draws):
            moved = images + step * scale * _normals(images, seed, ids, draw)
            total += (((_gradient(model, moved, labels) - center) * scale).double() / step).square().sum((1, 2, 3))
        return (total / draws,)

    return in_batches(measure, model, images, labels, sample_ids, batch_size)[0]


def input_hessian_spectrum(model: Model, images: Tensor, labels: Tensor, *, batch_size: int = 64) -> Tensor:
    """Eigenvalues of H, exact for networks that are piecewise linear in x (ReLU, max pooling, batch norm at rest).

    There H = J^T A J with the logits' Jacobian J (K, C*H*W) and A = diag(p) - p p^T, which is B B^T for B =
    diag(sqrt p) - p sqrt(p)^T; its non-zero eigenvalues are those of the K x K matrix B^T J J^T B. H does not depend on
    the label. For other networks this is the Gauss-Newton part of H. Trace: the sum; ||H||_F^2: the sum of squares.

    Returns:
        float64 (N, K), descending, in units of the images.

    Raises:
        TypeError, ValueError: an argument or what the model returns is not as described.
    """

    def measure(images: Tensor, labels: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        logits, gram = jacobian_gram(lambda x: logits_of(model, x, labels), images)
        return (_spectrum(logits, gram).flip(1).clamp(min=0),)

    return in_batches(measure, model, images, labels, None, batch_size)[0]


def _spectrum(logits: Tensor, gram: Tensor) -> Tensor:
    """The eigenvalues (N, K), ascending, of B^T G B for the Gram matrices G (N, K, K) of the logits' gradients."""
    p = logits.double().softmax(1)
    b = torch.diag_embed(p.sqrt()) - p.unsqueeze(2) * p.sqrt().unsqueeze(1)
    return torch.linalg.eigvalsh(b.mT @ gram @ b)


def jacobian_gram(function: Callable[[Tensor], Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
    """(outputs (N, M), J J^T float64 (N, M, M)) of a function that maps images (N, ...) to (N, M), image by image."""
    x = images.detach().requires_grad_()
    with torch.enable_grad():
        outputs = function(x)
    n, m = outputs.shape

    def rows(part: range) -> Tensor:
        gradients = [torch.autograd.grad(outputs[:, row].sum(), x, retain_graph=True)[0] for row in part]
        return torch.stack(gradients, 1).flatten(2).double()

    chunk = max(1, JACOBIAN_BYTES // max(1, 8 * images.numel()))
    parts = [range(first, min(first + chunk, m)) for first in range(0, m, chunk)]
    gram = torch.empty(n, m, m, dtype=torch.float64, device=images.device)
    for i, part in enumerate(parts):
        jacobian = rows(part)
        for other in parts[: i + 1]:
            product = jacobian @ (jacobian if other is part else rows(other)).mT
            gram[:, part.start : part.stop, other.start : other.stop] = product
            gram[:, other.start : other.stop, part.start : part.stop] = product.mT
    return outputs.detach(), gram


class Eigenvalues(NamedTuple):
    """The greatest eigenvalues of H, descending, and ||H v - value v|| of each Ritz vector v; float64 (N, top) each."""

    values: Tensor
    residuals: Tensor


def top_eigenvalues(
    model: Model, images: Tensor, labels: Tensor, *, top: int = 1, steps: int = 20, seed: int = 0,
    sample_ids: Tensor | None = None, batch_size: int = 64,
) -> Eigenvalues:  # fmt: skip
    """The greatest eigenvalues of H, of any twice differentiable network, by Lanczos on Hessian-vector products.

    Args:
        top, steps: how many eigenvalues, of how many steps of Lanczos (at most the number of pixels); every step is
            kept orthogonal to all before it. Within ``residuals`` of each value there is an eigenvalue of H.
        Otherwise as in :func:`curvature`; the first vector is draw 0 of the noise.
    """
    positive(top=top)
    pixels = math.prod(images.shape[1:])
    steps = min(steps, pixels)
    if steps < top:
        raise ValueError(f"steps: expected at least top ({top}), got {steps} for images of {pixels} values")

    def measure(images: Tensor, labels: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        product = _hessian_products(model, images, labels)
        basis = [_unit(_normals(images, seed, ids, 0).double().flatten(1))]
        diagonal, beside = [], []
        for _ in range(steps):
            new = product(basis[-1])
            diagonal.append((new * basis[-1]).sum(1))
            for _ in range(2):  # once leaves what rounding left
                for vector in basis:
                    new = new - (new * vector).sum(1, keepdim=True) * vector
            beside.append(new.norm(dim=1))
            basis.append(_unit(new))
        a, b = torch.stack(diagonal, 1), torch.stack(beside, 1)
        tridiagonal = torch.diag_embed(a) + torch.diag_embed(b[:, :-1], 1) + torch.diag_embed(b[:, :-1], -1)
        values, vectors = torch.linalg.eigh(tridiagonal)
        residuals = (b[:, -1:] * vectors[:, -1]).abs()
        return values.flip(1)[:, :top], residuals.flip(1)[:, :top]

    return Eigenvalues(*in_batches(measure, model, images, labels, sample_ids, batch_size))


def hessian_trace(
    model: Model, images: Tensor, labels: Tensor, *, draws: int = 20, seed: int = 0, sample_ids: Tensor | None = None,
    batch_size: int = 64,
) -> Estimate:  # fmt: skip
    """Hutchinson's estimate of tr H, of any twice differentiable network: the mean of v^T H v over random signs v.

    Arguments as in :func:`curvature`, in units of the images.
    """
    positive(draws=draws)

    def measure(images: Tensor, labels: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        product = _hessian_products(model, images, labels)
        signs = (_signs(images, seed, ids, draw) for draw in range(draws))
        return _mean_and_error(((v * product(v)).sum(1) for v in signs), draws)

    return Estimate(*in_batches(measure, model, images, labels, sample_ids, batch_size))


def smoothed_trace(
    model: Model, images: Tensor, labels: Tensor, *, sigma: float, draws: int = 20, seed: int = 0,
    sample_ids: Tensor | None = None, batch_size: int = 256,
) -> Estimate:  # fmt: skip
    """The trace of the Hessian of the smoothed loss E l(x + sigma eps): E[eps . grad l(x + sigma eps)] / sigma (Stein).

    It is well defined across kinks, and tends to tr H for small sigma where there are none. Each draw is taken with eps
    and -eps: their mean has the same expectation and no term of the gradient at x.

    Args:
        sigma: > 0, in units of the images, which are not clipped.
        Otherwise as in :func:`curvature`.
    """
    positive(draws=draws)
    above_zero(sigma=sigma)

    def measure(images: Tensor, labels: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        def one(draw: int) -> Tensor:
            eps = _normals(images, seed, ids, draw)
            ahead, behind = (_gradient(model, images + side * sigma * eps, labels) for side in (1, -1))
            return (eps * (ahead - behind)).double().sum((1, 2, 3)) / (2 * sigma)

        return _mean_and_error((one(draw) for draw in range(draws)), draws)

    return Estimate(*in_batches(measure, model, images, labels, sample_ids, batch_size))


class Theory(NamedTuple):
    """Two sides of what the paper argues with, per image, float64 (N,) each; f are the penultimate features.

    ``displacement`` E||f(x + sigma eps) - f(x)||^2 beside its linear part ``linear`` sigma^2 ||J_f||_F^2; ``top``
    lambda_max(H) <= ``top_bound`` ||W||_2^2 ||J_f||_2^2 / 2; ``trace`` tr H <= ``trace_bound``
    ||W||_2^2 ||J_f||_F^2 / 2. The bounds hold for networks that are piecewise linear in x, since
    ||diag(p) - p p^T||_2 <= 1/2.
    """

    displacement: Tensor
    linear: Tensor
    top: Tensor
    top_bound: Tensor
    trace: Tensor
    trace_bound: Tensor


def theory(
    model: Any, images: Tensor, labels: Tensor, *, sigma: float, draws: int = 20, seed: int = 0,
    sample_ids: Tensor | None = None, batch_size: int = 64,
) -> Theory:  # fmt: skip
    """Features' displacement and curvature beside what bounds them.

    Args:
        model: has ``features(images)`` (N, D) and a linear ``fc``, and maps images to ``fc(features(images))``.
        sigma, draws: of the noise, unclipped, in units of the images.
        Otherwise as in :func:`curvature`.
    """
    positive(draws=draws)

    def measure(images: Tensor, labels: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        features, gram = jacobian_gram(model.features, images)
        with torch.no_grad():
            moved = partial(gaussian_noise, images, sigma, seed=seed, sample_ids=ids, clip=None)
            squares = ((model.features(moved(draw=draw)) - features).double().square().sum(1) for draw in range(draws))
            displacement = torch.stack(list(squares)).mean(0)
            weight, logits = model.fc.weight.double(), logits_of(model.fc, features, labels)
        spectrum = _spectrum(logits, weight @ gram @ weight.T)
        trace_f, top_f = gram.diagonal(dim1=1, dim2=2).sum(1), torch.linalg.eigvalsh(gram)[:, -1]
        bound = torch.linalg.matrix_norm(weight, 2).square() / 2
        return displacement, sigma**2 * trace_f, spectrum[:, -1], bound * top_f, spectrum.sum(1), bound * trace_f

    return Theory(*in_batches(measure, model, images, labels, sample_ids, batch_size))


def _loss(model: Model, x: Tensor, labels: Tensor) -> Tensor:
    """The sum over images of their cross entropy: its gradient at one image is that image's own."""
    return F.cross_entropy(logits_of(model, x, labels), labels.long(), reduction="sum")


def _gradient(model: Model, images: Tensor, labels: Tensor) -> Tensor:
    x = images.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(_loss(model, x, labels), x)[0]


def _hessian_products(model: Model, images: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
    """v -> H v, float64 (N, pixels) both, each image with its own H."""
    x = images.detach().requires_grad_()
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        gradient = torch.autograd.grad(_loss(model, x, labels), x, create_graph=True)[0].flatten(1)

    def product(v: Tensor) -> Tensor:
        if not gradient.requires_grad:  # the logits are the same for all images
            return torch.zeros_like(v)
        found = torch.autograd.grad(gradient, x, v.to(x.dtype), retain_graph=True, materialize_grads=True)[0]
        return found.flatten(1).double()

    return product


def _mean_and_error(values, draws: int) -> tuple[Tensor, Tensor]:
    each = torch.stack(list(values), 1)
    mean = each.mean(1)
    squares = (each - mean.unsqueeze(1)).square().sum(1)
    return mean, (squares / (draws * (draws - 1))).sqrt() if draws > 1 else torch.full_like(mean, torch.nan)


def _normals(images: Tensor, seed: int, ids: Tensor, draw: int) -> Tensor:
    return gaussian_noise(torch.zeros_like(images), 1.0, seed=seed, sample_ids=ids, draw=draw, clip=None)


def _signs(images: Tensor, seed: int, ids: Tensor, draw: int) -> Tensor:
    noise = uniform_noise(torch.zeros_like(images), 1.0, seed=seed, sample_ids=ids, draw=draw, clip=None)
    return noise.sign().double().flatten(1)


def _unit(vectors: Tensor) -> Tensor:
    """Vectors (N, pixels) of length 1; 0 where there is no direction."""
    length = vectors.norm(dim=1, keepdim=True)
    return vectors / length.masked_fill(length < 1e-12, torch.inf)


def _pixel_scale(pixel_std: Sequence[float] | None, images: Tensor) -> Tensor:
    if pixel_std is None:
        return images.new_ones(1, 1, 1)
    return check_channels("pixel_std", pixel_std, images).to(images.dtype).view(-1, 1, 1)
