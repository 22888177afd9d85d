"""The model of the collectives' cost, and the page made of it."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from loss_cases import random_case

from robustfast import DiscriminativeLoss, collectives, costs, process_groups

SCRIPT = str(Path(__file__).resolve().parents[1] / "benchmarks" / "scaling.py")


@pytest.fixture(scope="module")
def scaling():
    return runpy.run_path(SCRIPT)


def test_fit_finds_what_times_were_made_of(scaling):
    alpha, beta = 2e-5, 3e-10
    rows = [
        {"world": world, "collective": kind, "bytes": size}
        for world in (2, 4)
        for kind in ("all_reduce", "all_gather")
        for size in (1 << 10, 1 << 20, 1 << 24)
    ]
    for row in rows:
        hops, sent = scaling["terms"](row)
        row["seconds"] = alpha * hops + beta * sent
    assert scaling["terms"]({"world": 4, "collective": "all_reduce", "bytes": 400}) == (6, 600)
    assert scaling["fit"](rows) == pytest.approx((alpha, beta))


@pytest.mark.parametrize("exchange", ["sums", "gather"])
def test_bytes_are_those_of_a_step(scaling, exchange, monkeypatch):
    """Collectives of two ranks that have the same batch, counted."""
    n, dim, num_classes, world, sent = 48, 12, 8, 2, []

    def all_gather(mine, group):
        sent.append(("all_gather", world * mine.nbytes))
        return torch.cat([mine] * world)

    def all_reduce(tensor, op, group):
        if group is not None:
            sent.append(("all_reduce", tensor.nbytes))
        return tensor.mul_(world) if group and op == "SUM" else tensor

    monkeypatch.setattr(collectives, "all_gather", all_gather)
    monkeypatch.setattr(collectives, "all_reduce", all_reduce)
    monkeypatch.setattr(collectives, "size", lambda group: 1 if group is None else world)
    monkeypatch.setattr(collectives, "rank", lambda group: 0)
    monkeypatch.setitem(costs.COSTS, "cpu", costs.Costs(0, 0, 0, 0, searched=1))  # a search that the ranks share
    f, g, target, *_ = random_case(n, dtype=torch.bfloat16)
    monkeypatch.setattr(process_groups, "training_group", lambda module: "both")
    loss = DiscriminativeLoss(num_classes, dim, exchange=exchange, max_batch=n)
    fc = torch.nn.Linear(dim, num_classes)
    loss(f, g, target, fc).backward()
    problem = scaling["Problem"]("", num_classes, dim, n)
    assert sent == scaling["EXCHANGES"][exchange](problem, world)


def test_page_is_what_the_results_say(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--check"])
    runpy.run_path(SCRIPT, run_name="__main__")
