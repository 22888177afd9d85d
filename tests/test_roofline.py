"""benchmarks/roofline.py: bytes are those of the tensors that the ops take and give, flops those of products."""

import re
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
    for search in MODEL["searches"](n, dim, num_classes):
        assert search.flops in (0, counter.get_total_flops())  # settling needs no products
    for step in (MODEL["CUDA_STEP"], MODEL["TRITON_STEP"]):
        flops = 2 * 2 * step.rows * step.classes * step.depth
        assert flops / step.shared < 4096  # a cycle, which an H100's matrix units make: they wait


def test_the_slowest_part_is_the_prediction():
    card = MODEL["Card"](10, 1e9, 1e12, 1e14, 100)
    step = MODEL["Step"](4, 8, 16, 4, shared=100, instructions=60, beside=300)
    kernel = MODEL["Kernel"]("any", ("a",), ("b",), ("a", "c"), flops=10**9, instructions=10**6, tiles=11, tile=step)
    sizes = {"a": 50, "b": 1000, "c": 1000, "dim": 20}
    times = MODEL["microseconds"](kernel, sizes, card)
    assert times == pytest.approx({
        "memory": 2050 / 350e9 * 1e6,  # c does not fit in the L2, through which all of it comes
        "L2": 50 / 350e9 * 1e6,
        "matrix units": 10.0,
        "instructions": 1e6 / 1280e9 * 1e6,
        "shared memory": 2 * (2 * 100 + 300) * 1e-3,  # eleven tiles are two rounds, of two steps each
        "tiles' instructions": 2 * (2 * 60 + 300) * 1e-3,
        "tiles' L2": 2 * (2 * 2 * 16 * 16 / 35 + 300) * 1e-3,
    })  # fmt: skip
    alone = MODEL["microseconds"](kernel._replace(blocks=1), sizes, card)
    assert alone["instructions"] == pytest.approx(10 * times["instructions"])
    assert alone["memory"] == pytest.approx(2050 / 35e9 * 1e6)


def test_every_kernel_is_in_the_model():
    sources = "".join(path.read_text() for path in (ROOT / "csrc/cuda").glob("*.cu"))
    found = set(re.findall(r"__global__ void\s+__launch_bounds__\(.*?\)\s*(\w+_kernel)\(", sources, re.DOTALL))
    assert len(found) > 20
    for path in (ROOT / "robustfast/triton_ops").glob("*.py"):
        jitted = re.findall(r"^@triton\.jit.*\n(?:@.*\n)*def (\w+_kernel)\(", path.read_text(), re.MULTILINE)
        found |= {f"triton {name}" for name in jitted}
    shapes = [(MODEL[name], SIZES) for name in ("cuda", "small", "steps", "triton", "triton_small", "triton_steps")]
    shapes += [(MODEL[name], (20000, 64, 300)) for name in ("cuda", "triton")]
    modelled = [kernel for kernels, sizes in shapes for kernel in kernels(*sizes)] + MODEL["noise"](10)
    assert set().union(*(kernel.functions for kernel in modelled)) == found


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
        shown = MODEL["tables"](card, MODEL["Shapes"]())
        assert shown.count("| measured, µs |") == 9 and "nan" not in shown
