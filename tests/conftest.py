"""What tests of several backends share: every floor that can run here, and how slow it is."""

import os
import shutil
from typing import NamedTuple

# Threads that wait do not keep the processor from those of the tests beside them; read when PyTorch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is decorated: Triton's run on the CPU then

from cuda_emulation.build import build
from loss_cases import random_case

from robustfast import backends
from robustfast.backends import LIBRARIES, home
from robustfast.ops import define

USABLE = [name for name, reason in backends().items() if reason is None]
if backends()["cpu"] is None and shutil.which("g++"):
    USABLE.append("emulated")  # the CUDA backend's own kernels, compiled by g++
# Backends whose kernels take milliseconds for a small batch: their tests take fewer examples.
SLOW = {"emulated", *(name for name in ("triton",) if home(name) == "cpu")}


@pytest.fixture(scope="session")
def emulated():
    """The emulated CUDA backend, under the name "emulated" while tests run."""
    torch.ops.load_library(build())
    define("robustfast_emulated")
    LIBRARIES["emulated"] = "robustfast_emulated"
    yield
    del LIBRARIES["emulated"]


@pytest.fixture(autouse=True, scope="session")
def patch_language_once():
    """The interpreter patches triton.language again at each call of a device function, which takes half of its time."""
    if "triton" not in SLOW & set(USABLE):
        yield
        return
    from triton.runtime import interpreter

    def call(function, *args, **kwargs):
        language = id(function.fn.__globals__)
        if language not in patched:
            interpreter._patch_lang(function.fn)
            patched.add(language)
        return function.rewrite()(*args, **kwargs)

    patched: set[int] = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        yield


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def pytest_runtest_setup():
    torch.manual_seed(0)  # a test has the same numbers in every run


def enter(request, name):
    """The backend of that name, ready to run."""
    if name == "emulated":
        request.getfixturevalue("emulated")
    return name


@pytest.fixture(params=[name for name in USABLE if name not in SLOW])
def backend(request):
    """Every backend that is quick here; tests of what all of them promise take ``every_backend`` in its place."""
    return request.param


@pytest.fixture(params=USABLE)
def every_backend(request):
    """Every backend that can run here, emulated and interpreted ones too."""
    return enter(request, request.param)


@pytest.fixture(params=[name for name in USABLE if name != "reference"])
def kernels(request):
    """Every backend that can run here but the reference."""
    return enter(request, request.param)


@pytest.fixture
def device(backend):
    return device_of(backend)


def device_of(backend):
    on_gpu = home(backend) == "cuda" or (backend == "reference" and torch.cuda.is_available())
    return "cuda" if on_gpu else "cpu"


class Way(NamedTuple):
    """A size of batch that goes one of the ways that a backend has: small problems, large ones, tables of fewer rows
    than classes."""

    backend: str
    n: int
    num_classes: int
    launches: str = "as they are"

    @property
    def device(self):
        return device_of(self.backend)

    def case(self, dim=24, **options):
        """Inputs of this size (see loss_cases.random_case), but where the options have another."""
        options = {"n": self.n, "classes": options.pop("num_classes", self.num_classes)} | options
        return random_case(dim=dim, device=self.device, **options)


def ways(backend):
    if backend == "triton" and backend in SLOW:  # large problems would be too slow to interpret
        return [Way(backend, 24, 10), Way(backend, 24, 10, "many")]
    large = {"reference": (60, 90), "emulated": (100, 140)}.get(backend, (600, 140))
    return [Way(backend, 40, 12), Way(backend, *large)]


@pytest.fixture(params=[way for name in USABLE for way in ways(name)], ids=lambda way: "-".join(map(str, way[:3])))
def way(request, monkeypatch):
    """Every way through every backend."""
    enter(request, request.param.backend)
    if request.param.launches == "many":
        from robustfast.triton_ops import loss

        monkeypatch.setattr(loss, "is_small", lambda *_: False)
    return request.param


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


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """``folder:DIR`` with two classes of training and test images of several sizes and formats, darker and lighter."""
    from PIL import Image

    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for part, count in (("train", 24), ("test", 6)):
        for label, name in enumerate(("dark", "light")):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 120, (20 + i % 7, 30 - i % 5, 3)) + 110 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / part / name / f"{i}.{('png', 'jpg')[i % 2]}")
    return f"folder:{folder}"


@pytest.fixture(scope="module")
def one_thread():
    """Small tensors gain nothing from threads, and tests that run side by side lose by them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
