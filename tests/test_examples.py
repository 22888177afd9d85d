"""The scripts in examples/ train, where the packages that they are for are installed."""

import json
import math
import os
import runpy
import subprocess
import sys
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


def test_imagenet(pictures, tmp_path):
    """train.sh with two processes of torchrun on small images."""
    run = tmp_path / "run"
    paths = {
        "DATA": pictures.partition(":")[2],
        "RUN": str(run),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    smaller = {"size": 12, "model": "small", "inter-dim": 8, "epochs": 1, "batch-size": 8, "lr": 0.02, "warmup": 0.5,
               "workers": 1, "validation": 0.25, "test-sigmas": 0.1}  # fmt: skip
    root = EXAMPLES.parent
    settings = {"cwd": root, "env": os.environ | paths | {"PROCESSES": "2", "OMP_NUM_THREADS": "1"}}
    command = [
        "bash",
        str(EXAMPLES / "imagenet" / "train.sh"),
        *(f"--{name}={value}" for name, value in smaller.items()),
    ]
    shown = subprocess.run(command, capture_output=True, text=True, **settings)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("best epoch 1 of 1") == 1, "rank 0 alone prints"
    results = json.loads((run / "results.json").read_text())
    config = results["config"]
    assert results["environment"]["ranks"] == 2 and math.isfinite(results["history"][0]["loss"])
    assert (config["amp"], config["schedule"], config["ema"], config["label_smoothing"]) == (
        "bf16",
        "cosine",
        0.9998,
        0.1,
    )


@pytest.mark.parametrize("script", ["train.sh", "train.sbatch", "settings.sh"])
def test_scripts_are_bash(script):
    subprocess.run(["bash", "-n", str(EXAMPLES / "imagenet" / script)], check=True)


def test_a_run_of_imagenet_goes_on(tmp_path):
    (tmp_path / "state.safetensors").touch()
    script = f'RUN={tmp_path} DATA=x; source {EXAMPLES}/imagenet/settings.sh; echo "${{SETTINGS[@]}}"'
    shown = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == ["--resume", "--out", str(tmp_path)]
