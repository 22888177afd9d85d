"""The table of a pass: the same bytes whatever the batches, the ranks and the interruptions; and what it refuses."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluated_models import Net, images, labels

from robustfast.evaluation import certify, curvature, input_hessian_spectrum, measurements, survival, table
from robustfast.evaluation.stream import PARTS, TABLE, measure
from robustfast.evaluation.summary import summarise

X, Y = images(20), labels(20)
EVERYTHING = (
    measurements.Draws("clean", None),
    measurements.Draws("noise", "gaussian", {"std": 0.3}, draws=3),
    measurements.Draws("patches", "occlusion", severity=2),
    measurements.Spectrum(),
    measurements.Curvature("curvature", draws=2, pixel_std=(0.5,)),
    measurements.Smoothed("smoothed", 0.1, draws=2),
    measurements.Bounds("bounds", 0.1, draws=2),
    measurements.Features("features", 0.1),
    measurements.Certificates("certificates", 0.2, n0=4, n=20, alpha=0.1, every=3),
    measurements.Attack("attack", "linf", 0.05, steps=3, queries=3),
)


def batches(size, order=None):
    order = torch.arange(20) if order is None else order
    return [(X[part], Y[part], part) for part in order.split(size)]


class Rowwise(torch.nn.Module):
    """A network whose results do not depend on the batch to the last bit: sums of products, image by image."""

    def __init__(self):
        super().__init__()
        net = Net()
        self.weight = torch.nn.Parameter(net.fc.weight.detach().clone())
        self.first = torch.nn.Parameter(torch.randn(8, 64, generator=torch.Generator().manual_seed(0)))

    def features(self, x):
        return torch.stack([(x.flatten(1) * row).sum(1) for row in self.first], 1).relu()

    def forward(self, x):
        f = self.features(x)
        return torch.stack([(f * row).sum(1) for row in self.weight], 1)


@pytest.mark.parametrize("size", [1, 7, 64])
def test_bytes_do_not_depend_on_the_batches(tmp_path, one_thread, size):
    chosen = [m for m in EVERYTHING if m.name not in ("bounds", "features")]
    measure(Rowwise(), batches(20), chosen, tmp_path / "whole", batch_size=20)
    measure(Rowwise(), batches(3, torch.randperm(20)), chosen, tmp_path / "other", batch_size=size)
    whole, _ = table.read(tmp_path / "whole" / TABLE)
    other, _ = table.read(tmp_path / "other" / TABLE)
    assert [name for name in whole if whole[name].tobytes() != other[name].tobytes()] == []
    assert (tmp_path / "whole" / TABLE).read_bytes() == (tmp_path / "other" / TABLE).read_bytes()


def test_table_agrees_with_the_functions(tmp_path):
    net = Net().eval()
    columns, about = measure(net, [(X, Y)], EVERYTHING, tmp_path, seed=4, about={"data": "random"})
    assert columns["id"].tolist() == list(range(20)) and about["data"] == "random" and about["seed"] == 4
    counts = (columns["noise/prediction"] == columns["label"][:, None]).sum(1)
    assert counts.tolist() == survival(net, X, Y, scale=0.3, draws=3, seed=4).tolist()
    np.testing.assert_allclose(columns["spectrum"], input_hessian_spectrum(net, X, Y).float())
    expected = curvature(net, X, Y, draws=2, pixel_std=(0.5,), seed=4).float()
    np.testing.assert_allclose(columns["curvature"], expected, rtol=1e-3)
    ids = torch.arange(0, 20, 3)
    certificate = certify(net, X[ids], sigma=0.2, n0=4, n=20, alpha=0.1, seed=4, sample_ids=ids)
    assert columns["certificates/prediction"][::3].tolist() == certificate.prediction.tolist()
    assert (columns["certificates/prediction"][1::3] == -2).all()
    assert not list(tmp_path.glob("*.part*"))
    again, _ = measure(net, [], EVERYTHING, tmp_path, seed=4, about={"data": "random"})
    assert again.keys() == columns.keys(), "a finished pass is read, not repeated"
    with pytest.raises(ValueError, match=r"images\.npz: holds another evaluation, with other seed"):
        measure(net, [(X, Y)], EVERYTHING, tmp_path, seed=5, about={"data": "random"})
    with pytest.raises(ValueError, match="with other model"):
        measure(Net(seed=9).eval(), [(X, Y)], EVERYTHING, tmp_path, seed=4, about={"data": "random"})


def test_interrupted_pass_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("robustfast.evaluation.stream.ROWS", 4)
    net, seen = Net().eval(), []

    def stop(count):
        seen.append(count)
        if count >= 12:
            raise KeyboardInterrupt

    measure(net, batches(4), EVERYTHING[:3], tmp_path / "whole", batch_size=4)
    with pytest.raises(KeyboardInterrupt):
        measure(net, batches(4), EVERYTHING[:3], tmp_path / "cut", batch_size=4, on_images=stop)
    assert len(list((tmp_path / "cut" / PARTS).glob("*.npz"))) == 3 and not (tmp_path / "cut" / TABLE).exists()
    with pytest.raises(ValueError, match=r"images\.parts: holds another evaluation, with other measurements"):
        measure(net, batches(4), EVERYTHING[:2], tmp_path / "cut", batch_size=4)
    calls = []
    net.register_forward_hook(lambda *_: calls.append(1))
    measure(net, batches(4), EVERYTHING[:3], tmp_path / "cut", batch_size=4)
    assert (tmp_path / "cut" / TABLE).read_bytes() == (tmp_path / "whole" / TABLE).read_bytes()
    assert not (tmp_path / "cut" / PARTS).exists() and seen == [4, 8, 12]
    assert len(calls) == 2 * (1 + 1 + 3 + 1), "only the 8 images that were missing"


SCRIPT = """
import sys, time, torch
import torch.distributed as dist
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from evaluated_models import Net, images, labels
from robustfast.evaluation import stream
from robustfast.evaluation.measurements import Draws, Spectrum
torch.set_num_threads(1)
stream.ROWS = 4
if sys.argv[2] == "ranks":
    dist.init_process_group("gloo")
x, y = images(40), labels(40)
slow = 0.05 if sys.argv[2] == "slow" else 0
stream.measure(Net().eval(), [(x[i:i+5], y[i:i+5]) for i in range(0, 40, 5)], [Draws("clean", None),
    Draws("noise", "uniform", {"epsilon": 0.3}, draws=4), Spectrum()], Path(sys.argv[1]), batch_size=4,
    on_images=lambda count: time.sleep(slow))
"""


def run(tmp_path, name, mode, *launcher):
    (tmp_path / "script.py").write_text(SCRIPT)
    root = Path(__file__).parents[1]
    arguments = [str(tmp_path / "script.py"), str(tmp_path / name), mode, str(root / "tests")]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *launcher, *arguments], env=environment, stderr=subprocess.PIPE, text=True)


def finish(process):
    """Wait for a process; one that fails is an error with what it wrote."""
    _, error = process.communicate()
    assert process.returncode == 0, error


def test_two_ranks_and_a_killed_pass_give_the_same_bytes(tmp_path):
    alone = run(tmp_path, "alone", "one")
    finish(alone)
    expected = (tmp_path / "alone" / TABLE).read_bytes()
    ranks = run(tmp_path, "ranks", "ranks", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    killed = run(tmp_path, "killed", "slow")
    while len(list((tmp_path / "killed" / PARTS).glob("*.npz"))) < 3:
        assert killed.poll() is None, killed.stderr.read()
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "killed" / TABLE).exists() and (tmp_path / "killed" / PARTS).exists()
    resumed = run(tmp_path, "killed", "one")
    finish(resumed)
    assert (tmp_path / "killed" / TABLE).read_bytes() == expected
    finish(ranks)
    assert (tmp_path / "ranks" / TABLE).read_bytes() == expected


def test_a_model_in_training_mode_is_evaluated_and_left_in_it(tmp_path):
    net = Net().train()
    columns, about = measure(net, batches(1), EVERYTHING[1:2], tmp_path / "a", batch_size=1)
    expected, _ = measure(Net().eval(), batches(20), EVERYTHING[1:2], tmp_path / "b")
    assert net.training and np.array_equal(columns["noise/prediction"], expected["noise/prediction"])
    with pytest.raises(ValueError, match=r'columns: expected those of Draws\("clean", None\)'):
        summarise(columns, about)


def test_uint8_images_and_ids(tmp_path):
    pixels = (X * 255).round().byte()
    one, _ = measure(Net().eval(), [(pixels, Y)], EVERYTHING[:1], tmp_path / "a")
    two, _ = measure(Net().eval(), [(pixels / 255, Y.int(), torch.arange(20) + 7)], EVERYTHING[:1], tmp_path / "b")
    assert np.array_equal(one["pixels"], two["pixels"]) and two["id"].tolist() == list(range(7, 27))
    assert np.array_equal(one["clean/nll"], two["clean/nll"])


def test_mistakes_leave_nothing_behind(tmp_path):
    net = Net().eval()
    for model, data, message in (
        (net, [(X * 2, Y)], r"images: expected values in \[0, 1\]"),
        (net, [(X, Y + 5)], "labels: expected classes 0..4 of the model"),
        (net, [(X, Y[:3])], r"labels: expected shape \(20,\)"),
        (net, [(X, Y, torch.zeros(20, dtype=torch.int64))], "image ids: expected each once, got 0 twice"),
        (net, [], "expected at least one image, got none"),
        (lambda x: net(x) * torch.nan, [(X, Y)], "model: expected finite logits"),
        (lambda x: net(x).softmax(1), [(X, Y)], "expected logits, got probabilities"),
        (lambda x: (net(x),), [(X, Y)], "model: expected logits, .* got tuple"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            measure(model, data, EVERYTHING[:2], tmp_path / "out")
        assert not list(tmp_path.glob("out/*.npz")) and not list(tmp_path.glob("out/*/*.npz"))
        for left in tmp_path.glob("out/*/*"):
            left.unlink()


def test_tables_are_whole_or_refused(tmp_path):
    path = tmp_path / "a.npz"
    columns = {"id": np.arange(3), "x": np.ones((3, 2))}
    table.write(path, columns, {"b": 1})
    first = path.read_bytes()
    table.write(path, dict(reversed(columns.items())), {"b": 1})
    assert path.read_bytes() == first
    read, about = table.read(path)
    assert about == {"b": 1} and all(np.array_equal(read[name], columns[name]) for name in columns)
    for content in (first[:-40], b"", b"PK", first.replace(b"id.npy", b"ie.npy")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.npz: not a table of evaluated images, or damaged"):
            table.read(path)
    with pytest.raises(OSError):
        table.read(tmp_path / "none.npz")
