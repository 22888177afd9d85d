"""The Triton backend where only its kernels can go wrong: tiles, the ways of sorting and searching, launches.

Without a GPU the kernels run in Triton's interpreter: slowly, so the cases are small and most tiles are made small.
"""

from __future__ import annotations

import math

import pytest
import torch
import triton
from loss_cases import assert_close, assert_matches_float64, golden_steps, in_float64, random_case, run

from robustfast import steps as plain
from robustfast.backends import backends, ops
from robustfast.reference import Settings
from robustfast.triton_ops import centroids, device, groups, loss, search, steps, variance

pytestmark = pytest.mark.skipif(backends()["triton"] is not None, reason=str(backends()["triton"]))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SETTINGS = (list(Settings()), None, 2, True, -100)
OPS = ops("triton") if backends()["triton"] is None else None


@pytest.fixture
def large(monkeypatch):
    """The launches of large problems for small ones."""
    monkeypatch.setattr(loss, "is_small", lambda *_: False)


@pytest.fixture
def small_tiles(large, monkeypatch):
    """Tiles of 16 and 4, which small cases cross two times with a remainder."""

    def row_tile(dim, *_, **__):
        return device.RowTile(4, max(16, triton.next_power_of_2(dim)), {"num_warps": 4})

    monkeypatch.setattr(search, "search_tiles", lambda *_: search.SearchTiles(16, 16, 16, 4, 2))
    monkeypatch.setattr(search, "search_items", lambda tiles, rows, num_classes, _: -(-rows // 16) * 2)
    for module in (search, loss, variance, steps):
        monkeypatch.setattr(module, "row_tile", row_tile)
    monkeypatch.setattr(centroids, "sums_width", lambda dim: 16)
    monkeypatch.setattr(loss, "slice_size", lambda dim: 16)


def replaced(tensors, **changes):
    names = ("input", "input_noise", "target", "weight", "bias", "centroids", "seen")
    return tuple(changes.get(name, tensor) for name, tensor in zip(names, tensors, strict=True))


def test_scatter_of_the_weight_s_gradient(monkeypatch):
    """dW by a scatter into zeros, as where there are many classes."""
    monkeypatch.setattr(loss, "DENSE", 64)
    monkeypatch.setattr(loss, "slice_size", lambda dim: 16)
    for tensors, keywords, expected in golden_steps("many_classes_few_present", torch.float64, DEVICE):
        actual = run(tensors, "triton", **keywords)
        assert_close(actual, expected, 1e-10)
        tensors[5].copy_(actual["centroids"])
        tensors[6].copy_(actual["seen"])


@pytest.mark.parametrize(
    "n, dim, classes, dtype, weight_dtype, norm",
    [
        (41, 37, 43, torch.float32, None, 2),
        (41, 37, 43, torch.float64, None, 1),
        (41, 48, 35, torch.bfloat16, None, 2),
        (41, 37, 35, torch.float16, torch.float32, 2),
        (9, 33, 150, torch.float32, torch.bfloat16, 1),  # dW by the scatter into zeros
        (20, 16, 8, torch.float32, torch.float64, 2),
        (20, 16, 8, torch.float64, torch.float32, 2),
        (1, 5, 2, torch.float32, None, 2),
    ],
    ids=str,
)
def test_every_tile_crossed(n, dim, classes, dtype, weight_dtype, norm, small_tiles, monkeypatch):
    monkeypatch.setattr(loss, "DENSE", 64)
    tensors = random_case(n, dim, classes, dtype=dtype, weight_dtype=weight_dtype, device=DEVICE)
    each = torch.arange(n, device=DEVICE) % classes  # as many rows as there can be
    assert_matches_float64(replaced(tensors, target=each), "triton", norm=norm, delta_dist=2.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_as_they_are(dtype):
    tensors = random_case(70, 64, 130, dtype=dtype, device=DEVICE)
    assert_matches_float64(tensors, "triton")


@pytest.mark.parametrize("n", [500, 1100, 2500])
def test_each_way_of_sorting(n, monkeypatch):
    """In one program; by ranks, in one or more programs; by torch.sort; with ignored samples, long runs among short."""
    if n == 2500:
        monkeypatch.setattr(groups, "COMPARED", 2000)
    labels = torch.randint(30, (n,), generator=torch.Generator().manual_seed(1)) * 2
    labels[::7] = -100
    labels[n // 2 :] = 3
    tensors = replaced(random_case(n, 3, 60, device=DEVICE), target=labels.to(DEVICE))
    slot = OPS.discriminative_loss(*tensors[:5], tensors[5].clone(), tensors[6].clone(), *SETTINGS)[2]
    classes = torch.unique(labels[labels >= 0])
    assert torch.equal(slot.cpu().long(), torch.where(labels < 0, -1, torch.searchsorted(classes, labels.clamp(min=0))))
    assert_matches_float64(tensors, "triton")


@pytest.mark.parametrize("skew", [1, 3], ids=["one class", "three classes"])
def test_skewed_labels_give_the_same_bits_every_time(skew, small_tiles):
    tensors = random_case(120, 24, 7, device=DEVICE)
    tensors = replaced(tensors, target=tensors[2] % skew)
    first, second = run(tensors, "triton"), run(tensors, "triton")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert_matches_float64(tensors, "triton")


def test_steps_of_long_classes(small_tiles):
    """Sums and pulls in rows of their classes, of classes in chunks and others, of samples that are not counted."""
    f, g, target, weight, *_ = random_case(120, 24, 7, dtype=torch.float64, device=DEVICE)
    target[:90] = torch.where(torch.arange(90, device=DEVICE) % 3 > 0, 5, -100)
    share = torch.rand(7, dtype=torch.float64).to(DEVICE)
    arguments = (f, g, target, weight, share, Settings(delta_var=4.0), None, 2, -100)
    results = (OPS.class_sums(f, target, 7, -100), *OPS.class_pulls(*arguments))
    for actual, expected in zip(
        results, (plain.class_sums(f, target, 7, -100), *plain.class_pulls(*arguments)), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("classes, dense", [(30, 2048), (300, 64)])
def test_one_winner_for_all_classes(classes, dense, monkeypatch):
    monkeypatch.setattr(loss, "DENSE", dense)
    tensors = random_case(40, 12, classes, device=DEVICE)
    tensors[4][17] = 200.0
    assert_matches_float64(tensors, "triton")


@pytest.mark.parametrize(
    "dtype, label, num_classes, ignore_index",
    [
        (torch.uint8, 156, 200, -100),
        (torch.int8, 127, 128, -100),
        (torch.uint8, 255, 256, -100),
        (torch.uint8, 255, 5, 255),
        (torch.int16, 32767, 40000, -100),
        (torch.int64, 2**40, 5, 2**40),
    ],
)
def test_labels_at_the_ends_of_their_dtypes(dtype, label, num_classes, ignore_index):
    target = torch.tensor([1, label, 0], dtype=dtype, device=DEVICE)
    slot, classes = (torch.empty(shape, dtype=torch.int32, device=DEVICE) for shape in (3, (2, 3)))
    groups.group(target, slot, torch.empty(2, 3, device=DEVICE), classes, num_classes, ignore_index)
    ignored = label == ignore_index
    assert slot.tolist() == [1, -1 if ignored else 2, 0]
    assert classes[0].tolist() == [0, 1, -1 if ignored else label]


# Winners of half types are found with mu rounded, where no row is close.
@pytest.mark.parametrize("dtype, relative", [(torch.float32, 1e-5), (torch.bfloat16, 1e-3)], ids=["f32", "bf16"])
@pytest.mark.parametrize("splits", [1, 3])
def test_close_rows_are_told_apart(dtype, relative, splits, small_tiles, monkeypatch):
    monkeypatch.setattr(search, "search_items", lambda tiles, rows, num_classes, _: -(-rows // 16) * splits)
    f, g, y, w, b, *state = random_case(60, 20, 50, device=DEVICE)
    w[25:] = w[:25] + 1e-5 * w[25:]  # ||W_i||^2 + ||W_c||^2 - 2 W_i . W_c is rounding alone
    w[25:, :3] += 2**-7 * w[:25, :3].sign()  # so that half types differ too
    tensors = (f.to(dtype), g.to(dtype), y, w.to(dtype), torch.zeros_like(b, dtype=dtype), *state)
    expected = run(in_float64(tensors), "reference")
    assert_close({"margin": run(tensors, "triton")["margin"]}, {"margin": expected["margin"]}, relative)


def best_pairs(mu, weight, bias, classes):
    """The scores of all pairs, (R, K) in float64, -inf where there is no boundary: from differences, one by one."""
    mu, weight, bias, classes = (t.cpu() for t in (mu.double(), weight.double(), bias.double(), classes.long()))
    normal = weight - weight[classes].unsqueeze(1)
    distance = normal.norm(dim=2)
    scores = ((normal * mu.unsqueeze(1)).sum(2) + bias - bias[classes].unsqueeze(1)) / distance
    return scores.masked_fill(distance == 0, -math.inf)


def classifier(kind, num_classes, dim, generator):
    """Weights whose rows differ by little, or in few bits, or beyond the range of their squares."""
    weight = torch.randn(num_classes, dim, generator=generator, dtype=torch.float64)
    if kind in ("signs", "bits", "ternary"):
        values = torch.tensor({"signs": (-1.0, 1.0), "bits": (0.0, 1.0), "ternary": (-1.0, 0.0, 1.0)}[kind])
        return values[torch.randint(len(values), weight.shape, generator=generator)].double()
    return {
        "opposite": torch.cat((weight[: num_classes // 2], -weight[: num_classes - num_classes // 2])),
        "one-hot": torch.eye(num_classes, dim, dtype=torch.float64),
        "bfloat16": weight.bfloat16().double(),
        "offset": weight + 300,
        "clusters": weight[:3].repeat(num_classes, 1)[:num_classes] * (1 + 2**-7 * torch.rand(num_classes, 1)),
        "equal": weight[:5].repeat(num_classes, 1)[:num_classes],
        "tiny": weight * 1e-21,
        "huge": weight * 1e19,
        "one tiny row": torch.cat((weight[:1] * 1e-21, weight[1:])),
    }[kind]


KINDS = ["signs", "bits", "ternary", "opposite", "one-hot", "bfloat16", "offset", "clusters", "equal", "tiny", "huge",
         "one tiny row"]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_search_finds_the_best_pair(kind, dtype, small_tiles):
    generator = torch.Generator().manual_seed(4)
    wide = torch.promote_types(dtype, torch.float32)
    weight = classifier(kind, 40, 20, generator).to(dtype).to(DEVICE)
    mu, bias = torch.randn(9, 20, generator=generator).to(DEVICE, wide), torch.zeros(40, dtype=wide, device=DEVICE)
    classes = torch.tensor([0, 1, 5, 17, 18, 33, 38, 39, -1], dtype=torch.int32, device=DEVICE)
    score, winner = search.margin_search(mu, None, None, weight, bias, classes)
    own = classes[:-1].long()  # the last row has no class
    given = search.margin_search(mu[:-1], weight[own], bias[own], weight, bias)
    assert torch.equal(given[0], score[:-1]) and torch.equal(given[1], winner[:-1])
    exact = best_pairs(mu, weight, bias, classes.clamp(min=0))[:-1]
    best = exact.max(1).values
    assert winner[-1] == -1 and score[-1] == -math.inf
    assert_close({"score": score[:-1]}, {"score": best}, 1e-5 if wide == torch.float32 else 1e-12)
    taken = exact.gather(1, winner[:-1].long().cpu().unsqueeze(1)).squeeze(1)
    assert ((best - taken) <= 1e-6 * best.abs()).all()
    same = (weight.unsqueeze(0) == weight[winner[:-1].long()].unsqueeze(1)).all(2).int()
    assert torch.equal(winner[:-1].long(), same.argmax(1)), "the lowest class of those that have this row"


def test_nothing_found_where_all_rows_are_equal(small_tiles):
    mu, weight = torch.randn(3, 20, device=DEVICE), torch.ones(40, 20, device=DEVICE)
    score, winner = search.margin_search(
        mu, None, None, weight, None, torch.arange(3, dtype=torch.int32, device=DEVICE)
    )
    assert (score == -math.inf).all() and (winner == -1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("first, second", [(37, 9), (9, 37), (9, 10), (30, 31)])
def test_lowest_class_wins_where_other_logits_score_alike(dtype, splits, first, second, small_tiles, monkeypatch):
    """Distances of 41 and 1 along one axis: scores are equal, logits are not, nor are rounded reciprocals."""
    monkeypatch.setattr(search, "search_items", lambda tiles, rows, num_classes, _: splits)
    weight = torch.zeros(48, 16, dtype=dtype, device=DEVICE)
    weight[:, 1] = -torch.arange(48, device=DEVICE) - 1.0
    weight[0], weight[first], weight[second] = 0, 0, 0
    weight[first, 0], weight[second, 0] = 1, 41
    mu = torch.zeros(1, 16, device=DEVICE)
    mu[0, :2] = torch.tensor([1.75, 0.3])
    score, winner = search.margin_search(mu, None, None, weight, None, torch.zeros(1, dtype=torch.int32, device=DEVICE))
    assert winner.item() == min(first, second)
    assert score.item() == mu[0, 0]


def test_lowest_class_wins_a_tie(small_tiles):
    f, g, y, w, b, m, s = random_case(1, 4, 60, device=DEVICE)
    y.zero_(), w.zero_(), b.zero_()
    w[[50, 21, 35], 1] = 1.0  # boundaries alike, in different tiles
    actual = run((f, g, y, w, b, m, s), "triton", delta_dist=30.0)
    assert actual["grad_weight"].abs().sum(1).nonzero().flatten().tolist() == [0, 21]
