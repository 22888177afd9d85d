"""Inputs of the loss for its tests, and its results as one dictionary."""

import json
from pathlib import Path

import numpy as np
import torch

from robustfast import functional
from robustfast.backends import home

DATA = Path(__file__).parent / "data"
GOLDEN = sorted(path.stem for path in DATA.glob("*.npz"))


def golden_steps(case, dtype, device="cpu"):
    """Yield (tensors, keywords, expected) of each step of a golden case; the state starts empty and is carried on."""
    archive = np.load(DATA / f"{case}.npz")
    keywords = json.loads(str(archive["params"]))
    steps, classes, dim = (keywords.pop(name) for name in ("steps", "num_classes", "dim"))
    state = torch.zeros(classes, dim, dtype=dtype, device=device), torch.zeros(classes, dtype=torch.bool, device=device)
    for step in range(steps):
        prefix = f"s{step}_"
        expected = {
            key.removeprefix(prefix): torch.from_numpy(archive[key]) for key in archive if key.startswith(prefix)
        }
        cast = [
            torch.from_numpy(archive[key]).to(device, dtype)
            for key in (f"s{step}_input", f"s{step}_input_noise", "weight", "bias")
        ]
        del expected["input"], expected["input_noise"]
        f, g, weight, bias = cast
        yield (f, g, expected.pop("target").to(device), weight, bias, *state), keywords, expected


def random_case(
    n=50, dim=12, classes=7, *, dtype=torch.float32, weight_dtype=None, bias_dtype=None, seed=0, seen=0.5, device="cpu"
):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight_dtype = weight_dtype or dtype
    f = normal(n, dim)
    tensors = (
        f.to(dtype),
        (f + 0.3 * normal(n, dim)).to(dtype),
        torch.randint(classes, (n,), generator=generator),
        normal(classes, dim).to(weight_dtype),
        normal(classes).to(bias_dtype or weight_dtype),
        normal(classes, dim).to(wide),
        torch.rand(classes, generator=generator) < seen,
    )
    return tuple(tensor.to(device) for tensor in tensors)


def in_float64(tensors):
    """The same values in float64: what the exact result is computed from."""
    return [t.double() if t is not None and t.is_floating_point() else t for t in tensors]


def run(tensors, backend, **keywords):
    """Loss, terms, gradients and the state after one step; the tensors given are left as they were."""
    f, g, target, weight, bias, centroids, seen = tensors
    leaves = [None if t is None else t.detach().requires_grad_() for t in (f, g, weight, bias)]
    centroids, seen = centroids.clone(), seen.clone()
    terms = functional.discriminative_loss(
        leaves[0], leaves[1], target, leaves[2], leaves[3], centroids, seen, backend=backend, **keywords
    )
    terms.loss.backward()
    names = ("grad_input", "grad_input_noise", "grad_weight", "grad_bias")
    grads = {name: leaf.grad for name, leaf in zip(names, leaves, strict=True) if leaf is not None}
    return {**{k: v.detach() for k, v in terms._asdict().items()}, **grads, "centroids": centroids, "seen": seen}


def assert_close(actual, expected, relative, absolute=1e-300):
    """Within ``relative`` of the largest entry, for every quantity that is expected."""
    for name, value in expected.items():
        value = value.to(actual[name].device)
        if value.dtype == torch.bool:
            assert torch.equal(actual[name], value), name
            continue
        error = (actual[name].double() - value.double()).abs().max() if value.numel() else torch.tensor(0.0)
        scale = value.double().abs().max() if value.numel() else torch.tensor(0.0)
        assert error <= relative * scale + absolute, f"{name}: {float(error)} of {float(scale)}"


RELATIVE = {torch.float64: 1e-10, torch.float32: 1e-5}  # of the largest entry, by the dtype of statistics


def rounding(dtype, backend):
    """What rounding to a half type may change of a number; Triton's interpreter cuts bits off instead."""
    if dtype not in (torch.bfloat16, torch.float16):
        return 0.0
    cuts = backend == "triton" and home("triton") == "cpu"
    return torch.finfo(dtype).eps / (1 if cuts else 2)


def assert_matches_float64(tensors, backend, **keywords):
    """Values, gradients and state as the reference has them in float64, but for RELATIVE and the results' dtypes."""
    actual, expected = run(tensors, backend, **keywords), run(in_float64(tensors), "reference", **keywords)
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    for name, value in expected.items():
        narrow = torch.finfo(torch.float32).eps if actual[name].dtype == torch.float32 else 0.0
        relative = RELATIVE[wide] + max(narrow, rounding(actual[name].dtype, backend))
        assert_close(actual, {name: value}, relative, 1e-12)
