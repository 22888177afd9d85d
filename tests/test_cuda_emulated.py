"""The CUDA backend's own kernels, launchers and bindings, compiled by g++ and run on the CPU: see cuda_emulation/.

What this cannot show is what PTX wrappers do on the device (their counterparts are written after NVIDIA's description),
races that a fixed order of threads hides, and speed.
"""

import os

import pytest
import torch
from loss_cases import assert_matches_float64, random_case, run

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
HALF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


pytestmark = pytest.mark.usefixtures("emulated")


# One block takes the first three; the others cross every tile of the margin, of packs and of teams.
@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("dtype", [*TOLERANCE, *HALF])
@pytest.mark.parametrize(
    "n, dim, classes",
    [(1, 1, 2), (33, 17, 6), (64, 128, 10), (600, 41, 13), (600, 40, 150), (90, 24, 520), (70, 2200, 3)],
)
def test_sizes(n, dim, classes, dtype, norm):
    assert_matches_float64(random_case(n, dim, classes, dtype=dtype), "emulated", norm=norm, momentum=0.9)


@pytest.mark.parametrize("classes", [300, 40])
def test_sort_of_more_than_a_tile(classes):
    assert_matches_float64(random_case(9000, 4, classes, dtype=torch.float64), "emulated")


def test_sort_in_three_passes():
    f, g, target, *rest = random_case(30, 4, 66000)
    target[:2] = torch.tensor([0, 65999])
    assert_matches_float64((f, g, target, *rest), "emulated")


@pytest.mark.parametrize("argument", [0, 2, 3, 4])
def test_an_unknown_dtype_is_an_error(argument):
    tensors = list(random_case(40, 8, 5))
    tensors[argument] = tensors[argument].to(torch.int32 if argument != 2 else torch.float32)
    loss = torch.ops.robustfast_emulated.discriminative_loss
    with pytest.raises(ValueError, match="dtype that it does not take"):
        loss(*tensors, [0.5, 3.0, 1.0, 1.0, 0.001, 0.99], None, 2, False, -100)


@pytest.mark.parametrize("n", [40, 700])
def test_order_of_threads_and_blocks_changes_no_bit(n, monkeypatch):
    tensors = random_case(n, 40, 12)
    forward = run(tensors, "emulated")
    monkeypatch.setitem(os.environ, "ROBUSTFAST_EMULATION_ORDER", "reverse")
    backward = run(tensors, "emulated")
    assert all(torch.equal(value, backward[name]) for name, value in forward.items())
