"""How every backend's loss is called: what it refuses, its ops, the compiler, and what autograd sees of the state."""

import pytest
import torch
from loss_cases import random_case
from test_loss import MIXED

from robustfast import backends, functional
from robustfast.backends import ops
from robustfast.reference import Settings


@pytest.fixture
def backend(every_backend):
    return every_backend


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
    fixed = (torch.tensor(1.0, device=device), f, g, *saved, 4, weight_dtype, bias_dtype, 2)
    every = registered.discriminative_loss_backward(*fixed, [True, noise, True, noise])
    for wanted in ([True, noise, True, noise], [False, False, True, False], [True, False, False, False], [False] * 4):
        torch.library.opcheck(registered.discriminative_loss_backward, (*fixed, wanted))
        grads = registered.discriminative_loss_backward(*fixed, wanted)
        assert [grad.dtype for grad in grads] == [dtype, dtype, weight_dtype, bias_dtype]
        assert [grad.numel() > 0 for grad in grads] == wanted
        assert all(torch.equal(a, b) for a, b, want in zip(grads, every, wanted, strict=True) if want)


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
    assert all(torch.equal(t, before) for t, before in zip(tensors[5:], random_case(device=device)[5:], strict=True))


def test_a_state_made_in_inference_mode(backend, device):
    f, g, target, weight, bias, *state = random_case(device=device)
    with torch.inference_mode():
        frozen = [t.clone() for t in state]
        functional.discriminative_loss(f, g, target, weight, bias, *frozen, backend=backend)
    with pytest.raises(ValueError, match="centroids, seen: expected tensors that were made outside of"):
        functional.discriminative_loss(f, g, target, weight, bias, *frozen, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(state, frozen, strict=True))
    functional.discriminative_loss(f, g, target, weight, bias, *frozen, update_state=False, backend=backend)
