"""Memory of a rank that trains a classifier whose classes are split over ranks, against docs/scaling.md's derivation.

python benchmarks/sharded_memory.py                                          # K = 1,000,000, D = 64 on 2 gloo ranks
python benchmarks/sharded_memory.py --out benchmarks/results/sharded_memory.json
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from robustfast.cross_entropy import LOGITS
from robustfast.distributed import ShardedDiscriminativeLoss


def resident(name: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def derived(num_classes: int, dim: int, samples: int, ranks: int) -> dict[str, int]:
    """docs/scaling.md's bytes of a rank, in float32 and with a noisy view; ``samples`` of all ranks."""
    classes, rows = -(-num_classes // ranks), min(samples, num_classes)
    table = 4 * classes * dim
    return {
        "weight and centroids": 2 * table,
        "gradient and momentum": 2 * table,
        "a second gradient": table,
        "features and their gradients": 4 * samples * dim * 4,
        "tables of rows": 15 * 4 * rows * dim,
        "logits": 2 * 4 * min(LOGITS, samples * classes),
    }


def rank_main(rank: int, options: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=options.ranks)
    torch.manual_seed(rank)
    n = options.samples // options.ranks
    f, g = (torch.randn(n, options.dim).requires_grad_() for _ in range(2))
    target = torch.randint(options.num_classes, (n,))
    tiny = ShardedDiscriminativeLoss(100, options.dim, process_group="world")
    (tiny(f, g, target % 100) + tiny.cross_entropy(f, target % 100)).backward()
    torch.optim.SGD(tiny.parameters()).step()  # a first step imports 140 MiB

    forget_peak()
    before = resident("VmRSS")
    head = ShardedDiscriminativeLoss(options.num_classes, options.dim, process_group="world")
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9, foreach=False)
    values, seconds = [], []
    for _ in range(options.steps):
        start = time.perf_counter()
        entropy, loss = head.cross_entropy(f, target), head(f, g, target)
        (entropy + loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        values.append([entropy.item(), loss.item()])
    result = {"peak": resident("VmHWM") - before, "seconds": seconds, "cross entropy and loss": values}
    Path(folder, f"{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def measure(options: argparse.Namespace) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(rank_main, (options, folder), options.ranks)
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(options.ranks)]
    parts = derived(options.num_classes, options.dim, options.samples, options.ranks)
    return {
        "sizes": {name: getattr(options, name) for name in ("num_classes", "dim", "samples", "ranks", "steps")},
        "derived": parts | {"sum": sum(parts.values())},
        "measured": ranks,
        "logits of all classes": 4 * options.samples * options.num_classes,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-classes", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--samples", type=int, default=512, help="of all ranks")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a file for the JSON")
    options = parser.parse_args()
    result = measure(options)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, size in result["derived"].items():
        print(f"{name:30} {size / 2**20:9.1f} MiB")
    for rank, found in enumerate(result["measured"]):
        print(f"rank {rank}: peak {found['peak'] / 2**20:.1f} MiB, {min(found['seconds']):.1f} s a step")


if __name__ == "__main__":
    sys.exit(main())
