"""Calibration, feature statistics, intervals and correlations, against scikit-learn, SciPy and plain loops."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.decomposition import PCA
from sklearn.metrics import brier_score_loss, log_loss

from robustfast.evaluation import (
    boundary_distance,
    calibration,
    correlation,
    feature_statistics,
    paired,
    principal_components,
    tsne,
)
from robustfast.evaluation.confidence import reliability
from robustfast.functional import discriminative_loss


def logits_and_labels(n=200, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    noisy = logits + torch.randn(n, classes, generator=generator)
    return logits, noisy.argmax(1)


def test_calibration_is_what_others_compute():
    logits, labels = logits_and_labels()
    found = calibration(logits, labels)
    p = logits.softmax(1).numpy()
    y, confidence = labels.numpy(), p.max(1)
    right = p.argmax(1) == y
    assert found.nll == pytest.approx(log_loss(y, p, labels=range(4)))
    each = [brier_score_loss(y == k, p[:, k]) for k in range(4)]
    assert found.brier == pytest.approx(sum(each))
    edges, ece = np.linspace(0, 1, 16), 0.0
    for low, high in itertools.pairwise(edges):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            ece += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert found.ece == pytest.approx(ece)
    order = np.argsort(confidence)
    mass = (
        sum(abs(right[part].mean() - confidence[part].mean()) * len(part) for part in np.array_split(order, 10)) / 200
    )
    assert calibration(logits, labels, bins=10).adaptive_ece == pytest.approx(mass)
    risks = [1 - right[np.argsort(-confidence)[:n]].mean() for n in range(1, 201)]
    assert found.aurc == pytest.approx(np.mean(risks))
    points = reliability(torch.from_numpy(confidence), torch.from_numpy(right))
    gaps = (points.accuracy - points.confidence).abs().nan_to_num()
    assert points.images.sum() == 200 and float((gaps * points.images).sum() / 200) == pytest.approx(ece)


def test_calibration_at_its_ends():
    sure = torch.tensor([[50.0, -50.0], [-50.0, 50.0]])
    assert max(calibration(sure, torch.tensor([0, 1]))) == pytest.approx(0, abs=1e-12)
    wrong = calibration(sure, torch.tensor([1, 0]))
    assert wrong[:3] == pytest.approx((1, 1, 2)) and wrong.aurc == 1 and wrong.nll == pytest.approx(100)
    assert all(map(math.isnan, calibration(sure[:0], torch.zeros(0, dtype=torch.int64))))
    for call, message in (
        (lambda: calibration(sure, torch.tensor([0, 2])), r"labels: expected classes 0..1, got 0 to 2"),
        (lambda: calibration(sure * torch.nan, torch.tensor([0, 1])), "logits: expected finite numbers"),
        (lambda: calibration(sure[0], torch.tensor([0, 1])), r"logits: expected .* got \(2,\)"),
        (lambda: calibration(sure, torch.tensor([0, 1]), bins=0), "bins: expected a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def features(n=30, dim=6, classes=4, seed=3):
    generator = torch.Generator().manual_seed(seed)
    f, g = (torch.randn(n, dim, generator=generator, dtype=torch.float64) for _ in range(2))
    weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((classes, dim), (classes,))
    )
    return f, f + 0.3 * g, torch.randint(classes - 1, (n,), generator=generator), weight, bias


def test_feature_statistics_against_loops():
    f, g, y, weight, bias = features()
    found = feature_statistics(f, g, y, weight, bias)
    centroids = {c: f[y == c].mean(0) for c in range(3)}
    for c, mu in centroids.items():
        own, noisy = f[y == c], g[y == c]
        distances = [
            float(((weight[c] - weight[i]) @ mu + bias[c] - bias[i]) / (weight[c] - weight[i]).norm())
            for i in range(4)
            if i != c
        ]
        nearest = min(float((mu - centroids[other]).norm()) for other in centroids if other != c)
        expected = {
            "samples": len(own),
            "compactness": float((own - mu).norm(dim=1).mean()),
            "alignment": float((noisy - mu).norm(dim=1).mean()),
            "shift": float((noisy.mean(0) - mu).norm()),
            "boundary": min(distances),
            "separability": nearest / float((own - mu).square().sum(1).mean().sqrt()),
        }
        for name, value in expected.items():
            assert float(getattr(found, name)[c]) == pytest.approx(value), name
    assert found.samples[3] == 0 and all(bool(part[3].isnan()) for part in found[1:])
    alone = feature_statistics(f, None, y, weight, None)
    assert alone.alignment.isnan().all() and alone.shift.isnan().all()
    empty = feature_statistics(f[:0], None, y[:0], weight, bias)
    assert empty.samples.tolist() == [0] * 4 and empty.boundary.isnan().all()


def test_boundary_is_the_losss_margin():
    f, _, y, weight, bias = features()
    found = feature_statistics(f, None, y, weight, bias).boundary[:3]
    state = torch.zeros(4, 6, dtype=torch.float64), torch.zeros(4, dtype=torch.bool)
    terms = discriminative_loss(f, None, y, weight, bias, *state, delta_dist=20.0)
    assert float(terms.margin) == pytest.approx(float((20 - found).mean()))
    each = boundary_distance(f, y, weight, bias)
    assert torch.equal(each > 0, (f @ weight.T + bias).argmax(1) == y)
    assert boundary_distance(f, y, weight[:1].expand(4, 6), bias).isinf().all()
    with pytest.raises(IndexError, match="label 4 at position"):
        boundary_distance(f, y + 4, weight, bias)
    with pytest.raises(ValueError, match=r"weight: expected shape"):
        boundary_distance(f, y, weight[:, :3], bias)


def test_projections():
    f, g, *_ = features()
    found = principal_components(f, g)
    peer = PCA(2).fit(f.numpy())
    np.testing.assert_allclose(np.abs(found.clean.numpy()), np.abs(peer.transform(f.numpy())), atol=1e-9)
    np.testing.assert_allclose(np.abs(found.noisy.numpy()), np.abs(peer.transform(g.numpy())), atol=1e-9)
    assert found.kept == pytest.approx(peer.explained_variance_ratio_.sum())
    embedded = tsne(f[:8], g[:8])
    assert embedded.clean.shape == embedded.noisy.shape == (8, 2)


def test_paired_difference():
    a, b = np.array([1.0, 1, 1, 0, 1, 1, 0, 1]), np.array([0.0, 1, 0, 0, 0, 1, 1, 0])
    found = paired(a, b)
    expected = stats.ttest_rel(a, b).confidence_interval()
    assert found.difference == (a - b).mean() and found.pairs == 8
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.p_value == pytest.approx(stats.binomtest(4, 5).pvalue)
    same = paired(a, a)
    assert same.p_value == 1 and same.low == same.high == 0
    assert paired([1.0], [0.0]).low == -math.inf
    for call, message in (
        (lambda: paired(a, b[:3]), r"a, b: expected two rows of one length"),
        (lambda: paired([], []), "at least 1"),
        (lambda: paired([math.nan], [1.0]), "a, b: expected finite values"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_correlations():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(300, 2))
    x, y = z[:, 0] + 0.1 * rng.normal(size=300), np.exp(z[:, 0] + 0.1 * rng.normal(size=300))
    found = correlation(x, y)
    assert found.pearson == pytest.approx(stats.pearsonr(x, y)[0])
    assert found.spearman == pytest.approx(stats.spearmanr(x, y)[0])
    partial = correlation(x, np.log(y), z)
    u, v = (side - np.column_stack((np.ones(300), z)) @ np.linalg.lstsq(
        np.column_stack((np.ones(300), z)), side, rcond=None)[0] for side in (x, np.log(y)))  # fmt: skip
    assert partial.pearson == pytest.approx(stats.pearsonr(u, v)[0]) and abs(partial.pearson) < 0.2
    assert math.isnan(correlation(np.ones(300), y).pearson) and math.isnan(correlation([1, 2], [1, 2]).spearman)
    assert math.isnan(correlation(x, y, x[:, None]).pearson), "nothing of x is left"
