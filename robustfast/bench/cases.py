"""What is measured: an op on a shape, by every implementation, with the bytes and flops that it cannot do without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustfast import DiscriminativeLoss, backends, checks, functional
from robustfast import steps as loss_steps
from robustfast.backends import home, ops
from robustfast.bench.baselines import DEFAULTS, loop_loss
from robustfast.bench.measure import NullFunction, Rotation, Step, copies_past_cache

OPS = ("loss", "margin", "noise", "train-step")
PEERS = ("loop", "eager", "compiled", "max-autotune")  # plain PyTorch, what a kernel is compared with
PRODUCTS = "products"  # W mu and W W_c by PyTorch, without the search: what the margin is compared with
BOTH = "cross entropy of both views"  # what a training step without the method is
NULL = "null autograd Function"  # what a step costs that computes nothing: with the ops alone a small problem's ceiling
NORMALIZATION: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "pixel_std": (0.229, 0.224, 0.225)}

# (N, D, K)
LOSS = {
    "paper": (64, 128, 10),
    "imagenet": (4096, 512, 1000),
    "wide": (8192, 2048, 1000),
    "faces": (1024, 512, 100_000),
}
# One size at a time, about the same middle.
SCALING = {
    f"scaling-{name}={size}": tuple(
        size if other == name else middle for other, middle in (("N", 1024), ("D", 256), ("K", 256))
    )
    for name, grown in (("N", (256, 1024, 4096, 16384)), ("D", (64, 256, 1024, 4096)), ("K", (16, 256, 1024, 4096)))
    for size in grown
}
# (P, D, K) of random W, or of other ones: after training; with all that tells rows apart in the last columns; in two
# far groups, each narrower than rounding tells apart from one origin
MARGIN = {
    "imagenet": (1000, 512, 1000),
    "imagenet-trained": (1000, 512, 1000),
    "imagenet-worst": (1000, 512, 1000),
    "imagenet-groups": (1000, 512, 1000),
    "wide": (1024, 2048, 10_000),
    "faces": (512, 512, 1_000_000),
}
# (N, C, H, W) of uint8 images, or (N, D) of features; -out: into buffers that are there, where new memory costs time
NOISE = {
    "paper": (128, 3, 32, 32),
    "imagenet": (256, 3, 224, 224),
    "imagenet-out": (256, 3, 224, 224),
    "features": (4096, 512),
}
# Classes of a head on features (64, 128), or None: ResNet-18 on 32x32 images, ten classes
TRAIN_STEP = {"cifar": None, **{f"head-{k}": k for k in (1000, 10_000, 100_000, 1_000_000)}}
SHAPES: dict[str, dict[str, Any]] = {"loss": LOSS, "margin": MARGIN, "noise": NOISE, "train-step": TRAIN_STEP}
# Shapes that a machine without a GPU measures unless others are asked for.
ON_CPU = {
    "loss": ("paper", "imagenet", "wide"),
    "margin": ("imagenet", "imagenet-trained", "imagenet-worst", "imagenet-groups", "wide"),
    "noise": tuple(NOISE),
    "train-step": ("cifar", "head-1000", "head-10000"),
}


@dataclass
class Case:
    """One table: an op on a shape, its implementations, and the bytes and flops that none of them can do without."""

    op: str
    shape: str
    sizes: tuple[int, ...]
    dtype: torch.dtype
    steps: dict[str, Step]
    peers: Sequence[str] = PEERS
    bytes: int = 0
    flops: int = 0
    ceilings: dict[str, Step] = field(default_factory=dict)  # parts that a step cannot do without, shown beside it
    notes: dict[str, str] = field(default_factory=dict)  # of implementations that are left out: why


def usable(names: Sequence[str] | None, device: torch.device) -> tuple[list[str], dict[str, str]]:
    """The kernel backends to measure on a device, and why others are not."""
    use, reasons = [], {}
    for name, reason in backends().items():
        if name == "reference" or (names and name not in names):
            continue
        if reason is None and home(name) != device.type:
            reason = f"it runs on {home(name)} tensors"
        if reason is None and name == "triton" and device.type == "cpu":
            reason = "Triton's interpreter runs it here, whose time says nothing"
        if reason is None:
            use.append(name)
        else:
            reasons[name] = reason
    return use, reasons


def make_batch(
    sizes: Sequence[int], dtype: torch.dtype, device: torch.device | str, seed: int = 0
) -> tuple[Tensor, ...]:
    """(f, g, target, weight, bias, centroids, seen) of random numbers; f, g, weight and bias are leaves."""
    n, dim, num_classes = sizes
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    f = normal(n, dim)
    leaves = (f, f + 0.3 * normal(n, dim), normal(num_classes, dim), normal(num_classes))
    f, g, weight, bias = (leaf.to(dtype).requires_grad_() for leaf in leaves)
    target = torch.randint(num_classes, (n,), generator=generator, device=device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return f, g, target, weight, bias, normal(num_classes, dim).to(wide), normal(num_classes) > 0


def loss_of(backend: str) -> Callable[..., Tensor]:
    return lambda *batch: functional.discriminative_loss(*batch, backend=backend).loss


def forward_backward(loss: Callable[..., Tensor], batch: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The loss and its gradients, which are not kept."""
    value = loss(*batch)
    return value.detach(), *torch.autograd.grad(value, (batch[0], batch[1], batch[3], batch[4]))


def compiled(function: Callable[..., Any], device: torch.device) -> dict[str, Callable[..., Any]]:
    """torch.compile of a function, with static shapes, as it is best used on the device."""
    modes = {"compiled": None} if device.type == "cpu" else {"compiled": None, "max-autotune": "max-autotune"}
    return {
        name: torch.compile(function, fullgraph=True, dynamic=False, mode=mode)  # type: ignore[call-overload]
        for name, mode in modes.items()
    }


def loss(shape: str, dtype: torch.dtype, device: torch.device, names: Sequence[str]) -> Case:
    """The loss, forward and backward: the package's module with each backend, and plain PyTorch as functions."""
    n, dim, num_classes = sizes = (LOSS | SCALING)[shape]
    copies = copies_past_cache((2 * n + num_classes) * dim * dtype.itemsize)
    batches = [make_batch(sizes, dtype, device, seed) for seed in range(copies)]
    functions: dict[str, Callable[..., Tensor]] = {"eager": loss_of("reference")}
    functions |= compiled(functions["eager"], device)
    if shape in ("paper", "imagenet"):  # elsewhere a call takes half a minute and more
        functions = {"loop": lambda *batch: loop_loss(*batch)} | functions
    steps: dict[str, Step] = {
        name: Rotation(partial(forward_backward, function), batches) for name, function in functions.items()
    }
    steps |= {name: Rotation(module_step, [module_of(name, batch) for batch in batches]) for name in names}
    ceilings: dict[str, Step] = {}
    if n * dim <= 1 << 17:  # where a step is short enough for them to be a part of it
        ceilings = {NULL: Rotation(lambda step: step(), [null_step(batch) for batch in batches])}
        ceilings |= {f"{name}, ops alone": Rotation(partial(ops_alone, name), batches) for name in names}
    present = len(batches[0][2].unique())
    return Case(
        "loss", shape, sizes, dtype, steps, ceilings=ceilings,
        bytes=7 * n * dim * dtype.itemsize, flops=4 * present * num_classes * dim,
    )  # fmt: skip


def module_of(backend: str, batch: Sequence[Tensor]) -> tuple[DiscriminativeLoss, nn.Linear, Tensor, Tensor, Tensor]:
    """(loss, fc, f, g, target): the package's module with the batch's state, and its classifier."""
    f, g, target, weight, bias, centroids, seen = batch
    num_classes, dim = weight.shape
    with torch.device("meta"):  # all that there is to allocate is in the batch
        loss, fc = DiscriminativeLoss(num_classes, dim, backend=backend), nn.Linear(dim, num_classes)
    loss.centroids, loss.seen = centroids, seen
    fc.weight, fc.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
    return loss, fc, f, g, target


def module_step(of_batch: tuple[DiscriminativeLoss, nn.Linear, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """What forward_backward gives, of the module."""
    loss, fc, f, g, target = of_batch
    value = loss(f, g, target, fc)
    return value.detach(), *torch.autograd.grad(value, (f, g, fc.weight, fc.bias))


def null_step(batch: Sequence[Tensor]) -> Step:
    """An autograd Function of the loss's arguments that computes nothing; its gradients are there already."""
    leaves = (batch[0], batch[1], batch[3], batch[4])
    value, grads = torch.zeros((), device=batch[0].device), tuple(leaf.detach() for leaf in leaves)
    return lambda: torch.autograd.grad(NullFunction.apply(value, grads, *leaves), leaves)


@torch.no_grad()
def ops_alone(backend: str, batch: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The two ops of a step, without checks, module and autograd."""
    f, g, _, weight, bias, *_ = batch
    norm, library = 2, ops(backend)
    loss, _, *saved = library.discriminative_loss(*batch, DEFAULTS, None, norm, True, -100)
    classifier = weight.shape[0], weight.dtype, bias.dtype
    grads = library.discriminative_loss_backward(torch.ones_like(loss), f, g, *saved, *classifier, norm, [True] * 4)
    return loss, *grads


def margin(shape: str, dtype: torch.dtype, device: torch.device, names: Sequence[str]) -> Case:
    """The search for each row's nearest boundary, beside the two matrix products that it would take unpruned."""
    rows, dim, num_classes = sizes = MARGIN[shape]
    mu, weight, bias = classifier(shape, sizes, device)
    weight, bias = weight.to(dtype), bias.to(dtype)
    own = torch.randperm(num_classes, device=device)[:rows] if shape != "imagenet-trained" else slice(rows)
    arguments = mu.to(checks.wide_dtype(weight)), weight[own], bias[own], weight, bias
    functions: dict[str, Callable[..., Any]] = {}
    if "-" not in shape and num_classes <= 100_000:
        functions["eager"] = loss_steps.margin_search
        functions |= compiled(functions["eager"], device)
    functions |= {name: loss_steps.of(name).margin_search for name in names}
    turns: dict[str, Step] = {PRODUCTS: Products(mu.to(dtype), weight[own], weight)}
    turns |= {name: partial(function, *arguments) for name, function in functions.items()}
    return Case(
        "margin", shape, sizes, dtype, turns, peers=(PRODUCTS,),
        bytes=num_classes * dim * dtype.itemsize, flops=4 * rows * num_classes * dim,
    )  # fmt: skip


class Products:
    """W mu and W W_c, some classes at a time, so that both fit memory; nothing is made of them."""

    def __init__(self, mu: Tensor, weight_c: Tensor, weight: Tensor, most: int = 1 << 25) -> None:
        self.left, self.blocks = (mu, weight_c), weight.split(max(1, most // len(mu)))
        self.out = [mu.new_empty(len(mu), len(block)) for block in (self.blocks[0], self.blocks[-1])]

    def __call__(self) -> None:
        for block in self.blocks:
            for left in self.left:
                torch.mm(left, block.T, out=self.out[block is self.blocks[-1]])


def classifier(shape: str, sizes: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Batch centroids (P, D), W (K, D) and b (K,), as a margin's shape has them."""
    _, dim, num_classes = sizes
    if shape.endswith("-trained"):
        return trained_classifier(num_classes, dim, device)
    batch = make_batch(sizes, torch.float32, device)
    mu, weight, bias = (batch[argument].detach() for argument in (0, 3, 4))
    if shape.endswith("-worst"):
        weight[:, : 7 * dim // 8] = 0  # what a part of the columns says of a pair is nothing
    if shape.endswith("-groups"):
        far = weight[0].clone()
        weight *= 1e-3
        weight[::2] += far
        weight[1::2] -= far
    return mu, weight, bias


def trained_classifier(num_classes: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """A head that this package's loss trained on synthetic classes, normal about one point each, and those points."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    points = normal(num_classes, dim)
    head, loss = nn.Linear(dim, num_classes, device=device), DiscriminativeLoss(num_classes, dim).to(device)
    nn.init.normal_(head.weight, std=dim**-0.5, generator=generator)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.5, momentum=0.9)
    for _ in range(40):
        target = torch.randperm(num_classes, generator=generator, device=device)
        f, g = (points[target] + 0.5 * normal(num_classes, dim) for _ in range(2))
        objective = F.cross_entropy(head(f), target) + loss(f, g, target, head)
        optimizer.zero_grad()
        objective.backward()
        optimizer.step()
    return points, head.weight.detach(), head.bias.detach()


def noise(shape: str, dtype: torch.dtype, device: torch.device, names: Sequence[str]) -> Case:
    """noisy_pair of uint8 images, or gaussian_noise of features."""
    sizes = NOISE[shape]
    seed = torch.ones((), dtype=torch.int64, device=device)
    if len(sizes) == 4:
        source = torch.randint(256, sizes, dtype=torch.uint8, device=device)
        clean, noisy = torch.empty(2, *sizes, dtype=dtype, device=device)
        out = (clean, noisy) if shape.endswith("-out") else None
        results = 2

        def add(input: Tensor, backend: str) -> Any:
            options = NORMALIZATION | {"seed": seed, "dtype": dtype, "backend": backend}
            return functional.noisy_pair(input, 0.06, **options, out=out)
    else:
        source = torch.randn(sizes, device=device).to(dtype)
        results = 1

        def add(input: Tensor, backend: str) -> Any:
            return functional.gaussian_noise(input, 0.1, seed=seed, clip=None, backend=backend)

    inputs = [source.clone() for _ in range(copies_past_cache(source.nbytes))]
    functions: dict[str, Callable[[Tensor], Any]] = {"eager": partial(add, backend="reference")}
    functions |= compiled(functions["eager"], device)
    functions |= {name: partial(add, backend=name) for name in names}
    steps: dict[str, Step] = {name: Rotation(function, inputs) for name, function in functions.items()}
    moved = source.nbytes + results * source.numel() * dtype.itemsize
    return Case("noise", shape, sizes, dtype, steps, bytes=moved)


class TrainingStep:
    """One step of SGD: noise, both views, cross entropy of both or the paper's objective, backward, update."""

    def __init__(self, body: nn.Module, fc: nn.Linear, sample: Callable[[], tuple[Tensor, Tensor, Tensor]],
                 loss: DiscriminativeLoss | None) -> None:  # fmt: skip
        self.body, self.fc, self.sample, self.loss = body, fc, sample, loss
        self.optimizer = torch.optim.SGD([*body.parameters(), *fc.parameters()], lr=1e-6, momentum=0.9)

    def __call__(self) -> None:
        clean, noisy, target = self.sample()
        f, g = self.body(clean), self.body(noisy)
        objective = F.cross_entropy(self.fc(f), target)
        if self.loss is None:
            objective = (objective + F.cross_entropy(self.fc(g), target)) / 2
        else:
            objective = objective + self.loss(f, g, target, self.fc)
        self.optimizer.zero_grad(set_to_none=True)
        objective.backward()
        self.optimizer.step()


def train_step(shape: str, dtype: torch.dtype, device: torch.device, names: Sequence[str]) -> Case:
    """What the method adds to a step of training with both views."""
    from robustfast.training import models

    num_classes = TRAIN_STEP[shape]
    if num_classes is None:
        n, dim, num_classes = 128 if device.type == "cuda" else 16, 128, 10
        model = models.build("resnet18", 3, dim, num_classes, seed=0).to(device, dtype)
        images = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, device=device)
        target = torch.randint(num_classes, (n,), device=device)
        body: nn.Module = nn.Sequential(model.backbone, model.penultimate)
        fc = model.fc

        def sample() -> tuple[Tensor, Tensor, Tensor]:
            return *functional.noisy_pair(images, 0.06, **NORMALIZATION, seed=1, dtype=dtype), target
    else:
        n, dim = 64, 128
        body, fc = nn.Identity(), nn.Linear(dim, num_classes, device=device, dtype=dtype)
        f, g, target, *_ = make_batch((n, dim, num_classes), dtype, device)

        def sample() -> tuple[Tensor, Tensor, Tensor]:
            return f.detach(), g.detach(), target

    steps: dict[str, Step] = {BOTH: TrainingStep(body, fc, sample, None)}
    for name in (*names, "reference"):
        module = DiscriminativeLoss(num_classes, dim, backend=name).to(device, dtype)
        steps[name] = TrainingStep(body, fc, sample, module)
    return Case("train-step", shape, (n, dim, num_classes), dtype, steps, peers=(BOTH,))


BUILDERS: dict[str, Callable[..., Case]] = {"loss": loss, "margin": margin, "noise": noise, "train-step": train_step}
