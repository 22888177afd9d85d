"""Attacks: within the ball, no weaker with more, each image's worst kept, and an audit that sees masked gradients."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from evaluated_models import Net, images
from torch import nn

from robustfast.evaluation import attack, audited_attack, autoattack, random_search
from robustfast.evaluation.attacks import _checkpoints, inside, judged
from robustfast.evaluation.measurements import Attack, Draws
from robustfast.evaluation.stream import measure
from robustfast.evaluation.summary import summarise

X = images(16)
NET = Net().eval()
Y = NET(X).argmax(1)  # all right at first


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("method", ["apgd", "pgd"])
def test_attack_finds_the_corner_of_a_linear_model(norm, method):
    """A linear model's worst point is x + epsilon * sign(w), or x + epsilon * w / |w|, where nothing is clipped."""
    linear = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).double()
    x = torch.full((5, 1, 8, 8), 0.5, dtype=torch.float64)
    y = torch.tensor([0, 1, 0, 1, 0])
    w = (linear[1].weight[1] - linear[1].weight[0]).detach().view(1, 1, 8, 8) * (1 - 2 * y).view(5, 1, 1, 1)
    move = w.sign() if norm == "linf" else w / w.flatten(1).norm(dim=1).view(5, 1, 1, 1)
    found = attack(linear, x, y, norm=norm, epsilon=0.1, steps=30, method=method)
    tolerance = 1e-4 if method == "apgd" else 3e-3  # a fixed step does not end quite there
    expected = judged(linear, x + 0.1 * move, y)[0]
    torch.testing.assert_close(judged(linear, found, y)[0], expected, rtol=tolerance, atol=0)
    assert inside(found, x, norm, 0.1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("method", ["apgd", "pgd"])
def test_batches_ids_and_restarts(norm, method):
    given = {"norm": norm, "method": method, "epsilon": 0.05 if norm == "linf" else 0.3, "steps": 8}
    ids = torch.arange(16) * 3
    kept = X.clone()
    NET.train()
    one = attack(NET, X, Y, sample_ids=ids, **given)
    assert NET.training and torch.equal(X, kept)
    NET.eval()
    assert inside(one, X, norm, given["epsilon"]) and not torch.equal(one, X)
    for part in torch.arange(16).split(5):
        torch.testing.assert_close(attack(NET, X[part], Y[part], sample_ids=ids[part], **given), one[part])
    torch.testing.assert_close(attack(NET, X, Y, sample_ids=ids, batch_size=7, **given), one)
    loss, wrong = judged(NET, one, Y)
    more_loss, more_wrong = judged(NET, attack(NET, X, Y, sample_ids=ids, restarts=4, **given), Y)
    assert (more_wrong >= wrong).all() and (more_loss[more_wrong == wrong] >= loss[more_wrong == wrong] - 1e-5).all()
    assert torch.equal(attack(NET, X, Y, **{**given, "epsilon": 0.0}), X)
    assert attack(NET, X[:0], Y[:0], **given).shape == (0, 1, 8, 8)


def test_clean_image_counts_and_accuracy_falls_with_epsilon():
    right = [
        int((~judged(NET, attack(NET, X, Y, epsilon=epsilon, steps=10), Y)[1]).sum()) for epsilon in (0, 0.02, 0.1, 0.4)
    ]
    assert right[0] == 16 and right == sorted(right, reverse=True) and right[-1] < 8
    clean, _ = judged(NET, X, Y)
    assert (judged(NET, attack(NET, X, Y, epsilon=0.01, steps=1), Y)[0] >= clean).all()


def test_checkpoints_of_apgd():
    assert _checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_search_stays_inside_and_works(norm):
    epsilon = 0.2 if norm == "linf" else 1.5
    found = random_search(NET, X, Y, norm=norm, epsilon=epsilon, queries=60, seed=3)
    assert inside(found, X, norm, epsilon)
    assert judged(NET, found, Y)[1].any()
    part = random_search(
        NET, X[4:9], Y[4:9], norm=norm, epsilon=epsilon, queries=60, seed=3, sample_ids=torch.arange(4, 9)
    )
    torch.testing.assert_close(part, found[4:9])


def test_audit_of_an_honest_model_and_of_masked_gradients():
    honest = audited_attack(NET, X, Y, epsilon=0.1, steps=20, queries=20)
    assert not any("masked" in warning or "outside" in warning or "radius" in warning for warning in honest.warnings)
    assert torch.equal(honest.right, ~judged(NET, honest.images, Y)[1])

    def masked(x):  # the same classifier behind a rounding, whose gradient is 0
        return NET((x * 20).round() / 20)

    y = masked(X).argmax(1)
    found = audited_attack(masked, X, y, epsilon=0.15, steps=5, queries=100)
    assert found.zero_gradient.all()
    assert any("has no gradient" in warning for warning in found.warnings)
    assert any("gradients may be masked" in warning for warning in found.warnings)
    assert found.searched.sum() < found.right.sum()


def test_the_table_of_an_attack_carries_its_audit(tmp_path):
    def masked(x):
        return NET((x * 20).round() / 20)

    y = masked(X).argmax(1)
    chosen = [Draws("clean", None), Attack("strong", "linf", 0.15, steps=4, queries=100)]
    columns, about = measure(masked, [(X, y)], chosen, tmp_path)
    summary = summarise(columns, about)
    (found,) = summary["attacks"]
    assert found["searched"] < found["accuracy"] <= found["fewer_steps"] <= found["smaller_radius"] == 1.0
    assert found["still"] == 1.0 and 0 < found["longest"] <= 0.15 + 1e-6 and not found["outside"]
    assert len(summary["warnings"]) == 1 and "strong: gradients may be masked" in summary["warnings"][0]

    def doubts(**changes):
        changed = {f"strong/{part}": np.full_like(columns[f"strong/{part}"], value) for part, value in changes.items()}
        return " ".join(summarise({**columns, **changed}, about)["warnings"])

    assert "a quarter of the steps leaves 0.0% right" in doubts(fewer=False)
    assert "an attacked image lies outside of the ball" in doubts(length=0.2)
    assert "radius 0 moves 100.0% of the images" in doubts(still=False)
    wrong = {"clean/prediction": columns["clean/prediction"] + 1}
    assert "more images are right than at a smaller radius" in " ".join(
        summarise({**columns, **wrong}, about)["warnings"]
    )


def test_mistakes_are_named():
    for call, message in (
        (lambda: attack(NET, X, Y, epsilon=0.1, norm="l1"), "norm: expected 'linf' or 'l2', got 'l1'"),
        (lambda: attack(NET, X, Y, epsilon=-1), "epsilon: expected a finite number >= 0, got -1"),
        (lambda: attack(NET, X, Y, epsilon=0.1, method="cw"), "method: expected one of apgd, pgd, got 'cw'"),
        (lambda: attack(NET, X, Y, epsilon=0.1, restarts=0), "restarts: expected a whole number"),
        (lambda: attack(lambda x: F.softmax(NET(x), 1), X, Y, epsilon=0.1), "expected logits, got probabilities"),
        (lambda: attack(NET, X, Y + 5, epsilon=0.1), "labels: expected classes 0..4 of the model"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_autoattack_is_no_weaker_and_leaves_the_generator(norm):
    pytest.importorskip("pyautoattack")
    state = torch.get_rng_state()
    epsilon = 0.05 if norm == "linf" else 0.3
    found = autoattack(NET, X, Y, norm=norm, epsilon=epsilon)
    assert torch.equal(torch.get_rng_state(), state)
    assert inside(found, X, norm, epsilon)
    ours = judged(NET, attack(NET, X, Y, norm=norm, epsilon=epsilon, steps=40), Y)[1]
    assert judged(NET, found, Y)[1].sum() >= ours.sum() > 0
    assert autoattack(NET, X[:0], Y[:0], norm=norm, epsilon=epsilon).shape == (0, 1, 8, 8)


def test_autoattack_names_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(ModuleNotFoundError, match=r"pyautoattack is not installed; .*attack"):
        autoattack(NET, X, Y, epsilon=0.1)
