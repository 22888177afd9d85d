"""The Python in README and docs runs as it stands there."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from robustfast import DiscriminativeLoss

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/pytorch.md")
BLOCKS = [
    pytest.param(block, id=f"{page}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL))
]


@pytest.fixture
def names():
    """What the pages say that the reader has."""
    images = torch.randint(256, (64, 3, 8, 8), dtype=torch.uint8)
    target = torch.arange(64) % 10
    body = nn.Sequential(nn.Flatten(), nn.Linear(192, 128), nn.ReLU())
    images_float = images / 255
    return {
        "torch": torch,
        "F": nn.functional,
        "images_uint8": images,
        "images_float": images_float,
        "data": list(zip(images, target.tolist(), strict=True)),
        "target": target,
        "indices": torch.arange(64),
        "epoch": 0,
        "body": body,
        "fc": nn.Linear(128, 10),
        "loss_fn": DiscriminativeLoss(10, 128),
        "features": body(images_float),
        "noisy_features": body(images_float),
    }


@pytest.mark.parametrize("block", BLOCKS)
def test_python_blocks(block, names):
    exec(block, names)
    assert names["loss"].requires_grad and torch.isfinite(names["loss"])
