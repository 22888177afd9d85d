"""Hugging Face's Trainer: robustfast.RobustClassifier is the model as it is. python examples/with_trainer.py"""

import tempfile

import torch
import transformers

from robustfast import DiscriminativeLoss, RobustClassifier


def collate(samples):
    images, labels, indices = zip(*samples, strict=True)
    return {"images": torch.stack(images), "labels": torch.stack(labels), "sample_ids": torch.stack(indices)}


def main(images, labels, epochs=2):
    """Trains on images (N, 3, H, W), uint8 or in [0, 1], with labels (N,); returns the mean training loss."""
    config = transformers.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], num_labels=10)
    network = transformers.ResNetForImageClassification(config)

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, x):
            return self.network(x).logits

    loss = DiscriminativeLoss(10, 32, process_group="world")
    settings = {"sigma": 0.06, "mean": [0.5] * 3, "pixel_std": [0.25] * 3, "seed": 1}
    model = RobustClassifier(Logits(), loss, classifier="network.classifier.1", **settings)
    data = torch.utils.data.TensorDataset(images, labels, torch.arange(len(labels)))
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=64,
            learning_rate=1e-3,
            remove_unused_columns=False,
            save_strategy="no",
            report_to="none",
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=data, data_collator=collate)
        return trainer.train().training_loss


if __name__ == "__main__":
    print(main(torch.randint(256, (512, 3, 16, 16), dtype=torch.uint8), torch.arange(512) % 10))
