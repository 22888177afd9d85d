"""benchmarks/roofline.py: bytes are those of the tensors that the ops take and give, flops those of products."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from robustfast import ops, searches

ROOT = Path(__file__).resolve().parents[1]
MODEL = runpy.run_path(str(ROOT / "benchmarks" / "roofline.py"))
SIZES = (8192, 2048, 1000)


@pytest.mark.parametrize("sizes", [SIZES, (64, 128, 10), (48, 33, 500)])
def test_bytes_are_those_of_the_tensors(sizes):
    n, dim, num_classes = sizes
    meta = {"dtype": torch.bfloat16, "device": "meta"}
    input, weight, bias = torch.empty(n, dim, **meta), torch.empty(num_classes, dim, **meta), None
    target = torch.empty(n, dtype=torch.int64, device="meta")
    _, _, slot, pull, tables, classes, boundary_bias = ops.discriminative_loss(input, input, target, weight, bias)
    grads = ops.gradients(input, num_classes, weight.dtype, weight.dtype, [True, True, True, False])
    sizes_of = MODEL["tensors"](*sizes)
    found = {
        "input": input, "input_noise": input, "target": target, "weight": weight, "slot": slot, "pull": pull,
        "classes": classes, "boundary_bias": boundary_bias, "centroid": tables[0], "mu_grad": tables[1],
        "boundary_grad": tables[2], "grad_input": grads[0], "grad_input_noise": grads[1], "grad_weight": grads[2],
    }  # fmt: skip
    assert {name: sizes_of[name] for name in found} == {name: tensor.nbytes for name, tensor in found.items()}


def test_flops_are_those_of_two_products():
    """mu and W_c, each by W."""
    n, dim, num_classes = 48, 64, 30
    mu, weight = torch.empty(30, dim, device="meta"), torch.empty(num_classes, dim, device="meta")
    with FlopCounterMode(display=False) as counter:
        for left in (mu, weight):
            left @ weight.T
    search = next(kernel for kernel in MODEL["loss"](n, dim, num_classes) if kernel.name == "margin_search")
    assert search.flops == counter.get_total_flops()
    step = 2 * 2 * 64 * 128 * 32  # of a tile
    assert step / MODEL["SEARCH_SHARED_CYCLES"] < 4096  # flops a cycle that an H100's matrix units make: they wait


def test_the_slowest_part_is_the_prediction():
    card = MODEL["Card"](10, 1e9, 1e12, 1e14, 100)
    kernel = MODEL["Kernel"](
        "any", ("a",), ("b",), ("a", "c"), flops=10**9, instructions=10**6, tiles=11, tile_cycles=500
    )
    times = MODEL["microseconds"](kernel, {"a": 50, "b": 1000, "c": 1000}, card)
    assert times == pytest.approx({
        "memory": 2050e-6,  # c does not fit in the L2
        "L2": 50 / 350e9 * 1e6,
        "matrix units": 10.0,
        "instructions": 1e6 / 1280e9 * 1e6,
        "shared memory": 1.0,  # eleven tiles are two rounds
    })  # fmt: skip


def test_the_table_of_searches_is_the_prediction():
    """Until there is a measurement."""
    predicted = MODEL["search_rates"](512, MODEL["CARDS"]["H100"])
    for dtype, own in ((torch.bfloat16, "cuda"), (torch.float16, "cuda, float16")):
        assert searches.RATES[9, dtype] == pytest.approx((predicted[own], predicted["triton"]), rel=0.02)


def test_the_page_shows_what_the_script_prints():
    page = (ROOT / "docs" / "performance.md").read_text()
    command = [sys.executable, "benchmarks/roofline.py", "--card", "H100"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed in page
    for card in MODEL["CARDS"]:
        assert MODEL["table"](card, SIZES, (512, 3, 224, 224)).count("\n") == 10
