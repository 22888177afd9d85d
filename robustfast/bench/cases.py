"""What is measured: an op on a shape, by every implementation, with the bytes and flops that it cannot do without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustfast import DiscriminativeLoss, backends, functional
from robustfast.backends import home
from robustfast.bench.baselines import loop_loss
from robustfast.bench.measure import NullFunction, Rotation, Step, copies_past_cache

OPS = ("loss", "margin", "noise", "train-step")
PEERS = ("loop", "eager", "compiled", "max-autotune")  # plain PyTorch, what a kernel is compared with
BOTH = "cross entropy of both views"  # what a training step without the method is
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
MARGIN = {"imagenet": (1024, 512, 1000), "wide": (1024, 2048, 10_000), "faces": (512, 512, 1_000_000)}
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
    "margin": ("imagenet",),
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
    null: Step | None = None  # an autograd Function that does nothing with the same arguments
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
    """The loss, forward and backward."""
    n, dim, num_classes = sizes = (LOSS | SCALING)[shape]
    copies = copies_past_cache(2 * n * dim * dtype.itemsize)
    batches = [make_batch(sizes, dtype, device, seed) for seed in range(copies)]
    functions: dict[str, Callable[..., Tensor]] = {"eager": loss_of("reference")}
    functions |= compiled(functions["eager"], device)
    if shape in ("paper", "imagenet"):  # elsewhere a call takes half a minute and more
        functions = {"loop": lambda *batch: loop_loss(*batch)} | functions
    functions |= {name: loss_of(name) for name in names}

    def step(function: Callable[..., Tensor]) -> Step:
        return Rotation(lambda batch: forward_backward(function, batch), batches)

    leaves = (batches[0][0], batches[0][1], batches[0][3], batches[0][4])
    value, grads = torch.zeros((), device=device), tuple(torch.zeros_like(leaf) for leaf in leaves)
    present = len(batches[0][2].unique())
    return Case(
        "loss", shape, sizes, dtype, {name: step(function) for name, function in functions.items()},
        bytes=7 * n * dim * dtype.itemsize, flops=4 * present * num_classes * dim,
        null=lambda: torch.autograd.grad(NullFunction.apply(value, grads, *leaves), leaves),
    )  # fmt: skip


def margin(shape: str, dtype: torch.dtype, device: torch.device, names: Sequence[str]) -> Case:
    """The loss without gradients where nearly all of it is the margin, each class once in the batch."""
    n, dim, num_classes = sizes = MARGIN[shape]
    batch = list(make_batch(sizes, dtype, device))
    batch[2] = torch.randperm(num_classes, device=device)[torch.arange(n, device=device) % num_classes]
    functions = {"eager": loss_of("reference")} if num_classes <= 100_000 else {}
    if functions:
        functions |= compiled(functions["eager"], device)
    functions |= {name: loss_of(name) for name in names}

    def step(function: Callable[..., Tensor]) -> Step:
        def run() -> Tensor:
            with torch.no_grad():
                return function(*batch)

        return run

    return Case(
        "margin", shape, sizes, dtype, {name: step(function) for name, function in functions.items()},
        bytes=num_classes * dim * dtype.itemsize, flops=4 * min(n, num_classes) * num_classes * dim,
    )  # fmt: skip


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
    for name, backend in {"eager": "reference", **dict(zip(names, names, strict=True))}.items():
        module = DiscriminativeLoss(num_classes, dim, backend=backend).to(device, dtype)
        steps[name] = TrainingStep(body, fc, sample, module)
    return Case("train-step", shape, (n, dim, num_classes), dtype, steps, peers=(BOTH,))


BUILDERS: dict[str, Callable[..., Case]] = {"loss": loss, "margin": margin, "noise": noise, "train-step": train_step}
