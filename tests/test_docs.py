"""What the documentation shows runs, and names what exists."""

import importlib
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from robustfast.training import models, preset, train

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/guide.md")


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, one_thread):
    folder = tmp_path_factory.mktemp("run")
    train(preset("digits", epochs=1), folder)
    return folder


@pytest.fixture
def names(run_folder):
    """What the pages take for granted: a model in torchvision's manner, one in timm's, data, a run, a process group."""
    timm_model = models.build("small", channels=3, inter_dim=128, num_classes=10, seed=0)
    model = nn.Sequential()
    model.add_module("body", nn.Sequential(timm_model.backbone, timm_model.penultimate))
    model.add_module("fc", timm_model.fc)
    images = torch.randint(256, (64, 3, 8, 8), dtype=torch.uint8)
    labels = torch.arange(64) % 10
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield {
        "data_set": list(zip(images, labels, strict=True)), "model": model, "timm_model": timm_model,
        "run_folder": run_folder, "test_images": torch.rand(3, 1, 8, 8),
        "images_uint8": images, "indices": torch.arange(64), "target": labels, "epoch": 0,
        "body": model.body, "fc": model.fc, "features": torch.randn(64, 128, requires_grad=True),
        "noisy_features": torch.randn(64, 128),
    }  # fmt: skip
    dist.destroy_process_group()


@pytest.mark.parametrize("page", PAGES)
def test_code_of_the_page_runs(page, names):
    code = blocks(page)
    assert code
    for block in code:
        exec(compile(block, page, "exec"), names)
    assert names["loss"].isfinite()


@pytest.mark.parametrize("module", ["robustfast", "robustfast.functional", "robustfast.training"])
def test_the_api_page_has_every_public_name(module):
    table = re.search(rf"^\| `{module}`.*?\n\n", (ROOT / "docs/api.md").read_text(), re.M | re.S)[0]
    public = importlib.import_module(module).__all__
    missing = [name for name in public if not re.search(rf"`{name}[`(]", table)]
    assert missing == []
    listed = re.findall(r"`(\w+)[`(]", "".join(re.findall(r"^\| (.*?) \|", table, re.M)))
    assert set(listed) - {module.rpartition(".")[2]} <= set(public)


def test_links_lead_somewhere():
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(((?!http)[^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_files_that_contributing_names_are_there():
    named = re.findall(r"`((?:\w+/)+[\w.*]+)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert named
    assert [path for path in named if not [*ROOT.glob(path)]] == []
