"""Small models and images that the tests of evaluation share."""

import torch
from torch import nn


def images(n=12, channels=1, side=8, dtype=torch.float32, seed=0):
    return torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(seed)).to(dtype)


def labels(n=12, classes=5, seed=1):
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """A convolutional ReLU network with features and fc, steep enough that curvature shows."""

    def __init__(self, classes=5, channels=1, scale=4.0, seed=2):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = nn.Sequential(
                nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
                nn.Linear(36, 8), nn.ReLU(),
            )  # fmt: skip
            self.fc = nn.Linear(8, classes)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(scale if parameter.dim() > 1 else 1)

    def features(self, x):
        return self.body(x)

    def forward(self, x):
        return self.fc(self.features(x))
