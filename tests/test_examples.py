"""The scripts in examples/ train, where the packages that they are for are installed."""

import math
import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PACKAGES = {
    "with_lightning": ["lightning"],
    "with_trainer": ["transformers", "accelerate"],
    "with_timm": ["timm"],
    "with_metric_learning": ["pytorch_metric_learning"],
}


def test_every_example_is_run():
    assert set(PACKAGES) == {path.stem for path in EXAMPLES.glob("*.py")}


@pytest.mark.parametrize("example", PACKAGES)
def test_example(example):
    for package in PACKAGES[example]:
        pytest.importorskip(package)
    labels = torch.arange(128) % 10
    images = (20 * labels.view(-1, 1, 1, 1) + torch.randint(40, (128, 3, 32, 32))).to(torch.uint8)
    results = runpy.run_path(str(EXAMPLES / f"{example}.py"))["main"](images, labels)
    for result in results if isinstance(results, list) else [results]:
        assert math.isfinite(result)
