"""The loss of a backend with Triton's search, as a table says where that is done sooner."""

import pytest
import torch
from conftest import USABLE, device_of, enter
from loss_cases import assert_matches_float64, random_case, run

from robustfast import searches
from robustfast.backends import ops
from robustfast.functional import loss_and_terms
from robustfast.gathering import ALONE
from robustfast.global_batch import GlobalLoss
from robustfast.reference import Settings
from robustfast.searches import Rates

GPU = torch.device("cuda")
BIG = torch.empty(100_000, 512, dtype=torch.bfloat16, device="meta")
OF_PLAIN_SEARCH = ("cuda", "emulated")


@pytest.fixture(params=[name for name in OF_PLAIN_SEARCH if name in USABLE and "triton" in USABLE])
def searched(request, monkeypatch):
    """A backend whose loss takes Triton's search at any size, and the calls of this search."""
    calls, search = [], ops("triton").margin_search
    monkeypatch.setattr(searches, "rates_of", lambda backend, *_: Rates(1e9, 0) if backend == request.param else None)
    monkeypatch.setattr(ops("triton"), "margin_search", lambda *given: calls.append(len(given[0])) or search(*given))
    return enter(request, request.param), calls


@pytest.mark.parametrize("n, dim, num_classes", [(30, 64, 10), (9, 128, 150), (70, 64, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_that_of_its_own_search(n, dim, num_classes, dtype, searched):
    backend, calls = searched
    case = random_case(n, dim, num_classes, dtype=dtype, device=device_of(backend))
    assert_matches_float64(case, backend, momentum=0.9, delta_dist=5.0)
    assert len(calls) == 1


def test_what_a_batch_may_lack(searched):
    backend, calls = searched
    f, g, target, weight, bias, *state = random_case(20, 64, 9, device=device_of(backend))
    target[target == 3] = 2
    target[::3] = -100
    f[::3] = torch.nan
    assert_matches_float64((f, None, target, weight, None, *state), backend, norm=1)
    assert_matches_float64((f, g, torch.full_like(target, -100), weight, bias, *state), backend)
    assert len(calls) == 1  # nothing to look for in the second
    nothing = run((f[:0], g[:0], target[:0], weight, bias, *state), backend)
    assert nothing["loss"] == 0 and not nothing["grad_weight"].any() and torch.equal(nothing["seen"], state[1])


def test_winners_are_those_of_its_own_search(searched):
    """The lowest of equal ones, none among equal rows."""
    backend, calls = searched
    f, g, target, weight, *_ = random_case(60, 64, 90, device=device_of(backend))
    weight[30:60], weight[60:] = weight[:30], weight[4]
    state = torch.zeros_like(weight), torch.zeros(90, dtype=torch.bool, device=f.device)
    call = (f, g, target, weight, None, *state, list(Settings()), None, 2, False, -100)
    of_samples = []
    for op in (ops(backend), GlobalLoss(ALONE, backend)):
        _, _, slot, _, _, classes, _ = op.discriminative_loss(*call)
        of_samples.append(classes[:, slot.long()])  # class and winner
    assert torch.equal(*of_samples) and torch.equal(of_samples[0][0], target.int()) and len(calls) == 1
    assert (of_samples[0][1] < 30).all() and (of_samples[0][1] >= 0).any()


def test_a_wrong_label_is_named(searched):
    backend, calls = searched
    if device_of(backend) == "cuda":
        pytest.skip("a device assertion would end the process's use of the GPU")
    f, g, target, *rest = random_case(20, 64, 9)
    target[5] = 9
    with pytest.raises(IndexError, match=r"label 9 at position 5 is outside 0\.\.8"):
        run((f, g, target, *rest), backend)
    assert not calls


@pytest.mark.parametrize("dynamic", [True, False])
def test_compiled_for_batches_of_any_size(dynamic, searched):
    backend, calls = searched

    def step(f, g, target, weight, bias, *state):
        settings = Settings()
        return loss_and_terms(f, g, target, weight, bias, *state, settings, 2, True, -100, backend)[0]

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for n in (20, 33):
        results = []
        for loss in (step, compiled):
            f, *rest, centroids, seen = random_case(n, 64, 9, device=device_of(backend))
            value = loss(f.requires_grad_(), *rest, centroids, seen)
            results.append((value.detach(), *torch.autograd.grad(value, f), centroids, seen))
        torch.testing.assert_close(*results)
    assert len(calls) == 4


@pytest.mark.parametrize("weight, wide, rows, expected", [
    (BIG, torch.float32, 4096, "triton"),
    (BIG, torch.float32, 50, "cuda"),  # too little to win
    (BIG, torch.float64, 4096, "cuda"),
    (BIG.float(), torch.float32, 4096, "cuda"),  # not in the table
    (BIG[:, :500], torch.float32, 4096, "cuda"),  # no whole tiles
])  # fmt: skip
def test_the_table(weight, wide, rows, expected, monkeypatch):
    table = {torch.bfloat16: Rates(own=2.5e-15, triton=1.7e-15)}
    monkeypatch.setattr(searches, "rates_of", lambda backend, dtype, _: table.get(dtype))
    assert searches.search_of("cuda", rows, weight, wide) == expected
    input = torch.empty(rows, weight.shape[1], dtype=wide, device="meta")
    assert searches.is_apart("cuda", input, weight) == (expected == "triton")
    assert searches.search_of("cuda", rows, weight, wide, least=1.0) == "cuda"


def test_the_table_is_looked_at_where_triton_can_run(monkeypatch):
    loaded, reason = [], {"triton": None}
    monkeypatch.setattr(searches, "why_not", reason.get)
    monkeypatch.setattr(searches, "ops", loaded.append)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert searches.rates_of("cuda", torch.bfloat16, GPU) is searches.RATES[9, torch.bfloat16]
    assert loaded == ["triton"]
    for backend, dtype in (("cuda", torch.float64), ("cpu", torch.bfloat16)):
        assert searches.rates_of(backend, dtype, GPU) is None
    reason["triton"] = "triton is not installed: pip install triton"
    assert searches.rates_of("cuda", torch.bfloat16, GPU) is None and loaded == ["triton"]
