"""Where published code breaks and no backend here may: numbers that are not finite, rows that are alike, labels."""

import pytest
import torch
from conftest import SLOW, USABLE
from loss_cases import (
    RELATIVE,
    assert_close,
    assert_matches_float64,
    in_float64,
    random_case,
    rounding,
    run,
)

from robustfast import functional, reference

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def backend(every_backend):
    return every_backend


# Features and classifiers that are not finite.


@pytest.mark.parametrize("poison", [INF, -INF, NAN])
def test_nothing_is_lost_to_features_that_are_not_finite(poison, way):
    f, g, target, weight, bias, centroids, seen = way.case()
    bad, c = f.clone(), int(target[0])
    bad[0, 3] = poison
    after = run((bad, g, target, weight, bias, centroids, seen), way.backend)
    assert not after["loss"].isfinite()
    assert torch.equal(after["centroids"][c], centroids[c]) and after["seen"][c] == seen[c]
    others = [k for k in target.unique().tolist() if k != c]
    clean = run((f, g, target, weight, bias, centroids, seen), way.backend)
    assert torch.equal(after["centroids"][others], clean["centroids"][others])
    assert after["seen"][others].all() and after["centroids"].isfinite().all()
    expected = run((bad, g, target, weight, bias, centroids, seen), "reference")
    assert_close(after, {name: expected[name] for name in ("centroids", "seen")}, 1e-5)


def test_a_nan_feature_spoils_its_class_alone(way):
    tensors = way.case(dtype=torch.float64)
    target = tensors[2]
    target[: way.num_classes // 2] = torch.arange(way.num_classes // 2)
    tensors[0][2, 1] = NAN
    expected = run(tensors, "reference")
    actual, again = (run(tensors, way.backend) for _ in range(2))
    spoiled = target == 2
    for name in ("grad_input", "grad_input_noise"):
        assert actual[name][spoiled].isnan().any(1).all() and actual[name][~spoiled].isfinite().all()
    for name in ("grad_input", "grad_input_noise", "grad_weight", "grad_bias"):
        assert torch.equal(actual[name].isnan(), expected[name].isnan()), name
    if way.backend != "reference":
        assert all(torch.equal(actual[name].nan_to_num(7.0), again[name].nan_to_num(7.0)) for name in actual)


@pytest.mark.parametrize("where", ["weight", "bias"])
def test_nan_in_the_classifier_reaches_the_loss(where, way):
    tensors = way.case()
    tensors[3 if where == "weight" else 4][way.num_classes - 1] = NAN
    assert not run(tensors, way.backend)["loss"].isfinite()


def test_a_class_with_bias_minus_infinity_never_wins(way):
    f, g, target, weight, bias, *state = way.case(dtype=torch.float64)
    target[target == 5] = 4
    without = torch.arange(way.num_classes, device=f.device) != 5
    bias[5] = -INF
    actual = run((f, g, target, weight, bias, *state), way.backend)
    target = torch.where(target > 5, target - 1, target)
    expected = run((f, g, target, weight[without], bias[without], *(t[without] for t in state)), way.backend)
    assert not actual["grad_weight"][5].any() and not actual["grad_bias"][5].any()
    for name in ("grad_weight", "grad_bias", "centroids", "seen"):
        actual[name] = actual[name][without]
    assert_close(actual, expected, 1e-12)


# Rows of W that are equal, nearly equal, or of any size.


def margin_by_pairs(tensors, delta_dist=3.0):
    """The margin by its definition, pair by pair."""
    f, _, target, weight, bias = tensors[:5]
    values = []
    for c in target.unique().tolist():
        mu = f[target == c].mean(0)
        hinges = [torch.zeros((), dtype=f.dtype, device=f.device)]
        for i in range(weight.shape[0]):
            normal = weight[i] - weight[c]
            if normal.any():
                hinges.append(delta_dist + (normal @ mu + bias[i] - bias[c]) / normal.norm())
        values.append(torch.stack(hinges).max())
    return torch.stack(values).mean()


def assert_margin(tensors, backend, relative, **keywords):
    expected = margin_by_pairs(in_float64(tensors), **keywords)
    assert_close({"margin": run(tensors, backend, **keywords)["margin"]}, {"margin": expected}, relative)


@pytest.mark.parametrize("delta_dist", [-3.0, 0.0, 3.0])
def test_margin_by_pairs(delta_dist, backend, device):
    tensors = random_case(40, 70, 150, dtype=torch.float64, device=device)
    assert_margin(tensors, backend, 1e-10, delta_dist=delta_dist)


def test_equal_rows_have_no_boundary(way):
    tensors = list(way.case(dtype=torch.float64))
    tensors[3][1] = tensors[3][0]
    tensors[3][-4:] = tensors[3][2]
    tensors[3][3, 5] = 0.0
    tensors[3][4] = tensors[3][3]
    tensors[3][4, 5] = -0.0  # equal as well, though not bit for bit
    tensors[4][-4:] += 5  # would win by far if the pairs counted
    assert_matches_float64(tensors, way.backend)
    assert_margin(tensors, way.backend, 1e-10)


def test_no_pair_left_gives_margin_zero(way):
    f, g, target, weight, bias, *state = way.case()
    weight[:] = weight[0].clone()
    actual = run((f, g, target, weight, bias, *state), way.backend)
    assert actual["margin"] == 0
    assert not actual["grad_weight"].any() and not actual["grad_bias"].any()
    assert actual["grad_input"].isfinite().all()


def test_rows_that_nearly_agree_do_count(backend, device):
    tensors = list(random_case(60, 80, 70, device=device))
    tensors[3][1] = tensors[3][0] + 1e-4 * tensors[3][1]
    tensors[3][60:] = tensors[3][2] + 1e-3 * tensors[3][60:]
    tensors[4][:] = 0
    assert_margin(tensors, backend, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["equal", "close", "offset", "all equal"])
def test_rows_of_the_classifier_that_are_alike(kind, dtype, way):
    f, g, target, weight, *rest = way.case(dtype=dtype)
    if kind == "equal":
        weight[1::2] = weight[::2][: len(weight[1::2])]
    elif kind == "close":
        weight[1::2] = weight[::2][: len(weight[1::2])] * (1 + 0.002 * torch.rand_like(weight[1::2]))
    elif kind == "offset":
        weight += 100
    else:
        weight[:] = weight[0].clone()
    assert_matches_float64((f, g, target, weight, *rest), way.backend)


ALPHABETS = {"signs": (-1.0, 1.0), "bits": (0.0, 1.0), "ternary": (-1.0, 0.0, 1.0), "bfloat16": None}


@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize("kind", [*ALPHABETS, "opposite", "one-hot", "offset", "clusters"])
def test_classifiers_of_few_values(kind, dtype, backend, device):
    """Rows that differ, however alike their bits are, have a boundary."""
    size = 33 if backend in SLOW else 90
    classes = 2 if kind == "opposite" else size
    f, g, target, weight, bias, *state = random_case(size, size, classes, dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(1)
    if kind == "opposite":
        weight[1], bias[1] = -weight[0], bias[0]
    elif kind == "one-hot":
        weight = torch.eye(size, dtype=dtype, device=device)
    elif kind == "offset":
        weight += 300
    elif kind == "clusters":  # a third of the rows each that nearly agree
        weight = weight[:3].repeat(size // 3, 1) * (1 + 1e-4 * torch.rand(size, size, generator=generator).to(weight))
    elif kind == "bfloat16":
        weight = weight.bfloat16().to(dtype)
    else:
        values = torch.tensor(ALPHABETS[kind], dtype=dtype)
        weight = values[torch.randint(len(values), (classes, size), generator=generator)].to(device)
    assert_margin((f, g, target, weight, bias, *state), backend, 1e-10 if dtype == torch.float64 else 2e-5)


def test_equal_rows_are_told_from_others():
    weight = torch.randn(500, 40)
    weight[7], weight[9] = weight[3], weight[3]
    weight[9, 5] = torch.nextafter(weight[9, 5], torch.tensor(9.0))
    weight[11], weight[12] = 0.0, -0.0
    same = reference.equal_rows(weight)
    assert same[7] == same[3] and same[11] == same[12]
    assert same.unique().numel() == 498


def test_lowest_index_wins_ties(backend, device):
    f = torch.tensor([[1.0, 0.0]], dtype=torch.float64, device=device)
    weight = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [1.0, 0.0]], dtype=torch.float64, device=device)
    state = torch.zeros(4, 2, dtype=torch.float64, device=device), torch.zeros(4, dtype=torch.bool, device=device)
    target = torch.zeros(1, dtype=torch.long, device=device)
    grad = run((f, f, target, weight, torch.zeros(4, dtype=torch.float64, device=device), *state), backend)["grad_bias"]
    assert grad.tolist() == [-1, 1, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("values", ["any", "signs", "bits", "one-hot"])
def test_of_equal_rows_the_lowest_wins(values, dtype, way):
    f, _, target, weight, bias, *state = way.case(dtype=dtype)
    make = {"any": lambda w: w, "signs": torch.sign, "bits": lambda w: (w > 0).to(dtype),
            "one-hot": lambda w: torch.eye(24, dtype=dtype, device=w.device)[: len(w)]}  # fmt: skip
    distinct = min(way.num_classes // 2, 24)
    weight[:distinct] = make[values](weight[:distinct])
    copies = torch.arange(way.num_classes, device=f.device) % distinct
    grads = run((f, None, target % distinct, weight[copies], bias[copies], *state), way.backend)
    assert grads["grad_weight"][:distinct].any() and not grads["grad_weight"][distinct:].any()
    assert not grads["grad_bias"][distinct:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_of_equal_scores_the_lowest_wins(dtype, way):
    """W_i = a_i e and mu_c = e for a whole a_i score 1, whatever the logit; class 5 has W = 0."""
    f, _, target, weight, _, *state = way.case(dtype=dtype, seen=0)
    generator = torch.Generator().manual_seed(1)
    factors = 1 + torch.randperm(way.num_classes, generator=generator).to(f.device) % 120
    f[:], target[:], weight[:] = 0, 5, 0
    f[:, 3], weight[:, 3] = 1, factors.to(dtype)
    weight[5] = 0
    zero = torch.zeros(way.num_classes, dtype=dtype, device=f.device)
    grads = run((f, None, target, weight, zero, *state), way.backend)
    assert grads["margin"] == 4
    assert grads["grad_bias"].nonzero().flatten().tolist() == [0, 5]


@pytest.mark.parametrize(
    "dtype, scale",
    [(torch.float32, 2.0**-70), (torch.float32, 2.0**-110), (torch.float32, 2.0**64), (torch.float32, 2.0**100),
     (torch.bfloat16, 2.0**-70), (torch.bfloat16, 2.0**64), (torch.float64, 2.0**-600), (torch.float64, 2.0**600)],
)  # fmt: skip
def test_rows_whose_squares_leave_the_range(dtype, scale, way):
    """Without a bias the margin does not depend on the scale of W: of all rows, or of every third."""
    f, _, target, weight, _, *state = way.case(dtype=dtype)
    expected = run((f, None, target, weight, None, *state), way.backend)
    actual = run((f, None, target, weight * scale, None, *state), way.backend)
    actual["grad_weight"] = actual["grad_weight"].double() * scale
    assert_close(actual, expected, max(1e-6, 4 * rounding(dtype, way.backend)), 1e-6)
    weight[::3] *= scale
    result, scores = run((f, None, target, weight, None, *state), way.backend), []
    wide, exact = weight.double(), f.double()
    for c in target.unique().tolist():
        others = torch.arange(way.num_classes, device=f.device) != c
        normal = (wide - wide[c])[others] / (max(scale, 1.0) if dtype == torch.float64 else 1)
        scores.append((normal @ exact[target == c].mean(0) / normal.norm(dim=1)).max())
    margin = torch.stack(scores).add(3).relu().mean()
    assert_close(result, {"margin": margin}, 1e-5)


@pytest.mark.parametrize("sizes", [(1e-21,), (3e19,), (1e-21, 1.0, 3e19)])
def test_classifiers_whose_squares_leave_the_range(sizes, backend, device):
    f, g, target, weight, bias, *state = random_case(device=device)
    weight *= torch.tensor(sizes, device=device)[torch.arange(7, device=device) % len(sizes)].unsqueeze(1)
    assert_matches_float64((f, g, target, weight, bias * min(sizes), *state), backend)


# Labels, and batches of nothing.


@pytest.mark.parametrize("noise", [True, False])
@pytest.mark.parametrize("empty", ["samples", "features", "both"])
def test_sizes_of_zero(empty, noise, way):
    n, dim = 0 if empty != "features" else way.n, 0 if empty != "samples" else 24
    f, g, target, weight, bias, *state = way.case(n=n, dim=dim)
    tensors = f, g if noise else None, target, weight, bias, *state
    actual = run(tensors, way.backend, delta_var=-1.5)
    share = 2.25 if n else 0
    expected = {"loss": share, "margin": 0.0, "compactness": share, "alignment": share if noise else 0.0}
    assert {name: float(actual[name]) for name in expected} == pytest.approx(expected, rel=1e-6)
    assert actual["grad_weight"].shape == (way.num_classes, dim) and not actual["grad_bias"].any()
    assert_matches_float64(tensors, way.backend)


@pytest.mark.parametrize("ignored", [False, True])
def test_nothing_to_learn_from(ignored, way):
    f, g, target, weight, bias, centroids, seen = way.case(n=5 if ignored else 0)
    if ignored:
        target[:] = -100
        f[:], g[0] = NAN, INF
    after = run((f, g, target, weight, bias, centroids, seen), way.backend)
    assert after["loss"] == 0
    for name in set(after) - {"centroids", "seen"}:
        assert not after[name].any(), name
    assert torch.equal(after["centroids"], centroids) and torch.equal(after["seen"], seen)


@pytest.mark.parametrize("ignore_index", [-100, 2, 255])
def test_ignored_rows_count_nowhere(ignore_index, way):
    f, g, target, weight, bias, centroids, seen = way.case(dtype=torch.float64)
    kept = (torch.arange(way.n, device=f.device) % 3 != 0) & (target != ignore_index)
    ignoring = target.where(kept, torch.tensor(ignore_index, device=f.device))
    f[~kept], g[~kept] = NAN, INF
    some = run((f, g, ignoring, weight, bias, centroids, seen), way.backend, ignore_index=ignore_index)
    alone = run((f[kept], g[kept], target[kept], weight, bias, centroids, seen), way.backend)
    for name in ("grad_input", "grad_input_noise"):
        assert not some[name][~kept].any()
        some[name] = some[name][kept]
    assert_close(some, alone, 1e-12)


@pytest.fixture
def wide_tiles(monkeypatch):
    """The interpreter takes as long for a tile of rows of W, whatever it holds."""
    if "triton" in SLOW & set(USABLE):
        from robustfast.triton_ops import device, loss, search

        def row_tile(*arguments, **options):
            return device.row_tile(*arguments, **options)._replace(block_n=2048)

        monkeypatch.setattr(loss, "row_tile", row_tile)
        monkeypatch.setattr(search, "row_tile", row_tile)
        monkeypatch.setattr(search, "search_tiles", lambda *_: search.SearchTiles(16, 2048, 16, 4, 2))


@pytest.mark.parametrize(
    "dtype, label, ignore_index, classes",
    [
        (torch.uint8, 156, -100, 200),
        (torch.int8, 100, -100, 128),
        (torch.uint8, 255, -100, 256),
        (torch.uint8, 156, 156, 200),
        (torch.int16, 32767, -100, 40_000),
        (torch.int8, 100, 2**40, 128),
    ],
)
def test_labels_whose_dtype_does_not_hold_the_bounds(dtype, label, ignore_index, classes, way, wide_tiles):
    n = 4 if classes > 300 or way.backend in SLOW else way.n
    tensors = list(way.case(n=n, dim=3, num_classes=classes, dtype=torch.float64))
    tensors[2] %= torch.iinfo(dtype).max + 1
    tensors[2][:4] = torch.tensor([label, 0, label, 1])
    expected = run(tensors, way.backend, ignore_index=ignore_index)
    tensors[2] = tensors[2].to(dtype)
    assert_close(run(tensors, way.backend, ignore_index=ignore_index), expected, 1e-12)


def wrong_label(way, label):
    """The error of a label that is out of range: an assertion on the device in the kernels of CUDA."""
    if way.device == "cuda":
        pytest.skip("a device assertion would end the process's use of the GPU")
    if way.backend == "emulated":
        return pytest.raises(RuntimeError, match="device-side assert triggered")
    return pytest.raises(IndexError, match=rf"target: label {label} at position 13")


@pytest.mark.parametrize("label", [-1, "K", 2**40])
def test_labels_out_of_range(label, way, capfd):
    label = way.num_classes if label == "K" else label
    tensors = way.case()
    tensors[2][13] = label
    before = tensors[5].clone()
    with wrong_label(way, label):
        functional.discriminative_loss(*tensors, backend=way.backend)
    assert torch.equal(tensors[5], before)
    assert way.backend != "emulated" or "target: a label is outside" in capfd.readouterr().err


def test_a_label_is_no_other_number_s_ignore_index(way):
    tensors = list(way.case(num_classes=12))
    tensors[2] = tensors[2].to(torch.int8)
    tensors[2][13] = -1
    with wrong_label(way, -1):
        functional.discriminative_loss(*tensors, ignore_index=255, backend=way.backend)
