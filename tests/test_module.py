"""DiscriminativeLoss as a module: its state, its modes, its place of the published code."""

import copy
import inspect
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from loss_cases import random_case

import robustfast
from robustfast import DiscriminativeLoss
from robustfast.backends import has_code_for
from robustfast.compat import DiscriminativeLoss_forcing


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


def test_published_signature():
    names = list(inspect.signature(DiscriminativeLoss_forcing).parameters)
    assert names[:9] == ["num_classes", "dim", "delta_var", "delta_dist", "norm", "alpha", "beta", "gamma", "momentum"]
    assert list(inspect.signature(DiscriminativeLoss.forward).parameters)[1:] == [
        "input",
        "input_noise",
        "target",
        "fc",
    ]
    loss = DiscriminativeLoss_forcing(10, 128, 0.5, 5.0, 2, 1.0, 1.0, 0.001, 0.99)
    assert loss(torch.randn(4, 128), None, torch.arange(4), torch.nn.Linear(128, 10)).dim() == 0


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


@pytest.mark.parametrize(
    "keyword, value", [("num_classes", 1), ("dim", 0), ("norm", 0), ("momentum", -0.1), ("gamma", float("nan"))]
)
def test_wrong_arguments(keyword, value):
    with pytest.raises(ValueError, match=f"{keyword}: expected .*{value}"):
        DiscriminativeLoss(**{keyword: value})


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


def ranks(rank, world, path, results):
    """One process of a group: a quarter of the batch, gradients averaged as by DistributedDataParallel."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    torch.set_num_threads(1)
    f, g, target, weight, bias, _, _ = random_case(48, dtype=torch.float64)
    mine = slice(rank * 48 // world, (rank + 1) * 48 // world)
    fc = SimpleNamespace(weight=weight.requires_grad_(), bias=bias.requires_grad_())
    f, g = (t[mine].requires_grad_() for t in (f, g))
    loss = DiscriminativeLoss(7, 12, process_group=torch.distributed.group.WORLD).double()
    value = loss(f, g, target[mine], fc)
    value.backward()
    torch.distributed.all_reduce(weight.grad)
    results.put(
        (
            rank,
            value.item(),
            f.grad.numpy() / world,
            g.grad.numpy() / world,
            (weight.grad / world).numpy(),
            loss.centroids.numpy(),
        )
    )
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_ranks_batches_count_as_one(tmp_path):
    f, g, target, weight, bias, _, _ = random_case(48, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (f, g, weight)]
    loss = DiscriminativeLoss(7, 12).double()
    value = loss(f, g, target, SimpleNamespace(weight=weight, bias=bias))
    value.backward()

    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    world = 2
    processes = [context.Process(target=ranks, args=(r, world, tmp_path / "store", results)) for r in range(world)]
    for process in processes:
        process.start()
    found = sorted((results.get() for _ in processes), key=lambda result: result[0])
    for process in processes:
        process.join()
        assert process.exitcode == 0
    for _, other, *_, weight_grad, centroids in found:
        assert other == pytest.approx(value.item(), rel=1e-12)
        torch.testing.assert_close(torch.from_numpy(weight_grad), leaves[2].grad)
        torch.testing.assert_close(torch.from_numpy(centroids), loss.centroids)
    for leaf, part in zip(leaves[:2], (2, 3), strict=True):
        torch.testing.assert_close(torch.cat([torch.from_numpy(result[part]) for result in found]), leaf.grad)
