"""The loss inside torch.compile, torch.func and activation checkpoints."""

import pytest
import torch
from loss_cases import assert_close, random_case, run
from torch.utils.checkpoint import CheckpointError, checkpoint

import robustfast
from robustfast import functional


@pytest.fixture(autouse=True)
def no_graphs():
    torch._dynamo.reset()


def compiled_graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("name", ["alpha", "delta_dist", "momentum"])
@pytest.mark.parametrize("dynamic", [None, True])
def test_a_setting_on_a_schedule_takes_two_graphs(name, dynamic, backend, device):
    tensors = random_case(device=device)

    @torch.compile(fullgraph=True, dynamic=dynamic, backend="aot_eager")
    def step(leaf, value):
        settings = {name: value}
        return functional.discriminative_loss(leaf, *tensors[1:], update_state=False, backend=backend, **settings).loss

    torch._dynamo.utils.counters.clear()
    for value in (0.25, 0.5, 0.625, 0.75, 0.875):
        leaf = tensors[0].clone().requires_grad_()
        loss = step(leaf, value)
        loss.backward()
        expected = run(tensors, backend, update_state=False, **{name: value})
        torch.testing.assert_close(loss.detach(), expected["loss"])
        torch.testing.assert_close(leaf.grad, expected["grad_input"])
    assert compiled_graphs() <= 2


def test_a_setting_of_the_module_on_a_schedule_takes_two_graphs(backend, device):
    f, g, target, *_ = random_case(device=device)
    fc = torch.nn.Linear(12, 7, device=device)
    module = robustfast.DiscriminativeLoss(7, 12, backend=backend).to(device)
    step = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    for alpha in (0.1, 0.2, 0.3, 0.4, 0.5):
        module.alpha = alpha
        step(f.requires_grad_(), g, target, fc).backward()
    assert compiled_graphs() <= 2


def test_one_tensor_as_both_views(backend, device):
    f, _, target, weight, bias, *state = random_case(device=device)

    def step(f):
        keywords = dict(update_state=False, backend=backend)
        return functional.discriminative_loss(f, f, target, weight, bias, *state, **keywords).loss

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = f.clone().requires_grad_()
        loss = function(leaf)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(*results)
    apart = run((f, f.clone(), target, weight, bias, *state), backend, update_state=False)
    torch.testing.assert_close(results[0][1], apart["grad_input"] + apart["grad_input_noise"])


@pytest.mark.parametrize(
    "use_reentrant, compiled",
    [(False, "nothing"), (True, "nothing"), (False, "checkpoint"), (False, "step"), (True, "step")],
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_checkpointed_step_moves_the_state_once(use_reentrant, compiled, nested, backend, device):
    f, g, target, weight, bias, centroids, seen = random_case(dtype=torch.float64, seen=0.5, device=device)
    expected = run((f.sin(), g.sin(), target, weight, bias, centroids, seen), backend)
    leaves = [t.clone().requires_grad_() for t in (f, g, weight, bias)]

    def inner(f, g, weight, bias):
        return functional.discriminative_loss(f, g, target, weight, bias, centroids, seen, backend=backend).loss

    def step(f, g, weight, bias):
        if not nested:
            return inner(f.sin(), g.sin(), weight, bias).square()
        return checkpoint(inner, f.sin(), g.sin(), weight, bias, use_reentrant=use_reentrant).square()

    def maybe_compiled(function, name):
        return torch.compile(function, backend="aot_eager") if compiled == name else function

    def checkpointed(*leaves):
        return checkpoint(maybe_compiled(step, "step"), *leaves, use_reentrant=use_reentrant)

    loss = maybe_compiled(checkpointed, "checkpoint")(*leaves)
    if (backend, compiled, use_reentrant, nested) == ("reference", "step", False, False):
        with pytest.raises(CheckpointError):  # its two passes compile to graphs that keep other tensors
            loss.backward()
        return
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected["loss"].square())
    torch.testing.assert_close(leaves[2].grad, 2 * expected["loss"] * expected["grad_weight"])
    torch.testing.assert_close(leaves[0].grad, 2 * expected["loss"] * expected["grad_input"] * f.cos())
    assert_close({"centroids": centroids, "seen": seen}, {k: expected[k] for k in ("centroids", "seen")}, 0)


def loss_of(tensors, backend, **keywords):
    return lambda f: functional.discriminative_loss(f, *tensors[1:], backend=backend, **keywords).loss


def test_torch_func_names_the_reference(backend, device):
    if backend == "reference":
        pytest.skip("the reference runs there")
    tensors = random_case(device=device)
    loss = loss_of(tensors, backend)
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.vmap):
        argument = tensors[0].unsqueeze(0) if transform is torch.func.vmap else tensors[0]
        with pytest.raises(RuntimeError, match=r"torch.func .*take backend='reference'"):
            transform(loss)(argument)
    assert not tensors[5]._version


@pytest.mark.parametrize("update_state", [True, False])
def test_torch_func_of_the_reference(update_state):
    tensors = random_case(dtype=torch.float64)
    f, g, target, *_ = tensors
    expected = run(tensors, "reference", update_state=False)
    loss = loss_of(tensors, "reference", update_state=update_state)
    torch.testing.assert_close(torch.func.grad(loss)(f), expected["grad_input"])
    torch.testing.assert_close(torch.func.jacrev(loss)(f), expected["grad_input"])

    def of_one(f, g, label):
        batch = f.unsqueeze(0), g.unsqueeze(0), label.unsqueeze(0)
        return functional.discriminative_loss(*batch, *tensors[3:], backend="reference", update_state=update_state).loss

    grads = torch.func.vmap(torch.func.grad(of_one))(f, g, target)
    for i in (0, 7):
        alone = run((f[i : i + 1], g[i : i + 1], target[i : i + 1], *tensors[3:]), "reference", update_state=False)
        torch.testing.assert_close(grads[i], alone["grad_input"][0])
    assert not tensors[5]._version and not tensors[6]._version  # such functions have no side effects


@pytest.mark.parametrize("batched", range(5))
def test_vmap_of_the_reference_over_one_argument(batched):
    """The others are the same for all: nothing may be written into what is made of those alone."""
    tensors = [tensor.detach() for tensor in random_case(dtype=torch.float64)]
    both = torch.stack((tensors[batched], tensors[batched].flip(0)))

    def of_one(argument):
        arguments = (*tensors[:batched], argument, *tensors[batched + 1 :])
        return functional.discriminative_loss(*arguments, update_state=False, backend="reference").loss

    torch.testing.assert_close(torch.func.vmap(of_one)(both), torch.stack([of_one(argument) for argument in both]))


def test_meta_tensors():
    tensors = [tensor.to("meta") for tensor in random_case()]
    tensors[0].requires_grad_()
    loss = functional.discriminative_loss(*tensors)
    loss.loss.backward()
    assert loss.loss.is_meta and tensors[0].grad.shape == tensors[0].shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_forward_mode_of_the_reference(dtype):
    tensors = random_case(dtype=dtype)
    tangent = torch.randn(tensors[0].shape).to(dtype)
    loss, slope = torch.func.jvp(loss_of(tensors, "reference"), (tensors[0],), (tangent,))
    assert slope.dtype == loss.dtype
    grad = run(tensors, "reference", update_state=False)["grad_input"]
    torch.testing.assert_close(slope.double(), (grad.double() * tangent.double()).sum(), rtol=1e-2, atol=1e-3)
