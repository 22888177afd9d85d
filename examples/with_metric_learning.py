"""pytorch-metric-learning: its miners, losses and measures on the same features.

python examples/with_metric_learning.py
"""

import torch
import torch.nn.functional as F
from pytorch_metric_learning import distances, losses, miners
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from torch import nn

from robustfast import DiscriminativeLoss
from robustfast.functional import noisy_pair


def main(images, labels, steps=4):
    """Trains on one batch of images (N, 3, H, W), uint8 or in [0, 1], with labels (N,); returns the precision at 1."""
    body = nn.Sequential(nn.Conv2d(3, 32, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    fc = nn.Linear(32, 10)
    discriminative, triplet, miner = (
        DiscriminativeLoss(10, 32),
        losses.TripletMarginLoss(),
        miners.MultiSimilarityMiner(),
    )
    optimizer = torch.optim.Adam([*body.parameters(), *fc.parameters()], lr=1e-2)
    for draw in range(steps):
        clean, noisy = noisy_pair(images, 0.06, mean=[0.5] * 3, pixel_std=[0.25] * 3, seed=1, draw=draw)
        f, g = body(clean), body(noisy)
        loss = F.cross_entropy(fc(f), labels) + discriminative(f, g, labels, fc) + triplet(f, labels, miner(f, labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    neighbours = CustomKNN(distances.LpDistance())
    measure = AccuracyCalculator(include=("precision_at_1",), k=1, knn_func=neighbours)
    return measure.get_accuracy(f.detach(), labels)["precision_at_1"]


if __name__ == "__main__":
    print(main(torch.randint(256, (256, 3, 16, 16), dtype=torch.uint8), torch.arange(256) % 10))
