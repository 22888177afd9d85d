"""The steps of the loss, one after the other, are the loss."""

import pytest
import torch
from conftest import USABLE, device_of, enter
from loss_cases import RELATIVE, assert_close, in_float64, random_case, run

from robustfast import steps
from robustfast.backends import ops
from robustfast.checks import wide_dtype
from robustfast.reference import Settings, Terms


def composed(tensors, backend, *, norm=2, ignore_index=-100, scheduled=False, **settings):
    """Loss, terms and gradients as `loss_cases.run` gives them, from the steps with a row for each class."""
    f, g, target, weight, bias, centroids, seen = tensors
    s, step = Settings(**settings), steps.of(backend)
    numbers = ((), torch.tensor(s, dtype=torch.float64)) if scheduled else (s, None)
    sums = step.class_sums(f, target, weight.shape[0], ignore_index)
    counts = sums[:, -1]
    mu = sums[:, :-1] / counts.clamp(min=1).unsqueeze(1)
    tau = torch.ones_like(counts).masked_fill(seen, 1 - s.momentum)
    centroid = tau.unsqueeze(1) * mu + (1 - tau).unsqueeze(1) * centroids
    share = torch.where(counts > 0, 1 / ((counts > 0).sum() * counts), 0)
    slot, pull, pull_sum, squares = step.class_pulls(f, g, target, centroid, share, *numbers, norm, ignore_index)
    _, winner = step.margin_search(mu, weight, bias, weight, bias)
    won = winner.long().clamp(min=0)
    weight_w, bias_w = weight[won], None if bias is None else bias[won]
    mu_grad, boundary_grad, boundary_bias, winner, (margin, regularization) = step.finish(
        mu, centroid, pull_sum, counts, tau, weight, bias, weight_w, bias_w, winner, *numbers, norm
    )
    row = torch.arange(len(winner), device=winner.device)
    tables, classes = torch.stack((centroid, mu_grad, boundary_grad)), torch.stack((row, winner))
    wanted = [True, g is not None, True, bias is not None]
    grads = step.discriminative_loss_backward(
        mu.new_ones(()), f, g, slot, pull, tables, classes.int(), boundary_bias, weight.shape[0],
        weight.dtype, weight.dtype if bias is None else bias.dtype, norm, wanted,
    )  # fmt: skip
    variance = squares[0] if g is None else squares.mean()
    loss = s.alpha * variance + s.beta * margin + s.gamma * regularization
    names = ("grad_input", "grad_input_noise", "grad_weight", "grad_bias")
    return {
        **Terms(loss, variance, margin, regularization, *squares)._asdict(),
        **{name: grad for name, grad, want in zip(names, grads, wanted, strict=True) if want},
    }


def many():
    """Cases that differ in one thing each."""
    f, g, target, weight, bias, *state = random_case(dtype=torch.float64)
    target[target == 3] = 2
    yield "absent class", (f, g, target, weight, bias, *state), {}
    yield "norm 1", (f, g, target, weight, bias, *state), dict(norm=1, delta_var=4.0)
    yield "no noisy view, no bias", (f, None, target, weight, None, *state), {}
    some = torch.where(torch.arange(50) % 3 == 0, -100, target)
    yield "ignored", (f.masked_fill((some == -100).unsqueeze(1), torch.nan), g, some, weight, bias, *state), {}
    yield "another ignore_index", (f, g, target.int(), weight, bias, *state), dict(ignore_index=2)
    yield "nothing but ignored", (f, g, torch.full_like(target, -100), weight, bias, *state), {}
    equal = torch.where(torch.arange(7).unsqueeze(1) < 4, weight[0], weight)
    yield "equal rows", (f, g, target, equal, bias, *state), {}
    yield "one boundary", (f, g, target, equal[:1].expand(7, -1), bias, *state), {}
    yield "inactive hinges", (f, g, target, weight, bias, *state), dict(delta_var=3.0, delta_dist=-2.0, gamma=1.0)
    yield "samples at their centroids", (torch.zeros_like(f), g, target, weight, bias, *state), dict(delta_var=0.0)
    yield "scheduled", (f, g, target, weight, bias, *state), dict(scheduled=True, alpha=0.5, momentum=0.3)
    yield "none", (f[:0], g[:0], target[:0], weight, bias, *state), {}
    yield "more classes than samples", random_case(5, classes=11, dtype=torch.float64), {}


CASES = list(many())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=[name for name, *_ in CASES])
def test_composed_steps_are_the_loss(case, dtype, every_backend):
    _, tensors, keywords = case
    f, g, target, weight, bias, centroids, seen = tensors
    features = [None if t is None else t.to(dtype) for t in (f, g)]
    wide = wide_dtype(features[0])
    tensors = (*features, target, weight.to(wide), None if bias is None else bias.to(wide), centroids.to(wide), seen)
    tensors = on_device(every_backend, *tensors)
    expected = run(in_float64(tensors), "reference", **{k: v for k, v in keywords.items() if k != "scheduled"})
    actual = composed(tensors, every_backend, **keywords)
    assert actual["grad_input"].dtype == dtype and actual["loss"].dtype == wide
    del expected["centroids"], expected["seen"]
    for name, value in expected.items():
        half = torch.finfo(dtype).eps if actual[name].dtype == torch.bfloat16 else 0
        assert_close(actual, {name: value}, (1e-12 if dtype == torch.float64 else RELATIVE[wide]) + half, 1e-12)


def test_wrong_labels_are_named():
    with pytest.raises(IndexError, match=r"label 7 at position 1 is outside 0\.\.6"):
        steps.class_sums(torch.zeros(2, 3), torch.tensor([0, 7]), 7, -100)


def on_device(backend, *tensors):
    return [None if t is None else t.to(device_of(backend)) for t in tensors]


def shards(dtype):
    """Rows of tables with their W_c, b_c, and parts of a classifier: some with these rows, some without, one empty.

    And where each row's own is in the part, -1 where it is not there.
    """
    mu, _, classes, weight, bias, *_ = random_case(17, 20, 90, dtype=torch.float64, seed=2)
    weight[60:64], bias[60:64] = weight[:4], bias[:4]  # equal rows far apart; those of `first` win nothing
    first = torch.cat((torch.arange(4), classes[4:]))
    wide = wide_dtype(torch.empty(0, dtype=dtype))
    weight, bias = weight.to(dtype), bias.to(dtype)
    tensors = [t.to(wide) for t in (mu, weight[first], bias[first])]
    for begin, end in ((0, 90), (0, 37), (40, 83), (83, 90), (90, 90)):
        here = (first >= begin) & (first < end)
        yield (*tensors, weight[begin:end], bias[begin:end]), torch.where(here, first - begin, -1).int()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_search_in_parts_of_a_classifier(dtype, every_backend):
    for case, classes in shards(dtype):
        *case, classes = on_device(every_backend, *case, classes)
        expected, at = steps.margin_search(*in_float64(case))
        for known in (None, classes):
            score, winner = steps.of(every_backend).margin_search(*case, known)
            assert winner.dtype == torch.int32 and torch.equal(winner, at)
            torch.testing.assert_close(score.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_search_for_rows_of_the_classifier_itself(dtype, every_backend):
    """Of which the last have no class."""
    search = steps.of(every_backend).margin_search
    case, classes = next(shards(dtype))
    mu, weight_c, bias_c, weight, bias, classes = on_device(every_backend, *case, classes)
    present = classes.new_tensor(12)
    expected = search(mu, weight_c, bias_c, weight, bias)
    mu[12:], classes[12:] = torch.nan, -1
    for actual, of_given in zip(search(mu, None, None, weight, bias, classes, present), expected, strict=True):
        assert torch.equal(actual[:12], of_given[:12])
    for actual, of_given in zip(search(mu[:12], None, None, weight, bias, classes[:12]), expected, strict=True):
        assert torch.equal(actual, of_given[:12])


def test_the_lowest_of_equal_winners_and_no_winner_among_equal_rows(every_backend):
    search = steps.of(every_backend).margin_search
    weight = torch.zeros(70, 20)
    weight[torch.arange(5, 70), torch.arange(65) % 20] = 1.0  # the first five are equal, each other one comes thrice
    mu, weight = on_device(every_backend, torch.eye(20)[:, torch.arange(20).roll(7)], weight)
    score, winner = search(mu, torch.zeros_like(mu), None, weight, None)
    assert (score == 1).all() and torch.equal(winner, 5 + mu.argmax(1).int())
    score, winner = search(mu, weight[:1].expand(20, -1), None, weight[:5], None)
    assert (score == -torch.inf).all() and (winner == -1).all()


def near_ties(count, gap, dtype, seed=0):
    """A search of one row, in which the scores of `count` classes are the highest, `gap` times ||mu|| apart, in any
    order. mu is what two bfloat16 represent worst, by as much as moves some scores up and some down. The classifier is
    of `dtype`, its bias float32."""
    generator = torch.Generator().manual_seed(seed)
    mu = torch.full((1, 40), 1 + 2.0**-8 - 2.0**-17)
    sides = torch.randint(2, (300, 1), generator=generator) * 2.0 - 1
    weight = (torch.randn(300, 40, generator=generator) + sides).to(dtype)
    own = weight[7:8].double()
    distance = (weight.double() - own).norm(dim=1)
    logit = ((weight.double() - own) * mu).sum(1)
    rank, others = torch.randperm(300, generator=generator), torch.arange(300) != 7
    score = torch.where(others, logit / distance, -torch.inf)
    highest = torch.where(rank < count, score.max() + 1 - rank * gap * mu.norm(), score - 1)
    bias = torch.where(others, highest * distance - logit, 0).float()
    return mu, weight[7:8], bias[7:8], weight, bias


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("count, gap", [(2, 1e-5), (5, 1e-6), (40, 1e-6), (299, 1e-6)])
def test_near_ties_are_decided_as_by_a_look_at_every_pair(count, gap, dtype, every_backend):
    for seed in range(4):
        case = near_ties(count, gap, dtype, seed)
        _, winner = steps.of(every_backend).margin_search(*on_device(every_backend, *case))
        assert winner.item() == steps.margin_search(*in_float64(case))[1].item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_lowest_of_many_copies_of_a_winner(dtype, every_backend):
    rows = torch.randn(20, 40, dtype=torch.float64).to(dtype)
    weight, wide = rows.repeat(15, 1), wide_dtype(rows)
    mu = torch.randn(20, 40, dtype=wide)
    case = (mu, rows.to(wide), None, weight, None)
    _, winner = steps.of(every_backend).margin_search(*on_device(every_backend, *case))
    expected = steps.margin_search(*in_float64(case))[1]
    assert (expected < 20).all() and torch.equal(winner.cpu(), expected)


def test_more_rows_than_samples(every_backend):
    """Rows are classes of a whole classifier, of which a rank has few samples or none."""
    step, row = steps.of(every_backend), torch.arange(50, device=device_of(every_backend))
    for n in (3, 0):
        f, g, target, *_ = random_case(n, 20, 50, dtype=torch.float64)
        generator = torch.Generator().manual_seed(1)
        centroid = torch.randn(50, 20, generator=generator, dtype=torch.float64)
        share = torch.rand(50, generator=generator, dtype=torch.float64)
        f, g, target, centroid, share = on_device(every_backend, f, g, target, centroid, share)
        arguments = (f, g, target, centroid, share, Settings(delta_var=0.1), None, 2, -100)
        for actual, expected in zip(step.class_pulls(*arguments), steps.class_pulls(*arguments), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
        sums = step.class_sums(f, target, 50, -100)
        torch.testing.assert_close(sums, steps.class_sums(f, target, 50, -100), rtol=1e-14, atol=1e-14)
        slot, pull, pull_sum, _ = step.class_pulls(*arguments)
        tables, classes = torch.stack((centroid, pull_sum, centroid)), torch.stack((row, row.roll(1))).int()
        arguments = (f.new_ones(()), f, g, slot, pull, tables, classes, share, 50, f.dtype, f.dtype, 2, [True] * 4)
        grads = step.discriminative_loss_backward(*arguments), steps.discriminative_loss_backward(*arguments)
        for actual, expected in zip(*grads, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["cpu", "emulated", "triton"])
def test_opcheck(name, request):
    if name not in USABLE:
        pytest.skip(f"{name} cannot run here")
    op, (f, g, target, weight, bias, *_) = ops(enter(request, name)), random_case(9, 6, 5)
    rows, settings = torch.ones(5), list(Settings())
    winner = torch.arange(5, dtype=torch.int32).roll(1)
    for step, *arguments in (
        (op.class_sums, f, target, 5, -100),
        (op.class_pulls, f, g, target, weight, rows, settings, None, 2, -100),
        (op.margin_search, weight, weight, bias, weight, bias),
        (op.margin_search, weight, None, None, weight, bias, winner, torch.tensor(5, dtype=torch.int32)),
        (op.finish, weight, weight, weight, rows, rows, weight, bias, weight[winner], bias, winner, settings, None, 2),
    ):
        torch.library.opcheck(step, tuple(arguments))
