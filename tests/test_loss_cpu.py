"""The CPU's loss where only its kernels can go wrong: threads, the range of floats, instruction sets."""

import os
import subprocess
import sys

import pytest
import torch
from loss_cases import assert_close, assert_search_looks_at_every_pair, in_float64, random_case, run

from robustfast import backends, functional
from robustfast.backends import ops
from robustfast.reference import Settings

pytestmark = pytest.mark.skipif(backends()["cpu"] is not None, reason=str(backends()["cpu"]))


def of_threads(tensors, **keywords):
    """Results with 1, 2, 3 and 7 threads, which have to be the same."""
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(run(tensors, "cpu", **keywords))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, value in results[0].items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=0, equal_nan=True)
    return results[0]


@pytest.mark.parametrize("n", [0, 5, 1500])
@pytest.mark.parametrize("classes", [3, 1500])
def test_no_features(n, classes):
    tensors = random_case(n, 0, classes)
    assert_close(run(tensors, "cpu"), run(tensors, "reference"), 1e-6)


def margin_bias_gradient(f, target, weight):
    """d loss / d bias by the definition, for bias 0 and one sample a class, where float32 computes scores exactly."""
    grad = torch.zeros(weight.shape[0])
    for mu, c in zip(f, target.tolist(), strict=True):
        normal = weight - weight[c]
        distance = normal.square().sum(1).sqrt()
        scores = torch.where(distance > 0, normal @ mu / distance, -torch.inf)
        winner = int((scores == scores.max()).nonzero()[0])
        grad[winner] += 1 / distance[winner]
        grad[c] -= 1 / distance[winner]
    return grad / f.shape[0]


@pytest.mark.parametrize("dim", [6, 80])
@pytest.mark.parametrize("kind", ["ternary", "multiples", "few rows", "no features"])
def test_lowest_index_wins_ties_with_any_number_of_threads(kind, dim):
    """Whole numbers, so that equal scores are equal to the bit; multiples have them at different logits."""
    generator = torch.Generator().manual_seed(0)
    classes, n = 1000, 60
    weight = torch.randint(-1, 2, (classes, dim), generator=generator).float()
    if kind == "multiples":
        weight = weight[torch.arange(classes) % 40] * 2.0 ** torch.randint(5, (classes, 1), generator=generator)
        weight[::9] = 0
    if kind == "few rows":
        weight = weight[torch.arange(classes) % 5 % 4]
    target = torch.arange(n) * 9 if kind == "multiples" else torch.randperm(classes, generator=generator)[:n]
    f = torch.randint(-3, 4, (n, dim), generator=generator).float() * (kind != "no features")
    state = torch.zeros(classes, dim), torch.zeros(classes, dtype=torch.bool)
    actual = of_threads((f, None, target, weight, torch.zeros(classes), *state), delta_dist=1000.0)
    torch.testing.assert_close(actual["grad_bias"], margin_bias_gradient(f, target, weight), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_many_equal_rows_have_no_boundary(value):
    f, g, target, weight, bias, centroids, seen = random_case(300, 70, 400)
    actual = of_threads((f, g, target, torch.full_like(weight, value), bias, centroids, seen))
    assert actual["margin"] == 0 and not actual["grad_weight"].any() and not actual["grad_bias"].any()


def test_nan_has_the_same_gradients_with_any_number_of_threads():
    f, g, target, weight, bias, centroids, seen = random_case(300, 70, 400)
    f[3, 5], g[20, 1] = float("nan"), float("inf")
    weight[150, 2], bias[390] = float("nan"), float("nan")
    assert of_threads((f, g, target, weight, bias, centroids, seen))["loss"].isnan()
    weight[150, 2], bias[390] = 0, 0
    assert of_threads((f, g, target, weight, bias, centroids, seen))["loss"].isnan()


def margin_of_scaled_pairs(f, target, weight, delta_dist=3.0):
    """The margin in float64 by its definition, each pair divided by its largest coordinate: squares are in range."""
    hinges = []
    for c in target.unique().tolist():
        normal = (weight - weight[c])[torch.arange(weight.shape[0]) != c]
        scaled = normal / normal.detach().abs().amax(1, keepdim=True)
        hinges.append(torch.relu(delta_dist + (scaled @ f[target == c].mean(0) / scaled.norm(dim=1)).max(0).values))
    return torch.stack(hinges).mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [7, 150])
@pytest.mark.parametrize("size", ["tiny", "huge", "mixed"])
def test_squares_of_weights_beyond_the_range_of_floats(size, classes, dtype):
    tiny, huge = (1e-21, 3e19) if dtype == torch.float32 else (1e-170, 3e160)
    f, _, target, weight, _, centroids, seen = random_case(70, 80, classes, dtype=dtype)
    sizes = torch.tensor({"tiny": [tiny], "huge": [huge], "mixed": [tiny, 1.0, huge]}[size], dtype=dtype)
    weight *= sizes[torch.arange(classes) % sizes.numel()].unsqueeze(1)
    actual = run((f, None, target, weight, None, centroids, seen), "cpu", alpha=0.0, gamma=0.0)
    f, weight = f.double().requires_grad_(), weight.double().requires_grad_()
    margin = margin_of_scaled_pairs(f, target, weight)
    grad_input, grad_weight = torch.autograd.grad(margin, (f, weight))
    assert margin > 0
    assert_close(actual, {"margin": margin, "grad_input": grad_input, "grad_weight": grad_weight}, 1e-5)


def test_bias_of_minus_infinity_never_wins():
    for classes in (7, 150):
        f, g, target, weight, bias, centroids, seen = random_case(70, 80, classes)
        target[target == 5] = 4
        bias[5] = -1e6
        expected = run((f, g, target, weight, bias, centroids, seen), "cpu")
        bias[5] = -torch.inf
        actual = run((f, g, target, weight, bias, centroids, seen), "cpu")
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_float16_subnormals_are_read_when_subnormals_are_flushed():
    f, g, target, weight, bias, centroids, seen = random_case(40, 50, 4, seen=0)
    tensors = [(2e-6 * f).half(), (2e-6 * g).half(), target, weight, bias, centroids, seen]
    expected = run([t.double() if t.is_floating_point() else t for t in tensors], "reference", delta_var=0.0)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        actual = run(tensors, "cpu", delta_var=0.0)
    finally:
        torch.set_flush_denormal(False)
    names = ("variance", "compactness", "alignment", "regularization", "centroids")
    assert_close(actual, {name: expected[name] for name in names}, 1e-5)


def test_float16_is_read_exactly():
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    read = functional.gaussian_noise(values.view(1, -1), 0.0, seed=0, clip=None, backend="cpu")
    number = ~values.isnan()
    assert torch.equal(read[0][number], values[number]) and read[0][~number].isnan().all()


def test_unknown_instruction_set():
    command = [sys.executable, "-c", "from robustfast import _C; _C.build_info()"]
    environment = {**os.environ, "ROBUSTFAST_CPU_ISA": "avx3"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "ROBUSTFAST_CPU_ISA: expected one of what this processor has (baseline" in done.stderr
    assert "got 'avx3'" in done.stderr


def test_skewed_labels_and_thread_counts():
    tensors = list(random_case(1500, 40, 130, seed=5))
    tensors[2][:1200] = 3
    assert_close(of_threads(tensors), run(in_float64(tensors), "reference"), 1e-5)


def test_the_search_is_a_look_at_every_pair():
    """Bit for bit, with any number of threads, also where the rows' rounding hides what tells pairs apart."""
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            assert_search_looks_at_every_pair()
    finally:
        torch.set_num_threads(before)


INSTRUCTION_SETS = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from loss_cases import assert_close, assert_search_looks_at_every_pair, random_case, run
from robustfast import _C
assert _C.build_info()["instruction_set"] == sys.argv[2], _C.build_info()
for dtype, relative in ((torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)):
    for n, dim, classes in ((64, 128, 10), (70, 100, 150), (9, 3, 2)):
        tensors = random_case(n, dim, classes, dtype=dtype)
        wide = [t.double() if t.is_floating_point() else t for t in tensors]
        assert_close(run(tensors, "cpu"), run(wide, "reference"), relative)
assert_search_looks_at_every_pair()
"""


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
def test_instruction_sets(name, request):
    from robustfast import _C

    order = ["baseline", "avx2", "avx512"]
    here = _C.build_info()["instruction_set"]
    if os.environ.get("ROBUSTFAST_CPU_ISA") or order.index(name) > order.index(here):
        pytest.skip(f"this processor or its setting stops at {here}")
    environment = {**os.environ, "ROBUSTFAST_CPU_ISA": name}
    command = [sys.executable, "-c", INSTRUCTION_SETS, str(request.path.parent), name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


MEMORY = """
import resource, torch
from robustfast import functional
n, dim, classes = 512, 128, 200_000
f, g = (torch.randn(n, dim, requires_grad=True) for _ in range(2))
weight, bias = torch.randn(classes, dim, requires_grad=True), torch.zeros(classes, requires_grad=True)
state = torch.ones(classes, dim), torch.zeros(classes, dtype=torch.bool)
for leaf in (f, g, weight, bias):
    leaf.grad = torch.ones_like(leaf)  # the gradients' own memory, touched
grads = [leaf.grad for leaf in (f, g, weight, bias)]
for leaf in (f, g, weight, bias):
    leaf.grad = None
small = [t.detach()[:4].clone().requires_grad_() for t in (f, g, weight, bias)]
small_state = state[0][:4], state[1][:4]
functional.discriminative_loss(*small[:2], torch.arange(4), *small[2:], *small_state, backend="cpu").loss.backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
del grads
loss = functional.discriminative_loss(f, g, torch.randint(classes, (n,)), weight, bias, *state, backend="cpu").loss
loss.backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_memory_with_200_000_classes():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 64, f"{float(done.stdout):.0f} MiB beside inputs, gradients and state"


def test_steps_give_the_same_bits_with_any_number_of_threads():
    f, g, target, weight, bias, centroid, _ = random_case(1500, 40, 130, seed=5)
    target[:1200] = 3
    step, settings, before = ops("cpu"), list(Settings()), torch.get_num_threads()

    def results():
        pulls = step.class_pulls(f, g, target, centroid, bias.abs(), settings, None, 2, -100)
        winners = step.margin_search(centroid[:90], weight[:90], bias[:90], weight[30:], bias[30:])
        return step.class_sums(f, target, 130, -100), *pulls, *winners

    try:
        torch.set_num_threads(1)
        expected = results()
        for count in (2, 3, 7):
            torch.set_num_threads(count)
            assert all(map(torch.equal, results(), expected))
    finally:
        torch.set_num_threads(before)
