"""Every op against plain PyTorch: `make bench`. The tables are those of `robustfast bench`."""

import pytest
from conftest import DEVICE

from robustfast.bench import cases

TABLES = [(op, shape) for op in cases.OPS for shape in (cases.ON_CPU if DEVICE.type == "cpu" else cases.SHAPES)[op]]


@pytest.mark.parametrize(("op", "shape"), TABLES)
def test_op(op, shape, gate):
    gate(op, shape)
