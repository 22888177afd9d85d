"""The command line from end to end, and the imports it does and does not need."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from robustfast import cli, disk
from robustfast.training import Config, comparison, data, files, loop, preset, train

ROOT = Path(__file__).parents[1]
runner = CliRunner()


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    """A working directory that holds tiny.npz alone, and one thread, as the demo's runs have."""
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 2
    images = (rng.integers(0, 200, (40, 8, 8)) + 55 * labels[:, None, None]).astype(np.uint8)
    np.savez(tmp_path / "tiny.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


TRAIN = ("train", "--data", "npz:tiny.npz", "--epochs", "2", "--out", "run", "--test-sigmas", "0.2", "--flip")


def invoke(*arguments):
    return runner.invoke(cli.app, arguments)


def test_train_then_evaluate(run_dir):
    shown = invoke(*TRAIN, "--milestones", "1", "--milestones", "2")
    assert shown.exit_code == 0, shown.output
    results = disk.read_json(run_dir / "run" / files.RESULTS)
    config = results["config"]
    assert config["flip"] is True and config["milestones"] == [1, 2] and config["method"] == "discriminative"
    for point in results["test"]:
        assert f"{100 * point['accuracy']:.2f}" in shown.output
    assert f"best epoch {results['best_epoch']} of 2" in shown.output

    again = invoke("evaluate", "run", "--out", "again.json")
    assert again.exit_code == 0, again.output
    assert disk.read_json(run_dir / "again.json") == {"run": "run", "seed": 0, "draws": 4, "test": results["test"]}
    other = invoke("evaluate", "run", "--sigma", "0.5", "--sigma", "0.1", "--draws", "1", "--out", "other.json")
    assert [point["sigma"] for point in disk.read_json(run_dir / "other.json")["test"]] == [0.0, 0.5, 0.1]
    assert other.output.split().count("0.5") == 1


def test_train_resumes_where_it_was_interrupted(run_dir, monkeypatch):
    whole = train(preset("digits", data="npz:tiny.npz", epochs=3), run_dir / "whole")
    arguments = ("train", "--data", "npz:tiny.npz", "--epochs", "3", "--out", "cut")
    train_epoch = loop.train_epoch

    def interrupted(setup, run):
        if len(run.history) == 1:
            raise KeyboardInterrupt
        return train_epoch(setup, run)

    monkeypatch.setattr(loop, "train_epoch", interrupted)
    shown = invoke(*arguments)
    assert shown.exit_code == 130 and "robustfast train --resume --out cut" in shown.output
    monkeypatch.setattr(loop, "train_epoch", train_epoch)
    assert isinstance(invoke(*arguments).exception, FileExistsError)
    assert f"lr: the run in cut has {whole['config']['lr']}" in str(
        invoke("train", "--resume", "--out", "cut", "--lr", "1").exception
    )
    shown = invoke("train", "--resume", "--out", "cut", "--epochs", "3")
    assert shown.exit_code == 0, shown.output
    results = disk.read_json(run_dir / "cut" / files.RESULTS)
    assert results["history"] == whole["history"] and results["test"] == whole["test"]


def test_default_folder_and_threads(run_dir):
    arguments = ("train", "--data", "npz:tiny.npz", "--epochs", "1", "--method", "noisy", "--seed", "7")
    shown = invoke(*arguments, "--threads", "2")
    assert shown.exit_code == 0, shown.output
    assert disk.read_json(Path("runs/digits-noisy-7") / files.RESULTS)["environment"]["threads"] == 2


def test_every_setting_is_an_option():
    shown = runner.invoke(cli.app, ["train", "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    for name in Config().as_json():
        assert f"--{name.replace('_', '-')} " in shown, name


def test_demo(run_dir):
    shown = invoke("demo", "--epochs", "1", "--seeds", "1", "--workers", "2", "--out", "demo")
    assert shown.exit_code == 0, shown.output
    content = disk.read_json(run_dir / "demo" / files.RESULTS)
    assert {point["sigma"] for point in content["summary"]} >= {0.0, 0.15, 0.25, 0.4, 0.6}
    assert len(content["runs"]) == 5 and all(method in shown.output for method in cli.METHODS)
    assert all(f"{100 * point['mean']:.1f} ± 0.0" in shown.output for point in content["summary"])
    assert (run_dir / "demo" / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    alone = train(preset("digits", "discriminative", epochs=1))
    assert content["runs"][4]["history"] == alone["history"], "a run does not depend on those beside it"
    documented = (ROOT / "docs" / "results.md").read_text().partition("field of the demo")[2]
    assert all(f"| `{field}` |" in documented for field in content)


def result(method, *accuracies):
    return {
        "config": {"method": method},
        "test": [{"sigma": sigma, "accuracy": value} for sigma, value in zip((0.0, 0.5), accuracies, strict=True)],
    }


def test_summary_is_mean_and_sample_deviation():
    summary = comparison.summarise([result("a", 0.5, 0.1), result("b", 1.0, 0.2), result("a", 0.7, 0.1)])
    assert [(point["method"], point["sigma"], point["runs"]) for point in summary] == [
        ("a", 0.0, 2), ("a", 0.5, 2), ("b", 0.0, 1), ("b", 0.5, 1),
    ]  # fmt: skip
    assert [point["mean"] for point in summary] == pytest.approx([0.6, 0.1, 1.0, 0.2])
    assert [point["std"] for point in summary] == pytest.approx([np.std([0.5, 0.7], ddof=1), 0, 0, 0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "mnist"], "data: expected digits, npz:FILE or folder:DIR, got 'mnist'"),
        (["train", "--data", "npz:nowhere.npz"], "[Errno 2] No such file or directory: 'nowhere.npz'"),
        (["train", "--resume", "--out", "nowhere"], "[Errno 2] No such file or directory: 'nowhere/state.pt'"),
        (["train", "--backend", "fast"], "backend: expected auto, cuda, triton, cpu, reference, got 'fast'"),
    ],
)
def test_mistakes_are_one_line(run_dir, monkeypatch, arguments, message):
    monkeypatch.setattr(sys, "argv", ["robustfast", *arguments])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == f"robustfast: {message}"


def test_the_package_works_without_the_extra_and_the_command_line_names_it():
    code = (
        "import sys\n"
        "for name in ('typer', 'rich', 'sklearn', 'matplotlib', 'safetensors', 'PIL'): sys.modules[name] = None\n"
        "import robustfast\n"
        "print(robustfast.DiscriminativeLoss(), 'robustfast.training' in sys.modules)\n"
        "import robustfast.cli\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert shown.stdout.startswith("DiscriminativeLoss(") and shown.stdout.endswith("False\n")
    assert shown.returncode == 1
    assert shown.stderr == "robustfast: typer is not installed; install it with: pip install '.[train]'\n"


def test_a_missing_package_is_named_as_it_is_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"^scikit-learn is not installed; .*'\.\[train\]'"):
        data.load("digits")
