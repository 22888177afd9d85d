"""The model of the collectives' cost, and the page made of it."""

import runpy
import sys
from pathlib import Path

import pytest

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


def test_page_is_what_the_results_say(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--check"])
    runpy.run_path(SCRIPT, run_name="__main__")
