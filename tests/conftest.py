"""What tests of several backends share."""

import os

import numpy as np
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


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Settings of a run of a second on 66 colour images of three classes."""
    from robustfast.training import Config

    rng = np.random.default_rng(0)
    labels = np.arange(90) % 3
    images = (rng.integers(0, 60, (90, 8, 8, 3)) + 90 * labels[:, None, None, None]).astype(np.uint8)
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(path, x_train=images[:66], y_train=labels[:66], x_test=images[66:], y_test=labels[66:])
    return Config(
        data=f"npz:{path}", epochs=4, batch_size=8, inter_dim=8, milestones=(2,), crop=1, flip=True, test_sigmas=(0.3,)
    )


@pytest.fixture(scope="module")
def one_thread():
    """Small tensors gain nothing from threads, and tests that run side by side lose by them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
