"""What the loss's collectives cost: measured and fitted here, predicted for clusters; the tables of docs/scaling.md.

    python benchmarks/scaling.py measure     # writes benchmarks/results/collectives_gloo.json, about a minute
    python benchmarks/scaling.py exchanges   # writes benchmarks/results/exchanges_gloo.json, about half a minute
    python benchmarks/scaling.py             # writes the tables between the marks in docs/scaling.md; --check: compare

On a ring of w ranks an all_gather goes round in w - 1 hops, in which a rank sends (w - 1)/w of the buffer, an
all_reduce twice. It takes alpha * hops + beta * bytes; both are fitted to the relative errors of the measured medians,
since sizes span four orders.
"""

import argparse
import math
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.distributed as dist

from robustfast import DiscriminativeLoss, disk
from robustfast.bench.measure import environment
from robustfast.costs import COSTS, Step

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "collectives_gloo.json"
EXCHANGE_RESULTS = ROOT / "benchmarks" / "results" / "exchanges_gloo.json"
PAGE = ROOT / "docs" / "scaling.md"
MARKS = re.compile(r"(<!-- scaling: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
SIZES = tuple(4**k << 10 for k in range(8))  # bytes of the buffer that every rank ends with: 1 KiB to 16 MiB
WORLDS = (2, 4)
SHAPES = (  # classes, features, samples of a rank: below and above the border, which is at 3 samples a class
    (200, 512, 128),
    (200, 512, 1024),
    (1000, 128, 256),
    (1000, 128, 4096),
    (1000, 512, 256),
    (1000, 512, 1024),
    (1000, 512, 2048),
    (1000, 512, 4096),
    (10_000, 64, 512),
    (10_000, 64, 32_768),
)
ROUNDS = 9


# Measurement.


def all_reduce(buffer: torch.Tensor) -> Callable[[], object]:
    return lambda: dist.all_reduce(buffer)


def all_gather(buffer: torch.Tensor) -> Callable[[], object]:
    parts = list(buffer.chunk(dist.get_world_size()))
    mine = parts[dist.get_rank()].clone()
    return lambda: dist.all_gather(parts, mine)


KINDS = {"all_reduce": all_reduce, "all_gather": all_gather}


def measure_rank(rank: int, world: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world)
    rows = []
    for kind, collective in KINDS.items():
        for size in SIZES:
            step = collective(torch.zeros(size // 4))
            times = [timed(step) for _ in range(5 if size > 1 << 20 else 50)]
            rows.append({"world": world, "collective": kind, "bytes": size, "seconds": median(times)})
    if rank == 0:
        disk.write_json(Path(out), {"rows": rows})
    dist.barrier()
    dist.destroy_process_group()


def timed(step: Callable[[], object]) -> float:
    """Seconds until the last rank has done it."""
    dist.barrier()
    start = time.perf_counter()
    step()
    took = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(took, dist.ReduceOp.MAX)
    return took.item()


def exchanges_rank(rank: int, world: int, store: str, out: str) -> None:
    """Forward by sums and by gathering in turn, and what auto takes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world)
    rows = []
    for num_classes, dim, batch in SHAPES:
        losses = {name: of_all_ranks(num_classes, dim, name) for name in ("sums", "gather", "auto")}
        f, g = torch.randn(2, batch, dim)
        target = torch.randint(num_classes, (batch,))
        fc = torch.nn.Linear(dim, num_classes)
        times: dict[str, list[float]] = {"sums": [], "gather": []}
        losses["auto"](f, g, target, fc)
        for _ in range(ROUNDS):
            for name, seconds in times.items():
                seconds.append(timed(lambda: losses[name](f, g, target, fc)))  # noqa: B023
        row = {"world": world, "num_classes": num_classes, "dim": dim, "batch": batch, "auto": losses["auto"]._auto}
        rows.append(row | {name: median(seconds[2:]) for name, seconds in times.items()})
    if rank == 0:
        disk.write_json(Path(out), {"rows": rows})
    dist.barrier()
    dist.destroy_process_group()


def of_all_ranks(num_classes: int, dim: int, exchange: str) -> DiscriminativeLoss:
    return DiscriminativeLoss(num_classes, dim, process_group="world", exchange=exchange)


def measure(rank_main: Callable[[int, int, str, str], None], worlds: tuple[int, ...]) -> dict:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for world in worlds:
            store, out = f"{folder}/store{world}", f"{folder}/{world}.json"
            torch.multiprocessing.spawn(rank_main, (world, store, out), nprocs=world)
            rows += disk.read_json(Path(out))["rows"]
    return {"environment": environment(torch.device("cpu")) | {"threads": 1}, "backend": "gloo", "rows": rows}


# Model.


def rounds(collective: str) -> int:
    return 2 if collective == "all_reduce" else 1


def terms(row: dict) -> tuple[float, float]:
    """Hops, and bytes that a rank sends, of a ring."""
    hops = rounds(row["collective"]) * (row["world"] - 1)
    return hops, hops / row["world"] * row["bytes"]


def fit(rows: list[dict]) -> tuple[float, float]:
    """Alpha in seconds a hop and beta in seconds a byte, by least squares of the relative error."""
    weighted = np.array([terms(row) for row in rows]) / np.array([[row["seconds"]] for row in rows])
    alpha, beta = np.linalg.lstsq(weighted, np.ones(len(rows)), rcond=None)[0]
    return float(alpha), float(beta)


@dataclass(frozen=True)
class Problem:
    name: str
    num_classes: int
    dim: int
    batch: int  # samples of a rank


PROBLEMS = (
    Problem("ImageNet-1k, ResNet-50", 1000, 2048, 128),
    Problem("ImageNet-21k, ViT-B", 21_841, 768, 128),
    Problem("1M classes", 1_000_000, 512, 128),
    Problem("10M classes", 10_000_000, 512, 128),
)
HALF, WIDE, LONG = 2, 4, 8  # bytes of a bfloat16 feature, a float32 of the tables, a label

Collectives = list[tuple[str, float]]  # which, and bytes of the buffer that every rank ends with


def sums(p: Problem, world: int) -> Collectives:
    """robustfast/global_batch.py: class sums and counts, pulls and terms, winners of a search by all ranks."""
    table = p.num_classes * p.dim
    return [
        ("all_reduce", WIDE * (table + p.num_classes + 3)),
        ("all_reduce", WIDE * (table + 2)),
        ("all_gather", WIDE * p.num_classes),
    ]


def samples(p: Problem, world: int) -> Collectives:
    """robustfast/gathering.py: what could be wrong, then labels and both views."""
    return [("all_reduce", 4 * LONG), ("all_gather", world * p.batch * (2 * p.dim * HALF + LONG))]


def gather(p: Problem, world: int) -> Collectives:
    """robustfast/global_batch.py: the samples, winners of a search by all ranks."""
    return [*samples(p, world), ("all_gather", WIDE * min(world * p.batch, p.num_classes))]


def sharded(p: Problem, world: int) -> Collectives:
    """robustfast/sharded.py: the samples; W, b and state of the batch's classes; winners, and their W and b."""
    rows = min(world * p.batch, p.num_classes)
    return [
        *samples(p, world),
        ("all_reduce", WIDE * rows * (2 * p.dim + 2)),
        ("all_reduce", WIDE * rows),
        ("all_reduce", WIDE * rows),
        ("all_reduce", WIDE * rows * (p.dim + 1)),
    ]


EXCHANGES = {"sums": sums, "gather": gather, "sharded": sharded}


def sent(collectives: Collectives, world: int) -> float:
    """Bytes that a rank sends."""
    return sum(rounds(kind) * (world - 1) / world * size for kind, size in collectives)


# What data sheets say, but for the latencies and the share, which are assumed.
GPUS_OF_A_NODE = 8
NVLINK = 450e9  # bytes a second each way, H100 SXM: 900 GB/s both ways
INFINIBAND = 50e9  # bytes a second each way and GPU: one NDR port of 400 Gb/s
MATRIX_RATE = 989e12  # bfloat16 flops a second, H100 SXM, dense
MEMORY = 80e9  # bytes of an H100 SXM
REPLICAS = 5  # tables (K, D) of a rank: W, its gradient, momentum, the centroids, and what a step sums
LATENCY = {"launch": 10e-6, "hop": 3e-6}  # assumed: of a collective, and of each doubling of nodes
SHARE = 0.4  # assumed: of the matrix rate that is reached


def cluster_seconds(collectives: Collectives, world: int) -> float:
    """Each GPU brings its eighth across nodes and hands it on inside; an all_reduce goes both ways."""
    nodes = world // GPUS_OF_A_NODE
    inside = (GPUS_OF_A_NODE - 1) / GPUS_OF_A_NODE / NVLINK
    across = (nodes - 1) / nodes / GPUS_OF_A_NODE / INFINIBAND
    latency = LATENCY["launch"] + LATENCY["hop"] * math.log2(world)
    return sum(rounds(kind) * (latency + size * (inside + across)) for kind, size in collectives)


def search_seconds(p: Problem, exchange: str, world: int) -> float:
    """4 R K D flops on all ranks together, on each of them where they gather and do not share."""
    rows = p.num_classes if exchange == "sums" else min(world * p.batch, p.num_classes)
    alone = exchange == "gather" and not expected(p, world).gather_shares()
    return 4 * rows * p.num_classes * p.dim / (1 if alone else world) / (SHARE * MATRIX_RATE)


def expected(p: Problem, world: int, device: str = "cuda", element: int = HALF) -> Step:
    """The step as exchange="auto" sees it."""
    return Step(world, world * p.batch, p.num_classes, p.dim, element, WIDE, COSTS[device])


def auto(step: Step) -> str:
    return "sums" if step.sums() <= step.gather() else "gather"


# The page.


def fitted_table(results: dict) -> str:
    environment = results["environment"]
    lines = [
        f"{environment['device']}, {environment['cores']} cores, gloo, {environment['date'][:10]}.\n",
        "| ranks | alpha, us a hop | 1/beta, GB/s | predicted / measured, median (10th-90th percentile) |",
        "| --- | --- | --- | --- |",
    ]
    for world in WORLDS:
        rows = [row for row in results["rows"] if row["world"] == world]
        alpha, beta = fit(rows)
        ratios = [np.dot((alpha, beta), terms(row)) / row["seconds"] for row in rows]
        low, middle, high = np.percentile(ratios, (10, 50, 90))
        lines.append(f"| {world} | {alpha * 1e6:.0f} | {1e-9 / beta:.2f} | {middle:.2f} ({low:.2f}-{high:.2f}) |")
    return "\n".join(lines)


def exchanges_table(results: dict) -> str:
    lines = [
        "| classes | features | global batch | sums, ms (expected) | gather, ms (expected) | auto | to the better |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in results["rows"]:
        p, world = Problem("", row["num_classes"], row["dim"], row["batch"]), row["world"]
        step = expected(p, world, "cpu", WIDE)
        if auto(step) != row["auto"]:
            raise SystemExit(
                f"{EXCHANGE_RESULTS.name}: auto took {row['auto']}, and now {auto(step)}; measure it again"
            )
        cells = [
            f"{1e3 * row[name]:.1f} ({1e3 * seconds:.1f})"
            for name, seconds in (("sums", step.sums()), ("gather", step.gather()))
        ]
        ratio = row[row["auto"]] / min(row["sums"], row["gather"])
        lines.append(
            f"| {p.num_classes:,} | {p.dim} | {world * p.batch:,} | {' | '.join(cells)} | {row['auto']} | {ratio:.2f} |"
        )
    return "\n".join(lines)


def costs_table(_: dict) -> str:
    units = {"collective": 1e6, "sent": 1e9, "gathered": 1e9, "table": 1e9, "searched": 1e12}
    lines = [
        "| | collective, µs | sent, ns a byte | gathered, ns a byte | tables, ns a byte | search, ps an operation |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for device, costs in COSTS.items():
        cells = [f"{value * units[name]:g}" for name, value in costs._asdict().items()]
        lines.append(f"| {device} | {' | '.join(cells)} |")
    return "\n".join(lines)


def predicted_table(_: dict) -> str:
    lines = [
        f"| | GPUs | global batch | {' | '.join(EXCHANGES)} | auto |",
        f"| --- | --- | --- |{' --- |' * len(EXCHANGES)} --- |",
    ]
    for p in PROBLEMS:
        for world in (8, 64, 1024):
            cells = [predicted(p, name, world) for name in EXCHANGES]
            cells.append("" if "memory" in cells else auto(expected(p, world)))
            lines.append(f"| {p.name} | {world:,} | {world * p.batch:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def predicted(p: Problem, exchange: str, world: int) -> str:
    if exchange != "sharded" and REPLICAS * WIDE * p.num_classes * p.dim > MEMORY:
        return "memory"
    collectives = EXCHANGES[exchange](p, world)
    exchanging, searching = cluster_seconds(collectives, world), search_seconds(p, exchange, world)
    return f"{sent(collectives, world) / 1e6:,.0f} MB, {1e3 * exchanging:.2f} + {1e3 * searching:.2f} ms"


TABLES = {
    "fitted": (fitted_table, RESULTS),
    "predicted": (predicted_table, RESULTS),
    "costs": (costs_table, RESULTS),
    "exchanges": (exchanges_table, EXCHANGE_RESULTS),
}


def page(text: str) -> str:
    def table(match: re.Match) -> str:
        make, results = TABLES[match[2]]
        return f"{match[1]}\n{make(disk.read_json(results))}\n\n{match[3]}"

    return MARKS.sub(table, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", choices=("measure", "exchanges", "write"), default="write")
    parser.add_argument("--check", action="store_true", help="fail where the page is not what the results say")
    arguments = parser.parse_args()
    if arguments.task == "measure":
        disk.write_json(RESULTS, measure(measure_rank, WORLDS))
        return
    if arguments.task == "exchanges":
        disk.write_json(EXCHANGE_RESULTS, measure(exchanges_rank, (2,)))
        return
    text = PAGE.read_text()
    if not arguments.check:
        PAGE.write_text(page(text))
    elif page(text) != text:
        sys.exit(f"{PAGE.name}: not what the results say; run python benchmarks/scaling.py")


if __name__ == "__main__":
    main()
