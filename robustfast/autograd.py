"""Autograd Functions over the registered ops: one set for every backend, since the ops have one signature each.

All are once differentiable and say so when asked for more; the reference is there for that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from robustfast.backends import ops
from robustfast.noise import Noise


class Refusal(torch.autograd.Function):
    """The gradients as they are, with an error behind them."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Any) -> tuple[Any, ...]:
        return tuple(None if grad is None else grad.view_as(grad) for grad in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise RuntimeError(
            "robustfast's kernels, and losses of several ranks, are once differentiable; for higher derivatives take"
            " backend='reference' without a process_group"
        )


def once_differentiable(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """Like PyTorch's decorator, which is silent, however, where the incoming gradient is a constant.

    A second derivative then lacks what comes through the inputs. So with ``create_graph`` all saved tensors stand
    before the error.
    """

    @functools.wraps(backward)
    def once(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return backward(ctx, *grads)
        with torch.no_grad():
            results = backward(ctx, *grads)
        return Refusal.apply(len(results), *results, *grads, *ctx.saved_tensors)

    return once


class DiscriminativeLossFunction(torch.autograd.Function):
    """(loss, terms): the scalar, and (variance, margin, regularization, compactness, alignment) without gradient.

    ``call`` is all that has no gradient, in one argument, as autograd handles each of them: (op, target, centroids,
    seen, settings, scheduled, norm, update_state, ignore_index). ``op`` has discriminative_loss and
    discriminative_loss_backward: a backend's library, or what puts collectives between steps.
    """

    @staticmethod
    def forward(ctx, input, input_noise, weight, bias, call):
        op, target, centroids, seen, settings, scheduled, norm, update_state, ignore_index = call
        loss, terms, *saved = op.discriminative_loss(
            input, input_noise, target, weight, bias, centroids, seen, settings, scheduled, norm, update_state,
            ignore_index,
        )  # fmt: skip
        if update_state and not torch.compiler.is_compiling():  # which sees it from the schema
            torch.autograd.graph.increment_version((centroids, seen))
        ctx.save_for_backward(input, input_noise, weight, bias, *saved)
        ctx.backward_op, ctx.norm = op.discriminative_loss_backward, norm
        ctx.mark_non_differentiable(terms)
        ctx.set_materialize_grads(False)  # no zeros for the gradient of the terms
        return loss, terms

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _):
        if grad_loss is None:
            return (None,) * 5
        *wanted, _ = ctx.needs_input_grad
        input, input_noise, weight, bias, *saved = ctx.saved_tensors
        bias_dtype = weight.dtype if bias is None else bias.dtype
        grads = ctx.backward_op(
            grad_loss, input, input_noise, *saved, weight.shape[0], weight.dtype, bias_dtype, ctx.norm, wanted
        )
        return *[grad if want else None for grad, want in zip(grads, wanted, strict=True)], None


class AddNoiseFunction(torch.autograd.Function):
    """clip(input + scale * noise)."""

    @staticmethod
    def forward(ctx, backend, input, distribution, *noise):
        tensors, ctx.numbers = Noise(*noise).parted()
        ctx.save_for_backward(input, *tensors)
        ctx.backend, ctx.distribution = backend, distribution
        return ops(backend).add_noise(input, distribution, *noise)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        input, *tensors = ctx.saved_tensors
        noise = Noise.joined(tensors, ctx.numbers)
        grad_input = ops(ctx.backend).add_noise_backward(grad, input, ctx.distribution, *noise)
        return None, grad_input, None, *(None,) * len(noise)


class NoisyPairFunction(torch.autograd.Function):
    """(clean, noisy), both normalised."""

    @staticmethod
    def forward(ctx, backend, images, mean, pixel_std, dtype, *noise):
        tensors, ctx.numbers = Noise(*noise).parted()
        ctx.save_for_backward(images, pixel_std, *tensors)
        ctx.backend = backend
        clean, noisy = ops(backend).noisy_pair(images, mean, pixel_std, *noise, dtype)
        if not images.is_floating_point():
            ctx.mark_non_differentiable(clean, noisy)
        return clean, noisy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_clean, grad_noisy):
        images, pixel_std, *tensors = ctx.saved_tensors
        noise = Noise.joined(tensors, ctx.numbers)
        grad_images = ops(ctx.backend).noisy_pair_backward(grad_clean, grad_noisy, images, pixel_std, *noise)
        return None, grad_images, None, None, None, *(None,) * len(noise)
