"""What the loss's collectives cost: measured and fitted here, predicted for clusters; the tables of docs/scaling.md.

    python benchmarks/scaling.py measure     # writes benchmarks/results/collectives_gloo.json, about a minute
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

from robustfast import disk
from robustfast.bench.measure import environment

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "collectives_gloo.json"
PAGE = ROOT / "docs" / "scaling.md"
MARKS = re.compile(r"(<!-- scaling: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
SIZES = tuple(4**k << 10 for k in range(8))  # bytes of the buffer that every rank ends with: 1 KiB to 16 MiB
WORLDS = (2, 4)


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


def measure() -> dict:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for world in WORLDS:
            store, out = f"{folder}/store{world}", f"{folder}/{world}.json"
            torch.multiprocessing.spawn(measure_rank, (world, store, out), nprocs=world)
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


def gather(p: Problem, world: int) -> Collectives:
    """robustfast/global_batch.py: what could be wrong, then labels and both views."""
    return [("all_reduce", 4 * LONG), ("all_gather", world * p.batch * (2 * p.dim * HALF + LONG))]


def sharded(p: Problem, world: int) -> Collectives:
    """robustfast/sharded.py: the samples; W, b and state of the batch's classes; winners, and their W and b."""
    rows = min(world * p.batch, p.num_classes)
    return [
        *gather(p, world),
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
    """4 P K D flops, which the ranks share where they have not gathered the whole problem."""
    present = min(world * p.batch, p.num_classes)
    shares = 1 if exchange == "gather" else world
    return 4 * present * p.num_classes * p.dim / shares / (SHARE * MATRIX_RATE)


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


def predicted_table(results: dict) -> str:
    lines = [
        f"| | GPUs | global batch | {' | '.join(EXCHANGES)} |",
        f"| --- | --- | --- |{' --- |' * len(EXCHANGES)}",
    ]
    for p in PROBLEMS:
        for world in (8, 64, 1024):
            cells = [predicted(p, name, world) for name in EXCHANGES]
            lines.append(f"| {p.name} | {world:,} | {world * p.batch:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def predicted(p: Problem, exchange: str, world: int) -> str:
    if exchange != "sharded" and REPLICAS * WIDE * p.num_classes * p.dim > MEMORY:
        return "memory"
    collectives = EXCHANGES[exchange](p, world)
    exchanging, searching = cluster_seconds(collectives, world), search_seconds(p, exchange, world)
    return f"{sent(collectives, world) / 1e6:,.0f} MB, {1e3 * exchanging:.2f} + {1e3 * searching:.2f} ms"


TABLES = {"fitted": fitted_table, "predicted": predicted_table}


def page(text: str) -> str:
    results = disk.read_json(RESULTS)
    return MARKS.sub(lambda match: f"{match[1]}\n{TABLES[match[2]](results)}\n\n{match[3]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", choices=("measure", "write"), default="write")
    parser.add_argument("--check", action="store_true", help="fail where the page is not what the results say")
    arguments = parser.parse_args()
    if arguments.task == "measure":
        disk.write_json(RESULTS, measure())
        return
    text = PAGE.read_text()
    if not arguments.check:
        PAGE.write_text(page(text))
    elif page(text) != text:
        sys.exit(f"{PAGE.name}: not what the results say; run python benchmarks/scaling.py")


if __name__ == "__main__":
    main()
