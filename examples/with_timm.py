"""timm: the loss on the pre-logits of any of its models. python examples/with_timm.py"""

import timm
import torch
import torch.nn.functional as F

from robustfast import DiscriminativeLoss
from robustfast.functional import noisy_pair


def main(images, labels, steps=4, name="mobilenetv3_small_050"):
    """Trains on one batch of images (N, 3, H, W), uint8 or in [0, 1], with labels (N,); returns each step's loss."""
    model = timm.create_model(name, num_classes=10)
    # Not num_features, where the head has a layer of its own.
    loss_fn = DiscriminativeLoss(num_classes=10, dim=model.head_hidden_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    mean, pixel_std = model.default_cfg["mean"], model.default_cfg["std"]
    losses = []
    for draw in range(steps):
        views = noisy_pair(images, 0.06, mean=mean, pixel_std=pixel_std, seed=1, draw=draw)
        f, g = (model.forward_head(model.forward_features(view), pre_logits=True) for view in views)
        fc = model.get_classifier()
        loss = F.cross_entropy(fc(f), labels) + loss_fn(f, g, labels, fc)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print(main(torch.randint(256, (64, 3, 64, 64), dtype=torch.uint8), torch.arange(64) % 10))
