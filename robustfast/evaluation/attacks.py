"""Images moved within a small ball so that a model errs: PGD, APGD-CE, a black-box search, and an audit of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from robustfast.evaluation.models import Model, checked, evaluating, in_batches, logits_of, positive
from robustfast.evaluation.perturbations import Key
from robustfast.extras import needed
from robustfast.functional import gaussian_noise, uniform_noise


class Ball:
    """The images within ``epsilon`` of ``center`` (N, C, H, W) in a norm, and within [0, 1]."""

    def __init__(self, norm: str, epsilon: float, center: Tensor) -> None:
        self.norm, self.epsilon, self.center = norm, epsilon, center

    def project(self, images: Tensor) -> Tensor:
        if self.norm == "linf":
            near = torch.minimum(torch.maximum(images, self.center - self.epsilon), self.center + self.epsilon)
        else:
            move = images - self.center
            near = self.center + move * (self.epsilon / _length(move).clamp(min=1e-30)).clamp(max=1)
        return near.clamp(0, 1)

    def direction(self, gradient: Tensor) -> Tensor:
        """The move of length 1 that the linearised loss grows most with; 0 where the gradient is 0."""
        if self.norm == "linf":
            return gradient.sign()
        length = _length(gradient)
        return gradient / length.masked_fill(length == 0, math.inf)

    def start(self, seed: int, ids: Tensor, restart: int) -> Tensor:
        """A random image of the ball, one for each restart."""
        if self.norm == "linf":
            return uniform_noise(self.center, self.epsilon, seed=seed, sample_ids=ids, draw=restart)
        normal = gaussian_noise(torch.zeros_like(self.center), 1.0, seed=seed, sample_ids=ids, draw=restart, clip=None)
        return self.project(self.center + self.epsilon * self.direction(normal))


class Best:
    """Of all candidates seen, each image's worst for the model: misclassified before not, then the highest loss."""

    def __init__(self, images: Tensor, loss: Tensor, wrong: Tensor) -> None:
        self.images, self.loss, self.wrong = images.clone(), loss.clone(), wrong.clone()

    def update(self, images: Tensor, loss: Tensor, wrong: Tensor) -> None:
        better = (wrong & ~self.wrong) | ((wrong == self.wrong) & (loss > self.loss))
        self.images = torch.where(_per_image(better), images, self.images)
        self.loss = torch.where(better, loss, self.loss)
        self.wrong = torch.where(better, wrong, self.wrong)


def attack(
    model: Model, images: Tensor, labels: Tensor, *, norm: str = "linf", epsilon: float, steps: int = 40,
    restarts: int = 1, method: str = "apgd", seed: int = 0, sample_ids: Tensor | None = None, batch_size: int = 256,
) -> Tensor:  # fmt: skip
    """The worst image for the model that was met within ``epsilon`` of each, over all steps and restarts.

    Args:
        model: maps images (N, C, H, W) in [0, 1] to logits (N, K), differentiably.
        images, labels: (N, C, H, W) floating in [0, 1], and their classes (N,).
        norm, epsilon: "linf" or "l2", and the radius >= 0 in units of the images; results stay in [0, 1].
        steps, restarts: of the ascent on the cross entropy, from random images of the ball.
        method: "apgd", APGD-CE of Croce and Hein 2020 (arXiv 2003.01690), whose step size adapts, or "pgd", projected
            gradient ascent with step 2.5 epsilon / steps (Madry et al. 2018).
        seed, sample_ids: what the random starts depend on.

    Returns:
        (N, C, H, W): a misclassified image where one was met, else the one of highest loss; the clean image counts too.

    Raises:
        TypeError, ValueError: an argument or what the model returns is not as described.
    """
    checked_ball(norm, epsilon)
    if method not in ASCENTS:
        raise ValueError(f"method: expected one of {', '.join(ASCENTS)}, got {method!r}")
    positive(steps=steps, restarts=restarts)

    def attacked(images: Tensor, labels: Tensor, ids: Tensor) -> tuple[Tensor]:
        ball = Ball(norm, float(epsilon), images.detach())
        best = Best(ball.center, *judged(model, ball.center, labels))
        for restart in range(restarts):
            ASCENTS[method](model, labels, ball, ball.start(seed, ids, restart), steps, best)
        return (best.images,)

    return in_batches(attacked, model, images, labels, sample_ids, batch_size)[0]


def checked_ball(norm: str, epsilon: float) -> None:
    if norm not in ("linf", "l2"):
        raise ValueError(f"norm: expected 'linf' or 'l2', got {norm!r}")
    if not (isinstance(epsilon, (int, float)) and 0 <= epsilon < math.inf):
        raise ValueError(f"epsilon: expected a finite number >= 0, got {epsilon!r}")


def pgd(model: Model, labels: Tensor, ball: Ball, x: Tensor, steps: int, best: Best) -> None:
    """Projected gradient ascent from x with a fixed step."""
    for _ in range(steps):
        loss, wrong, gradient = ascent_direction(model, x, labels)
        best.update(x, loss, wrong)
        x = ball.project(x + 2.5 * ball.epsilon / steps * ball.direction(gradient))
    best.update(x, *judged(model, x, labels))


def apgd(model: Model, labels: Tensor, ball: Ball, x: Tensor, steps: int, best: Best) -> None:
    """APGD-CE: momentum, and a step that halves, back at the best point, where progress ends at a checkpoint."""
    loss, wrong, gradient = ascent_direction(model, x, labels)
    best.update(x, loss, wrong)
    top, top_loss, top_gradient = x, loss, gradient  # of this start alone
    step = torch.full_like(loss, 2 * ball.epsilon)
    rises = torch.zeros_like(loss)
    halved, checkpoint_loss, since = torch.zeros_like(wrong), loss, 0
    previous = x
    checkpoints = set(_checkpoints(steps))
    for k in range(1, steps + 1):
        z = ball.project(x + _per_image(step) * ball.direction(gradient))
        inertia = 0.25 if k > 1 else 0.0
        x, previous = ball.project(x + (1 - inertia) * (z - x) + inertia * (x - previous)), x
        old = loss
        loss, wrong, gradient = ascent_direction(model, x, labels)
        best.update(x, loss, wrong)
        rises, since = rises + (loss > old), since + 1
        higher = loss > top_loss
        top, top_gradient = (
            torch.where(_per_image(higher), new, kept) for new, kept in ((x, top), (gradient, top_gradient))
        )
        top_loss = torch.where(higher, loss, top_loss)
        if k in checkpoints:
            stuck = ~halved & (checkpoint_loss >= top_loss)
            halved = (rises < 0.75 * since) | stuck
            step = torch.where(halved, step / 2, step)
            back = _per_image(halved)
            x, gradient = torch.where(back, top, x), torch.where(back, top_gradient, gradient)
            previous = torch.where(back, x, previous)
            loss = torch.where(halved, top_loss, loss)
            checkpoint_loss, rises, since = top_loss, torch.zeros_like(rises), 0


ASCENTS: dict[str, Callable[..., None]] = {"apgd": apgd, "pgd": pgd}


def _checkpoints(steps: int) -> list[int]:
    """Steps ceil(p_j * steps), p_0 = 0, p_1 = 0.22, p_j+1 = p_j + max(p_j - p_j-1 - 0.03, 0.06)."""
    before, at, found = 0, 22, []  # in hundredths, which add without rounding
    while at <= 100:
        found.append(-(-at * steps // 100))
        before, at = at, at + max(at - before - 3, 6)
    return found


def ascent_direction(model: Model, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(loss (N,), misclassified (N,), gradient of the loss) at these images."""
    x = images.detach().requires_grad_()
    with torch.enable_grad():
        logits = logits_of(model, x, labels)
        loss = F.cross_entropy(logits, labels.long(), reduction="none")
        gradient = torch.autograd.grad(loss.sum(), x)[0]
    return loss.detach(), logits.detach().argmax(1) != labels, gradient


@torch.no_grad()
def judged(model: Model, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(cross entropy (N,), misclassified (N,)) of these images."""
    logits = logits_of(model, images, labels)
    return F.cross_entropy(logits, labels.long(), reduction="none"), logits.argmax(1) != labels


@torch.no_grad()
def random_search(
    model: Model, images: Tensor, labels: Tensor, *, norm: str = "linf", epsilon: float, queries: int = 100,
    seed: int = 0, sample_ids: Tensor | None = None, batch_size: int = 256,
) -> Tensor:  # fmt: skip
    """A black-box attack that needs no gradient: squares of random colours, kept where the loss grows.

    A small relative of the Square attack (Andriushchenko et al. 2020): the squares' side shrinks from half of the
    image's to one pixel. Arguments, result and errors as in :func:`attack`; ``queries`` calls of the model an image.
    """
    checked_ball(norm, epsilon)
    positive(queries=queries)

    def searched(images: Tensor, labels: Tensor, ids: Tensor) -> tuple[Tensor]:
        return (_searched(model, images, labels, ids, Ball(norm, float(epsilon), images), queries, seed),)

    return in_batches(searched, model, images, labels, sample_ids, batch_size)[0]


def _searched(model, images, labels, ids, ball, queries, seed) -> Tensor:
    best = Best(images, *judged(model, images, labels))
    n, channels, height, width = images.shape
    row, column = (torch.arange(side, device=images.device) for side in (height, width))
    for query in range(queries):
        words = Key(seed, ids, query).of("random search").words(2 + channels)
        side = max(1, round(min(height, width) / 2 * (1 - query / queries)))
        top, left = ((words[:, i : i + 1] * (length - side + 1)) >> 32 for i, length in enumerate((height, width)))
        rows, columns = ((at >= start) & (at < start + side) for at, start in ((row, top), (column, left)))
        square = (rows.unsqueeze(2) & columns.unsqueeze(1)).unsqueeze(1)
        sign = ((words[:, 2:] >> 31) * 2 - 1).to(images.dtype).view(n, channels, 1, 1)
        move = best.images - images
        if ball.norm == "linf":
            move = torch.where(square, ball.epsilon * sign, move)
        else:
            move = move + square * sign * (ball.epsilon / math.sqrt(channels * side * side))
        candidate = ball.project(images + move)
        best.update(candidate, *judged(model, candidate, labels))
    return best.images


def autoattack(
    model: Model, images: Tensor, labels: Tensor, *, norm: str = "linf", epsilon: float, version: str = "standard",
    seed: int = 0, batch_size: int = 256,
) -> Tensor:  # fmt: skip
    """The full AutoAttack of Croce and Hein 2020, by the package pyautoattack; PyTorch's generators stay as they were.

    It draws from PyTorch's generators, so that its result depends on the batches, unlike those of :func:`attack`.

    Args:
        version: "standard", "plus" or "rand".
        Otherwise as in :func:`attack`.

    Raises:
        ModuleNotFoundError: pyautoattack is not installed.
        TypeError, ValueError: as of :func:`attack`.
    """
    with needed("attack"):
        from pyautoattack import AutoAttack
    checked(images, labels, None)
    checked_ball(norm, epsilon)
    if version not in ("standard", "plus", "rand"):
        raise ValueError(f"version: expected standard, plus or rand, got {version!r}")
    if not len(images):
        return images.clone()
    with evaluating(model), torch.random.fork_rng():
        classes = logits_of(model, images[:1], labels[:1]).shape[1]
        runner = AutoAttack(
            model, norm={"linf": "Linf", "l2": "L2"}[norm], eps=epsilon, version=version, seed=seed,
            device=images.device,
        )  # fmt: skip
        for part in (runner.apgd_targeted, runner.fab):
            part.n_target_classes = min(part.n_target_classes, classes - 1)
        return runner.run_standard_evaluation(images, labels.long(), batch_size=batch_size)[0]


class Audit(NamedTuple):
    """An attack and what speaks for or against its strength.

    ``images`` (N, C, H, W) the attacked ones; ``right`` bool (N,): classified rightly even so, found by asking the
    model again with the images returned; ``zero_gradient`` bool (N,): the loss has no gradient at the clean image;
    ``searched`` bool (N,): classified rightly after the black-box search; ``warnings``: what casts doubt on ``right``.
    """

    images: Tensor
    right: Tensor
    zero_gradient: Tensor
    searched: Tensor
    warnings: tuple[str, ...]


def audited_attack(
    model: Model, images: Tensor, labels: Tensor, *, norm: str = "linf", epsilon: float, steps: int = 40,
    restarts: int = 1, method: str = "apgd", queries: int = 100, seed: int = 0, sample_ids: Tensor | None = None,
    batch_size: int = 256,
) -> Audit:  # fmt: skip
    """:func:`attack` with its audit: it warns where gradients seem masked, so that robustness is not an illusion.

    Checked: the returned images lie in the ball; with radius 0 it returns the clean images; accuracy does not rise with
    four times the steps or twice the radius; images whose loss has no gradient; and a black-box search
    (:func:`random_search`, ``queries`` calls) that does better.
    """
    common = {"norm": norm, "seed": seed, "sample_ids": sample_ids, "batch_size": batch_size}
    white = {**common, "restarts": restarts, "method": method}

    def attacked(epsilon: float, steps: int) -> tuple[Tensor, Tensor]:
        found = attack(model, images, labels, epsilon=epsilon, steps=steps, **white)  # type: ignore[arg-type]
        return found, still_right(model, found, labels, batch_size)

    found, right = attacked(epsilon, steps)
    box = random_search(model, images, labels, epsilon=epsilon, queries=queries, **common)  # type: ignore[arg-type]
    searched = still_right(model, box, labels, batch_size)
    with evaluating(model):
        gradients = [
            ascent_direction(model, x, y)[2].flatten(1).abs().sum(1)
            for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True)
        ]
    zero = torch.cat(gradients) == 0
    count = int(right.sum())
    more, fewer, wider = (
        int(attacked(*setting)[1].sum())
        for setting in ((epsilon, 4 * steps), (epsilon, max(1, steps // 4)), (2 * epsilon, steps))
    )
    hidden = int(searched.sum())
    doubts = {
        "an attacked image lies outside of the ball": not inside(found, images, norm, epsilon),
        "radius 0 moves images": not torch.equal(attacked(0.0, 1)[0], images),
        f"four times the steps leave {more} images right, the attack {count}": more > count,
        f"a quarter of the steps leaves {fewer} images right, the attack {count}": fewer < count,
        f"twice the radius leaves {wider} images right, the attack {count}": wider > count,
        f"the loss of {int(zero.sum())} of {len(images)} images has no gradient": bool(zero.any()),
        f"gradients may be masked: a black-box search leaves {hidden} images right, the attack {count}": hidden < count,
    }
    return Audit(found, right, zero, searched, tuple(doubt for doubt, holds in doubts.items() if holds))


def still_right(model: Model, images: Tensor, labels: Tensor, batch_size: int = 256) -> Tensor:
    """bool (N,): which of the images the model classifies rightly."""
    parts = zip(images.split(batch_size), labels.split(batch_size), strict=True)
    with evaluating(model):
        return torch.cat([~judged(model, x, y)[1] for x, y in parts])


def inside(found: Tensor, images: Tensor, norm: str, epsilon: float) -> bool:
    """Whether all images lie in the ball and in [0, 1], up to rounding."""
    move = (found - images).double()
    length = move.abs().flatten(1).amax(1) if norm == "linf" else move.flatten(1).norm(dim=1)
    return bool((length <= epsilon * (1 + 1e-5) + 1e-6).all() & (found >= 0).all() & (found <= 1).all())


def _length(move: Tensor) -> Tensor:
    return move.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def _per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)
