"""Training by several ranks: the run of one process, whoever computes it, interrupts it or goes on with it."""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from test_runs import Interrupt, interrupt_after, model_bits, without_time

from robustfast import DiscriminativeLoss, RobustClassifier, ranks
from robustfast.training import batching, files, load_classifier, loop, models, resume, train
from robustfast.training.run import Run
from robustfast.training.setup import prepare

pytestmark = pytest.mark.usefixtures("one_thread")


def settings_of_runs(tiny, pictures):
    """Of 48 images a batch of 9 is uneven on 2 ranks, and one of 47 leaves one for the first."""
    everything = {
        "method": "stability", "batch_size": 9, "accumulate": 2, "label_smoothing": 0.1, "schedule": "cosine",
        "warmup": 1.0, "ema": 0.8, "optimizer": "adamw", "lr": 0.003,
    }  # fmt: skip
    tiny = replace(tiny, epochs=2, threads=1)
    return {
        "discriminative": replace(tiny, noise_view="independent", batch_size=9),
        "empty": replace(tiny, method="discriminative-both", batch_size=47),
        "everything": replace(tiny, **everything),
        "streamed": replace(tiny, data=pictures, size=12, crop=0, workers=0, noise_view="independent"),
    }


def views_of(config):
    """The first epoch's noisy views and labels of this rank, step by step."""
    return [(batch.noisy, batch.target) for _, batch in batching.batches(prepare(config), 0)]


def on_two_ranks(rank, begin, configs, out):
    begin()
    if rank > 0:  # which writes nothing
        files.save = files.remove_run = loop.disk.write_json = None
    found = {name: (train(config, out / name), views_of(config)) for name, config in configs.items()}
    for name in ("cut", "cut in two"):
        with pytest.raises(Interrupt):
            train(configs["everything"], out / name, interrupt_after(1))
    resumed = resume(out / "begun alone"), resume(out / "cut in two")
    return found, resumed, half_precision(rank, configs["discriminative"]), sharded(rank)


def half_precision(rank, config):
    """A run in float16 whose second rank has an overflow of its own: scales, weights and centroids at every step."""
    setup = prepare(replace(config, amp="fp16", model="test_training:linear"))
    run = Run(setup)
    run.classifier.train()
    run.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    weight, steps = run.model.fc.weight, []
    for number, (part, batch) in enumerate(batching.batches(setup, 0)):
        overflow = weight.register_hook(lambda grad: grad * (torch.inf if rank == 1 and number == 2 else 1))  # noqa: B023
        run.backward(batch, part)
        run.step(0.01)
        overflow.remove()
        steps.append((run.scaler.get_scale(), weight.detach().clone(), run.classifier.loss.centroids.clone()))
    return steps


NOISE = {"sigma": 0.2, "mean": [0.5], "pixel_std": [0.2], "seed": 4}


def small_step(group):
    model = models.build("small", channels=1, inter_dim=6, num_classes=4, seed=2)
    return RobustClassifier(model, DiscriminativeLoss(4, 6, process_group=group), process_group=group, **NOISE)


def one_step(step, mine):
    images = torch.randint(256, (8, 1, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    labels, ids = torch.tensor([0, 1, 1, 3, 0, 0, 1, 2]), torch.arange(8) * 5
    optimizer = torch.optim.SGD(step.parameters(), lr=0.1, momentum=0.9)
    step(images[mine], labels[mine], ids[mine])["loss"].backward()
    optimizer.step()
    whole = {name: getattr(value, "full_tensor", lambda v=value: v)() for name, value in step.state_dict().items()}
    return {name: value.detach().clone() for name, value in whole.items()}


def sharded(rank):
    """A step under FSDP2 with the head in the root's group."""
    from torch.distributed.fsdp import fully_shard

    step = small_step("world")
    fully_shard(step.model.backbone)
    fully_shard(step)
    return one_step(step, slice(4 * rank, 4 * rank + 4))


@pytest.fixture(scope="module")
def both_ranks(tiny, pictures, tmp_path_factory):
    """(settings, folder of the runs, what each of two ranks found)."""
    configs, out = settings_of_runs(tiny, pictures), tmp_path_factory.mktemp("ranks")
    with pytest.raises(Interrupt):
        train(configs["everything"], out / "begun alone", interrupt_after(1))
    found = run_ranks(partial(on_two_ranks, configs=configs, out=out), out / "store")
    return configs, out, found


@pytest.mark.parametrize("name", ["discriminative", "empty", "everything", "streamed"])
def test_two_ranks_train_as_one_process_does(both_ranks, tmp_path, name):
    configs, out, found = both_ranks
    whole = train(configs[name], tmp_path / "whole")
    for runs, *_ in found:
        assert_same_run(runs[name][0], whole)
    assert whole["environment"]["ranks"] == 1 and found[0][0][name][0]["environment"]["ranks"] == 2
    assert {file.name for file in (out / name).iterdir()} == {files.STATE, files.MODEL, files.RESULTS}
    mine, others = (
        load_classifier(place / name).model.state_dict() for place, name in ((out, name), (tmp_path, "whole"))
    )
    torch.testing.assert_close(mine, others, rtol=1e-3, atol=1e-4)
    for both, (noisy, target) in zip(
        zip(*(runs[name][1] for runs, *_ in found), strict=True), views_of(configs[name]), strict=True
    ):
        assert torch.equal(torch.cat([views for views, _ in both]), noisy), "the noise of a sample is its own"
        assert torch.equal(torch.cat([labels for _, labels in both]), target)


def assert_same_run(one, other):
    for left, right in zip(one["history"], other["history"], strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-4) and left["lr"] == right["lr"]
    assert one["best_epoch"] == other["best_epoch"] and one["config"] == other["config"]
    for left, right in zip(one["test"], other["test"], strict=True):
        assert left["accuracy"] == pytest.approx(right["accuracy"], abs=0.05)


def test_a_run_goes_on_with_as_many_ranks_or_others(both_ranks):
    _, out, found = both_ranks
    whole = resume(out / "everything")
    begun_alone, cut_in_two = found[0][1]
    assert_same_run(begun_alone, whole)
    assert without_time(cut_in_two) == without_time(whole)
    assert model_bits(out / "cut in two") == model_bits(out / "everything")
    assert_same_run(resume(out / "cut"), whole)


def test_a_step_that_one_rank_cannot_take_is_left_out_by_all(both_ranks):
    *_, found = both_ranks
    first, second = (rank[2] for rank in found)
    for (scale, weight, centroids), (other_scale, other_weight, other_centroids) in zip(first, second, strict=True):
        assert scale == other_scale and torch.equal(weight, other_weight) and torch.equal(centroids, other_centroids)
        assert weight.isfinite().all() and centroids.isfinite().all()
    assert [scale for scale, *_ in first] == [8.0, 8.0, 4.0, 4.0, 4.0, 4.0]
    assert torch.equal(first[1][1], first[2][1]) and not torch.equal(first[2][1], first[3][1])


def test_fully_sharded_the_step_is_that_of_one_process(both_ranks):
    expected = one_step(small_step(None), slice(None))
    for *_, state in both_ranks[2]:
        torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-5)


def start_ranks(*arguments, world=2):
    """``robustfast train`` as torchrun starts it, without torchrun, which would end the ranks that are left."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = ({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)} for rank in range(world))
    return [
        subprocess.Popen(
            [sys.executable, "-m", "robustfast", "train", *map(str, arguments)], cwd=Path(__file__).parents[1],
            env=os.environ | rank | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in ranks
    ]  # fmt: skip


def test_a_port_that_is_taken_is_named(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        for name, value in (place | {"RANK": "0", "WORLD_SIZE": "2"}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ConnectionError, match=f"the ranks cannot meet at 127.0.0.1:{place['MASTER_PORT']} "):
            ranks.joined(5).__enter__()


def test_a_killed_rank_ends_the_others_and_the_run_goes_on(pictures, tmp_path):
    options = {"data": pictures, "size": 12, "workers": 1, "epochs": 8, "batch_size": 9, "threads": 1}
    out = tmp_path / "killed"
    arguments = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    first, second = start_ranks(*arguments, "--method", "both", "--out", out)
    try:
        while not (files.holds_run(out) and loop.saved_run(out)[1] >= 2):
            assert first.poll() is None and second.poll() is None, first.stderr.read() + second.stderr.read()
            time.sleep(0.05)
        os.kill(second.pid, signal.SIGKILL)
        shown, errors = first.communicate()
    finally:
        first.kill()
        second.kill()
    assert first.returncode == 1 and second.communicate()[0] == "", "rank 0 prints"
    assert "robustfast: another rank has ended, or has not answered for 600 s: " in errors, errors
    assert "Traceback" not in errors
    assert shown.startswith("1 of 8  both  loss") and not (out / files.RESULTS).exists()
    config, _ = loop.saved_run(out)
    assert_same_run(resume(out), train(config, tmp_path / "whole"))
