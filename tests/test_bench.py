"""`robustfast bench`: its schedule and statistics on steps that take no time, and the command on tiny shapes."""

import io
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")

import typer
from rich.console import Console
from typer.testing import CliRunner

from robustfast import reference
from robustfast.bench import cases, command, measure, report, run

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def test_spread():
    assert measure.Spread.of([3.0]) == measure.Spread(3.0, 3.0, 3.0)
    assert measure.Spread.of([5.0, 1.0, 4.0, 2.0, 3.0, 6.0]) == measure.Spread(3.5, 2.0, 5.0)


def test_ratios_are_of_one_round():
    assert measure.ratios([4.0, 6.0, None, 8.0], [2.0, 2.0, 2.0, None]) == [2.0, 3.0]


@pytest.fixture
def clock(monkeypatch):
    """Steps that take as long as they say."""
    order = []

    class Takes:
        def __init__(self, name, seconds):
            self.name, self.seconds = name, seconds

        def __call__(self):
            order.append(self.name)

    def elapsed(step, device):
        step()
        return step.seconds

    monkeypatch.setattr(measure, "elapsed", elapsed)
    return Takes, order


def test_steps_take_turns_and_slow_ones_stop_early(clock):
    takes, order = clock
    steps = {
        "fast": takes("fast", 0.1),
        "other": takes("other", 0.2),
        "slow": takes("slow", 2.0),
        "loop": takes("loop", 99.0),
    }
    times, peaks = measure.interleave(steps, CPU, seconds=8.0)
    rounds = len(times["fast"])
    assert set(peaks) == set(steps)
    assert rounds == int(2.0 * 2 / 0.3)
    counted = {name: sum(value is not None for value in values) for name, values in times.items()}
    assert counted == {"fast": rounds, "other": rounds, "slow": 3, "loop": 1}
    of_rounds = [order[i : i + 2] for i in range(17, len(order) - 1, 2)]  # those that only two take part in
    assert {tuple(names) for names in of_rounds} == {("fast", "other"), ("other", "fast")}


def test_at_least_five_rounds_whatever_they_cost(clock):
    takes, _ = clock
    times, _ = measure.interleave({"a": takes("a", 50.0), "b": takes("b", 60.0)}, CPU, seconds=1.0)
    assert len(times["a"]) == 5 and [value is not None for value in times["b"]] == [True] + [False] * 4


def test_rotation_passes_the_cache():
    assert measure.copies_past_cache(measure.LAST_LEVEL_CACHE // 4) == 4
    assert measure.copies_past_cache(1) == 16
    seen = []
    step = measure.Rotation(seen.append, "abc")
    for _ in range(4):
        step()
    assert seen == ["b", "c", "a", "b"]


def test_rotation_passes_the_cache_that_is_there(tmp_path):
    told = tmp_path / "size"
    assert measure.last_level_cache(told) == 64 << 20
    told.write_text("491520K\n")
    assert measure.last_level_cache(told) == 480 << 20


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system tells no peak")
def test_peak_memory_sees_what_is_gone_again():
    total, peak = measure.peak_memory(lambda: torch.ones(16 << 20).sum(), CPU)
    assert total == 16 << 20 and 60 << 20 < peak < 96 << 20


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system tells no peak")
def test_peak_memory_sees_what_earlier_calls_left_to_it():
    def step():
        return [torch.ones(1 << 16) for _ in range(256)]

    step()
    assert 60 << 20 < measure.peak_memory(step, CPU)[1] < 96 << 20


def test_steps_run_where_the_system_tells_no_peak(monkeypatch):
    def refused(self, text):
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", refused)
    times, peaks = measure.interleave({"a": lambda: None}, CPU, seconds=0.01)
    assert peaks == {"a": None} and len(times["a"]) >= 5


def test_plan():
    planned = run.plan(["loss", "noise"], None, [torch.float32], CPU)
    assert planned[0] == ("loss", "paper", torch.float32) and ("noise", "features", torch.float32) in planned
    assert run.plan(["loss", "noise"], ["wide"], [torch.float32], CPU) == [("loss", "wide", torch.float32)]
    with pytest.raises(ValueError, match=r"shapes: expected some of .*paper.*, got 'huge'"):
        run.plan(["loss"], ["huge"], [torch.float32], CPU)


@pytest.fixture
def tiny(monkeypatch):
    """Every op on a shape of few numbers, and plain PyTorch uncompiled."""
    monkeypatch.setattr(cases, "LOSS", {"paper": (12, 6, 4)})
    margins = {name: (4, 6, 5) for name in ("imagenet", "imagenet-worst")} | {"imagenet-trained": (5, 6, 5)}
    monkeypatch.setattr(cases, "MARGIN", margins)
    monkeypatch.setattr(cases, "NOISE", {"paper": (2, 3, 4, 4), "features": (5, 6)})
    monkeypatch.setattr(cases, "TRAIN_STEP", {"head-1000": 7})
    ops = {"loss": ("paper",), "margin": tuple(margins), "noise": ("paper", "features"), "train-step": ("head-1000",)}
    monkeypatch.setattr(cases, "ON_CPU", ops)
    monkeypatch.setattr(cases, "compiled", lambda function, device: {"compiled": function})
    monkeypatch.setattr(run, "copy_rate", lambda device: 1e10)
    monkeypatch.setattr(run, "matrix_rate", lambda device, dtype: 1e11)
    monkeypatch.setattr(measure, "LAST_LEVEL_CACHE", 1)


def invoke(*arguments):
    app = typer.Typer()
    app.command()(command.bench)
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_command(tiny, tmp_path):
    done = invoke("--device", "cpu", "--seconds", 0.01, "--dtype", "float32,bfloat16", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    content = json.loads((tmp_path / "results.json").read_text())
    found = {(row["op"], row["shape"], row["dtype"]) for row in content["rows"]}
    assert len(found) == 14 and ("train-step", "head-1000", "bfloat16") in found
    assert {"date", "device", "torch", "commit", "threads"} <= set(content["environment"])
    loss = {row["implementation"]: row for row in content["rows"] if (row["op"], row["dtype"]) == ("loss", "float32")}
    assert {"loop", "eager", "compiled"} <= set(loss)
    names, peers = set(cases.usable(None, CPU)[0]), {"loop", "eager", "compiled"}
    assert set(loss) == peers | {cases.NULL} | names | {f"{name}, ops alone" for name in names}
    for name in names:
        assert loss[name]["speedup"]["over"] in peers
        assert loss[name]["bytes"] == 7 * 12 * 6 * 4 and loss[name]["of_ceiling"] > 0
        assert "speedup" not in loss[f"{name}, ops alone"]
    null = loss[cases.NULL]["seconds"]["median"]  # which a step cannot do without
    for name, row in loss.items():
        assert ("of_ceiling" in row) == (name != cases.NULL)
        if name in names | peers:
            assert row["floor_seconds"] > null
    for chart in ("times.png", "times.svg"):
        assert (tmp_path / chart).stat().st_size > 1000
    assert "…" not in done.output
    for reason in content["unusable"].values():
        assert reason and reason in done.output.replace("\n", " ")


def test_a_table_fits_a_narrow_terminal():
    """Names and comparisons are folded, and nothing is cut off."""
    row = {"op": "loss", "shape": "paper", "sizes": [64, 128, 10], "dtype": "float32", "implementation": cases.NULL,
           "seconds": {"median": 0.0000123, "p20": 0.0000101, "p80": 0.0000199}, "bytes": 123, "flops": 123,
           "of_ceiling": 1.23, "speedup": {"over": "compiled", "median": 23.45, "p20": 21.23, "p80": 29.87},
           "peak_bytes": 123456 << 20, "peer": False}  # fmt: skip
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(command._table([row]))
    shown = console.export_text()
    name, *numbers = report.cells(row)
    comparison = numbers.pop(report.HEADER.index("speedup") - 1)
    for whole in (*name.split(), *numbers, comparison.split()[0], "compiled"):
        assert whole in shown, shown


def test_interruption_keeps_what_was_measured(tiny, tmp_path, monkeypatch):
    noise = cases.BUILDERS["noise"]

    def interrupted(shape, *arguments):
        if shape == "features":
            raise KeyboardInterrupt
        return noise(shape, *arguments)

    monkeypatch.setitem(cases.BUILDERS, "noise", interrupted)
    done = invoke("loss", "noise", "--device", "cpu", "--seconds", 0.01, "--out", tmp_path)
    assert done.exit_code == 130 and "Interrupted after 2 of 3 tables" in done.output
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [key[:2] for key, _ in report.tables(rows)] == [("loss", "paper"), ("noise", "paper")]


@pytest.mark.parametrize("arguments", [("lost",), ("--dtype", "int8"), ("--backends", "gpu"), ("--shapes", "huge")])
def test_unknown_names(arguments, tiny, tmp_path):
    done = invoke(*arguments, "--out", tmp_path)
    assert isinstance(done.exception, ValueError) and "expected some of" in str(done.exception)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(("device", "said"), [("cuda", "no GPU is visible"), ("gpu", "expected auto, cpu or cuda")])
def test_device_that_is_not_there(device, said, tmp_path):
    done = invoke("--device", device, "--out", tmp_path)
    assert isinstance(done.exception, ValueError) and f"device: {said}" in str(done.exception)


def test_gate_fails_where_a_fifth_of_a_speedup_is_lost():
    gate = runpy.run_path(str(ROOT / "benchmarks" / "conftest.py"))
    now = {"cpu": 3.1, "cuda": 3.3, "new": 0.1}
    assert gate["dropped"](now, {"cpu": 4.0, "cuda": 4.0, "unusable": 9.0}) == {"cpu": (3.1, 4.0)}


def test_implementations_compute_the_same(tiny):
    """What is compared is the same loss, with the same gradients."""
    batch = cases.make_batch((30, 8, 5), torch.float64, CPU)
    fresh = lambda: (*batch[:5], batch[5].clone(), batch[6].clone())  # noqa: E731
    expected = cases.forward_backward(cases.loss_of("reference"), fresh())
    steps = [cases.forward_backward(cases.loop_loss, fresh())]
    for name in cases.usable(None, CPU)[0]:
        steps += [cases.module_step(cases.module_of(name, fresh())), cases.ops_alone(name, fresh())]
    for results in steps:
        for a, b in zip(results, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_margins_are_searched_alike(monkeypatch):
    monkeypatch.setattr(
        cases, "MARGIN", {f"sizes{kind}": (40, 24, 40) for kind in ("", "-trained", "-worst", "-groups")}
    )
    for shape in cases.MARGIN:
        case = cases.margin(shape, torch.float32, CPU, cases.usable(None, CPU)[0])
        for name in set(case.steps) - {*cases.PEERS, cases.PRODUCTS}:
            score, winner = case.steps[name]()
            best, expected = reference.margin_search(*case.steps[name].args)
            torch.testing.assert_close(score, best)
            assert torch.equal(winner, expected.int())


def test_trained_classifier_knows_its_classes():
    points, weight, bias = cases.trained_classifier(50, 32, CPU)
    assert torch.equal((points @ weight.T + bias).argmax(1), torch.arange(50))


def test_products_are_taken_in_blocks():
    mu, weight = torch.randn(3, 4), torch.randn(7, 4)
    products = cases.Products(mu, weight[:3], weight, most=9)
    products()
    torch.testing.assert_close(products.out[0], weight[:3] @ weight[3:6].T)
    torch.testing.assert_close(products.out[1], weight[:3] @ weight[6:].T)


def test_summary():
    """The README's tables: speed, and what the method adds to a training step."""

    def row(op, name, seconds, speedup=None):
        spread = {"median": seconds, "p20": seconds, "p80": seconds}
        made = {"op": op, "shape": "paper", "sizes": [4, 3, 2], "dtype": "float32", "implementation": name,
                "seconds": spread, "bytes": 10**6, "flops": 0, "of_ceiling": 0.5, "peak_bytes": None}  # fmt: skip
        return made | ({"speedup": {"over": speedup[0]} | dict.fromkeys(spread, speedup[1])} if speedup else {})

    rows = [row("noise", "eager", 0.02), row("noise", "compiled", 0.01), row("noise", "cpu", 0.002, ("compiled", 5.0))]
    rows += [row("train-step", cases.BOTH, 0.01), row("train-step", "cpu", 0.0125, (cases.BOTH, 0.8)),
             row("train-step", "reference", 0.012, (cases.BOTH, 0.9))]  # fmt: skip
    lines = report.summary({"rows": rows}, ["noise", "train-step"]).splitlines()
    assert lines[2] == "| noise paper (4x3x2, float32) | 20 | 10 | 2 | 5.00x (5.00-5.00) compiled | 50% |"
    assert lines[-1] == "| train-step paper (N=4 D=3 K=2, float32) | 10 | 12.5 | +25.0% (+25.0% to +25.0%) |"
    assert report.cells(rows[0])[4:6] == ("0.05", "")


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_measure_runs_a_wide_machine_twice(isa, tmp_path, monkeypatch):
    measuring = runpy.run_path(str(ROOT / "benchmarks" / "measure.py"))
    runs = []

    def run_command(command, env=None, **_):
        if "--out" in command:
            out = Path(command[command.index("--out") + 1])
            out.mkdir(parents=True)
            (out / "results.json").write_text(json.dumps(env.get("ROBUSTFAST_CPU_ISA")))
        runs.append("bench" if "bench" in command else Path(command[1]).name)

    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    monkeypatch.setitem(measuring["main"].__globals__, "ROOT", tmp_path)
    monkeypatch.setattr(measuring["_C"], "build_info", lambda: {"instruction_set": isa})
    monkeypatch.setattr(measuring["subprocess"], "run", run_command)
    monkeypatch.setattr(sys, "argv", ["measure.py"])
    monkeypatch.delenv("ROBUSTFAST_CPU_ISA", raising=False)
    measuring["main"]()
    written = {path.name: json.loads(path.read_text()) for path in (tmp_path / "benchmarks" / "results").iterdir()}
    held = {"bench_avx512_held_to_avx2.json": "avx2"} if isa == "avx512" else {}
    assert written == {f"bench_{isa}.json": None} | held and runs[-1] == "make_docs.py"


def test_pages_are_what_the_results_say(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["make_docs.py", "--check"])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(ROOT / "benchmarks" / "make_docs.py"), run_name="__main__")
    assert done.value.code == 0
