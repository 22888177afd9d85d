"""Many noisy copies of an image: survival, noise tolerance, certificates."""

import time

import pytest
import torch
from evaluated_models import Net, images, labels
from scipy import stats

from robustfast.evaluation import certified_accuracy, certify, decide_survival, perturb, survival, tolerance
from robustfast.evaluation.intervals import binomial_interval
from robustfast.evaluation.repeats import tolerance_of
from robustfast.functional import gaussian_noise
from robustfast.training import models

X, Y, IDS = images(), labels(), torch.arange(12) * 5 + 2**35


@pytest.fixture(scope="module")
def net():
    return Net().train()


@pytest.mark.parametrize(("noise", "parameter"), [("gaussian", "std"), ("uniform", "epsilon")])
def test_survival_counts_the_draws_of_perturb(net, noise, parameter):
    counts = survival(net, X, Y, noise=noise, scale=0.3, draws=6, seed=3, sample_ids=IDS)
    assert counts.dtype == torch.int64 and net.training and 0 < counts.sum() < 72
    net.eval()
    with torch.no_grad():
        draws = [perturb(X, noise, seed=3, sample_ids=IDS, draw=draw, **{parameter: 0.3}) for draw in range(6)]
        expected = sum((net(view).argmax(1) == Y).long() for view in draws)
    net.train()
    assert torch.equal(counts, expected)
    for batch_size in (1, 4, 7, 50):
        again = survival(net, X, Y, noise=noise, scale=0.3, draws=6, seed=3, sample_ids=IDS, batch_size=batch_size)
        assert torch.equal(again, counts)
    part = survival(net, X[3:8], Y[3:8], noise=noise, scale=0.3, draws=6, seed=3, sample_ids=IDS[3:8])
    assert torch.equal(part, counts[3:8])
    assert survival(net, X[:0], Y[:0]).tolist() == []


class Threshold(torch.nn.Module):
    """Class 1 where the first pixel is above 1/2: everything about it under noise is known."""

    def forward(self, x):
        score = x[:, 0, 0, 0] - 0.5
        return torch.stack((-score, score), 1)


def test_certificate_is_cohens():
    x = torch.tensor([0.9, 0.6, 0.5, 0.2]).view(4, 1, 1, 1)
    found = certify(Threshold(), x, sigma=0.25, n0=20, n=2000, alpha=0.01, seed=2)
    votes = [
        sum(int(gaussian_noise(x, 0.25, seed=2, draw=draw, clip=None)[i] > 0.5) for draw in range(20, 2020))
        for i in range(4)
    ]
    assert found.prediction[:2].tolist() == [1, 1] and found.prediction[3] == 0
    for i, count in ((0, votes[0]), (1, votes[1]), (3, 2000 - votes[3])):
        bound = stats.binomtest(count, 2000, alternative="greater").proportion_ci(0.99).low
        assert found.votes[i] == count and abs(found.radius[i] - 0.25 * stats.norm.ppf(bound)) < 1e-12
    assert found.prediction[2] == -1 and found.radius[2] == 0
    assert (found.radius <= (x.flatten() - 0.5).abs() + 1e-6).all(), "no more than the true distance"
    curve = certified_accuracy(found, torch.tensor([1, 1, 1, 1]), torch.tensor([0.0, 0.05, 0.3, 1.0]))
    assert curve.tolist() == [0.5, 0.5, 0.25, 0.0]


def test_certificate_depends_on_no_batch(net):
    whole = certify(net, X, sigma=0.2, n0=7, n=50, alpha=0.05, seed=1, sample_ids=IDS)
    assert (whole.prediction >= 0).any() and (whole.prediction < 0).any()
    for batch_size in (1, 8, 33):
        again = certify(net, X, sigma=0.2, n0=7, n=50, alpha=0.05, seed=1, sample_ids=IDS, batch_size=batch_size)
        assert all(torch.equal(a, b) for a, b in zip(again, whole, strict=True))
    none = certify(net, X[:0], sigma=0.2)
    assert [len(part) for part in none] == [0, 0, 0] and none.prediction.dtype == none.votes.dtype == torch.int64


def test_tolerance_brackets_the_true_one():
    class Narrow(torch.nn.Module):  # right within 0.1 of 1/2: half of the draws at sigma = 0.1 / 0.6745
        def forward(self, x):
            score = 0.1 - (x[:, 0, 0, 0] - 0.5).abs()
            return torch.stack((score, -score), 1)

    x = torch.full((40, 1, 1, 1), 0.5)
    x[0] = 1.0
    scales = [0.05, 0.1, 0.15, 0.2, 0.25]
    found = tolerance(Narrow(), x, torch.zeros(40, dtype=torch.int64), scales, draws=60)
    assert found.scale[0] == found.low[0] == 0 and found.high[0] == 0.05
    true = 0.1 / 0.6745
    assert abs(found.scale[1:].median() - true) < 0.02
    assert ((found.low[1:] <= true) & (found.high[1:] >= true)).double().mean() > 0.9
    assert (found.low <= found.scale + 1e-9).all() and (found.scale <= found.high + 1e-9).all()
    assert tolerance(Threshold(), x[:1], torch.ones(1, dtype=torch.int64), [0.1], draws=60).scale.isinf().all()
    found = tolerance_of(torch.tensor([True]), torch.tensor([[10, 4]]), [0.1, 0.2], 10)
    assert found.scale.item() == pytest.approx(0.1 + 0.1 * 5 / 6)
    assert len(tolerance(Narrow(), x[:0], torch.zeros(0, dtype=torch.int64), scales).scale) == 0


def test_sequential_decisions_keep_their_error_and_their_draws():
    x = torch.full((300, 1, 1, 1), 0.5)
    x[:100], x[100:200] = 0.8, 0.2  # right with probability 0.88, 0.12 and 0.5 at this scale
    y = torch.ones(300, dtype=torch.int64)
    found = decide_survival(Threshold(), x, y, share=0.7, error=0.05, first=10, most=160, scale=0.25)
    assert (found.above[:100] == 0).sum() <= 5 and (found.above[:100] == 1).sum() > 80
    assert (found.above[100:] == 1).sum() <= 10
    assert found.draws[100:200].max() < found.draws[:100].max() == 160
    counts = survival(Threshold(), x, y, scale=0.25, draws=10)
    clear = (counts == 0) & (torch.arange(300) >= 100)
    assert clear.any() and (found.draws[clear] == 10).all() and (found.above[clear] == 0).all()
    part = decide_survival(
        Threshold(), x[90:110], y[90:110], share=0.7, error=0.05, first=10, most=160, scale=0.25,
        sample_ids=torch.arange(90, 110), batch_size=7,
    )  # fmt: skip
    assert torch.equal(part.above, found.above[90:110]) and torch.equal(part.draws, found.draws[90:110])
    none = decide_survival(Threshold(), x[:0], y[:0], share=0.5)
    assert len(none.above) == len(none.draws) == 0


def test_binomial_interval_is_scipys():
    low, high = binomial_interval(torch.tensor([0, 3, 10]), 10, 0.9)
    for k, a, b in zip((0, 3, 10), low, high, strict=True):
        expected = stats.binomtest(k, 10).proportion_ci(0.9, method="exact")
        assert (float(a), float(b)) == pytest.approx((expected.low, expected.high))


def test_mistakes_are_named(net):
    for call, message in (
        (lambda: survival(net, X, Y, noise="fog"), "noise: expected one of gaussian, uniform, got 'fog'"),
        (lambda: survival(net, X, Y, draws=0), "draws: expected a whole number"),
        (lambda: survival(net, X, Y, batch_size=0), "batch_size: expected a whole number"),
        (lambda: survival(net, X, Y, scale=-1.0), "std: expected a number from 0"),
        (lambda: survival(net, X, Y + 5), "labels: expected classes 0..4 of the model"),
        (lambda: survival(net, X, Y - 9), "labels: expected classes from 0, got -"),
        (lambda: survival(net, X, Y[:3]), r"labels: expected shape \(12,\), got \(3,\)"),
        (lambda: survival(net, X, Y.float()), "labels: expected torch.int64 or"),
        (lambda: survival(net, X * 255, Y), r"images: expected values in \[0, 1\]"),
        (lambda: survival(lambda x: net(x).softmax(1), X, Y), "expected logits, got probabilities"),
        (lambda: survival(lambda x: {"logits": net(x)}, X, Y), "model: expected logits, .* got dict"),
        (lambda: survival(lambda x: net(x) / 0, X, Y), "model: expected finite logits"),
        (lambda: certify(net, X, sigma=0.0), "sigma: expected a finite number above 0"),
        (lambda: certify(net, X, sigma=0.1, alpha=1), "alpha: expected 0 < alpha < 1"),
        (lambda: certify(net, X, sigma=0.1, n=0), "n: expected a whole number"),
        (lambda: decide_survival(net, X, Y, share=1), "share: expected a number between 0 and 1"),
        (lambda: decide_survival(net, X, Y, share=0.5, most=3), r"most: expected at least first \(10\), got 3"),
        (lambda: tolerance(net, X, Y, [0.2, 0.1]), "scales: expected ascending numbers above 0"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            call()


class Timed(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.seconds = model, 0.0

    def forward(self, x):
        start = time.process_time()
        logits = self.model(x)
        self.seconds += time.process_time() - start
        return logits


@pytest.mark.parametrize("name", ["survival", "certify"])
def test_the_time_is_the_models(name):
    """Of a model of 1 GFLOP an image, ResNet-18 at 32x32, less than a tenth of the CPU's time is spent outside."""
    model = Timed(models.build("resnet18", channels=3, inter_dim=128, num_classes=10, seed=0).eval())
    x, y = images(8, channels=3, side=32), labels(8)
    start = time.process_time()
    if name == "survival":
        survival(model, x, y, batch_size=64)
    else:
        certify(model, x[:1], sigma=0.1, n=60, n0=20, batch_size=64)
    assert time.process_time() - start < model.seconds / 0.9
