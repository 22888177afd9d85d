"""The CUDA backend's own kernels, launchers and bindings, compiled by g++ and run on the CPU: see cuda_emulation/.

What this cannot show is what PTX wrappers do on the device (their counterparts are written after NVIDIA's description),
races that a fixed order of threads hides, and speed.
"""

import os

import pytest
import torch
from loss_cases import GOLDEN, assert_close, golden_steps, random_case, run

from robustfast import functional

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
HALF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
NAN, INF = float("nan"), float("inf")


pytestmark = pytest.mark.usefixtures("emulated")


def assert_matches_float64(tensors, **keywords):
    """Every result within the arithmetic's tolerance, or its own dtype's step, of the reference's in float64."""
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in tensors]
    expected = run(wide, "reference", **keywords)
    actual = run(tensors, "emulated", **keywords)
    for name, value in expected.items():
        tolerance = max(TOLERANCE.get(tensors[0].dtype, 1e-5), HALF.get(actual[name].dtype, 0))
        assert_close(actual, {name: value}, tolerance, 1e-12)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", GOLDEN)
def test_golden(case, dtype):
    for tensors, keywords, expected in golden_steps(case, dtype):
        actual = run(tensors, "emulated", **keywords)
        assert_close(actual, expected, TOLERANCE[dtype])
        for state, new in zip(tensors[5:], (actual["centroids"], actual["seen"]), strict=True):
            state.copy_(new)


# One block takes the first three; the others cross every tile of the margin, of packs and of teams.
@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("dtype", [*TOLERANCE, *HALF])
@pytest.mark.parametrize(
    "n, dim, classes",
    [(1, 1, 2), (33, 17, 6), (64, 128, 10), (600, 41, 13), (600, 40, 150), (90, 24, 520), (70, 2200, 3)],
)
def test_sizes(n, dim, classes, dtype, norm):
    assert_matches_float64(random_case(n, dim, classes, dtype=dtype), norm=norm, momentum=0.9)


@pytest.mark.parametrize("n", [40, 600])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16])
def test_weight_and_bias_of_other_dtypes(n, weight_dtype, bias_dtype):
    options = dict(dtype=torch.float16, weight_dtype=weight_dtype, bias_dtype=bias_dtype)
    assert_matches_float64(random_case(n, 24, 20, **options))


@pytest.mark.parametrize("n", [40, 600])
def test_without_noise_and_bias_and_with_ignored_samples(n):
    f, _, target, weight, _, *state = random_case(n, 12, 5)
    target[::3] = -100
    assert_matches_float64((f, None, target, weight, None, *state))


@pytest.mark.parametrize("n", [40, 700])
@pytest.mark.parametrize("labels", ["one class", "all ignored", "skewed"])
def test_label_distributions(n, labels):
    f, g, target, *rest = random_case(n, 16, 9)
    fill = {"one class": 4, "all ignored": -100}.get(labels)
    target = torch.full_like(target, fill) if fill is not None else torch.where(target > 6, target, 2)
    assert_matches_float64((f, g, target, *rest))


@pytest.mark.parametrize("classes", [300, 40])
def test_sort_of_more_than_a_tile(classes):
    assert_matches_float64(random_case(9000, 4, classes, dtype=torch.float64))


def test_sort_in_three_passes():
    f, g, target, *rest = random_case(30, 4, 66000)
    target[:2] = torch.tensor([0, 65999])
    assert_matches_float64((f, g, target, *rest))


@pytest.mark.parametrize("n, classes", [(40, 12), (600, 140)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["equal", "close", "offset", "all equal"])
def test_rows_of_the_classifier_that_are_alike(kind, dtype, n, classes):
    f, g, target, weight, *rest = random_case(n, 24, classes, dtype=dtype)
    if kind == "equal":
        weight[1::2] = weight[::2][: len(weight[1::2])]
    elif kind == "close":
        weight[1::2] = weight[::2][: len(weight[1::2])] * (1 + 0.002 * torch.rand_like(weight[1::2]))
    elif kind == "offset":
        weight += 100
    else:
        weight[:] = weight[0].clone()
    assert_matches_float64((f, g, target, weight, *rest))


BATCHES = [(40, 12), (600, 140)]  # (N, K) for one block, and for matrix products of more than one tile


@pytest.mark.parametrize("n, classes", BATCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("values", ["any", "signs", "bits", "one-hot"])
def test_of_equal_rows_the_lowest_wins(values, dtype, n, classes):
    f, _, target, weight, bias, *state = random_case(n, 24, classes, dtype=dtype)
    make = {"any": lambda w: w, "signs": torch.sign, "bits": lambda w: (w > 0).to(dtype),
            "one-hot": lambda w: torch.eye(24, dtype=dtype)[: len(w)]}  # fmt: skip
    distinct = min(classes // 2, 24)
    weight[:distinct] = make[values](weight[:distinct])
    copies = torch.arange(classes) % distinct
    grads = run((f, None, target % distinct, weight[copies], bias[copies], *state), "emulated")
    assert grads["grad_weight"][:distinct].any() and not grads["grad_weight"][distinct:].any()
    assert not grads["grad_bias"][distinct:].any()


@pytest.mark.parametrize("n, classes", BATCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_of_equal_scores_the_lowest_wins(dtype, n, classes):
    """W_i = a_i e and mu_c = e for a whole a_i score 1, whatever the logit; class 5 has W = 0."""
    f, _, target, weight, _, *state = random_case(n, 24, classes, dtype=dtype, seen=0)
    factors = 1 + torch.randperm(classes, generator=torch.Generator().manual_seed(1)) % 120
    f[:], target[:], weight[:] = 0, 5, 0
    f[:, 3], weight[:, 3] = 1, factors.to(dtype)
    weight[5] = 0
    grads = run((f, None, target, weight, torch.zeros(classes, dtype=dtype), *state), "emulated")
    assert grads["margin"] == 4
    assert grads["grad_bias"].nonzero().flatten().tolist() == [0, 5]


@pytest.mark.parametrize("n, classes", BATCHES)
@pytest.mark.parametrize(
    "dtype, scale",
    [(torch.float32, 2.0**-70), (torch.float32, 2.0**-110), (torch.float32, 2.0**64), (torch.float32, 2.0**100),
     (torch.bfloat16, 2.0**-70), (torch.bfloat16, 2.0**64), (torch.float64, 2.0**-600), (torch.float64, 2.0**600)],
)  # fmt: skip
def test_rows_whose_squares_leave_the_range(dtype, scale, n, classes):
    """Without a bias the margin does not depend on the scale of W: of all rows, or of every third."""
    f, _, target, weight, _, *state = random_case(n, 24, classes, dtype=dtype)
    expected = run((f, None, target, weight, None, *state), "emulated")
    actual = run((f, None, target, weight * scale, None, *state), "emulated")
    actual["grad_weight"] = actual["grad_weight"].double() * scale
    assert_close(actual, expected, max(1e-6, 2 * HALF.get(dtype, 0)), 1e-6)
    weight[::3] *= scale
    result, scores = run((f, None, target, weight, None, *state), "emulated"), []
    wide, exact = weight.double(), f.double()
    for c in target.unique().tolist():
        normal = (wide - wide[c])[torch.arange(classes) != c] / (max(scale, 1.0) if dtype == torch.float64 else 1)
        scores.append((normal @ exact[target == c].mean(0) / normal.norm(dim=1)).max())
    margin = torch.stack(scores).add(3).relu().mean()
    assert_close(result, {"margin": margin}, 1e-5)


@pytest.mark.parametrize("n, classes", BATCHES)
def test_bias_of_minus_infinity_on_an_absent_class(n, classes):
    f, g, target, weight, bias, *state = random_case(n, 24, classes)
    target[target == 7] = 8
    bias[7] = -1e30
    expected = run((f, g, target, weight, bias, *state), "emulated")
    bias[7] = -INF
    assert_close(run((f, g, target, weight, bias, *state), "emulated"), expected, 0)


@pytest.mark.parametrize("n, classes", BATCHES)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_bias_of_another_dtype(bias_dtype, weight_dtype, n, classes):
    f, g, target, weight, bias, *state = random_case(n, 24, classes, dtype=torch.bfloat16, weight_dtype=weight_dtype)
    tensors = f, g, target, weight, bias.to(bias_dtype), *state
    assert run(tensors, "emulated")["grad_bias"].dtype == bias_dtype
    assert_matches_float64(tensors)


@pytest.mark.parametrize("n", [0, 5, 600])
@pytest.mark.parametrize("noise", [True, False])
def test_no_dimensions(noise, n):
    f, g, target, weight, bias, *state = random_case(n, 0, 7)
    tensors = f, g if noise else None, target, weight, bias, *state
    actual = run(tensors, "emulated", delta_var=-1.5)
    share = 2.25 if n else 0
    expected = {"loss": share, "margin": 0.0, "compactness": share, "alignment": share if noise else 0.0}
    assert {name: float(actual[name]) for name in expected} == expected
    assert not actual["grad_bias"].any()


@pytest.mark.parametrize("n, classes", BATCHES)
def test_gradients_with_a_nan_are_the_references(n, classes):
    tensors = random_case(n, 24, classes, dtype=torch.float64)
    tensors[0][3, 2] = NAN
    expected, actual = run(tensors, "reference"), run(tensors, "emulated")
    for name in ("grad_input", "grad_input_noise", "grad_weight", "grad_bias"):
        assert torch.equal(actual[name].isnan(), expected[name].isnan()), name


@pytest.mark.parametrize("n", [40, 600])
@pytest.mark.parametrize(
    "label_dtype, classes, ignore_index",
    [(torch.uint8, 200, -100), (torch.int8, 128, -100), (torch.uint8, 256, -100), (torch.int16, 40000, -7),
     (torch.uint8, 200, 156)],
)  # fmt: skip
def test_labels_are_compared_in_int64(label_dtype, classes, ignore_index, n):
    f, g, target, *rest = random_case(n, 3, classes)
    target %= torch.iinfo(label_dtype).max + 1
    target[:2] = torch.tensor([min(classes, torch.iinfo(label_dtype).max + 1) - 1, 156 % classes])
    expected = run((f, g, target, *rest), "emulated", ignore_index=ignore_index)
    actual = run((f, g, target.to(label_dtype), *rest), "emulated", ignore_index=ignore_index)
    assert_close(actual, expected, 0)


def test_minus_one_is_not_255(capfd):
    f, g, target, *rest = random_case(40, 8, 5)
    target[7] = -1
    with pytest.raises(RuntimeError, match="device-side assert triggered"):
        run((f, g, target.to(torch.int8), *rest), "emulated", ignore_index=255)


@pytest.mark.parametrize("argument", [0, 2, 3, 4])
def test_an_unknown_dtype_is_an_error(argument):
    tensors = list(random_case(40, 8, 5))
    tensors[argument] = tensors[argument].to(torch.int32 if argument != 2 else torch.float32)
    loss = torch.ops.robustfast_emulated.discriminative_loss
    with pytest.raises(ValueError, match="dtype that it does not take"):
        loss(*tensors, [0.5, 3.0, 1.0, 1.0, 0.001, 0.99], None, 2, False, -100)


@pytest.mark.parametrize("n", [40, 600])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_features_that_are_not_finite_keep_the_state(bad, n):
    tensors = random_case(n, 16, 5)
    tensors[0][3, 2] = bad
    expected, actual = run(tensors, "reference"), run(tensors, "emulated")
    assert not actual["loss"].isfinite()
    assert torch.equal(actual["seen"], expected["seen"])
    assert_close(actual, {"centroids": expected["centroids"]}, 1e-5)


@pytest.mark.parametrize("n", [40, 600])
def test_label_out_of_range_is_an_assertion(n, capfd):
    f, g, target, *rest = random_case(n, 8, 5)
    target[7] = 5
    with pytest.raises(RuntimeError, match="device-side assert triggered"):
        run((f, g, target, *rest), "emulated")
    assert "target: a label is outside" in capfd.readouterr().err


def test_empty_batch():
    f, g, target, *rest = random_case(4, 8, 5)
    actual = run((f[:0], g[:0], target[:0], *rest), "emulated")
    assert actual["loss"] == 0 and not actual["grad_weight"].any() and torch.equal(actual["centroids"], rest[2])


@pytest.mark.parametrize("n", [40, 600])
@pytest.mark.parametrize("label_dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_strides_and_label_dtypes(n, label_dtype):
    f, g, target, weight, bias, *state = random_case(n, 16, 9)
    f = f.t().contiguous().t()
    g = torch.cat((g, g), 1)[:, 1:17]
    target = target.to(label_dtype).repeat_interleave(2)[::2]
    weight, bias = weight.repeat(2, 1)[::2], bias.repeat_interleave(3)[::3]
    assert_matches_float64((f, g, target, weight, bias, *state))
    assert_matches_float64((f[:1].expand(n, 16), None, target, weight, bias, *state))


@pytest.mark.parametrize("n", [40, 700])
def test_order_of_threads_and_blocks_changes_no_bit(n, monkeypatch):
    tensors = random_case(n, 40, 12)
    forward = run(tensors, "emulated")
    monkeypatch.setitem(os.environ, "ROBUSTFAST_EMULATION_ORDER", "reverse")
    backward = run(tensors, "emulated")
    assert all(torch.equal(value, backward[name]) for name, value in forward.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 10), (2, 3, 8, 8), (3, 3, 5, 7), (2, 4, 8, 8), (2, 2, 3, 4, 4), (0, 3, 4, 4)])
@pytest.mark.parametrize("op", ["gaussian_noise", "uniform_noise"])
def test_noise(op, shape, dtype):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    ids = torch.arange(shape[0]) * 3 + 2**33
    layouts = [x, x.contiguous(memory_format=torch.channels_last)] if len(shape) == 4 else [x, x.expand(shape)]
    for layout in (*layouts, x[:1].expand(shape) if shape[0] else x):
        results = []
        for backend in ("reference", "emulated"):
            leaf = layout.clone().requires_grad_()
            noisy = getattr(functional, op)(leaf, 0.4, seed=5, sample_ids=ids, draw=2, backend=backend)
            noisy.backward(layout)
            results.append((noisy.detach(), leaf.grad))
        for expected, actual in zip(*results, strict=True):
            step = HALF.get(dtype, 2e-6)
            torch.testing.assert_close(actual, expected, rtol=step, atol=step)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (3, 3, 5, 7), (2, 4, 4, 4), (2, 1, 4, 8)])
@pytest.mark.parametrize("images_dtype", [torch.uint8, torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_noisy_pair(shape, images_dtype, dtype):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    images = (x * 255).to(torch.uint8) if images_dtype == torch.uint8 else x.to(images_dtype)
    mean, pixel_std = torch.linspace(0.3, 0.6, shape[1]), torch.linspace(0.5, 1.5, shape[1])
    for memory_format in (torch.contiguous_format, torch.channels_last):
        results = []
        for backend in ("reference", "emulated"):
            leaf = images.clone(memory_format=memory_format).requires_grad_(images.is_floating_point())
            views = functional.noisy_pair(leaf, 0.2, mean=mean, pixel_std=pixel_std, seed=9, dtype=dtype,
                                          backend=backend)  # fmt: skip
            if leaf.requires_grad:
                sum((view * x).sum() for view in views).backward()
            results.append([view.detach() for view in views] + [leaf.grad] * leaf.requires_grad)
        for expected, actual in zip(*results, strict=True):
            step = max(HALF.get(actual.dtype, 5e-6), HALF.get(dtype, 0))
            torch.testing.assert_close(actual, expected, rtol=2 * step, atol=2 * step)


def test_words():
    arguments = (2**62 + 12345, 2**40 + 5, 2**32 - 1, 300)
    expected = functional.philox_words(*arguments, backend="reference")
    assert torch.equal(functional.philox_words(*arguments, backend="emulated"), expected)
