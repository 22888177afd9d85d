"""Lightning: a LightningModule around robustfast.RobustClassifier. python examples/with_lightning.py"""

import lightning
import torch
from torch import nn

from robustfast import DiscriminativeLoss, RobustClassifier


class RobustModule(lightning.LightningModule):
    def __init__(self, network, classes, dim):
        super().__init__()
        # "world": under DDP the batches of all ranks count as one.
        loss = DiscriminativeLoss(classes, dim, process_group="world")
        settings = {"sigma": 0.06, "mean": [0.5] * 3, "pixel_std": [0.25] * 3, "seed": 1}
        self.step = RobustClassifier(network, loss, classifier="fc", **settings)

    def training_step(self, batch, _):
        images, labels, indices = batch
        result = self.step(images, labels, sample_ids=indices, draw=self.current_epoch)
        self.log_dict(result["terms"], prog_bar=True)
        return result["loss"]

    def validation_step(self, batch, _):
        images, labels, _ = batch
        self.log("accuracy", (self.step(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Network(nn.Module):
    def __init__(self, classes, dim):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, dim, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(dim, classes)

    def forward(self, x):
        return self.fc(self.body(x))


def main(images, labels, epochs=2):
    """Trains on images (N, 3, H, W), uint8 or in [0, 1], with labels (N,); returns the accuracy on them."""
    data = torch.utils.data.TensorDataset(images, labels, torch.arange(len(labels)))
    loader = torch.utils.data.DataLoader(data, batch_size=64, shuffle=True, drop_last=True)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=epochs, accelerator="auto", devices=1, **quiet)
    trainer.fit(RobustModule(Network(10, 32), 10, 32), loader, torch.utils.data.DataLoader(data, batch_size=256))
    return float(trainer.callback_metrics["accuracy"])


if __name__ == "__main__":
    print(main(torch.randint(256, (512, 3, 16, 16), dtype=torch.uint8), torch.arange(512) % 10))
