"""What tests of several backends share."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is decorated: Triton's run on the CPU then

from robustfast import backends
from robustfast.backends import home

# Interpreted kernels are too slow for these tests: test_triton.py has its own.
USABLE = [name for name, reason in backends().items() if reason is None and (name, home(name)) != ("triton", "cpu")]


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def pytest_runtest_setup():
    torch.manual_seed(0)  # a test has the same numbers in every run


@pytest.fixture(params=USABLE)
def backend(request):
    """Every backend that can run here."""
    return request.param


@pytest.fixture
def device(backend):
    on_gpu = home(backend) == "cuda" or (backend == "reference" and torch.cuda.is_available())
    return "cuda" if on_gpu else "cpu"
