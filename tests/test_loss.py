"""The loss of every backend against the published code's cases, float64, autograd and the reference."""

import itertools
import subprocess
import sys

import pytest
import torch
from conftest import SLOW, USABLE
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import GOLDEN, assert_close, golden_steps, random_case, run

from robustfast import backends, functional, reference
from robustfast.backends import home, ops
from robustfast.reference import Settings

KERNELS = [name for name in USABLE if name != "reference" and name not in SLOW]
WIDE = {torch.float64: 1e-10, torch.float32: 1e-5}
needs_cpu = pytest.mark.skipif(backends()["cpu"] is not None, reason=str(backends()["cpu"]))


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("case", GOLDEN)
def test_golden(case, dtype, backend, device):
    for tensors, keywords, expected in golden_steps(case, dtype, device):
        actual = run(tensors, backend, **keywords)
        assert_close(actual, expected, WIDE[dtype])
        for state, new in zip(tensors[5:], (actual["centroids"], actual["seen"]), strict=True):
            state.copy_(new)


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("with_noise, with_bias", [(True, True), (False, False)])
def test_gradcheck(norm, with_noise, with_bias, backend, device):
    f, g, target, weight, bias, centroids, seen = random_case(14, 5, 4, dtype=torch.float64, device=device)

    def loss(f, g, weight, bias):
        keywords = dict(norm=norm, delta_var=1.0, gamma=0.3, momentum=0.7, update_state=False, backend=backend)
        return functional.discriminative_loss(
            f, g if with_noise else None, target, weight, bias if with_bias else None, centroids, seen, **keywords
        ).loss

    leaves = [t.requires_grad_() for t in (f, g, weight, bias)]
    used = [True, with_noise, True, with_bias]
    used_leaves = [leaf for leaf, use in zip(leaves, used, strict=True) if use]

    def of_used(*tensors):
        given = iter(tensors)
        return loss(*(next(given) if use else leaf for leaf, use in zip(leaves, used, strict=True)))

    assert torch.autograd.gradcheck(of_used, used_leaves)


def test_reference_is_twice_differentiable():
    # Class 0 has one sample and is new, so its feature is its own centroid: the norm is taken at 0.
    f, g, target, weight, bias, centroids, seen = random_case(9, 4, 3, dtype=torch.float64)
    target[:] = torch.tensor([0, 1, 1, 1, 1, 2, 2, 2, 2])
    seen[0] = False

    def loss(f, g, weight, bias):
        return functional.discriminative_loss(
            f, g, target, weight, bias, centroids, seen, update_state=False, backend="reference"
        ).loss

    leaves = [t.requires_grad_() for t in (f, g, weight, bias)]
    assert torch.autograd.gradgradcheck(loss, leaves)
    grad = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    second = torch.autograd.grad(sum(part.square().sum() for part in grad), leaves)
    assert all(part.isfinite().all() for part in second)


def test_kernels_say_that_they_are_once_differentiable(backend, device):
    if backend == "reference":
        pytest.skip("the reference is differentiable twice")
    f, *rest = random_case(device=device)
    loss = functional.discriminative_loss(f.requires_grad_(), *rest, backend=backend).loss
    (grad,) = torch.autograd.grad(loss, f, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once differentiable; .* backend='reference'"):
        grad.square().sum().backward()


def layouts(tensor):
    """The same values with other strides."""
    if tensor.dim() == 1:
        return {"sliced": torch.stack([tensor, tensor], 1)[:, 0]}
    wider = torch.cat([tensor, tensor], 1)
    return {
        "transposed": tensor.t().contiguous().t(),
        "sliced": wider[:, : tensor.shape[1]],
        "strided": torch.stack([tensor, tensor], 2)[:, :, 0],
    }


@pytest.mark.parametrize("layout", ["transposed", "sliced", "strided"])
def test_strides(layout, backend, device):
    tensors = random_case(30, 9, 5, dtype=torch.float64, device=device)
    other = tuple(layouts(t).get(layout, t) for t in tensors[:5]) + tensors[5:]
    assert_close(run(other, backend), run(tensors, backend), 1e-12)


def test_zero_strides(backend, device):
    f, g, target, weight, bias, centroids, seen = random_case(6, 8, 3, dtype=torch.float64, device=device)
    expanded = (
        f[:1].expand(6, 8),
        g[:1].expand(6, 8),
        target[:1].expand(6),
        weight,
        bias[:1].expand(3),
        centroids,
        seen,
    )
    dense = tuple(t.contiguous() for t in expanded)
    assert_close(run(expanded, backend), run(dense, backend), 1e-12)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_label_dtypes(dtype, backend, device):
    tensors = random_case(dtype=torch.float64, device=device)
    narrow = (*tensors[:2], tensors[2].to(dtype), *tensors[3:])
    assert_close(run(narrow, backend), run(tensors, backend), 0)


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(0, 40),
    dim=st.integers(1, 150),
    classes=st.integers(2, 120),
    present=st.integers(1, 120),
    norm=st.sampled_from([1, 2]),
    noise=st.booleans(),
    bias=st.booleans(),
    ignored=st.floats(0, 1),
    label=st.sampled_from([torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]),
    delta_dist=st.floats(-4, 6),
    seed=st.integers(0, 2**20),
)
def test_kernels_are_the_reference(n, dim, classes, present, norm, noise, bias, ignored, label, delta_dist, seed):
    tensors = list(random_case(n, dim, classes, dtype=torch.float64, seed=seed))
    generator = torch.Generator().manual_seed(seed)
    ignore_index = 255 if label == torch.uint8 else -1
    target = tensors[2] % present
    target[torch.rand(n, generator=generator) < ignored] = ignore_index
    tensors[2] = target.to(label)
    tensors[1], tensors[4] = tensors[1] if noise else None, tensors[4] if bias else None
    keywords = dict(norm=norm, ignore_index=ignore_index, delta_dist=delta_dist, delta_var=1.0, gamma=0.1, momentum=0.8)
    expected = run(tensors, "reference", **keywords)
    for backend in KERNELS:
        moved = [None if t is None else t.to(home(backend)) for t in tensors]
        assert_close(run(moved, backend, **keywords), expected, 1e-9, absolute=1e-12)


# Of the features, the weight and the bias.
MIXED = [
    (torch.float32, torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16, torch.float16),
    (torch.float16, torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.float32, torch.float64, torch.float16),
]


@pytest.mark.parametrize("dtypes", MIXED)
@pytest.mark.parametrize("norm", [1, 2])
def test_narrow_dtypes_against_float64(dtypes, norm, backend, device):
    dtype, weight_dtype, bias_dtype = dtypes
    options = dict(dtype=dtype, weight_dtype=weight_dtype, bias_dtype=bias_dtype, seed=3, device=device)
    tensors = random_case(200, 96, 130, **options)
    keywords = dict(norm=norm, delta_var=1.0, gamma=0.1)
    actual = run(tensors, backend, **keywords)
    exact = run([t if t.dtype in (torch.int64, torch.bool) else t.double() for t in tensors], "reference", **keywords)
    assert actual["grad_input"].dtype == actual["grad_input_noise"].dtype == dtype
    assert (actual["grad_weight"].dtype, actual["grad_bias"].dtype) == (weight_dtype, bias_dtype)
    assert actual["loss"].dtype == actual["centroids"].dtype == torch.float32
    for name, value in exact.items():
        if value.dtype == torch.bool:
            assert torch.equal(actual[name], value)
            continue
        rounding = (value.to(actual[name].dtype).double() - value).abs().max()  # of the exact result, in its own dtype
        error = (actual[name].double() - value).abs().max()
        assert error <= rounding + 1e-5 * value.abs().max(), name


# What the published code gets wrong, and this does not.


def test_nothing_is_lost_to_features_that_are_not_finite(backend, device):
    f, g, target, weight, bias, centroids, seen = random_case(device=device)
    for poison in (float("inf"), float("-inf"), float("nan")):
        bad = f.clone()
        bad[0, 3] = poison
        c = int(target[0])
        after = run((bad, g, target, weight, bias, centroids, seen), backend)
        assert not after["loss"].isfinite()
        assert torch.equal(after["centroids"][c], centroids[c]) and after["seen"][c] == seen[c]
        others = [k for k in target.unique().tolist() if k != c]
        clean = run((f, g, target, weight, bias, centroids, seen), backend)
        assert torch.equal(after["centroids"][others], clean["centroids"][others])
        assert after["seen"][others].all()


def test_equal_rows_have_no_boundary(backend, device):
    tensors = list(random_case(60, 80, 70, dtype=torch.float64, device=device))
    tensors[3][1] = tensors[3][0]
    tensors[3][60:] = tensors[3][2]
    tensors[4][60:] += 5  # would win by far if the pairs counted
    actual = run(tensors, backend)
    assert_close(actual, run(tensors, "reference"), 1e-10)
    assert_close({"margin": actual["margin"]}, {"margin": margin_by_pairs(tensors)}, 1e-10)


def test_no_pair_left_gives_margin_zero(backend, device):
    f, g, target, weight, bias, centroids, seen = random_case(classes=3, device=device)
    weight[:] = weight[0]
    actual = run((f, g, target, weight, bias, centroids, seen), backend)
    assert actual["margin"] == 0
    assert not actual["grad_weight"].any() and not actual["grad_bias"].any()
    assert actual["grad_input"].isfinite().all()


def test_rows_that_nearly_agree_do_count(backend, device):
    tensors = list(random_case(60, 80, 70, device=device))
    tensors[3][1] = tensors[3][0] + 1e-4 * tensors[3][1]
    tensors[3][60:] = tensors[3][2] + 1e-3 * tensors[3][60:]
    tensors[4][:] = 0
    actual = run(tensors, backend)
    exact = [t.double() if t.is_floating_point() else t for t in tensors]
    assert_close({"margin": actual["margin"]}, {"margin": margin_by_pairs(exact)}, 1e-4)


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


@pytest.mark.parametrize("delta_dist", [-3.0, 0.0, 3.0])
def test_margin_by_pairs(delta_dist, backend, device):
    tensors = random_case(40, 70, 150, dtype=torch.float64, device=device)
    actual = run(tensors, backend, delta_dist=delta_dist)
    assert_close({"margin": actual["margin"]}, {"margin": margin_by_pairs(tensors, delta_dist)}, 1e-10)


def test_lowest_index_wins_ties(backend, device):
    f = torch.tensor([[1.0, 0.0]], dtype=torch.float64, device=device)
    weight = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [1.0, 0.0]], dtype=torch.float64, device=device)
    state = torch.zeros(4, 2, dtype=torch.float64, device=device), torch.zeros(4, dtype=torch.bool, device=device)
    target = torch.zeros(1, dtype=torch.long, device=device)
    grad = run((f, f, target, weight, torch.zeros(4, dtype=torch.float64, device=device), *state), backend)["grad_bias"]
    assert grad.tolist() == [-1, 1, 0, 0]


@pytest.mark.parametrize("n, ignored", [(0, False), (5, True)])
def test_nothing_to_learn_from(n, ignored, backend, device):
    f, g, target, weight, bias, centroids, seen = random_case(n, 6, 4, device=device)
    if ignored:
        target[:] = -100
        f[:], g[0] = float("nan"), float("inf")
    after = run((f, g, target, weight, bias, centroids, seen), backend)
    assert after["loss"] == 0
    for name in ("grad_input", "grad_input_noise", "grad_weight", "grad_bias"):
        assert not after[name].any(), name
    assert torch.equal(after["centroids"], centroids) and torch.equal(after["seen"], seen)


def test_ignored_rows_count_nowhere(backend, device):
    f, g, target, weight, bias, centroids, seen = random_case(dtype=torch.float64, device=device)
    keep = torch.arange(50, device=device) % 3 != 0
    ignoring = target.where(keep, torch.tensor(-100, device=device))
    f[~keep], g[~keep] = float("nan"), float("inf")
    some = run((f, g, ignoring, weight, bias, centroids, seen), backend)
    kept = run((f[keep], g[keep], target[keep], weight, bias, centroids, seen), backend)
    for name in ("grad_input", "grad_input_noise"):
        assert not some[name][~keep].any()
        some[name] = some[name][keep]
    assert_close(some, kept, 1e-12)


@pytest.mark.parametrize("label", [-1, 7, 2**40])
def test_labels_out_of_range(label):
    for backend in ("reference", *(name for name in ("cpu",) if backends()[name] is None)):
        tensors = random_case()
        tensors[2][13] = label
        before = tensors[5].clone()
        with pytest.raises(IndexError, match=rf"target: label {label} at position 13"):
            functional.discriminative_loss(*tensors, backend=backend)
        assert torch.equal(tensors[5], before)


@pytest.mark.parametrize(
    "name, change, error, message",
    [
        ("input", lambda t: t.long(), TypeError, "input: expected torch.float32 or .*, got torch.int64"),
        ("input", lambda t: t[0], ValueError, r"input: expected shape \(N, D\), got \(12,\)"),
        ("input_noise", lambda t: t.double(), TypeError, "input_noise: expected torch.float32, got torch.float64"),
        ("input_noise", lambda t: t[1:], ValueError, r"input_noise: expected shape \(50, 12\), got \(49, 12\)"),
        ("target", lambda t: t.float(), TypeError, "target: expected torch.int64 or .*, got torch.float32"),
        ("target", lambda t: t[1:], ValueError, r"target: expected shape \(50,\), got \(49,\)"),
        ("target", lambda t: t.to("meta"), ValueError, "target: expected a tensor on cpu, got one on meta"),
        ("weight", lambda t: t[:1], ValueError, r"weight: .* at least 2 classes, got \(1, 12\)"),
        ("weight", lambda t: t[:, 1:], ValueError, r"weight: expected shape \(7, 12\), got \(7, 11\)"),
        ("weight", lambda t: t.tolist(), TypeError, "weight: expected a tensor, got list"),
        ("bias", lambda t: t.long(), TypeError, "bias: expected torch.float32 or .*, got torch.int64"),
        ("bias", lambda t: t[1:], ValueError, r"bias: expected shape \(7,\), got \(6,\)"),
        ("centroids", lambda t: t.double(), TypeError, "centroids: expected torch.float32, got torch.float64"),
        ("centroids", lambda t: t.t().contiguous().t(), ValueError, "centroids, seen: expected contiguous"),
        ("seen", lambda t: t.long(), TypeError, "seen: expected torch.bool, got torch.int64"),
    ],
)
def test_wrong_tensors(name, change, error, message):
    names = ("input", "input_noise", "target", "weight", "bias", "centroids", "seen")
    tensors = dict(zip(names, random_case(), strict=True))
    tensors[name] = change(tensors[name])
    with pytest.raises(error, match=message):
        functional.discriminative_loss(**tensors)


@pytest.mark.parametrize(
    "keyword, value",
    [
        ("norm", 3),
        ("momentum", 1.5),
        ("alpha", float("nan")),
        ("delta_dist", float("inf")),
        ("backend", "gpu"),
        ("ignore_index", 2**70),
        ("ignore_index", 1.5),
    ],
)
def test_wrong_settings(keyword, value):
    with pytest.raises(ValueError, match=f"{keyword}: expected .*{value}"):
        functional.discriminative_loss(*random_case(), **{keyword: value})


def test_a_backend_that_cannot_run_says_why():
    for name, reason in backends().items():
        if reason is not None:
            with pytest.raises(RuntimeError, match=f"backend='{name}' cannot run discriminative_loss: "):
                functional.discriminative_loss(*random_case(), backend=name)


# The compiled ops themselves.


@pytest.mark.parametrize("noise", [True, False])
@pytest.mark.parametrize("dtypes", MIXED)
def test_opcheck(dtypes, noise, backend, device):
    if backend == "reference":
        pytest.skip("the reference registers no ops")
    dtype, weight_dtype, bias_dtype = dtypes
    options = dict(dtype=dtype, weight_dtype=weight_dtype, bias_dtype=bias_dtype, device=device)
    f, g, target, weight, bias, centroids, seen = random_case(12, 6, 4, **options)
    g, bias = (g, bias) if noise else (None, None)
    registered, scalars = ops(backend), (list(Settings()), None, 2, True, -100)
    # Rows of the tables that no class takes are not written, so that runs differ there: every class is present here.
    target = torch.arange(12, device=device) % 4
    torch.library.opcheck(registered.discriminative_loss, (f, g, target, weight, bias, centroids, seen, *scalars))
    _, _, *saved = registered.discriminative_loss(f, g, target, weight, bias, centroids, seen, *scalars)
    for wanted in ([True, noise, True, noise], [False, False, True, False], [True, False, False, False], [False] * 4):
        arguments = (torch.tensor(1.0, device=device), f, g, *saved, 4, weight_dtype, bias_dtype, 2, wanted)
        torch.library.opcheck(registered.discriminative_loss_backward, arguments)
        grads = registered.discriminative_loss_backward(*arguments)
        assert [grad.dtype for grad in grads] == [dtype, dtype, weight_dtype, bias_dtype]
        assert [grad.numel() > 0 for grad in grads] == wanted


def test_settings_of_a_compiled_graph(backend, device):
    """`scheduled` stands in the place of `settings`."""
    if backend == "reference":
        pytest.skip("the reference registers no ops")
    tensors, settings = random_case(device=device), [0.4, 2.0, 0.9, 1.1, 0.2, 0.8]
    rest = (2, False, -100)
    given = ops(backend).discriminative_loss(*tensors, settings, None, *rest)
    scheduled = ops(backend).discriminative_loss(*tensors, [], torch.tensor(settings, dtype=torch.float64), *rest)
    assert all(torch.equal(a, b) for a, b in zip(given, scheduled, strict=True))


class Classifier(torch.nn.Module):
    def __init__(self, backend):
        import robustfast

        super().__init__()
        self.body, self.fc = torch.nn.Linear(6, 12), torch.nn.Linear(12, 5)
        self.loss = robustfast.DiscriminativeLoss(5, 12, backend=backend)

    def forward(self, x, noisy, target):
        f, g = self.body(x), self.body(noisy)
        return torch.nn.functional.cross_entropy(self.fc(f), target) + self.loss(f, g, target, self.fc)


def test_compiled_step_is_the_eager_step(backend, device):
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager, compiled = Classifier(backend).to(device), Classifier(backend).to(device)
    compiled.load_state_dict(eager.state_dict())
    step = torch.compile(compiled, fullgraph=True)
    for _ in range(3):
        x = torch.randn(16, 6, device=device)
        batch = (x, x + 0.1 * torch.randn_like(x), torch.randint(5, (16,), device=device))
        for forward, model in ((eager, eager), (step, compiled)):
            model.zero_grad()
            loss = forward(*batch)
            loss.backward()
        for (name, p), q in zip(eager.named_parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, msg=lambda text, name=name: f"{name}: {text}")
        torch.testing.assert_close(eager.loss.state_dict(), compiled.loss.state_dict())


def test_runs_agree_to_the_bit(backend, device):
    if backend == "reference":
        pytest.skip("plain PyTorch sums in any order")
    for skew in (False, True):
        tensors = list(random_case(1500, 40, 130, seed=5, device=device))
        if skew:  # one class with most of the samples
            tensors[2][:1200] = 3
        first = run(tensors, backend)
        for _ in range(3):
            again = run(tensors, backend)
            assert all(torch.equal(first[name], again[name]) for name in first)


@needs_cpu
def test_skewed_labels_and_thread_counts():
    tensors = list(random_case(1500, 40, 130, seed=5))
    tensors[2][:1200] = 3
    exact = [t.double() if t.is_floating_point() else t for t in tensors]
    expected, threads = run(exact, "reference"), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(tensors, "cpu"))
    finally:
        torch.set_num_threads(threads)
    assert_close(results[0], expected, 1e-5)
    for a, b in itertools.pairwise(results):
        assert all(torch.equal(a[name], b[name]) for name in a)


INSTRUCTION_SETS = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from loss_cases import assert_close, random_case, run
from robustfast import _C
assert _C.build_info()["instruction_set"] == sys.argv[2], _C.build_info()
for dtype, relative in ((torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)):
    for n, dim, classes in ((64, 128, 10), (70, 100, 150), (9, 3, 2)):
        tensors = random_case(n, dim, classes, dtype=dtype)
        wide = [t.double() if t.is_floating_point() else t for t in tensors]
        assert_close(run(tensors, "cpu"), run(wide, "reference"), relative)
"""


@needs_cpu
@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
def test_instruction_sets(name, request):
    import os

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


@needs_cpu
def test_memory_with_200_000_classes():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 64, f"{float(done.stdout):.0f} MiB beside inputs, gradients and state"


def test_equal_rows_are_told_from_others():
    weight = torch.randn(500, 40)
    weight[7], weight[9] = weight[3], weight[3]
    weight[9, 5] = torch.nextafter(weight[9, 5], torch.tensor(9.0))
    weight[11], weight[12] = 0.0, -0.0
    same = reference.equal_rows(weight)
    assert same[7] == same[3] and same[11] == same[12]
    assert same.unique().numel() == 498


ALPHABETS = {"signs": (-1.0, 1.0), "bits": (0.0, 1.0), "ternary": (-1.0, 0.0, 1.0), "bfloat16": None}


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("kind", [*ALPHABETS, "opposite", "one-hot", "offset", "clusters"])
def test_classifiers_of_few_values(kind, dtype, backend, device):
    """Rows that differ, however alike their bits are, have a boundary."""
    classes = 2 if kind == "opposite" else 90
    f, g, target, weight, bias, *state = random_case(60, 90, classes, dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(1)
    if kind == "opposite":
        weight[1], bias[1] = -weight[0], bias[0]
    elif kind == "one-hot":
        weight = torch.eye(90, dtype=dtype, device=device)
    elif kind == "offset":
        weight += 300
    elif kind == "clusters":  # thirty rows each that nearly agree
        weight = weight[:3].repeat(30, 1) * (1 + 1e-4 * torch.rand(90, 90, generator=generator).to(weight))
    elif kind == "bfloat16":
        weight = weight.bfloat16().to(dtype)
    else:
        values = torch.tensor(ALPHABETS[kind], dtype=dtype)
        weight = values[torch.randint(len(values), (classes, 90), generator=generator)].to(device)
    tensors = (f, g, target, weight, bias, *state)
    exact = [t.double() if t.is_floating_point() else t for t in tensors]
    expected = {"margin": margin_by_pairs(exact)}
    assert_close(run(tensors, backend), expected, 1e-10 if dtype == torch.float64 else 2e-5)


def test_a_class_with_bias_minus_infinity_never_wins(backend, device):
    f, g, target, weight, bias, *state = random_case(classes=7, dtype=torch.float64, device=device)
    target, without = target % 5, torch.tensor([0, 1, 2, 3, 4, 6], device=device)
    bias[5] = -torch.inf
    actual = run((f, g, target, weight, bias, *state), backend)
    expected = run((f, g, target, weight[without], bias[without], *(t[without] for t in state)), backend)
    assert not actual["grad_weight"][5].any() and not actual["grad_bias"][5].any()
    for name in ("grad_weight", "grad_bias", "centroids", "seen"):
        actual[name] = actual[name][without]
    assert_close(actual, expected, 1e-12)


@pytest.mark.parametrize("sizes", [(1e-21,), (3e19,), (1e-21, 1.0, 3e19)])
def test_classifiers_whose_squares_leave_the_range(sizes, backend, device):
    f, g, target, weight, bias, *state = random_case(device=device)
    weight *= torch.tensor(sizes, device=device)[torch.arange(7, device=device) % len(sizes)].unsqueeze(1)
    tensors = (f, g, target, weight, bias * min(sizes), *state)
    exact = [t.double() if t.is_floating_point() else t for t in tensors]
    assert_close(run(tensors, backend), run(exact, "reference"), 1e-5)


@pytest.mark.parametrize(
    "dtype, label, ignore_index, classes",
    [
        (torch.uint8, 156, -100, 200),
        (torch.int8, 100, -100, 128),
        (torch.uint8, 255, -100, 256),
        (torch.int16, 32767, -100, 40_000),
        (torch.int8, 100, 2**40, 128),
    ],
)
def test_labels_whose_dtype_does_not_hold_the_bounds(dtype, label, ignore_index, classes, backend, device):
    tensors = list(random_case(4, 6, classes, dtype=torch.float64, device=device))
    tensors[2][:] = torch.tensor([label, 0, label, 1], device=device)
    expected = run(tensors, backend)
    tensors[2] = tensors[2].to(dtype)
    assert_close(run(tensors, backend, ignore_index=ignore_index), expected, 1e-12)


def test_a_label_is_no_other_number_s_ignore_index():
    for backend in ("reference", *(name for name in ("cpu",) if backends()[name] is None)):
        tensors = list(random_case())
        tensors[2] = tensors[2].to(torch.int8)
        tensors[2][13] = -1
        with pytest.raises(IndexError, match="target: label -1 at position 13"):
            functional.discriminative_loss(*tensors, ignore_index=255, backend=backend)


# What autograd sees of the state.


@pytest.mark.parametrize("compiled", [False, True])
def test_a_moved_state_is_seen_by_autograd(compiled, backend, device):
    f, g, target, weight, bias, centroids, seen = random_case(device=device)
    f.requires_grad_()

    def step(f):
        return functional.discriminative_loss(f, g, target, weight, bias, centroids, seen, backend=backend).loss

    torch._dynamo.reset()
    before = seen._version
    other = (f @ centroids.T).square().sum()
    (torch.compile(step, backend="aot_eager") if compiled else step)(f)
    assert seen._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_a_state_that_stays_is_not_a_moved_one(backend, device):
    tensors = random_case(device=device)
    functional.discriminative_loss(*tensors, update_state=False, backend=backend)
    with torch.no_grad():
        functional.discriminative_loss(*tensors, backend=backend)
    assert tensors[5]._version == tensors[6]._version == 0


def test_a_state_made_in_inference_mode(backend, device):
    f, g, target, weight, bias, *state = random_case(device=device)
    with torch.inference_mode():
        frozen = [t.clone() for t in state]
        functional.discriminative_loss(f, g, target, weight, bias, *frozen, backend=backend)
    with pytest.raises(ValueError, match="centroids, seen: expected tensors that were made outside of"):
        functional.discriminative_loss(f, g, target, weight, bias, *frozen, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(state, frozen, strict=True))
    functional.discriminative_loss(f, g, target, weight, bias, *frozen, update_state=False, backend=backend)
