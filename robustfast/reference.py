"""The method in plain PyTorch: what every kernel is checked against and measured against.

Nothing here loops over classes or waits for the device, and everything can be differentiated twice. Arguments are
those of :mod:`robustfast.functional`, which also checks them. Equations: arXiv 2405.18499, as its code computes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_when_compiled(function: Function) -> Function:
    """torch.compiler.assume_constant_result, which would import the compiler with the package: seconds.

    The compiler runs the function rather than trace it, and takes what it gives for a constant.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class Settings(NamedTuple):
    """The numbers that a loss is made with, in the one order in which they go down to the kernels."""

    delta_var: float = 0.5
    delta_dist: float = 3.0
    alpha: float = 1.0
    beta: float = 1.0
    gamma: float = 0.001
    momentum: float = 0.99


class Terms(NamedTuple):
    """The loss and what it is made of, 0-d tensors in float32 (float64 for float64 features).

    Only ``loss`` carries gradient. ``loss = alpha * variance + beta * margin + gamma * regularization``.
    """

    loss: Tensor
    variance: Tensor
    margin: Tensor
    regularization: Tensor
    compactness: Tensor
    alignment: Tensor


def discriminative_loss(
    input: Tensor, input_noise: Tensor | None, target: Tensor, weight: Tensor, bias: Tensor | None, centroids: Tensor,
    seen: Tensor, *, norm: int = 2, update_state: bool = True, ignore_index: int = -100, **settings: float,
) -> Terms:  # fmt: skip
    """See :func:`robustfast.functional.discriminative_loss`; ``settings`` are those of :class:`Settings`."""
    s = Settings(**settings)
    with no_autocast(input.device):
        dtype = centroids.dtype
        f, weight = input.to(dtype), weight.to(dtype)
        g = None if input_noise is None else input_noise.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        groups = group(target, weight.shape[0], ignore_index)
        mu, centroid = class_centroids(f, groups, centroids, seen, s.momentum)
        if update_state and state_moves():  # now, since a checkpoint's second pass ends where it has all it needs
            write_state(centroid.detach(), groups, centroids, seen)
        variance_, compactness, alignment = variance(f, g, centroid, groups, s.delta_var, norm)
        margin_ = margin(mu, weight, bias, groups, s.delta_dist)
        regularization_ = regularization(centroid, groups, norm)
        # As vectors: in forward mode the product of a number and a 0-d tensor has a tangent in float64.
        weighted = s.alpha * variance_.view(1) + s.beta * margin_.view(1) + s.gamma * regularization_.view(1)
    terms = (variance_, margin_, regularization_, compactness, alignment)
    return Terms(weighted.squeeze(0), *(term.detach() for term in terms))


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast switched off; there is none on the meta device."""
    return torch.autocast(device.type, enabled=False) if _has_autocast(device.type) else nullcontext()


@constant_when_compiled  # PyTorch 2.10 cannot trace the question
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


class Groups(NamedTuple):
    """The classes of a batch as the rows of a table: R = min(N, K) rows, those of absent classes without samples."""

    slot: Tensor  # (N,) int64, the row of each sample; R for an ignored one
    classes: Tensor  # (R,) int64, the class of each row; any class where the row has no samples
    counts: Tensor  # (R,) int64, n_c
    taken: Tensor  # (R,) bool, n_c > 0
    present: Tensor  # () int64, P, but 1 where P = 0

    def mean(self, per_row: Tensor) -> Tensor:
        """(1/P) sum over the classes present."""
        return per_row.masked_fill(~self.taken, 0).sum() / self.present


def group(target: Tensor, num_classes: int, ignore_index: int) -> Groups:
    """Give each class in the batch a row, so that no table is larger than the batch."""
    labels = target.long()
    labels = torch.where(labels == ignore_index, num_classes, labels)
    rows = min(labels.numel(), num_classes)
    if rows == num_classes:
        slot, classes = labels, torch.arange(num_classes, device=labels.device)
    else:
        ordered, order = labels.sort(stable=True)
        first = torch.ones_like(ordered, dtype=torch.bool)
        first[1:] = ordered[1:] != ordered[:-1]
        rank = torch.where(ordered == num_classes, rows, first.cumsum(0) - 1)
        slot = rank.scatter(0, order, rank)
        classes = rank.new_zeros(rows + 1).scatter(0, rank, ordered)[:-1]
    count = slot.new_zeros(rows + 1).scatter_add(0, slot, torch.ones_like(slot))[:-1]
    taken = count > 0
    return Groups(slot, classes, count, taken, taken.sum().clamp(min=1))


def class_centroids(
    f: Tensor, groups: Groups, centroids: Tensor, seen: Tensor, momentum: float
) -> tuple[Tensor, Tensor]:
    """mu_c = (1/n_c) sum of the class's features, and m_c = mu_c if c is new, else (1 - rho) mu_c + rho m_prev_c."""
    sums = f.new_zeros(groups.counts.numel() + 1, f.shape[1]).index_add(0, groups.slot, f)[:-1]
    mu = sums / groups.counts.clamp(min=1).unsqueeze(1)
    previous, known = read_state(centroids, groups.classes), read_state(seen, groups.classes)
    m_c = (1 - momentum) * mu + momentum * previous
    return mu, torch.where(known.unsqueeze(1), m_c, mu)


def read_state(table: Tensor, classes: Tensor) -> Tensor:
    """Rows of the state as they are now.

    Plain indexing would do in eager mode, but torch.compile would repeat it in the backward, where the state has moved
    on; a scatter it does not repeat.
    """
    return table.new_zeros((classes.numel(), *table.shape[1:])).index_copy(
        0, torch.arange(classes.numel(), device=classes.device), table[classes]
    )


def variance(
    f: Tensor, g: Tensor | None, centroid: Tensor, groups: Groups, delta_var: float, norm: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Variance, and its parts: compactness of the clean features, alignment of the noisy ones, both about m_c."""
    compactness = squared_hinge(f, centroid, groups, delta_var, norm)
    if g is None:
        return compactness, compactness, torch.zeros_like(compactness)
    alignment = squared_hinge(g, centroid, groups, delta_var, norm)
    return (compactness + alignment) / 2, compactness, alignment


def squared_hinge(f: Tensor, centroid: Tensor, groups: Groups, delta_var: float, norm: int) -> Tensor:
    """(1/P) sum_c (1/n_c) sum_{y_i=c} max(||f_i - m_c||_p - delta_v, 0)^2."""
    if centroid.shape[0] == 0:
        return f.sum()
    counted = groups.slot < centroid.shape[0]
    slot = torch.where(counted, groups.slot, 0)
    residual = (f - centroid[slot]).masked_fill(~counted.unsqueeze(1), 0)
    hinge = torch.relu(length(residual, norm) - delta_var)
    return (hinge.square() / groups.counts[slot].clamp(min=1) * counted).sum() / groups.present


def length(r: Tensor, norm: int) -> Tensor:
    """||r||_p over the last dimension, p in {1, 2}, with derivative 0 (of every order) at r = 0."""
    if norm == 1:
        return r.abs().sum(-1)
    square = r.square().sum(-1)
    zero = square == 0
    return square.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)


def regularization(centroid: Tensor, groups: Groups, norm: int) -> Tensor:
    """(1/P) sum_c ||m_c||_p."""
    return groups.mean(length(centroid, norm))


def margin(mu: Tensor, weight: Tensor, bias: Tensor | None, groups: Groups, delta_dist: float) -> Tensor:
    """(1/P) sum_c max_{i != c} max(delta_d + ((W_i - W_c) . mu_c + b_i - b_c) / ||W_i - W_c||_2, 0).

    The winner i is found without gradient and its score computed again, so that backward touches two rows of W a class.
    """
    weight_c, bias_c = rows_of(weight, bias, groups.classes)
    _, winner = margin_search(mu, weight_c, bias_c, weight, bias)
    found = groups.taken & (winner >= 0)
    winner = torch.where(found, winner, groups.classes)  # of itself: there all derivatives are 0, whatever the numbers
    score = boundary(mu, weight_c, bias_c, *rows_of(weight, bias, winner)).score
    return groups.mean(torch.relu(delta_dist + score).masked_fill(~found, 0))


def rows_of(weight: Tensor, bias: Tensor | None, classes: Tensor) -> tuple[Tensor, Tensor | None]:
    """W and b of some classes."""
    return weight[classes], None if bias is None else bias[classes]


class Boundary(NamedTuple):
    """Between the classes c of the rows of a table and another class i of each row."""

    score: Tensor  # (R,), 0 where there is none
    exists: Tensor  # (R,) bool: W_i and W_c differ
    normal: Tensor  # (R, D), (W_i - W_c) * scale
    distance: Tensor  # (R,), ||normal||_2
    scale: Tensor  # (R,), a power of two that keeps squares in the dtype's range


def boundary(mu: Tensor, weight_c: Tensor, bias_c: Tensor | None, weight_i: Tensor, bias_i: Tensor | None) -> Boundary:
    """The boundaries, from differences of two rows of W, of which nothing cancels."""
    normal = weight_i - weight_c
    scale = power_of_two(normal.detach().abs().sum(1))
    normal = normal * scale.unsqueeze(1)
    logit = (normal * mu).sum(1)
    if bias_i is not None and bias_c is not None:
        logit = logit + (bias_i - bias_c) * scale
    distance = length(normal, 2)
    exists = distance != 0
    score = logit.masked_fill(~exists, 0) / distance.masked_fill(~exists, 1)
    return Boundary(score, exists, normal, distance, scale)


def power_of_two(size: Tensor) -> Tensor:
    """What brings a size to about 1 without rounding anything."""
    most = int(math.log2(torch.finfo(size.dtype).max)) - 2
    return torch.exp2(-size.log2().floor().clamp(-most, most))


LOOKS = 4  # of the search for a winner where it cannot know whether it has ended


@torch.no_grad()
def margin_search(
    mu: Tensor, weight_c: Tensor, bias_c: Tensor | None, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The score of the class whose boundary with c scores highest, -inf where there is none; and that class's row of
    ``weight``, the lowest on ties, -1 where there is none.

    ``weight_c`` and ``bias_c`` are those of the rows of mu. Class by class in descending order of `score_bounds`, the
    score is computed from differences, until no bound is left that reaches the best score: the result is that of a look
    at every pair. On a GPU, which would have to be waited for, and in a compiled graph it is that of ``LOOKS`` looks.
    """
    bounds = score_bounds(mu, weight_c, bias_c, weight, bias)
    columns = torch.arange(weight.shape[0], device=weight.device)
    best = mu.new_full((mu.shape[0],), -math.inf)
    winner = torch.full_like(best, -1, dtype=torch.int64)
    for _ in range(weight.shape[0] if readable(mu) else min(LOOKS, weight.shape[0])):
        bound, other = bounds.max(1)
        possible = (bound != -math.inf) & ~(bound < best) & ~best.isnan()
        if readable(mu) and not possible.any():
            break
        score, exists, *_ = boundary(mu, weight_c, bias_c, *rows_of(weight, bias, other))
        better = (score > best) | score.isnan() | ((score == best) & (other < winner))
        better = better & exists & possible & (score != -math.inf)
        best, winner = torch.where(better, score, best), torch.where(better, other, winner)
        bounds.masked_fill_(columns == other.unsqueeze(1), -math.inf)  # no scatter_, which vmap does one by one
    return best, winner


def score_bounds(mu: Tensor, weight_c: Tensor, bias_c: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(R, K): what no score of a row with a class exceeds, however the two products of matrices are rounded.

    -inf for equal rows of W, between which there is no boundary, and for a class whose bias is -inf.
    """
    rows, slack = weight_c.shape[0], (weight.shape[1] + 16) * torch.finfo(mu.dtype).eps
    both = torch.cat((weight_c, weight))
    same_c, same = equal_rows(both).split((rows, both.shape[0] - rows))
    both = both - weight.mean(0)  # what all rows share would only be rounded away
    scale = power_of_two(both.abs().sum())
    weight_c, weight = (both * scale).split((rows, both.shape[0] - rows))
    square_c, square = weight_c.square().sum(1).unsqueeze(1), weight.square().sum(1)
    reach = mu.square().sum(1).sqrt().unsqueeze(1) * (square.sqrt() + square_c.sqrt())
    logits, own_logit = mu @ weight.T, (mu * weight_c).sum(1)
    if bias is not None and bias_c is not None:
        bias, bias_c = bias * scale, bias_c * scale
        logits, own_logit = logits + bias, own_logit + bias_c
        reach = reach + (bias.abs() + bias_c.abs().unsqueeze(1))
    above = logits - own_logit.unsqueeze(1) + slack * reach
    squares = square + square_c
    distance2 = squares - 2 * (weight_c @ weight.T) + slack * torch.where(above > 0, -squares, squares)
    bounds = above / distance2.clamp(min=torch.finfo(mu.dtype).tiny).sqrt_()
    return bounds.masked_fill_((same_c.unsqueeze(1) == same) | (logits == -math.inf), -math.inf)


def equal_rows(weight: Tensor) -> Tensor:
    """(K,): the same number for equal rows, another for every other row.

    Rows are compared with their neighbours once they are in the order of a key, a sum that equal rows have in common.
    """
    columns = torch.arange(1, weight.shape[1] + 1, dtype=weight.dtype, device=weight.device)
    order = (weight * columns.cos()).sum(1).sort(stable=True).indices
    ordered = weight[order]
    differs = torch.zeros_like(order)
    differs[1:] = (ordered[1:] != ordered[:-1]).any(1)
    return torch.empty_like(order).scatter_(0, order, differs.cumsum(0))


def state_moves() -> bool:
    """Whether a step that is to move the state does: with gradients enabled, not inside torch.func, whose functions
    have no side effects, and not in the first of the two passes of an activation checkpoint, so that the second one
    meets the same state and moves it."""
    if torch.compiler.is_compiling():
        if not (torch.compiler.is_dynamo_compiling() and _traced_in_checkpoint()):
            return torch.is_grad_enabled()
        torch._dynamo.graph_break("a compiled step would move the state twice in a checkpoint: not compiled")
        return torch.is_grad_enabled() and not torch._dynamo.disable(_checkpointed)()
    return torch.is_grad_enabled() and not (torch._C._are_functorch_transforms_active() or _checkpointed())


def _checkpointed() -> bool:
    """Whether torch.utils.checkpoint (use_reentrant=False) will run this again for the gradients."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0].__qualname__.startswith("_checkpoint_hook.")


@constant_when_compiled
def _traced_in_checkpoint() -> bool:
    """While torch.compile traces: whether this stands in a checkpoint that it compiles, or that is around it all."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    tracer: Any = InstructionTranslator.current_tx().output.current_tracer
    while tracer is not None and str(tracer.source_target) != "tag_activation_checkpoint":
        tracer = tracer.parent
    return tracer is not None or _checkpointed()


def is_static(number: float) -> bool:
    """Whether a number has one value, rather than being a variable of a compiled graph."""
    if not torch.compiler.is_compiling():
        return True
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return has_static_value(number)


def readable(tensor: Tensor) -> bool:
    """Whether looking at values costs nothing: a GPU would be waited for, a compiled or transformed graph has none."""
    return tensor.device.type == "cpu" and not (torch.compiler.is_compiling() or transformed())


def transformed() -> bool:
    """Whether this runs inside torch.func (vmap, grad, jacrev and the others)."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


@torch.no_grad()
def write_state(centroid: Tensor, groups: Groups, centroids: Tensor, seen: Tensor) -> None:
    """centroids_c <- m_c and seen_c <- True for the classes of the batch, except where m_c is not finite."""
    write_rows(groups.classes, groups.taken, centroid, centroids, seen)


def write_rows(place: Tensor, wanted: Tensor, centroid: Tensor, centroids: Tensor, seen: Tensor) -> None:
    """centroids[place] <- centroid and seen[place] <- True for the wanted rows (R,) that are finite."""
    if not len(place):
        return
    write = wanted & centroid.isfinite().all(1)
    # Other rows repeat the first of these, so that no two rows write different values to one place.
    row = torch.where(write, torch.arange(len(place), device=place.device), write.int().argmax())
    place, write = place[row], write[row]
    centroids[place] = torch.where(write.unsqueeze(1), centroid[row], centroids[place])
    seen[place] = seen[place] | write


def philox_words(seed: Tensor, sample_ids: Tensor, draw: int | Tensor, quads: int) -> Tensor:
    """Philox4x32-10 words (N, quads, 4), int64, of key ``seed`` and counters (q, sample id, draw)."""
    mask = 0xFFFFFFFF
    c0 = torch.arange(quads, device=seed.device).expand(sample_ids.numel(), quads)
    c1, c2 = ((word & mask).unsqueeze(1).expand_as(c0) for word in (sample_ids, sample_ids >> 32))
    c3 = per_sample(draw & mask, c0).expand_as(c0) if isinstance(draw, Tensor) else torch.full_like(c0, draw)
    k0, k1 = seed & mask, (seed >> 32) & mask
    for _ in range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # the low 64 bits are right although the sign is not
        c0, c2 = ((product1 >> 32) & mask) ^ c1 ^ k0, ((product0 >> 32) & mask) ^ c3 ^ k1
        c1, c3 = product1 & mask, product0 & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return torch.stack((c0, c1, c2, c3), -1)


def normals(words: Tensor) -> Tensor:
    """Box-Muller: four float32 normals from four words (..., 4)."""
    bits = words >> 8
    u, v = (bits[..., 0::2] + 1).float() * 2.0**-24, bits[..., 1::2].float() * 2.0**-24
    radius, angle = (-2 * u.log()).sqrt(), 2 * math.pi * v
    return torch.stack((radius * angle.cos(), radius * angle.sin()), -1).flatten(-2)


def uniforms(words: Tensor) -> Tensor:
    """Float32 uniforms on (-1, 1): 2 ((w >> 8) + 0.5) 2^-24 - 1, which float32 holds exactly."""
    return ((words >> 8) - 2**23 + 0.5).float() * 2.0**-23


NUMBERS = {"gaussian": normals, "uniform": uniforms}  # a distribution's, of the words of the noise


def noisy_pair(
    images: Tensor,
    std: float | Tensor,
    *,
    mean: Tensor,
    pixel_std: Tensor,
    seed: Tensor,
    sample_ids: Tensor | None = None,
    draw: int | Tensor = 0,
    clip: tuple[float, float] | None = (0.0, 1.0),
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """See :func:`robustfast.functional.noisy_pair`."""
    wide = torch.promote_types(dtype, torch.float32)
    clean = images.to(wide) if images.is_floating_point() else images.to(wide) / 255
    noisy = add_noise(clean, "gaussian", std, seed=seed, sample_ids=sample_ids, draw=draw, clip=clip)
    mean, pixel_std = (channel.to(wide).view(-1, 1, 1) for channel in (mean, pixel_std))
    clean, noisy = (((view - mean) / pixel_std).to(dtype) for view in (clean, noisy))
    return clean, noisy


def add_noise(
    input: Tensor,
    distribution: str,
    scale: float | Tensor,
    *,
    seed: Tensor,
    sample_ids: Tensor | None = None,
    draw: int | Tensor = 0,
    clip: tuple[float, float] | None = (0.0, 1.0),
) -> Tensor:
    """clip(input + scale * numbers of the distribution); see :mod:`robustfast.functional` for the arguments."""
    if sample_ids is None:
        sample_ids = torch.arange(input.shape[0], device=input.device)
    size = math.prod(input.shape[1:])
    words = philox_words(seed, sample_ids, draw, -(-size // 4))
    noise = NUMBERS[distribution](words).flatten(1)[:, :size].view(input.shape)
    if isinstance(scale, Tensor):
        scale = per_sample(scale.float(), noise)
    noisy = input.to(torch.promote_types(input.dtype, torch.float32)) + scale * noise
    return (noisy if clip is None else clipped(noisy, *clip)).to(input.dtype)


def per_sample(numbers: Tensor, like: Tensor) -> Tensor:
    """0-d or (N,) numbers as they are broadcast to ``like`` (N, ...)."""
    return numbers.reshape(-1, *(1,) * (like.dim() - 1))


def clipped(x: Tensor, low: float, high: float) -> Tensor:
    """x.clamp(low, high) whose gradient passes up to the bounds: clamp's there differs between versions of PyTorch."""
    bounded = x.detach().clamp(low, high)
    return torch.where((x >= low) & (x <= high), x, bounded) if x.requires_grad else bounded
