"""Inputs of the loss for its tests, and its results as one dictionary."""

import json
from pathlib import Path

import numpy as np
import torch

from robustfast import functional
from robustfast.backends import home, ops

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


def search_cases(rows, dim, classes):
    """(name, mu, weight, bias) of float32, hard for a search by bounds; the rows of mu are of the first classes."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    mu, weight, bias, row = normal(rows, dim), normal(classes, dim), normal(classes), normal(dim)
    sign = torch.where(torch.arange(classes) % 3 == 0, -1.0, 1.0).unsqueeze(1)
    column = torch.zeros(dim).index_fill(0, torch.tensor([dim // 2]), 1000.0)
    sizes = torch.tensor([1e-39, 1e-21, 1.0, 3e19])[torch.arange(classes) % 4].unsqueeze(1)
    yield "random", mu, weight, bias
    yield "entries far from all others", mu + column, weight + sign * column, bias
    yield "rows near one row", mu, 10 * row + 1e-2 * weight, bias
    yield "rows all but one row", mu, row + 1e-6 * weight, bias
    yield "rows near two", mu, sign * row + 1e-3 * weight, torch.zeros(classes)
    yield "rows near five, some twins", mu, normal(5, dim)[torch.arange(classes) % 5] + 1e-3 * weight.round(), bias
    yield "sizes", mu, sizes * weight, bias
    yield "zeros", mu * (mu[:, :1] > 0), weight * (weight[:, :1] > 0), torch.zeros(classes)
    yield "ties", mu.sign(), weight.round().clamp(-1, 1), torch.zeros(classes)
    yield "not finite", *(t.masked_fill(t > 3, torch.inf).masked_fill(t < -3, torch.nan) for t in (mu, weight, bias))


def assert_search_looks_at_every_pair():
    """The margin's search on the CPU against itself row by row, where so few pairs are compared one by one."""
    search = ops("cpu").margin_search
    for rows, dim, classes in ((30, 1, 200), (17, 70, 1000), (5, 8191, 300)):
        for name, mu, weight, bias in search_cases(rows, dim, classes):
            for dtype in (torch.float32, torch.float64, torch.bfloat16):
                w, b = weight.to(dtype), bias.to(dtype)
                points = mu.double() if dtype == torch.float64 else mu
                actual = search(points, w[:rows], b[:rows], w, b)
                single = [search(*(t[r : r + 1] for t in (points, w, b)), w, b) for r in range(rows)]
                for a, e in zip(actual, map(torch.cat, zip(*single, strict=True)), strict=True):
                    torch.testing.assert_close(a, e, rtol=0, atol=0, equal_nan=True, msg=f"{name}, {dtype}, D={dim}")
