"""What people write first: the loss class by class, with labels brought to the host."""

import torch
from torch import Tensor

from robustfast.reference import Settings

DEFAULTS = Settings()


def loop_loss(
    input: Tensor,
    input_noise: Tensor,
    target: Tensor,
    weight: Tensor,
    bias: Tensor,
    centroids: Tensor,
    seen: Tensor,
    settings: Settings = DEFAULTS,
) -> Tensor:
    """The loss of robustfast.functional.discriminative_loss for norm 2, in a loop over the classes of the batch."""
    delta_var, delta_dist, alpha, beta, gamma, momentum = settings
    variance = margin = regularization = input.new_zeros(())
    labels = target.unique().tolist()
    for c in labels:
        of_class = target == c
        mu = input[of_class].mean(0)
        centroid = (1 - momentum) * mu + momentum * centroids[c] if seen[c].item() else mu
        for features in (input, input_noise):
            length = (features[of_class] - centroid).norm(dim=1)
            variance = variance + torch.relu(length - delta_var).square().mean() / 2
        others = torch.arange(len(weight), device=weight.device) != c
        normal = weight[others] - weight[c]
        score = (normal @ mu + bias[others] - bias[c]) / normal.norm(dim=1)
        margin = margin + torch.relu(delta_dist + score).max()
        regularization = regularization + centroid.norm()
        centroids[c] = centroid.detach()
        seen[c] = True
    return (alpha * variance + beta * margin + gamma * regularization) / len(labels)
