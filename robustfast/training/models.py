"""Classifiers with a linear penultimate layer: ``features(x)`` is (N, inter_dim), ``fc`` maps it to the logits.

They answer to timm's names too: forward_features, forward_head, get_classifier.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustfast.extras import imported, needed


class Classifier(nn.Module):
    """backbone -> linear penultimate layer -> ``fc``.

    Args:
        backbone: gives (N, width).
        width: None where the backbone ends with the penultimate layer, and gives (N, inter_dim).
    """

    def __init__(self, backbone: nn.Module, width: int | None, inter_dim: int, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.penultimate = nn.Identity() if width is None else nn.Linear(width, inter_dim)
        self.fc = nn.Linear(inter_dim, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate features (N, inter_dim) of images (N, C, H, W)."""
        return self.forward_head(self.forward_features(images), pre_logits=True)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, num_classes)."""
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """What the penultimate layer is given, (N, width)."""
        return self.backbone(images)

    def forward_head(self, inner: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of what forward_features gave, or the penultimate features."""
        features = self.penultimate(inner)
        return features if pre_logits else self.fc(features)

    def get_classifier(self) -> nn.Linear:
        return self.fc


def small(channels: int, inter_dim: int, num_classes: int) -> Classifier:
    """Two 3x3 convolutions and pooling to 4x4, for small images of any size."""
    layers = [nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU()]
    return _pooled(layers, 64, 4, inter_dim, num_classes)


def lenet(channels: int, inter_dim: int, num_classes: int) -> Classifier:
    """LeNet-5's convolutions (LeCun et al. 1998) with ReLU and max pooling, for 28x28 images; others pool to 5x5."""
    layers = [nn.Conv2d(channels, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU()]
    return _pooled(layers, 16, 5, inter_dim, num_classes)


def _pooled(layers: Sequence[nn.Module], channels: int, side: int, inter_dim: int, num_classes: int) -> Classifier:
    """The classifier of what ``layers`` give, of so many channels, by max pooling and then to side x side."""
    backbone = nn.Sequential(*layers, nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(side), nn.Flatten())
    return Classifier(backbone, channels * side * side, inter_dim, num_classes)


def resnet18(channels: int, inter_dim: int, num_classes: int) -> Classifier:
    """ResNet-18 (He et al. 2016) for 32x32 images: a 3x3 stem without pooling, and the linear penultimate layer."""
    blocks = [Block(64, 64, 1), Block(64, 64, 1)]
    for width in (128, 256, 512):
        blocks += [Block(width // 2, width, 2), Block(width, width, 1)]
    backbone = nn.Sequential(
        nn.Conv2d(channels, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    return Classifier(backbone, 512, inter_dim, num_classes)


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, images: Tensor) -> Tensor:
        inner = F.relu(self.bn1(self.conv1(images)))
        return F.relu(self.bn2(self.conv2(inner)) + self.shortcut(images))


def check_image(name: str, size: Sequence[int]) -> None:
    """ValueError if images of (height, width) are too small for the model of that name."""
    least = {"small": 2, "lenet": 12}.get(name, 1)
    if min(size) < least:
        raise ValueError(f"model: {name} needs images of {least}x{least} pixels or more, got {size[0]}x{size[1]}")


def build(name: str, channels: int, inter_dim: int, num_classes: int, seed: int) -> Classifier:
    """The model of that name, its initial weights fixed by the seed; PyTorch's own generator is left as it was.

    ``timm:NAME`` and ``package.module:factory`` are asked for a model of ``inter_dim`` outputs: their last layer is the
    penultimate one.

    Raises:
        ModuleNotFoundError: timm is not installed.
        ValueError: there is no such model or factory, or it takes no ``num_classes``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if name in OWN:
            return OWN[name](channels, inter_dim, num_classes)
        return Classifier(_made(name, channels, inter_dim), None, inter_dim, num_classes)


OWN = {"small": small, "lenet": lenet, "resnet18": resnet18}


def _made(name: str, channels: int, outputs: int) -> nn.Module:
    kind, _, rest = name.partition(":")
    try:
        if kind == "timm":
            with needed("timm"):
                import timm
            return timm.create_model(rest, num_classes=outputs, in_chans=channels)
        model = imported(name)(num_classes=outputs)
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, ModuleNotFoundError) and kind == "timm":
            raise
        raise ValueError(f"model: {name}: expected package.module:factory of num_classes: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: {name}: expected a torch.nn.Module, got {type(model).__name__}")
    return model
