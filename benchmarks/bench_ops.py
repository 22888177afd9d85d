"""Every op against plain PyTorch: `make bench`. The tables are those of `robustfast bench`."""

import pytest
import torch
from conftest import DEVICE

from robustfast.bench import cases, run

TABLES = run.plan(cases.OPS, None, [torch.float32], DEVICE)


@pytest.mark.parametrize(("op", "shape", "dtype"), TABLES)
def test_op(op, shape, dtype, gate):
    gate(op, shape, dtype)
