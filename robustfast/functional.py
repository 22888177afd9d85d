"""The losses and the noise as functions: arguments are checked, a backend is chosen, gradients are recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from robustfast import autograd, checks, reference
from robustfast.backends import home, ops, resolve
from robustfast.cross_entropy import linear_cross_entropy
from robustfast.gathering import ALONE
from robustfast.global_batch import GlobalLoss
from robustfast.noise import (
    check_channels,
    check_no_gradient,
    check_noise,
    check_out,
    check_seed,
    warn_of_images,
    warn_of_scale,
)
from robustfast.ops import DISTRIBUTIONS
from robustfast.reference import Settings, Terms
from robustfast.searches import is_apart

__all__ = [
    "Terms",
    "discriminative_loss",
    "gaussian_noise",
    "linear_cross_entropy",
    "noisy_pair",
    "philox_words",
    "uniform_noise",
]


def discriminative_loss(
    input: Tensor,
    input_noise: Tensor | None,
    target: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    centroids: Tensor,
    seen: Tensor,
    *,
    delta_var: float = 0.5,
    delta_dist: float = 3.0,
    norm: int = 2,
    alpha: float = 1.0,
    beta: float = 1.0,
    gamma: float = 0.001,
    momentum: float = 0.99,
    update_state: bool = True,
    ignore_index: int = -100,
    backend: str = "auto",
) -> Terms:
    """alpha * variance + beta * margin + gamma * regularization of arXiv 2405.18499.

    Features gather about their class's momentum centroid m_c within ``delta_var`` (variance: compactness of the clean
    features, alignment of the noisy ones), batch centroids stay ``delta_dist`` away from the classifier's boundaries
    (margin), and centroids stay small (regularization)::

        mu_c           = (1/n_c) sum_{y_i=c} f_i
        m_c            = mu_c if c was never seen, else (1 - momentum) mu_c + momentum centroids_c
        compactness    = (1/P) sum_c (1/n_c) sum_{y_i=c} max(||f_i - m_c||_p - delta_var, 0)^2
        alignment      = the same with the noisy features g_i, about the clean centroids
        variance       = (compactness + alignment) / 2, or compactness where there is no noisy view
        score_i        = ((W_i - W_c) . mu_c + b_i - b_c) / ||W_i - W_c||_2
        margin         = (1/P) sum_c max_{i != c} max(delta_dist + score_i, 0)
        regularization = (1/P) sum_c ||m_c||_p

    Sums run over the P classes present, i over all K classes; a pair with W_i = W_c has no boundary and is left out.

    Args:
        input: clean penultimate features f (N, D), float32, float64, bfloat16 or float16.
        input_noise: features g (N, D) of the noisy views in the same dtype, or None.
        target: labels (N,), of any integer dtype but uint64.
        weight, bias: the classifier W (K, D) and b (K,) or None, of any floating dtype.
        centroids, seen: the state (K, D) and (K,) bool; float64 for float64 features, else float32. Changed in place
            for the classes of the batch if ``update_state`` holds and gradients are enabled, except rows that would
            become inf or nan; inside an activation checkpoint by its second pass, inside ``torch.func`` not at all.
        norm: p, 1 or 2.
        ignore_index: samples with this label count nowhere.
        backend: "auto", or one of :func:`robustfast.backends`.

    Returns:
        Terms: 0-d tensors in the state's dtype; only ``loss`` carries gradient, to input, input_noise, weight, bias.
        The kernels' loss is once differentiable, the reference's any number of times.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, device or value.
        IndexError: a label is out of range (CPU; a device assertion on a GPU).
        RuntimeError: the backend asked for is not usable here.
    """
    settings = Settings(delta_var, delta_dist, alpha, beta, gamma, momentum)
    loss, terms = loss_and_terms(
        input, input_noise, target, weight, bias, centroids, seen, settings, norm, update_state, ignore_index, backend
    )
    return Terms(loss, *terms)


def loss_and_terms(
    input, input_noise, target, weight, bias, centroids, seen, settings, norm, update_state, ignore_index, backend,
    op_of: Callable[[str], Any] = ops, least: int = 2,
) -> tuple[Tensor, Sequence[Tensor] | Tensor]:  # fmt: skip
    """The loss, and the other :class:`Terms`: of kernels as one tensor, since a step that logs none pays for none.

    ``op_of`` gives the ops of a backend: where several ranks have one batch, those that put collectives between steps.
    ``least`` classes at least are here.
    """
    target = checks.discriminative_loss(input, input_noise, target, weight, bias, centroids, seen, least)
    checks.loss_settings(settings, norm, ignore_index)
    norm = int(norm)
    chosen = resolve(backend, input.device.type, "discriminative_loss")
    if input_noise is input:
        input_noise = input.view_as(input)  # torch.compile takes no tensor twice
    moves = update_state and reference.state_moves()
    if moves:
        checks.state(centroids, seen)
    if op_of is ops and chosen == "reference":
        checks.labels(target, weight.shape[0], ignore_index)
        loss, *terms = reference.discriminative_loss(
            input, input_noise, target, weight, bias, centroids, seen, norm=norm, update_state=moves,
            ignore_index=ignore_index, **settings._asdict(),
        )  # fmt: skip
        return loss, terms
    op = GlobalLoss(ALONE, chosen) if op_of is ops and is_apart(chosen, input, weight) else op_of(chosen)
    call = (op, target, centroids, seen, *as_arguments(settings), norm, moves, ignore_index)
    return autograd.DiscriminativeLossFunction.apply(input, input_noise, weight, bias, call)


def as_arguments(settings: Settings) -> tuple[Sequence[float], Tensor | None]:
    """The op's ``settings`` and ``scheduled``: the second where a number is a variable of a compiled graph.

    A list of numbers would be compiled again for each value.
    """
    if not torch.compiler.is_compiling() or all([reference.is_static(value) for value in settings]):
        return settings, None
    one = torch.ones((), dtype=torch.float64)
    return (), torch.stack([one * value for value in settings])  # products, since the compiler knows them


def gaussian_noise(
    input: Tensor,
    std: float | Tensor,
    *,
    seed: int | Tensor | None = None,
    sample_ids: Tensor | Sequence[int] | None = None,
    draw: int | Tensor = 0,
    clip: tuple[float, float] | None = (0.0, 1.0),
    generator: torch.Generator | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """clip(input + std * eps), eps ~ N(0, 1), where eps depends on (seed, sample id, draw, position) alone.

    The same numbers come whatever the batch, its split over processes, the backend, the memory format and the dtype.
    Words are Philox4x32-10's (key: seed; counter: element // 4, sample id, draw), normals Box-Muller's of them.
    Uniforms of 24 bits end the normals' tails at sqrt(48 ln 2) = 5.768: of values beyond 5 (5.5) there are 0.98 (0.79)
    times as many as there should be. :func:`uniform_noise` of the same seed, id and draw is made from the same words,
    and correlated with this one (-0.35): take another draw for noise that shall be independent.

    Args:
        input: (N, ...) floating, in any memory format; the noise of a sample is laid out in row-major order.
        std: standard deviation, in units of input, 0 <= std <= 1e37; or a floating tensor of them on input's device,
            0-d or one for each sample (N,), which nobody reads on the host. It gets a gradient from the reference only.
        seed: an int in 0..2**63-1, a 0-d int64 tensor on input's device, or None: drawn from ``generator``.
        sample_ids: integers (N,) >= 0, the identity of each sample in its data set; default 0..N-1.
        draw: which of the sample's draws, 0 <= draw < 2**32 (an epoch, or a repeat in certification); or an int64
            tensor of them on input's device, 0-d or (N,).
        clip: (low, high), or None for no clipping.
        generator: on input's device, in the place of a seed; default PyTorch's own.
        out: a tensor like the result, with memory of its own, which is written and returned. As in PyTorch nothing may
            require a gradient then.

    Returns:
        Like input. Its gradient is that of input where low <= input + std * eps <= high; the noise is generated again,
        not stored.

    Raises:
        TypeError, ValueError: an argument is of the wrong dtype, shape, device or range. Values of tensors are looked
            at on the CPU only, and not under torch.compile; elsewhere they are taken as they are.
    """
    return _noise("gaussian", "std", input, std, seed, sample_ids, draw, clip, generator, out, backend)


def uniform_noise(
    input: Tensor,
    epsilon: float | Tensor,
    *,
    seed: int | Tensor | None = None,
    sample_ids: Tensor | Sequence[int] | None = None,
    draw: int | Tensor = 0,
    clip: tuple[float, float] | None = (0.0, 1.0),
    generator: torch.Generator | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """clip(input + u), u uniform on [-epsilon, epsilon]; arguments and guarantees as in :func:`gaussian_noise`."""
    return _noise("uniform", "epsilon", input, epsilon, seed, sample_ids, draw, clip, generator, out, backend)


def _noise(distribution, name, input, scale, seed, sample_ids, draw, clip, generator, out, backend) -> Tensor:
    checks.of_dtype("input", input, checks.FLOATING)
    noise = check_noise(input, name, scale, seed, sample_ids, draw, clip, generator)
    warn_of_scale(name, scale, noise.high - noise.low)
    if out is not None:
        check_out("out", out, input, input.dtype, noise)
    chosen = resolve(backend, input.device.type, f"{distribution}_noise")
    if chosen == "reference":
        scale = noise.scale if noise.scales is None else noise.scales
        result = reference.add_noise(input, distribution, scale, **noise.keywords())
        return result if out is None else out.copy_(result)
    check_no_gradient(name, noise, chosen)
    code = DISTRIBUTIONS.index(distribution)
    if out is None:
        return autograd.AddNoiseFunction.apply(chosen, input, code, *noise)
    ops(chosen).add_noise_out(input, code, *noise, out)
    return written(out)


def noisy_pair(
    images: Tensor,
    std: float | Tensor,
    *,
    mean: Sequence[float] | Tensor,
    pixel_std: Sequence[float] | Tensor,
    seed: int | Tensor | None = None,
    sample_ids: Tensor | Sequence[int] | None = None,
    draw: int | Tensor = 0,
    clip: tuple[float, float] | None = (0.0, 1.0),
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
    out: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The clean and the noisy view of a batch, both normalised, in one read of the images::

        clean = (x - mean) / pixel_std
        noisy = (clip(x + std * eps) - mean) / pixel_std

    Args:
        images: (N, C, H, W), contiguous or channels-last: uint8, taken as x / 255, or floating in [0, 1]. On the CPU a
            warning comes, once, where the first of floating images leaves that range.
        std: as in :func:`gaussian_noise`, for x in [0, 1].
        mean, pixel_std: one number per channel, as a sequence or as a tensor on the images' device. A sequence is
            copied there at the first call: make one before you capture a CUDA graph.
        seed, sample_ids, draw, clip, generator: as in :func:`gaussian_noise`, with the same noise.
        dtype: floating dtype of the views.
        out: (clean, noisy) to be written and returned, as in :func:`gaussian_noise`. In a loop that is done with its
            views at each step this saves the time that the system takes to hand out memory.

    Returns:
        (clean, noisy), each (N, C, H, W) in the images' memory format; floating images get gradients from both.

    Raises:
        TypeError, ValueError: as in :func:`gaussian_noise`.
    """
    checks.of_dtype("images", images, (torch.uint8, *checks.FLOATING))
    if images.dim() != 4:
        raise ValueError(f"images: expected shape (N, C, H, W), got {tuple(images.shape)}")
    if dtype not in checks.FLOATING:
        raise TypeError(f"dtype: expected {' or '.join(map(str, checks.FLOATING))}, got {dtype}")
    noise = check_noise(images, "std", std, seed, sample_ids, draw, clip, generator)
    mean, pixel_std = check_channels("mean", mean, images), check_channels("pixel_std", pixel_std, images)
    warn_of_scale("std", std, 1)
    warn_of_images(images)
    if out is not None:
        if not isinstance(out, (tuple, list)) or len(out) != 2:
            raise TypeError(f"out: expected (clean, noisy), got {type(out).__name__}")
        clean, noisy = out
        check_out("out[0]", clean, images, dtype, noise)
        check_out("out[1]", noisy, images, dtype, noise, clean)
    chosen = resolve(backend, images.device.type, "noisy_pair")
    if chosen == "reference":
        std = noise.scale if noise.scales is None else noise.scales
        views = reference.noisy_pair(images, std, mean=mean, pixel_std=pixel_std, dtype=dtype, **noise.keywords())
        return views if out is None else (clean.copy_(views[0]), noisy.copy_(views[1]))
    check_no_gradient("std", noise, chosen)
    if out is None:
        return autograd.NoisyPairFunction.apply(chosen, images, mean, pixel_std, dtype, *noise)
    ops(chosen).noisy_pair_out(images, mean, pixel_std, *noise, clean, noisy)
    return written(clean), written(noisy)


def written(out: Tensor) -> Tensor:
    """``out``, with autograd told that an op has written it; a compiled graph tells that itself."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(out)
    return out


def philox_words(seed: int | Tensor, sample_id: int, draw: int, quads: int, backend: str = "auto") -> Tensor:
    """The words of the noise: int64 (quads, 4), Philox4x32-10 of key ``seed`` and counters (q, sample_id, draw).

    A seed that is an int gives words on the CPU, or on the GPU if the backend asked for runs only there.
    """
    if not (0 <= sample_id < 2**63 and 0 <= draw < 2**32 and 0 <= quads < 2**32):
        raise ValueError(
            f"sample_id, draw, quads: expected 0 <= sample_id < 2**63, 0 <= draw < 2**32, 0 <= quads < 2**32, "
            f"got {sample_id}, {draw}, {quads}"
        )
    device = seed.device if isinstance(seed, Tensor) else torch.device(home(backend))
    seed = check_seed(seed, None, device)
    chosen = resolve(backend, device.type, "philox_words")
    if chosen == "reference":
        return reference.philox_words(seed, torch.tensor([sample_id], device=device), draw, quads)[0]
    return ops(chosen).philox_words(seed, sample_id, draw, quads)
