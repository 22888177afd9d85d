"""DiscriminativeLoss as a module: its state, its modes, its place of the published code."""

import copy
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.utils.prune
from loss_cases import random_case
from torch.utils._python_dispatch import TorchDispatchMode

import robustfast
from robustfast import DiscriminativeLoss
from robustfast.backends import has_code_for
from robustfast.reference import Settings


def batch_and_head(device="cpu", dtype=torch.float32):
    f, g, target, weight, bias, _, _ = random_case(device=device, dtype=dtype)
    return f.requires_grad_(), g, target, SimpleNamespace(weight=weight, bias=bias)


@pytest.fixture
def loss(backend, device):
    return DiscriminativeLoss(7, 12, backend=backend).to(device)


@pytest.mark.parametrize(
    "architecture, runs_on",
    [
        ("8.0", [(8, 0), (8, 6), (8, 9)]),
        ("8.6", [(8, 6), (8, 9)]),
        ("9.0a", [(9, 0)]),
        ("9.0+PTX", [(9, 0), (10, 0), (12, 0)]),
        ("10.0a+PTX", [(10, 0)]),
    ],
)
def test_code_for_an_architecture(architecture, runs_on):
    capabilities = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
    assert [c for c in capabilities if has_code_for(architecture, c)] == runs_on
    assert has_code_for("Hopper", (9, 0))


def test_state_moves_in_training_with_gradients_only(loss, device):
    batch = batch_and_head(device)
    for move in (lambda: loss.eval()(*batch), torch.no_grad()(lambda: loss.train()(*batch))):
        move()
        assert not loss.seen.any() and not loss.centroids.any()
    loss.train()(*batch)
    assert loss.seen.all() and loss.centroids.any()


def test_state_survives_saving_and_copying(loss, device):
    batch = batch_and_head(device)
    loss(*batch)
    for twin in (copy.deepcopy(loss), DiscriminativeLoss(7, 12, backend=loss.backend).to(device)):
        twin.load_state_dict(loss.state_dict())
        torch.testing.assert_close(twin(*batch), copy.deepcopy(loss)(*batch), rtol=0, atol=0)


def test_state_dtypes(loss, device):
    assert loss.centroids.dtype == torch.float32
    loss(*batch_and_head(device))
    state = loss.centroids.clone()
    for narrow in (loss.half(), loss.bfloat16()):
        assert narrow.centroids.dtype == torch.float32 and torch.equal(narrow.centroids, state)
    assert loss.double().half().centroids.dtype == torch.float32
    assert loss.double().centroids.dtype == torch.float64
    assert loss(*batch_and_head(device, torch.float64)).dtype == torch.float64
    assert loss.float().centroids.dtype == torch.float32 and loss.seen.dtype == torch.bool


def test_return_terms(loss, device):
    batch = batch_and_head(device)
    loss.return_terms, loss.gamma = True, 0.5
    terms = loss.eval()(*batch)
    assert terms._fields == ("loss", "variance", "margin", "regularization", "compactness", "alignment")
    assert [term.requires_grad for term in terms] == [True, False, False, False, False, False]
    weighted = terms.variance + terms.margin + 0.5 * terms.regularization
    torch.testing.assert_close(terms.loss.detach(), weighted)
    torch.testing.assert_close(terms.variance, (terms.compactness + terms.alignment) / 2)


class Calls(TorchDispatchMode):
    """The names of the ops that were called."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names = [*getattr(self, "names", ()), function.name().split("::")[1]]
        return function(*args, **(kwargs or {}))


def test_a_step_calls_nothing_but_the_kernels(loss, device):
    """At the paper's size a call of any other op would be a noticeable part of it."""
    if loss.backend == "reference":
        pytest.skip("it is made of PyTorch's ops")
    batch = batch_and_head(device)
    with Calls() as calls:
        loss(*batch).backward()
    steps = ["discriminative_loss", "ones_like", "discriminative_loss_backward", "detach"]  # backward()'s own: two
    assert calls.names == steps


def test_autocast(loss, device):
    fc = torch.nn.Linear(12, 7, device=device)
    x = torch.randn(20, 12, device=device)
    body = torch.nn.Linear(12, 12, device=device)
    target = torch.arange(20, device=device) % 7
    with torch.autocast(device, dtype=torch.bfloat16):
        features = body(x)
        assert features.dtype == torch.bfloat16
        value = loss(features, features.detach(), target, fc)
    value.backward()
    assert value.dtype == fc.weight.grad.dtype == body.weight.grad.dtype == torch.float32


def test_meta_device(device):
    """Memory that to_empty gives holds anything: the state starts from nothing all the same."""
    with torch.device("meta"):
        loss = DiscriminativeLoss(7, 12)
    loss.to_empty(device=device)
    assert not loss.seen.any() and not loss.centroids.any()
    loss(*batch_and_head(device))
    loss.reset_parameters()
    assert not loss.seen.any() and not loss.centroids.any()


def test_double_and_back(loss, device):
    assert loss.double().half().centroids.dtype == torch.float32
    loss(*batch_and_head(device))


def test_checkpoint_of_a_model_without_the_loss(loss):
    model = torch.nn.ModuleDict({"fc": torch.nn.Linear(12, 7), "loss": loss})
    loss(*batch_and_head(loss.centroids.device))
    state = copy.deepcopy(loss.state_dict())
    old = {name: value for name, value in model.state_dict().items() if not name.startswith("loss.")}
    message = r"loss.centroids, loss.seen: the checkpoint is of a model without the loss's state; with strict=False"
    with pytest.warns(UserWarning, match=message):
        model.load_state_dict(old, strict=False)
    with pytest.warns(UserWarning, match=message), pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(old)
    for name, value in state.items():
        assert torch.equal(value, loss.state_dict()[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_assigned_checkpoint_keeps_the_states_dtype(loss, device, dtype):
    loss(*batch_and_head(device))
    checkpoint = {name: value.to(dtype) if name == "centroids" else value for name, value in loss.state_dict().items()}
    twin = DiscriminativeLoss(7, 12, backend=loss.backend).to(device)
    twin.load_state_dict(checkpoint, assign=True)
    assert twin.centroids.dtype == torch.float32 and torch.equal(twin.seen, loss.seen)
    twin(*batch_and_head(device))
    assert checkpoint["centroids"].dtype == dtype


class Cosine(torch.nn.Linear):
    def forward(self, x):
        return 16 * torch.nn.functional.linear(torch.nn.functional.normalize(x), self.weight)


class Affine(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.calls = torch.nn.Linear(12, 7), 0
        self.weight, self.bias = self.linear.weight, self.linear.bias

    def forward(self, x):
        self.calls += 1
        return self.linear(x)


def test_classifier_that_is_more_than_affine(loss, device):
    f, g, target, _ = batch_and_head(device)
    with pytest.raises(TypeError, match=r"fc: expected a classifier that is input @ weight.T \+ bias, got Cosine"):
        loss(f, g, target, Cosine(12, 7).to(device))
    patched = torch.nn.Linear(12, 7).to(device)
    patched.forward = lambda x: 2 * x[:, :7]
    with pytest.raises(TypeError, match="fc: expected a classifier"):
        loss(f, g, target, patched)
    affine = Affine().to(device)
    for _ in range(2):
        loss(f, g, target, affine)
    assert affine.calls == 1  # tried once


def test_words_for_what_is_no_classifier(loss, device):
    f, g, target, fc = batch_and_head(device)
    headless = SimpleNamespace(weight=fc.weight)
    others = (torch.nn.Conv2d(12, 7, 1), "Conv2d"), (torch.nn.LazyLinear(7), "LazyLinear"), (headless, "SimpleNam")
    for wrong, name in (((fc.weight, fc.bias), "tuple"), (torch.nn.Identity(), "Identity"), *others):
        with pytest.raises(TypeError, match=f"fc: expected an nn.Linear, or an object with weight .*, got {name}"):
            loss(f, g, target, wrong)


def test_words_for_sizes_dtypes_and_labels(loss, device):
    f, g, target, fc = batch_and_head(device)
    with pytest.raises(ValueError, match="dim: the loss was made with dim=12, got input of 6 features"):
        loss(f[:, :6], None, target, fc)
    with pytest.raises(ValueError, match="num_classes: the loss was made for 7, got a classifier of 3"):
        loss(f, g, target, SimpleNamespace(weight=fc.weight[:3], bias=fc.bias[:3]))
    with pytest.raises(TypeError, match=r"centroids: expected torch.float64, .*; call \.double\(\) on the loss"):
        loss(f.double(), None, target, fc)
    with pytest.raises(TypeError, match=r"centroids: expected torch.float32, .*; call \.float\(\) on the loss"):
        copy.deepcopy(loss).double()(f, None, target, fc)
    for soft in (torch.nn.functional.one_hot(target, 7), target.float()):
        with pytest.raises(TypeError, match=r"target: expected torch.int64 or .*; soft labels are not supported"):
            loss(f, g, soft, fc)
    for place, name in enumerate(("input", "input_noise", "target")):
        batch: list = [f, g, target]
        batch[place] = batch[place].tolist()
        with pytest.raises(TypeError, match=f"^{name}: expected a tensor, got list"):
            loss(*batch, fc)


def test_classifier_whose_weight_is_made_anew(loss, device):
    """Pruned, as under the older FSDP and weight norm, an nn.Linear has its weight beside its parameters."""
    f, g, target, _ = batch_and_head(device)
    fc = torch.nn.utils.prune.random_unstructured(torch.nn.Linear(12, 7, device=device), "weight", amount=0.5)
    plain = SimpleNamespace(weight=fc.weight.detach(), bias=fc.bias.detach())
    assert torch.equal(copy.deepcopy(loss)(f, g, target, fc), copy.deepcopy(loss)(f, g, target, plain))
    loss(f, g, target, fc).backward()
    assert fc.weight_orig.grad.any() and not fc.weight_orig.grad[fc.weight_mask == 0].any()


def test_labels_and_norm_of_unusual_types(loss, device):
    f, g, target, fc = batch_and_head(device)
    expected = copy.deepcopy(loss)(f, g, target, fc)
    for dtype in (torch.uint16, torch.uint32):
        assert torch.equal(copy.deepcopy(loss)(f, g, target.to(dtype), fc), expected)
    twin = DiscriminativeLoss(7, 12, norm=2.0, backend=loss.backend).to(device)
    assert torch.equal(twin(f, g, target, fc), expected)


@pytest.mark.parametrize(
    "keyword, value", [("num_classes", 1), ("dim", 0), ("norm", 0), ("momentum", -0.1), ("gamma", float("nan"))]
)
def test_wrong_arguments(keyword, value):
    with pytest.raises(ValueError, match=f"{keyword}: expected .*{value}"):
        DiscriminativeLoss(**{keyword: value})


@pytest.mark.parametrize(
    "keyword, value",
    [("num_classes", 10.0), ("num_classes", "10"), ("dim", None), ("delta_var", "0.5"), ("beta", None), ("alpha", [1])],
)
def test_arguments_of_wrong_types(keyword, value):
    with pytest.raises(TypeError, match=rf"^{keyword}: expected .*, got {re.escape(repr(value))}$"):
        DiscriminativeLoss(**{keyword: value})
    if keyword in Settings._fields:
        loss = DiscriminativeLoss(7, 12)
        setattr(loss, keyword, value)
        with pytest.raises(TypeError, match=rf"^{keyword}: expected "):
            loss(*batch_and_head("cpu"))


def test_sizes_of_other_integer_types():
    loss = DiscriminativeLoss(np.int64(7), torch.tensor(12))
    assert loss.centroids.shape == (7, 12) and type(loss.num_classes) is type(loss.dim) is int


@pytest.mark.parametrize("input", [None, [[1.0] * 12], np.ones((6, 12), np.float32)])
def test_input_that_is_no_tensor(loss, input):
    _, _, target, fc = batch_and_head("cpu")
    with pytest.raises(TypeError, match=f"^input: expected a tensor, got {type(input).__name__}$"):
        loss(input, None, target, fc)


def test_state_that_is_no_tensor(loss):
    state = {name: tensor.cpu().numpy() for name, tensor in loss.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"centroids.*expected torch.Tensor .* received <class 'numpy.ndarray'>"):
        loss.load_state_dict(state)


def test_import_is_light():
    code = (
        "import sys, robustfast\n"
        "extras = {'triton', 'sklearn', 'matplotlib', 'typer', 'rich', 'scipy', 'PIL', 'safetensors'}\n"
        "assert not extras & (set(sys.modules) - before), extras & (set(sys.modules) - before)\n"
    )
    before = "import sys, torch, numpy\nbefore = set(sys.modules)\n"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", before + code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_build_info():
    if robustfast.backends()["cpu"] is not None:
        pytest.skip(robustfast.backends()["cpu"])
    from robustfast import _C

    info = _C.build_info()
    assert info["instruction_set"] in info["instruction_sets"]
    assert info["torch"].split(".")[0] == "2" and info["compiler"]
