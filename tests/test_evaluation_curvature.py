"""Curvature against autograd's Hessian, its estimates against their expectations, and the theory's bounds."""

import pytest
import torch
import torch.nn.functional as F
from evaluated_models import Net, images, labels
from torch import nn

from robustfast.evaluation import (
    Normalized,
    curvature,
    hessian_trace,
    input_hessian_spectrum,
    smoothed_trace,
    theory,
    top_eigenvalues,
)
from robustfast.functional import gaussian_noise

X, Y = images(6, dtype=torch.float64), labels(6)


def hessians(model, x, y):
    """(N, pixels, pixels) by torch.autograd, image by image."""
    model.eval()
    return torch.stack(
        [
            torch.autograd.functional.hessian(
                lambda z, i=i: F.cross_entropy(model(z.view(1, *x.shape[1:])), y[i : i + 1]), x[i].flatten()
            )
            for i in range(len(x))
        ]
    )


@pytest.fixture(scope="module")
def net():
    return Net().double().eval()


@pytest.fixture(scope="module")
def smooth():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 5)).double()


def test_spectrum_is_autograds(net):
    exact = torch.linalg.eigvalsh(hessians(net, X, Y)).flip(1)[:, :5]
    assert exact[:, 0].max() > 1, "the test is about curvature that is there"
    spectrum = input_hessian_spectrum(net, X, Y)
    assert (spectrum - exact).abs().max() < 1e-9
    assert (spectrum.diff(dim=1) <= 0).all()


def test_spectrum_in_chunks_of_classes_and_of_images(net, monkeypatch):
    whole = input_hessian_spectrum(net, X, Y)
    for bytes_ in (8 * 64 * 6 * 2, 1):
        monkeypatch.setattr("robustfast.evaluation.hessian.JACOBIAN_BYTES", bytes_)
        torch.testing.assert_close(input_hessian_spectrum(net, X, Y), whole, rtol=1e-12, atol=1e-12)
    for batch_size in (1, 4):
        torch.testing.assert_close(input_hessian_spectrum(net, X, Y, batch_size=batch_size), whole)
    torch.testing.assert_close(input_hessian_spectrum(net.float(), X.float(), Y), whole, rtol=1e-4, atol=1e-4)
    net.double()


def test_published_estimate_is_the_mean_over_draws(smooth):
    step, std = 0.1, [0.25]
    result = curvature(smooth, X, Y, draws=3, step=step, pixel_std=std, seed=5, sample_ids=torch.arange(6) + 100)

    def gradient(z):  # of the loss in normalised pixels, by the normalised model
        z = z.detach().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(smooth(z * 0.25), Y, reduction="sum"), z)[0]

    z = X / 0.25
    expected = torch.zeros(6, dtype=torch.float64)
    for draw in range(3):
        g = gaussian_noise(torch.zeros_like(z), 1, seed=5, sample_ids=torch.arange(6) + 100, draw=draw, clip=None)
        expected += ((gradient(z + step * g) - gradient(z)) / step).square().sum((1, 2, 3)) / 3
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-9)


def test_published_estimate_tends_to_the_hessian(smooth, net):
    exact = hessians(smooth, X, Y).square().sum((1, 2))
    estimate = curvature(smooth, X, Y, draws=500, step=1e-4)
    torch.testing.assert_close(estimate, exact, rtol=0.3, atol=1e-6)
    steps = [curvature(net, X, Y, draws=50, step=step).mean() for step in (1e-2, 1e-4)]
    assert not torch.isclose(*steps, rtol=0.5), "kinks: the estimate depends on its step"


def test_lanczos_and_hutchinson(smooth):
    hessian = hessians(smooth, X, Y)
    exact = torch.linalg.eigvalsh(hessian).flip(1)
    found = top_eigenvalues(smooth, X, Y, top=3, steps=30)
    torch.testing.assert_close(found.values, exact[:, :3], rtol=1e-8, atol=1e-8)
    assert found.residuals.max() < 1e-6
    short = top_eigenvalues(smooth, X, Y, top=2, steps=4)
    nearest = (short.values.unsqueeze(2) - exact.unsqueeze(1)).abs().amin(2)
    assert (nearest <= short.residuals + 1e-9).all() and short.residuals.max() > 1e-4
    trace = hessian_trace(smooth, X, Y, draws=200)
    z = (trace.value - hessian.diagonal(dim1=1, dim2=2).sum(1)) / trace.standard_error
    assert z.abs().max() < 4 and trace.standard_error.min() > 0
    assert hessian_trace(smooth, X, Y, draws=1).standard_error.isnan().all()


def test_smoothed_trace(smooth):
    small = smoothed_trace(smooth, X, Y, sigma=1e-3, draws=300)
    z = (small.value - hessians(smooth, X, Y).diagonal(dim1=1, dim2=2).sum(1)) / small.standard_error
    assert z.abs().max() < 4


def test_smoothed_trace_counts_kinks():
    """|x| has no second derivative but at its kink; smoothed it is E|x + sigma eps|'' = 2 phi(x / sigma) / sigma."""

    def kinked(x):  # the loss of label 0 is log 2 + a |x| up to third order, with a small a
        score = 1e-4 * (x.flatten(1) - 0.5).abs()
        return torch.cat((-score, score), 1)

    x = torch.tensor([0.5, 0.6, 0.9], dtype=torch.float64).view(3, 1, 1, 1)
    result = smoothed_trace(kinked, x, torch.zeros(3, dtype=torch.int64), sigma=0.1, draws=2000)
    density = torch.exp(-0.5 * ((x.flatten() - 0.5) / 0.1) ** 2) / (2 * torch.pi) ** 0.5
    expected = 1e-4 * 2 * density / 0.1
    assert ((result.value - expected).abs() < 4 * result.standard_error + 1e-6).all()


def test_theory_bounds_hold_and_parts_agree(net):
    result = theory(net, X, Y, sigma=1e-3, draws=100)
    spectrum = input_hessian_spectrum(net, X, Y)
    torch.testing.assert_close(result.top, spectrum[:, 0])
    torch.testing.assert_close(result.trace, spectrum.sum(1))
    assert (result.top <= result.top_bound).all() and (result.trace <= result.trace_bound).all()
    torch.testing.assert_close(result.displacement, result.linear, rtol=0.5, atol=0)
    normalized = theory(Normalized(net, [0.0], [1.0]).double(), X, Y, sigma=1e-3, draws=100)
    torch.testing.assert_close(normalized.displacement, result.displacement)


MEASURES = {
    "curvature": lambda *a, **k: curvature(*a, draws=3, **k),
    "spectrum": lambda m, x, y, sample_ids, **k: input_hessian_spectrum(m, x, y, **k),
    "lanczos": lambda *a, **k: top_eigenvalues(*a, top=2, steps=3, **k).values,
    "trace": lambda *a, **k: hessian_trace(*a, draws=3, **k).value,
    "smoothed": lambda *a, **k: smoothed_trace(*a, sigma=0.1, draws=3, **k).value,
    "theory": lambda *a, **k: theory(*a, sigma=0.1, draws=3, **k).displacement,
}


@pytest.mark.parametrize("name", MEASURES)
def test_batches_ids_modes_and_no_images(name, net):
    measure, ids = MEASURES[name], torch.arange(6) * 7
    net.train()
    whole = measure(net, X, Y, sample_ids=ids, batch_size=6)
    assert net.training and net.body[1].training
    net.eval()
    assert whole.dtype == torch.float64 and len(whole) == 6
    for batch_size in (1, 4):
        torch.testing.assert_close(measure(net, X, Y, sample_ids=ids, batch_size=batch_size), whole)
    part = measure(net, X[2:5], Y[2:5], sample_ids=ids[2:5], batch_size=2)
    torch.testing.assert_close(part, whole[2:5])
    none = measure(net, X[:0], Y[:0], sample_ids=ids[:0], batch_size=2)
    assert none.shape == (0, *whole.shape[1:]) and none.dtype == torch.float64
    assert all(parameter.grad is None for parameter in net.parameters())


class Attention(nn.Module):
    def forward(self, x):
        rows = x.squeeze(1)
        return F.scaled_dot_product_attention(rows, rows, rows).mean(1)


def test_attention_has_a_second_derivative():
    found = top_eigenvalues(Attention(), X, Y, top=1, steps=20)
    exact = torch.linalg.eigvalsh(hessians(Attention(), X, Y))[:, -1]
    torch.testing.assert_close(found.values[:, 0], exact)


def test_mistakes_are_named(net):
    for call, message in (
        (lambda: curvature(net, X, Y, step=0), "step: expected a finite number above 0, got 0"),
        (lambda: curvature(net, X, Y, draws=0), "draws: expected a whole number of at least 1, got 0"),
        (lambda: smoothed_trace(net, X, Y, sigma=0), "sigma: expected a finite number above 0"),
        (lambda: top_eigenvalues(net, X, Y, top=9, steps=4), r"steps: expected at least top \(9\), got 4"),
        (lambda: input_hessian_spectrum(net, X, Y + 5), r"labels: expected classes 0..4 of the model, got"),
        (lambda: input_hessian_spectrum(lambda x: (x,), X, Y), "model: expected logits, .* got tuple"),
        (lambda: input_hessian_spectrum(lambda x: net(x).softmax(1), X, Y), "expected logits, got probabilities"),
        (lambda: input_hessian_spectrum(lambda x: net(x) * torch.nan, X, Y), "expected finite logits, got 30"),
        (lambda: input_hessian_spectrum(lambda x: net(x)[0], X, Y), r"expected logits \(6, K\), got shape \(5,\)"),
        (lambda: curvature(net, X, Y, pixel_std=[1, 1]), r"pixel_std: expected shape \(1,\)"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            call()
