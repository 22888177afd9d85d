"""Classes split over ranks: the loss, its cross entropy and checkpoints are those of all classes on one rank."""

import copy
import json
import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils.checkpoint
from conftest import USABLE, device_of
from loss_cases import random_case
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

import robustfast
from robustfast import DiscriminativeLoss, collectives, shards
from robustfast.checkpoint import _sharded_parameters
from robustfast.distributed import (
    ShardedDiscriminativeLoss,
    load_checkpoint,
    optimizer_state,
    save_checkpoint,
    set_optimizer_state,
)

ROOT = Path(__file__).parents[1]
DIM = 5
SIZES = {4: (3, 0, 6, 1), 2: (0, 10), 1: (10,)}  # samples of each rank
CLASSES = (11, 9, 3)  # 3/3/3/2, 3/3/3/0 and 1/1/1/0 on four ranks; fewer and more than samples


def whole(num_classes, n=10, **options):
    """The global batch, the classifier and the state, in float64; a sample counts nowhere."""
    f, g, target, *rest = random_case(n, DIM, num_classes, dtype=torch.float64, **options)
    target[1:2] = -100
    return f, g, target, *rest


def plain(case, label_smoothing, **options):
    """Values, gradients and the state after a step with all classes in one place."""
    f, g, target, weight, bias, centroids, seen = case
    loss = DiscriminativeLoss(len(weight), DIM, process_group=False, **options).double()
    loss.load_state_dict({"centroids": centroids, "seen": seen})
    f, g, weight, bias = (None if t is None else t.clone().requires_grad_() for t in (f, g, weight, bias))
    value = loss(f, g, target, SimpleNamespace(weight=weight, bias=bias))
    entropy = F.cross_entropy(F.linear(f, weight, bias), target, label_smoothing=label_smoothing)
    (value + 2 * entropy).backward()
    grads = [None if t is None else t.grad for t in (f, g, weight, bias)]
    return [value.detach(), entropy.detach(), *grads, loss.centroids, loss.seen]


def head_of(case, group, dtype, **options):
    """The sharded loss with this rank's part of the classes."""
    _, _, _, weight, bias, centroids, seen = case
    head = ShardedDiscriminativeLoss(len(weight), DIM, process_group=group, bias=bias is not None, **options).to(dtype)
    state = {"weight": weight, "bias": bias, "centroids": centroids, "seen": seen}
    head.load_state_dict({name: value for name, value in state.items() if value is not None})
    return head


def sharded(case, label_smoothing, group, dtype, **options):
    """This rank's part of what ``plain`` gives, and where it belongs: slices of the samples and of the classes."""
    world, rank = collectives.size(group), collectives.rank(group)
    sizes = SIZES[world]
    samples = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    f, g, target, *_ = case
    head = head_of(case, group, dtype, **options)
    f, g = (None if t is None else t[samples].to(dtype).requires_grad_() for t in (f, g))
    value = head(f, g, target[samples])
    entropy = head.cross_entropy(f, target[samples], label_smoothing)
    (value + 2 * entropy).backward()
    of_features = [None if t is None else t.grad / world for t in (f, g)]  # as DistributedDataParallel averages
    grads = [*of_features, *(None if t is None else t.grad for t in (head.weight, head.bias))]
    block = head._block()
    classes = slice(block.first, block.first + block.size)
    return [value.detach(), entropy.detach(), *grads, head.centroids, head.seen], samples, classes


def assert_is_plain(case, label_smoothing, group, dtype, **options):
    actual, samples, classes = sharded(case, label_smoothing, group, dtype, **options)
    parts = (..., ..., samples, samples, classes, classes, classes, classes)
    tolerance = {"rtol": 1e-10, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    for found, expected, part in zip(actual, plain(case, label_smoothing, **options), parts, strict=True):
        if expected is not None:
            torch.testing.assert_close(found.to(expected.dtype), expected[part], **tolerance)


def equals_plain(group):
    for num_classes in CLASSES:
        for dtype in (torch.float64, torch.float32):
            f, g, *rest, bias, centroids, seen = whole(num_classes)
            assert_is_plain((f, g, *rest, bias, centroids, seen), 0.0, group, dtype)
            assert_is_plain((f, None, *rest, None, centroids, seen), 0.1, group, dtype, norm=1, delta_var=2.0)


def with_triton(group):
    if "triton" not in USABLE or device_of("triton") != "cpu":
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=RuntimeWarning)  # the interpreter's, of nan
        for num_classes in (9, 3):
            assert_is_plain(whole(num_classes), 0.0, group, torch.float32, backend="triton")


def exact_rows(group):
    """Rows come bit for bit; the best of all ranks wins, the lowest class on ties, a nan before all."""
    block = shards.Block.of(11, group)
    table = torch.tensor([0.0, -0.0, torch.inf, torch.nan, -torch.inf, 1e-45, 1.5, 2, 3, 4, 5])
    own = table[block.first : block.first + block.size]
    ids = torch.tensor([10, 1, 3, 0, 2, -1, 4, 5])
    rows, copies = shards.fetch(block, ids, (own, own.unsqueeze(1).expand(-1, 2)), torch.float32)
    expected = torch.where(ids < 0, 0, table[ids])
    assert torch.equal(rows.view(torch.int32), expected.view(torch.int32))
    assert torch.equal(copies[:, 1].view(torch.int32), expected.view(torch.int32))

    world, rank = collectives.size(group), collectives.rank(group)
    for dtype in (torch.float32, torch.float64):
        scores = torch.tensor([1.5, -2.0, -0.0, -torch.inf, torch.nan], dtype=dtype)
        if rank == world - 2:
            scores = torch.tensor([1.5, -1.5, 0.0, -torch.inf, torch.inf], dtype=dtype)
        block = shards.Block.of(2 * world, group)
        winner = torch.where(scores == -torch.inf, -1, 1).int()
        expected = [1, 2 * max(0, world - 2) + 1, 1, -1, 1 if world != 2 else 3]
        assert shards.best_of_ranks(scores, winner, block).tolist() == expected


def skipped_by_all(group, rank):
    """A step in float16 that one rank has to skip, as docs/scaling.md says: all skip it."""
    head = head_of(whole(11), group, torch.float32)
    scaler = ShardedGradScaler(device="cpu", process_group=group)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    f, g, target, *_ = whole(11)
    before = head.weight.detach().clone()
    for overflow in (True, False):
        scaler.scale(head(f.float(), g.float(), target)).backward()
        if overflow and rank == 1:
            head.weight.grad[0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(head.weight, before) == overflow


class Net(nn.Module):
    """A body, and a head that DistributedDataParallel and FSDP2 leave alone."""

    def __init__(self, head):
        super().__init__()
        torch.manual_seed(3)
        self.body, self.head = nn.Linear(DIM, DIM).double(), head

    def forward(self, input, input_noise, target):
        f, g = self.body(input), self.body(input_noise)
        return self.head(f, g, target) + self.head.cross_entropy(f, target)


def under_wrappers(group):
    """The gradients of body and head are those of one rank with the whole batch, with the head inside and outside."""
    case = whole(11)
    f, g, target, *_ = case
    alone = Net(head_of(case, False, torch.float64))
    alone(f, g, target).backward()
    world, rank = collectives.size(group), collectives.rank(group)
    samples = slice(sum(SIZES[world][:rank]), sum(SIZES[world][: rank + 1]))
    for wrapped in ("whole", "body", "FSDP2"):
        net = Net(head_of(case, group, torch.float64))
        head = net.head
        if wrapped == "whole":
            ignored = [f"head.{name}" for name in head.state_dict()]
            nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, ignored)
            net = nn.parallel.DistributedDataParallel(net, process_group=group)
            net(f[samples], g[samples], target[samples]).backward()
            body = net.module.body
        elif wrapped == "FSDP2":
            fully_shard(net, mesh=init_device_mesh("cpu", (world,)), ignored_params=set(head.parameters()))
            net(f[samples], g[samples], target[samples]).backward()
            body = SimpleNamespace(weight=SimpleNamespace(grad=net.body.weight.grad.full_tensor()))
        else:
            body = nn.parallel.DistributedDataParallel(net.body, process_group=group)
            features = body(torch.cat((f[samples], g[samples])))
            f_, g_ = features.tensor_split(2)
            (head(f_, g_, target[samples]) + head.cross_entropy(f_, target[samples])).backward()
            body = body.module
        torch.testing.assert_close(body.weight.grad, alone.body.weight.grad, rtol=1e-10, atol=1e-12)
        block = head._block()
        mine = slice(block.first, block.first + block.size)
        torch.testing.assert_close(head.weight.grad, alone.head.weight.grad[mine], rtol=1e-10, atol=1e-12)


def step(head, optimizer):
    """One step on the batch of all ranks, all of it given by the first."""
    f, g, target, *_ = whole(11)
    n = 0 if collectives.rank(head._block().group) else len(f)
    (head(f[:n], g[:n], target[:n]) + head.cross_entropy(f[:n], target[:n])).backward()
    optimizer.step()
    optimizer.zero_grad()


def trained(group):
    """A sharded loss and its optimizer after a step."""
    head = head_of(whole(11), group, torch.float64)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.1)
    step(head, optimizer)
    return head, optimizer


def untrained(group):
    head = ShardedDiscriminativeLoss(11, DIM, process_group=group).double()
    return head, torch.optim.Adam(head.parameters(), lr=0.01)


def full(state):
    return {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in state.items()}


def state_of(head, optimizer):
    return {"head": head.state_dict(), "optimizer": optimizer_state(head, optimizer)}


def load(head, optimizer, folder, group):
    state = state_of(head, optimizer)
    load_checkpoint(state, folder, group)
    set_optimizer_state(head, optimizer, state["optimizer"])


def resharded(groups, rank, folder):
    """What four ranks wrote is loaded by three, by one, and by an nn.Linear with a DiscriminativeLoss; and back."""
    four, three, one = groups
    head, optimizer = trained(four)
    expected = full(head.state_dict())
    assert [tuple(t.shape) for t in expected.values()] == [(11, DIM), (11,), (11, DIM), (11,)]
    save_checkpoint(state_of(head, optimizer), folder / "four", four)
    step(head, optimizer)
    after = full(head.state_dict())

    for group in (three, one) if rank < 3 else (one,):
        head, optimizer = untrained(group)
        load(head, optimizer, folder / "four", group)
        torch.testing.assert_close(full(head.state_dict()), expected, rtol=0, atol=0)
        step(head, optimizer)  # Adam's moments and its learning rate came along
        torch.testing.assert_close(full(head.state_dict()), after)

    fc, loss = nn.Linear(DIM, 11).double(), DiscriminativeLoss(11, DIM, process_group=False).double()
    load_checkpoint({"head": fc.state_dict() | loss.state_dict()}, folder / "four", one)
    torch.testing.assert_close(fc.state_dict() | loss.state_dict(), expected, rtol=0, atol=0)

    if rank == 0:
        save_checkpoint({"head": fc.state_dict() | loss.state_dict()}, folder / "one", one)
    dist.barrier()
    head, _ = untrained(four)
    load_checkpoint({"head": head.state_dict()}, folder / "one", four)
    torch.testing.assert_close(full(head.state_dict()), expected, rtol=0, atol=0)
    other, _ = untrained(four)
    other.load_state_dict(head.state_dict())  # DTensors
    torch.testing.assert_close(other.weight, head.weight, rtol=0, atol=0)
    other, _ = untrained(four)
    other.load_state_dict(full(head.state_dict()))  # whole tensors
    torch.testing.assert_close(other.centroids, head.centroids, rtol=0, atol=0)


def damaged(group, rank, folder):
    """A checkpoint that is not as it was written is refused on every rank, and nothing has changed."""
    head, _ = trained(group)
    before = {name: value.clone() for name, value in full(head.state_dict()).items()}
    path = folder / "damaged"
    save_checkpoint({"head": head.state_dict()}, path, group)
    save_checkpoint({"head": head.state_dict()}, path, group)  # in its place
    with torch.no_grad():
        head.weight.zero_()
    load_checkpoint({"head": head.state_dict()}, path, group)
    for name in ("__2_0.distcp", ".metadata", "checksums.json"):
        for damage in (lambda old: old[: len(old) // 2], lambda old: old[:-2] + bytes([old[-2] ^ 1]) + old[-1:], None):
            file, whole_file = path / name, (path / name).read_bytes()
            dist.barrier(group)
            if rank == 0:
                file.unlink() if damage is None else file.write_bytes(damage(whole_file))
            dist.barrier(group)
            with pytest.raises(ValueError, match=rf"damaged: .*{name}"):
                load_checkpoint({"head": head.state_dict()}, path, group)
            dist.barrier(group)
            if rank == 0:
                file.write_bytes(whole_file)
    wrong = ShardedDiscriminativeLoss(12, DIM, process_group=group).double()
    for state in ({"head": wrong.state_dict()}, {"head": head.state_dict(), "another": torch.zeros(1)}):
        with pytest.raises(ValueError, match=r"damaged: .*(head\.weight|another)"):
            load_checkpoint(state, path, group)
    torch.testing.assert_close(full(head.state_dict()), before, rtol=0, atol=0)


def bytes_sent(call, group):
    """What ``call()`` sends from a rank by ring algorithms, counted at torch.distributed's functions."""
    share = (collectives.size(group) - 1) / collectives.size(group)
    sent = [0.0]

    def counting(function, of, times):
        def counted(*tensors, **keywords):
            sent[0] += times * share * tensors[of].nbytes
            return function(*tensors, **keywords)

        return counted

    counted = {"all_reduce": (0, 2)}  # which argument is the whole, and how often it goes round
    for newer, older, of in (
        ("all_gather_single", "all_gather_into_tensor", 0),
        ("reduce_scatter_single", "reduce_scatter_tensor", 1),
    ):
        counted[newer if hasattr(dist, newer) else older] = (of, 1)
    with pytest.MonkeyPatch.context() as patch:
        for name, (of, times) in counted.items():
            patch.setattr(dist, name, counting(getattr(dist, name), of, times))
        result = call()
        after_forward = sent[0]
        result.backward()
    assert sent[0] == after_forward  # no collective in backward
    return sent[0]


def bytes_as_derived(group):
    """docs/scaling.md's formulas."""
    world, num_classes, most = collectives.size(group), 40, 6
    case = whole(num_classes, 10)
    samples = slice(0, most) if collectives.rank(group) == 0 else slice(most, most + 1)
    n, rows, share = world * most, min(world * most, num_classes), (world - 1) / world
    for dtype, element in ((torch.float32, 4), (torch.bfloat16, 2)):
        f, g = (t[samples].to(dtype).requires_grad_() for t in case[:2])
        target = case[2][samples]
        head = ShardedDiscriminativeLoss(num_classes, DIM, process_group=group)

        def sample(views, element=element):
            return -(-(8 + views * DIM * element) // 8) * 8  # label and features, in a multiple of 8 bytes

        def of_loss(noisy, head=head, f=f, g=g, target=target):
            return head(f, g if noisy else None, target)

        for noisy in (False, True):
            expected = share * (n * sample(1 + noisy) + rows * (24 * DIM + 40) + 64)
            assert bytes_sent(partial(of_loss, noisy), group) == pytest.approx(expected)
        expected = share * (n * (sample(1) + 4 * DIM + 32) + 64)
        assert bytes_sent(partial(head.cross_entropy, f, target, 0.1), group) == pytest.approx(expected)


def errors_on_every_rank(group, rank):
    """What is wrong on one rank is an error on all, so that none waits."""
    head = head_of(whole(11), group, torch.float64)
    f, g, target, *_ = whole(11, 4)
    wrong = torch.where(torch.arange(4) == 2, 11 if rank == 1 else 0, target)
    for call in (lambda: head(f, g, wrong), lambda: head.cross_entropy(f, wrong)):
        with pytest.raises(IndexError, match=r"target: .*label.* outside 0\.\.10"):
            call()
    with pytest.raises(ValueError, match="input_noise: expected a noisy view on all ranks or on none"):
        head(f, g if rank else None, target)
    head.process_group = False
    with pytest.raises(ValueError, match=r"11 classes were split, [23] of them here, got 1 ranks, with 11 here"):
        head(f, g, target)
    head.process_group = group
    with pytest.raises(TypeError, match="exchange: ShardedDiscriminativeLoss has one way"):
        ShardedDiscriminativeLoss(11, DIM, process_group=group, exchange="sums")
    with pytest.raises(ValueError, match=r"input: expected shape \(4, 5\)|weight: expected shape"):
        head(f[:, 1:], None, target)


def every_way_of_having_it(group):
    """A limit for the batches, another draw of the weights, copies, evaluation, activation checkpoints, half types."""
    f, g, target, *_ = case = whole(11)
    expected, _, _ = sharded(case, 0.0, group, torch.float64)
    limited, _, _ = sharded(case, 0.0, group, torch.float64, max_batch=10)
    torch.testing.assert_close(limited, expected, rtol=0, atol=0)

    torch.manual_seed(5)
    drawn = full(ShardedDiscriminativeLoss(11, DIM, process_group=group).state_dict())
    torch.manual_seed(5)
    torch.testing.assert_close(drawn, ShardedDiscriminativeLoss(11, DIM, process_group=False).state_dict())
    assert drawn["weight"].unique().numel() == 11 * DIM and drawn["weight"].abs().max() <= DIM**-0.5

    head = head_of(case, group, torch.float64)
    before = head.centroids.clone()
    twin = copy.deepcopy(head).eval()
    torch.testing.assert_close(twin(f, g, target), head_of(case, group, torch.float64)(f, g, target))
    with torch.no_grad():
        head(f, g, target)
    assert torch.equal(twin.centroids, before) and torch.equal(head.centroids, before)

    leaf = f.clone().requires_grad_()
    torch.utils.checkpoint.checkpoint(head, leaf, g, target, use_reentrant=False).backward()
    once = head_of(case, group, torch.float64)
    once(leaf, g, target)
    torch.testing.assert_close(head.centroids, once.centroids)  # moved once

    half = head_of(case, group, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        leaf = f.bfloat16().requires_grad_()
        value = half(leaf, g.bfloat16(), target) + half.cross_entropy(leaf, target)
    value.backward()
    assert value.dtype == half.weight.grad.dtype == torch.float32 and leaf.grad.dtype == torch.bfloat16
    torch.testing.assert_close(value.double(), expected[0] + expected[1], rtol=0.1, atol=0.1)


def every_check(rank, initialise, folder):
    warnings.simplefilter("error")  # no deprecated collective either
    warnings.filterwarnings("ignore", "TypedStorage is deprecated")  # PyTorch 2.10's checkpoints
    initialise()
    world, three = dist.group.WORLD, dist.new_group([0, 1, 2])
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    singles = [dist.new_group([one]) for one in range(4)]
    for group in (world, pairs[rank // 2], singles[rank]):
        equals_plain(group)
        exact_rows(group)
    with_triton(world)
    under_wrappers(world)
    bytes_as_derived(world)
    errors_on_every_rank(world, rank)
    skipped_by_all(world, rank)
    every_way_of_having_it(world)
    resharded((world, three, singles[rank]), rank, folder)
    damaged(world, rank, folder)


def test_equals_the_loss_of_all_classes_on_one_rank(tmp_path):
    run_ranks(partial(every_check, folder=tmp_path), tmp_path / "store", world=4)


def test_one_process_without_a_group():
    equals_plain(None)
    exact_rows(None)


@pytest.mark.parametrize("wrap", [lambda model: model, torch.compile], ids=["as it is", "compiled"])
def test_names_in_a_checkpoint_of_what_the_optimizer_keeps(wrap):
    """Under another name a rank's part would be saved as if it were the same on all ranks."""
    model = nn.ModuleDict({"a_module": nn.ModuleList([head_of(whole(11), None, torch.float64)])})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    names = optimizer_state(wrap(model), optimizer)["state"]
    assert list(names) == list(_sharded_parameters(wrap(model))) == ["a_module.0.weight", "a_module.0.bias"]


def test_memory_of_a_rank_is_as_derived(tmp_path):
    """Of 100,000 classes and 512 samples, whose logits on a rank would be more than those that exist at a time."""
    out = tmp_path / "memory.json"
    command = [sys.executable, "benchmarks/sharded_memory.py", "--num-classes", "100000", "--steps", "2", "--out", out]
    environment = os.environ | {"PYTHONPATH": str(Path(robustfast.__file__).parents[1])}  # the package of this process
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    result = json.loads(out.read_text())
    for rank in result["measured"]:
        assert 0.8 < rank["peak"] / result["derived"]["sum"] < 1.2
