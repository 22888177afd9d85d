"""Which exchange is expected to take less time, and when ranks share a search."""

import pytest
import torch

from robustfast.costs import COSTS, Costs, Step

IMAGENET_1K, IMAGENET_21K, MILLION = (1000, 2048), (21_841, 768), (1_000_000, 512)


def of(device, shape, ranks, batch, element=2):
    return Step(ranks, ranks * batch, *shape, element, 4, COSTS[device])


def choice(step):
    return "sums" if step.sums() <= step.gather() else "gather"


@pytest.mark.parametrize(
    ("shape", "ranks", "batch", "exchange", "shares"),
    [
        (IMAGENET_1K, 8, 128, "gather", False),
        (IMAGENET_1K, 32, 128, "sums", False),
        (IMAGENET_1K, 64, 128, "sums", False),
        (IMAGENET_21K, 8, 128, "gather", True),
        (IMAGENET_21K, 64, 512, "gather", True),  # bytes alone say so too
        (IMAGENET_21K, 1024, 128, "sums", True),
        (MILLION, 8, 128, "gather", True),
        (MILLION, 1024, 128, "gather", True),
    ],
)
def test_choices_of_gpus(shape, ranks, batch, exchange, shares):
    step = of("cuda", shape, ranks, batch)
    assert choice(step) == exchange and step.gather_shares() is shares


def test_seconds_are_those_of_the_page():
    costs = Costs(collective=1000, sent=1, gathered=10, table=100, searched=0.5)
    step = Step(ranks=4, n=10, num_classes=6, dim=3, element=2, wide=4, costs=costs)
    table, search = 6 * 3 * 4, 4 * 6 * 6 * 3 * 0.5
    assert step.sums() == 2 * 1000 + table * (4 * 0.75 + 100) + search  # a shared search would cost a collective
    assert step.gather() == 2 * 1000 + 2 * 10 * 3 * 2 * (0.75 + 10) + search
    assert not step.search_is_shared() and not step.gather_shares()

    shared = step._replace(costs=costs._replace(searched=50))
    assert shared.search_is_shared() and shared.gather_shares()
    assert shared.sums() == 2 * 1000 + table * (4 * 0.75 + 100) + 1000 + 25 * search
    assert shared.gather() == 2 * 1000 + 2 * 10 * 3 * 2 * (0.75 + 10) + 1000 + 25 * search + 100 * table
    between = step._replace(costs=costs._replace(searched=10))  # worth a collective, but not the steps
    assert between.search_is_shared() and not between.gather_shares()


@pytest.mark.parametrize("device", COSTS)
@pytest.mark.parametrize("shape", [IMAGENET_1K, IMAGENET_21K, MILLION])
def test_there_is_one_border(device, shape):
    """More samples for the same classes never lead back from sums to gather."""
    choices = [choice(of(device, shape, 16, 2**k)) for k in range(22)]
    assert choices == sorted(choices) and set(choices) == {"gather", "sums"}


def test_sizes_are_those_of_the_tensors():
    step = Step.of(torch.empty(5, 12, dtype=torch.bfloat16), 20, 7, 4)
    assert step == (4, 20, 7, 12, 2, 4, COSTS["cpu"])
    assert Step.of(torch.empty(5, 12, dtype=torch.float64), 20, 7, 4)[4:6] == (8, 8)
    assert Step.of(torch.empty(5, 12, device="meta"), 20, 7, 4).costs == COSTS["cuda"]
