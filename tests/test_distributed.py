"""Several ranks: whose batches count as one, and what a rank is told instead of waiting for ever."""

import copy
import pickle
import warnings
from functools import cached_property
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from loss_cases import random_case
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from robustfast import DiscriminativeLoss, costs, process_groups

WORLD = 2


def global_batch():
    f, g, target, weight, bias, _, _ = random_case(48, dtype=torch.float64)
    return f, g, target, SimpleNamespace(weight=weight.requires_grad_(), bias=bias.requires_grad_())


def my_part(rank):
    f, g, target, fc = global_batch()
    mine = slice(rank * 48 // WORLD, (rank + 1) * 48 // WORLD)
    f, g = (t[mine].clone().requires_grad_() for t in (f, g))
    return f, g, target[mine], fc


def step(loss, rank):
    """The loss of this rank's part, and gradients as DistributedDataParallel averages them."""
    f, g, target, fc = my_part(rank)
    value = loss(f, g, target, fc)
    value.backward()
    dist.all_reduce(fc.weight.grad)
    grads = [t / WORLD for t in (f.grad, g.grad, fc.weight.grad)]
    return [t.detach().numpy() for t in (value, *grads, loss.centroids)]


def two_ranks(rank, initialise):
    """One group runs all of these, since each process takes seconds to import torch."""
    results = ways_of_naming_a_group(rank, initialise)
    for check in (errors_and_exceptions, sharded_classifiers, compiled_steps, compiled_and_checkpointed):
        torch.manual_seed(0)
        check(rank)
        dist.barrier()
    return results


def ways_of_naming_a_group(rank, initialise):
    early = {name: DiscriminativeLoss(7, 12, process_group=name).double() for name in ("world", True)}
    initialise()
    mesh = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("data",))
    late = {
        "group": DiscriminativeLoss(7, 12, process_group=dist.group.WORLD).double(),
        "mesh": DiscriminativeLoss(7, 12, process_group=mesh).double(),
    }
    losses = early | late
    losses |= {"deepcopy": copy.deepcopy(losses["mesh"]), "pickle": pickle.loads(pickle.dumps(losses["group"]))}
    return {name: step(loss, rank) for name, loss in losses.items()}


def errors_and_exceptions(rank):
    loss = DiscriminativeLoss(7, 12, process_group="world").double()
    f, g, target, fc = my_part(rank)
    if rank == 0:  # validation on one rank: nobody waits
        loss.eval()(f, g, target, fc)
        with torch.no_grad():
            loss.train()(f, g, target, fc)

    loss.process_group = dist.new_group([0])
    if rank == 1:
        with pytest.raises(ValueError, match="process_group: expected a group of which this process, rank 1, is a mem"):
            loss(f, g, target, fc)
    loss.process_group = init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("tensor", "data"))
    with pytest.raises(ValueError, match=r"process_group: expected a mesh of one dimension.*\('tensor', 'data'\)"):
        loss(f, g, target, fc)
    loss.process_group = "ranks"
    with pytest.raises(TypeError, match=r"process_group: expected 'world' .*, got 'ranks'"):
        loss(f, g, target, fc)

    loss.process_group = dist.new_group([0, 1])
    with pytest.warns(UserWarning, match="a process group does not leave its process"):
        assert pickle.loads(pickle.dumps(loss)).process_group is None

    apart = DiscriminativeLoss(7, 12).double()
    with pytest.warns(UserWarning, match="process_group='world' makes the ranks' batches count as one"):
        apart(f, g, target, fc)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apart(f, g, target, fc)  # once
        process_groups._warn_of_ranks_apart.cache_clear()
        apart.process_group = False
        apart(f, g, target, fc)


class Net(nn.Module):
    """A classifier whose forward gives its loss, or features and logits where it has none."""

    def __init__(self, loss=None):
        super().__init__()
        torch.manual_seed(1)
        self.body, self.fc, self.loss = nn.Linear(12, 12), nn.Linear(12, 7), loss
        self.double()

    def forward(self, x, target):
        f = self.body(x)
        z = self.fc(f)
        return (
            (f, z)
            if self.loss is None
            else nn.functional.cross_entropy(z, target) + self.loss(f, None, target, self.fc)
        )


def sharded_classifiers(rank):
    """The error for FSDP2's weights, and that each way it names gives the gradients of the whole batch."""
    from torch.distributed.fsdp import fully_shard

    x, _, target, _ = global_batch()
    whole = Net(DiscriminativeLoss(7, 12))
    whole(x, target).backward()
    x, _, target, _ = my_part(rank)

    def check(net, value):
        value.backward()
        for name, parameter in net.named_parameters():
            expected = whole.get_parameter(name).grad
            torch.testing.assert_close(parameter.grad.full_tensor(), expected)

    def features_and_loss(net, **options):
        fully_shard(net.fc, **options)
        fully_shard(net)
        f, z = net(x.detach(), target)
        return f, nn.functional.cross_entropy(z, target), DiscriminativeLoss(7, 12, process_group="world").double()

    net = Net()
    f, cross_entropy, loss = features_and_loss(net)
    with pytest.raises(TypeError, match=r"weight: expected a plain tensor, got a DTensor .*fc\.unshard\(\)"):
        loss(f, None, target, net.fc)
    net.fc.unshard()
    check(net, cross_entropy + loss(f, None, target, net.fc))

    net = Net()
    f, cross_entropy, loss = features_and_loss(net)
    fc = SimpleNamespace(weight=net.fc.weight.full_tensor(), bias=net.fc.bias.full_tensor())
    check(net, cross_entropy + loss(f, None, target, fc))

    net = Net()
    f, cross_entropy, loss = features_and_loss(net, reshard_after_forward=False)
    check(net, cross_entropy + loss(f, None, target, net.fc))

    net = Net(DiscriminativeLoss(7, 12, process_group="world"))
    fully_shard(net)
    check(net, net(x.detach(), target))


def compiled_steps(rank):
    """Batches of five sizes take two graphs, with the collectives in them; what backward computes again is the same."""
    before = costs.COSTS["cpu"]
    shared = costs.Costs(0, 0, 0, 0, searched=1)  # the search
    for exchange, costs.COSTS["cpu"] in (("sums", shared), ("gather", before), ("gather", shared)):
        options = dict(process_group="world", exchange=exchange, max_batch=16)
        losses = [DiscriminativeLoss(7, 12, **options) for _ in range(2)]
        steps = [losses[0], torch.compile(losses[1], fullgraph=True, backend="aot_eager_decomp_partition")]
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        for n in (6 + rank, 5, 9, 13, 16):
            f, g, target, *_ = random_case(n, seed=2 * n + rank)
            *_, weight, bias, _, _ = random_case(1)  # the same on all ranks
            results = []
            for step in steps:
                leaves = [t.clone().requires_grad_() for t in (f, g, weight, bias)]
                value = step(*leaves[:2], target, SimpleNamespace(weight=leaves[2], bias=leaves[3]))
                value.backward()
                results.append((value.detach(), *(leaf.grad for leaf in leaves)))
            torch.testing.assert_close(*results)
        torch.testing.assert_close(losses[0].centroids, losses[1].centroids)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    costs.COSTS["cpu"] = before


class CheckpointedNet(Net):
    """``around``: the whole step is in an activation checkpoint, or what comes after the body."""

    def __init__(self, loss, around):
        super().__init__(loss)
        self.around = around

    def forward(self, x, target):
        return self.rest(self.body(x), target)

    def rest(self, f, target):
        step = self.compiled if self.around else self.step
        return checkpoint(step, f, target, use_reentrant=False)

    def step(self, f, target):
        return self.loss(f, None, target, self.fc)

    @cached_property
    def compiled(self):
        return torch.compile(self.step, backend="aot_eager")


def compiled_and_checkpointed(rank):
    """A checkpoint in a compiled model, and a compiled step in a checkpoint: the state moves once."""
    x, _, target, _ = global_batch()
    whole = CheckpointedNet(DiscriminativeLoss(7, 12, process_group=False), around=False)
    for _ in range(2):
        whole.zero_grad()
        whole(x, target).backward()
    x, _, target, _ = my_part(rank)
    for exchange, way in (("sums", "model"), ("sums", "step"), ("gather", "DDP"), ("gather", "step")):
        torch._dynamo.reset()
        loss = DiscriminativeLoss(7, 12, process_group="world", exchange=exchange, max_batch=24)
        net = CheckpointedNet(loss, around=way == "step")
        if way == "model":
            net.compile(backend="aot_eager")
        ddp = DistributedDataParallel(net)
        if way == "DDP":
            ddp.compile(backend="aot_eager")
        for _ in range(2):
            net.zero_grad()
            value = ddp(x.detach(), target)
            value.backward()
        for name, parameter in whole.named_parameters():
            torch.testing.assert_close(net.get_parameter(name).grad, parameter.grad, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(loss.centroids, whole.loss.centroids, rtol=1e-10, atol=1e-12)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="a compiled step would move the state twice"):
        net.compiled = torch.compile(net.step, fullgraph=True, backend="aot_eager")
        net(x, target)


def test_two_ranks(tmp_path):
    """Batches count as one however the group is named; and what the checks of `two_ranks` promise."""
    f, g, target, fc = global_batch()
    loss = DiscriminativeLoss(7, 12).double()
    value = loss(f.requires_grad_(), g.requires_grad_(), target, fc)
    value.backward()
    ranks = run_ranks(two_ranks, tmp_path / "store")
    assert list(ranks[0]) == ["world", True, "group", "mesh", "deepcopy", "pickle"]
    for name in ranks[0]:
        for other, *_, grad_weight, centroids in (rank[name] for rank in ranks):
            assert other == pytest.approx(value.item(), rel=1e-12), name
            torch.testing.assert_close(torch.from_numpy(grad_weight), fc.weight.grad)
            torch.testing.assert_close(torch.from_numpy(centroids), loss.centroids)
        for part, whole in ((1, f), (2, g)):
            parts = torch.cat([torch.from_numpy(rank[name][part]) for rank in ranks])
            torch.testing.assert_close(parts, whole.grad)


def test_world_without_ranks_is_this_process():
    f, g, target, fc = global_batch()
    alone, world = (DiscriminativeLoss(7, 12, process_group=group).double() for group in (None, "world"))
    assert torch.equal(alone(f, g, target, fc), world(f, g, target, fc))
