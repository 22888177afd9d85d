"""What a run leaves on the disk: its files, its resumption, and what happens when they are damaged or another's."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file

from robustfast import disk
from robustfast.training import data, files, load_classifier, loop, preset, resume, saved, train
from robustfast.training.config import METHODS, from_json

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("one_thread")


def without_time(results):
    return {name: value for name, value in results.items() if name != "seconds"}


def model_bits(run):
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(run / files.MODEL).items()}


def test_training_learns_and_is_bit_for_bit_repeatable(tiny, tmp_path):
    first, again = (train(tiny, tmp_path / name) for name in ("first", "again"))
    assert without_time(first) == without_time(again)
    assert model_bits(tmp_path / "first") == model_bits(tmp_path / "again")
    assert first["test"][0]["accuracy"] > 0.8, "three levels of brightness"
    assert first["history"][-1]["loss"] < first["history"][0]["loss"]
    assert json.loads((tmp_path / "first" / files.RESULTS).read_text()) == first
    assert train(replace(tiny, seed=1))["history"] != first["history"]


class Interrupt(Exception):
    pass


def interrupt_after(epoch):
    def on_epoch(record):
        if record["epoch"] == epoch:
            raise Interrupt

    return on_epoch


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_the_uninterrupted_one(tiny, tmp_path, method):
    config = replace(tiny, method=method, noise_view="independent", epochs=3)
    whole = train(config, tmp_path / "whole")
    with pytest.raises(Interrupt):
        train(config, tmp_path / "cut", interrupt_after(1))
    assert not (tmp_path / "cut" / files.RESULTS).exists()
    with pytest.raises(Interrupt):
        resume(tmp_path / "cut", interrupt_after(2))
    torch.randn(5)  # the resumed run must not depend on the process's generator
    assert without_time(resume(tmp_path / "cut")) == without_time(whole)
    assert model_bits(tmp_path / "cut") == model_bits(tmp_path / "whole")
    tensors, expected = (files.load(tmp_path / name / files.STATE, "state")[0] for name in ("cut", "whole"))
    assert any(name.startswith("optimizer.") for name in tensors)
    assert tensors.keys() == expected.keys() and all(torch.equal(tensors[key], expected[key]) for key in tensors)
    assert ("classifier.loss.centroids" in tensors) == method.startswith("discriminative")


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_every_part_of_a_trainer_is_resumed(tiny, tmp_path, amp):
    """The scaler, which begins with steps that it leaves out, the averaged weights, AdamW's moments."""
    config = replace(
        tiny, model="test_training:linear", epochs=3, amp=amp, ema=0.9, optimizer="adamw", lr=0.003, accumulate=3,
        schedule="cosine", warmup=0.5,
    )  # fmt: skip
    whole = train(config, tmp_path / "whole")
    with pytest.raises(Interrupt):
        train(config, tmp_path / "cut", interrupt_after(2))
    assert without_time(resume(tmp_path / "cut")) == without_time(whole)
    assert model_bits(tmp_path / "cut") == model_bits(tmp_path / "whole")
    (tensors, about), (expected, _) = (files.load(tmp_path / name / files.STATE, "state") for name in ("cut", "whole"))
    assert tensors.keys() == expected.keys() and all(torch.equal(tensors[key], expected[key]) for key in tensors)
    assert any(name.startswith("average.module.") for name in tensors)
    assert ("scale" in about["scaler"]) == (amp == "fp16")


def test_a_killed_process_is_resumed_to_the_same_bits(tiny, tmp_path):
    """SIGKILL at no chosen moment: whatever was being written, the last whole epoch is there."""
    config = preset("digits", data=tiny.data, epochs=30, batch_size=8, inter_dim=8, crop=1, flip=True, threads=1)
    out = tmp_path / "killed"
    options = ["--data", config.data, "--epochs", "30", "--batch-size", "8", "--inter-dim", "8", "--crop", "1"]
    command = [sys.executable, "-m", "robustfast", "train", *options, "--flip", "--threads", "1", "--out", str(out)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while not (files.holds_run(out) and loop.saved_run(out)[1] >= 3):
        assert process.poll() is None, process.returncode
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    saved_config, done = loop.saved_run(out)
    assert not (out / files.RESULTS).exists() and 0 < done < config.epochs and saved_config == config
    whole = train(config, tmp_path / "whole")
    assert without_time(resume(out)) == without_time(whole)
    assert model_bits(out) == model_bits(tmp_path / "whole")


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_an_interrupted_write_leaves_the_last_checkpoint(tiny, tmp_path, monkeypatch, broken):
    config = replace(tiny, epochs=3)
    whole = train(config, tmp_path / "whole")

    def fail(*arguments):
        raise Interrupt

    with pytest.raises(Interrupt):
        train(config, tmp_path / "cut", lambda record: monkeypatch.setattr(os, broken, fail))
    monkeypatch.undo()
    assert loop.saved_run(tmp_path / "cut")[1] == 1
    assert without_time(resume(tmp_path / "cut")) == without_time(whole)


def test_a_full_disk_is_named_and_nothing_is_left_beside(tmp_path, monkeypatch):
    path = tmp_path / "file"
    disk.write_json(path, {"old": 1})

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=rf"No space left on device: '{path}'"):
        disk.write_json(path, {"new": 2})
    monkeypatch.undo()
    assert disk.read_json(path) == {"old": 1} and list(tmp_path.iterdir()) == [path]
    disk.write_json(path, {"new": 2})
    assert disk.read_json(path) == {"new": 2} and list(tmp_path.iterdir()) == [path]


def test_a_run_has_three_files_which_the_umask_governs(tiny, tmp_path):
    before = os.umask(0o027)
    try:
        train(replace(tiny, epochs=2), tmp_path)
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
    assert modes == dict.fromkeys((files.STATE, files.MODEL, files.RESULTS), 0o640)


def test_runs_are_not_overwritten_nor_invented(tiny, tmp_path):
    train(replace(tiny, epochs=1), tmp_path)
    (tmp_path / files.STATE).unlink()
    for name in (files.RESULTS, files.MODEL):
        with pytest.raises(FileExistsError, match="holds a run"):
            train(tiny, tmp_path)
        for folder in (tmp_path / "nothing", tmp_path):
            with pytest.raises(FileNotFoundError, match=f"^{folder}: no run to go on with"):
                resume(folder)
        (tmp_path / name).unlink()
    train(replace(tiny, epochs=1), tmp_path)


def test_a_run_can_be_overwritten_once_its_data_is_found(tiny, tmp_path):
    first = train(replace(tiny, epochs=1), tmp_path)
    with pytest.raises(FileNotFoundError):
        train(replace(tiny, data="npz:nowhere.npz"), tmp_path, overwrite=True)
    assert resume(tmp_path) == first
    with pytest.raises(Interrupt):
        train(replace(tiny, method="normal"), tmp_path, interrupt_after(1), overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == [files.STATE]
    assert resume(tmp_path)["config"]["method"] == "normal"


def changed_data(tiny, path):
    """tiny's data with one bit of one test image changed."""
    arrays = dict(np.load(tiny.data.removeprefix("npz:")))
    arrays["x_test"][0, 0, 0, 0] ^= 1
    np.savez(path, **arrays)


@pytest.mark.parametrize("difference", ["method", "pixel"])
def test_the_results_of_another_run_are_not_taken_for_its_own(tiny, tmp_path, difference):
    config = replace(tiny, data=f"npz:{tmp_path / 'a.npz'}")
    shutil.copy(tiny.data.removeprefix("npz:"), tmp_path / "a.npz")
    train(replace(config, method="normal") if difference == "method" else config, tmp_path / "other")
    if difference == "pixel":
        changed_data(tiny, tmp_path / "a.npz")
    with pytest.raises(Interrupt):
        train(config, tmp_path / "run", interrupt_after(1))
    shutil.copy(tmp_path / "other" / files.RESULTS, tmp_path / "run")
    with pytest.raises(ValueError, match=r"results\.json: the results of another run"):
        resume(tmp_path / "run")


def test_a_run_keeps_its_threads(tiny, tmp_path, monkeypatch):
    used = []
    train_epoch = loop.train_epoch

    def counted(setup, run):
        used.append(torch.get_num_threads())
        torch.set_num_threads(1)  # more would only be slower here
        return train_epoch(setup, run)

    monkeypatch.setattr(loop, "train_epoch", counted)
    torch.set_num_threads(2)
    with pytest.raises(Interrupt):
        train(tiny, tmp_path, interrupt_after(1))
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert resume(tmp_path)["config"]["threads"] == 2
    assert used == [2, 2, 1, 1] and torch.get_num_threads() == 1


@pytest.mark.parametrize("damage", ["empty", "cut", "foreign", "bit", "text", "list"])
@pytest.mark.parametrize("name", [files.STATE, files.MODEL, files.RESULTS])
def test_damaged_files_are_named(finished, tmp_path, name, damage):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    path = tmp_path / name
    content = path.read_bytes()
    bit = bytes([content[-9] ^ 4])  # in a tensor; in results.json in the name of a backend
    path.write_bytes({
        "empty": b"", "cut": content[: len(content) // 2], "foreign": safetensors.torch.save({"a": torch.zeros(1)}),
        "bit": content[:-9] + bit + content[-8:], "text": b"text", "list": b"[1]",
    }[damage])  # fmt: skip
    with pytest.raises(ValueError, match=f"^{path}: ") as error:
        saved.evaluate(tmp_path) if name == files.MODEL else resume(tmp_path)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """The folder of a finished run of one epoch."""
    folder = tmp_path_factory.mktemp("finished")
    train(replace(tiny, epochs=1), folder)
    return folder


def test_a_file_of_another_kind_shape_or_format_is_refused(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    state, model = tmp_path / files.STATE, tmp_path / files.MODEL
    tensors, about = files.load(state, "state")
    (tmp_path / files.RESULTS).unlink()
    for change in (
        {"classifier.model.fc.weight": torch.zeros(3, 3)},
        {"classifier.more": torch.zeros(1)},
        {"else": torch.zeros(1)},
    ):
        files.save(state, "state", tensors | change, about)
        with pytest.raises(ValueError, match=r"state\.safetensors: its tensors are not those of its settings"):
            resume(tmp_path)
    _, about = files.load(model, "model")
    shutil.copy(model, state)
    with pytest.raises(ValueError, match=r"state\.safetensors: expected a state of format 2, got model of 2"):
        resume(tmp_path)
    files.save(model, "model", {}, about)
    with pytest.raises(ValueError, match=r"model\.safetensors: its tensors are not those of its settings"):
        load_classifier(tmp_path)
    monkeypatch.setattr(files, "FORMAT", 3)
    with pytest.raises(ValueError, match=r"model\.safetensors: expected a model of format 3, got model of 2"):
        load_classifier(tmp_path)


def test_a_model_is_loaded_for_use(tiny, finished):
    results = disk.read_json(finished / files.RESULTS)
    classifier = load_classifier(finished / files.MODEL)
    assert classifier.classes == ("0", "1", "2") and classifier.image == (3, 8, 8) and not classifier.training
    assert classifier.config == from_json(results["config"])
    test = data.load(tiny.data).test
    right = (classifier(test.pixels).argmax(1) == test.labels).double().mean().item()
    assert right == pytest.approx(results["test"][0]["accuracy"])
    torch.testing.assert_close(classifier(test.pixels / 255), classifier(test.pixels))


def test_a_saved_run_gives_its_results_again(tiny, finished):
    results = disk.read_json(finished / files.RESULTS)
    assert saved.evaluate(finished, draws=tiny.test_draws) == results["test"]
    with pytest.raises(ValueError, match=r"digits: the model takes images \[3, 8, 8\]"):
        saved.evaluate(finished, source="digits")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="backend"):
            saved.evaluate(finished, backend="cuda")


def test_a_finished_run_is_not_tested_again(tiny, tmp_path, monkeypatch):
    results = train(replace(tiny, epochs=1), tmp_path)
    monkeypatch.setattr(loop, "finish", None)
    assert resume(tmp_path) == results


def test_other_data_is_not_resumed(tiny, tmp_path):
    shutil.copy(tiny.data.removeprefix("npz:"), tmp_path / "a.npz")
    with pytest.raises(Interrupt):
        train(replace(tiny, data=f"npz:{tmp_path / 'a.npz'}"), tmp_path / "run", interrupt_after(1))
    changed_data(tiny, tmp_path / "a.npz")
    with pytest.raises(ValueError, match="is not the data this run began with"):
        resume(tmp_path / "run")
