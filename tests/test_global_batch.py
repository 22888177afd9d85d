"""Batches of any sizes in four ranks: the loss and every gradient of one process that has all of the samples."""

import contextlib
import copy
import itertools
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import USABLE, device_of
from loss_cases import RELATIVE, assert_close, random_case
from ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from robustfast import DiscriminativeLoss, costs, gathering, global_batch, process_groups

SIZES = (3, 0, 6, 1)  # samples of each rank
EXCHANGES = {"sums": {}, "gather": {}, "gather, capturable": {"max_batch": 8}}
BACKENDS = ("cpu", "reference")
ALWAYS_SHARED = costs.Costs(collective=0, sent=0, gathered=0, table=0, searched=1)  # the search, by the ranks


def mine(rank, sizes=SIZES):
    """This rank's part of the global batch."""
    first = sum(sizes[:rank])
    return slice(first, first + sizes[rank])


def ways():
    for (name, options), backend in itertools.product(EXCHANGES.items(), BACKENDS):
        yield dict(exchange=name.split(",")[0], backend=backend, **options)


def steps(loss, case, part, ranks=1):
    """What two steps leave: losses, gradients as DistributedDataParallel averages them, and the state."""
    f, g, target, weight, bias, *_ = case
    results = {}
    for step in range(2):
        leaves = [None if t is None else t.clone().requires_grad_() for t in (f, g, weight, bias)]
        fc = SimpleNamespace(weight=leaves[2], bias=leaves[3])
        views = (None if view is None else view[part] for view in leaves[:2])
        terms = loss(*views, target[part], fc)
        terms.loss.backward()
        for name, leaf, parted in zip(("f", "g", "weight", "bias"), leaves, (True, True, False, False), strict=True):
            if leaf is not None:
                # As if there were a parameter below the features: the mean over ranks of what each one gives.
                grad = leaf.grad[part] / ranks if parted else leaf.grad
                results[f"{name} {step}"] = grad if parted or ranks == 1 else averaged(grad)
        results |= {f"{name} {step}": value.detach() for name, value in terms._asdict().items()}
        f = f + 0.25
    return results | {"centroids": loss.centroids, "seen": loss.seen}


def averaged(grad):
    dist.all_reduce(grad)
    return grad / dist.get_world_size()


def compare(rank, case, dtype, **options):
    """A rank's results with those of one process, and its state with that of the other ranks."""
    relative = options.pop("relative", RELATIVE[torch.promote_types(dtype, torch.float32)])
    wide = torch.promote_types(dtype, torch.float32)
    case = [t.to(wide) if t is not None and t.is_floating_point() else t for t in case]
    case[:2] = [None if view is None else view.to(dtype) for view in case[:2]]
    ways = options.pop("exchange"), options.pop("max_batch", None)
    alone = DiscriminativeLoss(7, 12, process_group=False, return_terms=True, **options).to(wide)
    options |= dict(zip(("exchange", "max_batch"), ways, strict=True))
    spread = DiscriminativeLoss(7, 12, process_group="world", return_terms=True, **options).to(wide)
    part = mine(rank)
    expected = steps(alone, case, slice(None))
    expected = {k: v[part] if k[:2] in ("f ", "g ") else v for k, v in expected.items()}
    assert_close(steps(spread, case, part, len(SIZES)), expected, relative, 1e-12)
    states = [torch.empty_like(spread.centroids) for _ in SIZES]
    dist.all_gather(states, spread.centroids)
    assert all(torch.equal(state, spread.centroids) for state in states)


def whole():
    f, g, target, weight, bias, *state = random_case(sum(SIZES), dtype=torch.float64)
    target[target == 3] = 2  # an absent class
    target[5] = -100
    f[5] = torch.nan  # counts nowhere, whatever it holds
    return f, g, target, weight, bias, *state


def gradients_are_those_of_one_process(rank):
    for way, dtype, norm in itertools.product(ways(), (torch.float64, torch.float32), (1, 2)):
        compare(rank, whole(), dtype, norm=norm, delta_var=2.0 * (3 - norm), **way)


def other_batches(rank):
    f, g, target, weight, bias, *state = whole()
    for way in ways():
        compare(rank, (f, None, target, weight, None, *state), torch.float64, **way)
        compare(rank, (f, g, torch.full_like(target, -100), weight, bias, *state), torch.float64, **way)
        labels = torch.where(target == -100, 255, target).to(torch.uint8)
        compare(rank, (f, g, labels, weight, bias, *state), torch.float64, ignore_index=255, **way)
        compare(rank, (f, g, target, weight, bias, *state), torch.bfloat16, relative=1e-2, **way)


def ranks_share_the_search(rank):
    f, g, target, weight, bias, *state = whole()
    before, costs.COSTS["cpu"] = costs.COSTS["cpu"], ALWAYS_SHARED
    for way, b in itertools.product(ways(), (bias, None)):  # 7 classes: 2, 2, 2 and 1
        compare(rank, (f, g, target, weight, b, *state), torch.float64, **way)
    mu = torch.randn(5, 12, dtype=torch.float64)
    for rows in (slice(0, 5), slice(0, 2)):  # of 4 one each; of 1 none but for the first
        case = mu[rows], weight[rows], bias[rows], weight, bias
        taken = torch.arange(len(case[0])) != 1
        classes = torch.arange(len(taken))
        winner = global_batch.search("cpu", dist.group.WORLD, taken, classes, *case)
        expected = global_batch.steps.of("cpu").margin_search(*case)[1]
        assert torch.equal(winner, expected.masked_fill(~taken, -1))
    costs.COSTS["cpu"] = before


def steps_of_triton(rank):
    if "triton" not in USABLE or device_of("triton") != "cpu":
        return
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # the interpreter's, of nan
    before = costs.COSTS["cpu"]
    for exchange, of_ranks in (("sums", before), ("gather", ALWAYS_SHARED)):
        costs.COSTS["cpu"] = of_ranks
        compare(rank, whole(), torch.float32, exchange=exchange, backend="triton")
    costs.COSTS["cpu"] = before


def errors_reach_all_ranks(rank):
    f, g, target, weight, bias, *_ = random_case(sum(SIZES), dtype=torch.float64)
    part, fc = mine(rank), SimpleNamespace(weight=weight, bias=bias)
    for way in ways():
        loss = DiscriminativeLoss(7, 12, process_group="world", **way).double()
        wrong = torch.where(torch.arange(len(target)) == 4, 7, target)  # in rank 2
        message = r"label 7 at position 1" if rank == 2 else r"another rank has a label outside 0\.\.6"
        with pytest.raises(IndexError, match=message):
            loss(f[part], g[part], wrong[part], fc)
        with pytest.raises(ValueError, match="input_noise: expected a noisy view on all ranks or on none"):
            loss(f[part], g[part] if rank == 3 else None, target[part], fc)
        assert not loss.seen.any()
        loss(f[part], g[part], target[part], fc)  # nobody is left behind
    loss = DiscriminativeLoss(7, 12, process_group="world", exchange="gather", max_batch=5).double()
    with pytest.raises(ValueError, match="max_batch: expected at least the size of each rank's batch, got 5"):
        loss(f[part], g[part], target[part], fc)


def the_exchange_is_chosen_once_for_all_ranks(rank):
    f, g, target, weight, bias, *_ = random_case(sum(SIZES), classes=20)
    part, fc = mine(rank), SimpleNamespace(weight=weight, bias=bias)
    # As docs/scaling.md derives: sums from 2.89 samples a class on, in float32 on four CPUs.
    for num_classes, options, expected in (
        (8, {}, "sums"),  # of 24 samples, each rank's filled up to 6
        (9, {}, "gather"),
        (20, {"max_batch": 14}, "gather"),
        (20, {"max_batch": 15}, "sums"),
    ):
        loss = DiscriminativeLoss(num_classes, 12, process_group="world", **options)
        fc = SimpleNamespace(weight=weight[:num_classes], bias=bias[:num_classes])
        for size in (6, 2):
            loss(f[part][:size], g[part][:size], target[part][:size] % num_classes, fc)
            assert loss._auto == expected


def a_change_of_the_state_shows(rank):
    """Another term made of the state has no gradient any more, rather than a wrong one."""
    f, g, target, weight, bias, *_ = random_case(sum(SIZES))
    f, fc, part = f.requires_grad_(), SimpleNamespace(weight=weight, bias=bias), mine(rank)
    for way in ways():
        loss = DiscriminativeLoss(7, 12, process_group="world", **way)
        other = (f @ loss.centroids.T).square().sum()
        loss(f[part], g[part], target[part], fc)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            other.backward()


def groups_are_apart(rank):
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    f, g, target, weight, bias, *_ = random_case(sum(SIZES), dtype=torch.float64)
    fc, part = SimpleNamespace(weight=weight, bias=bias), mine(rank)
    pair = slice(0, 3) if rank < 2 else slice(3, 10)
    for exchange in ("sums", "gather"):
        loss = DiscriminativeLoss(7, 12, process_group=pairs[rank // 2], exchange=exchange).double()
        expected = DiscriminativeLoss(7, 12, process_group=False).double()(f[pair], g[pair], target[pair], fc)
        torch.testing.assert_close(loss(f[part], g[part], target[part], fc), expected)


class Net(nn.Module):
    """A classifier whose forward gives its loss; ``checkpointed``: what comes after the body is computed twice."""

    def __init__(self, loss, checkpointed=False):
        super().__init__()
        torch.manual_seed(1)
        self.body, self.fc, self.loss, self.checkpointed = nn.Linear(12, 12), nn.Linear(12, 7), loss, checkpointed
        self.unused = nn.Linear(1, 1)
        self.double()

    def forward(self, x, noisy, target):
        f, g = self.body(x), self.body(noisy)
        if self.checkpointed:
            return checkpoint(self.head, f, g, target, use_reentrant=False)
        return self.head(f, g, target)

    def head(self, f, g, target):
        return self.loss(f, g, target, self.fc)


def trainers(rank):
    """What users of DistributedDataParallel do, against the same in one process."""
    for exchange in ("sums", "gather"):
        for name, options, routine in (
            ("as it is", {}, one_backward),
            ("static graph", {"static_graph": True}, one_backward),
            ("unused parameters", {"find_unused_parameters": True}, one_backward),
            ("views of buckets", {"gradient_as_bucket_view": True}, one_backward),
            ("two forwards", {}, two_forwards),
            ("accumulated", {}, accumulated),
        ):
            for checkpointed in (False, True):
                net, alone = (
                    Net(DiscriminativeLoss(7, 12, process_group=group, exchange=exchange), checkpointed)
                    for group in ("world", False)
                )
                if not options.get("find_unused_parameters"):
                    del net.unused
                ddp = DistributedDataParallel(net, **options)
                batches = [random_case(sum(SIZES), dtype=torch.float64, seed=seed)[:3] for seed in range(2)]
                for _ in range(2):
                    routine(alone, batches)
                    routine(ddp, [[t[mine(rank)] for t in batch] for batch in batches])
                for parameter in ("body.weight", "body.bias", "fc.weight", "fc.bias"):
                    actual, expected = net.get_parameter(parameter).grad, alone.get_parameter(parameter).grad
                    message = f"{exchange}, {name}, {checkpointed}, {parameter}"
                    assert (actual - expected).abs().max() <= 1e-10 * expected.abs().max(), message
                torch.testing.assert_close(net.loss.centroids, alone.loss.centroids, rtol=1e-10, atol=1e-12)


def autocast(rank):
    """Features of half precision beside a classifier in float32: the steps compute in float32 all the same."""
    f, g, target, weight, bias, *_ = random_case(sum(SIZES))
    fc = SimpleNamespace(weight=weight.requires_grad_(), bias=bias.requires_grad_())
    f, g = f.bfloat16().requires_grad_(), g.bfloat16()
    for way in ways():
        results = []
        for enabled in (False, True):
            loss = DiscriminativeLoss(7, 12, process_group="world", **way)
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                value = loss(f[mine(rank)], g[mine(rank)], target[mine(rank)], fc)
            results.append((value.detach(), torch.autograd.grad(value, fc.weight)[0], loss.centroids))
        torch.testing.assert_close(*results, rtol=0, atol=0)


def one_backward(net, batches):
    net.zero_grad()
    net(*batches[0]).backward()


def two_forwards(net, batches):
    net.zero_grad()
    if net_of(net).checkpointed:  # until its backward no other step may move the state
        return one_backward(net, batches)
    (net(*batches[0]) + net(*batches[1])).backward()


def accumulated(net, batches):
    net.zero_grad()
    with net.no_sync() if hasattr(net, "no_sync") else contextlib.nullcontext():
        net(*batches[0]).backward()
    net(*batches[1]).backward()


def net_of(net):
    return getattr(net, "module", net)


CHECKS = (
    gradients_are_those_of_one_process,
    other_batches,
    ranks_share_the_search,
    steps_of_triton,
    errors_reach_all_ranks,
    the_exchange_is_chosen_once_for_all_ranks,
    a_change_of_the_state_shows,
    groups_are_apart,
    trainers,
    autocast,
)


def all_checks(rank, initialise):
    initialise()
    for check in CHECKS:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check(rank)
        dist.barrier()


def test_four_ranks(tmp_path):
    run_ranks(all_checks, tmp_path / "store", world=len(SIZES))


@pytest.mark.parametrize("exchange", ["sums", "gather"])
def test_a_rank_alone_has_the_plain_loss(exchange, every_backend, monkeypatch):
    monkeypatch.setattr(process_groups, "resolve", lambda process_group: process_group)
    monkeypatch.setattr(DiscriminativeLoss, "_ranks", lambda *_: gathering.Ranks(None, exchange))
    device = device_of(every_backend)
    for n in (24, 3):
        case = random_case(n, 9, 5, device=device)
        plain, alone = (
            DiscriminativeLoss(5, 9, backend=every_backend, process_group=group, return_terms=True).to(device)
            for group in (None, "alone")
        )
        expected = steps(plain, case, slice(None))
        assert_close(steps(alone, case, slice(None)), expected, RELATIVE[torch.float32])


@pytest.mark.gpu
def test_sums_in_a_cuda_graph(tmp_path):
    dist.init_process_group("nccl", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    f, g, target, weight, bias, *_ = random_case(64, device="cuda")
    leaves = [t.requires_grad_() for t in (f, g, weight, bias)]
    loss = DiscriminativeLoss(7, 12, process_group=dist.group.WORLD, exchange="sums").cuda()

    def step():
        value = loss(f, g, target, SimpleNamespace(weight=weight, bias=bias))
        return (value.detach(), *torch.autograd.grad(value, leaves))

    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for seed in (1, 2):
            with torch.no_grad():
                for old, new in zip((f, g, target), random_case(64, seed=seed, device="cuda")[:3], strict=True):
                    old.copy_(new)
            state = copy.deepcopy(loss.state_dict())
            expected = step()
            loss.load_state_dict(state)
            graph.replay()
            torch.testing.assert_close(captured, expected)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"exchange": "ring"}, "exchange: expected one of auto, sums, gather, got 'ring'"),
        ({"max_batch": -1}, "max_batch: expected a number of samples or None, got -1"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        DiscriminativeLoss(7, 12, **options)
