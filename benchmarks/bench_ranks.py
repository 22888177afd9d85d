"""Throughput of ``robustfast train``: two processes of one thread each against one, in turn.

    python benchmarks/bench_ranks.py --out benchmarks/results/train_ranks.json

ResNet-18 on images of CIFAR's shape, the discriminative loss included. Both take the same batches, by the same options;
times are those that the runs report of themselves, without the start of their processes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from robustfast import disk
from robustfast.bench import measure

CLASSES = 10


def write_images(path: Path, count: int) -> None:
    """Random images with as few to validate and test on as there may be: training is what is measured."""
    rng = np.random.default_rng(0)
    train, test = (rng.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8) for n in (count + CLASSES, CLASSES))
    labels = np.arange(count + CLASSES) % CLASSES
    np.savez(path, x_train=train, y_train=labels, x_test=test, y_test=labels[:CLASSES])


def seconds(data: Path, processes: int, arguments: argparse.Namespace, out: Path) -> float:
    """What a run of so many processes takes in training."""
    share = CLASSES / (arguments.images + CLASSES)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
        "-m", "robustfast", "train", "--preset", "cifar10", "--data", f"npz:{data}", "--epochs", "1", "--threads", "1",
        "--batch-size", str(arguments.batch_size), "--validation", str(share), "--test-draws", "1",
        "--test-sigmas", "0.06", "--out", str(out), "--overwrite",
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return disk.read_json(out / "results.json")["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1024, help="in the epoch that is timed")
    parser.add_argument("--batch-size", type=int, default=128, help="of all processes together")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    times: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "images.npz"
        write_images(data, arguments.images)
        for number in range(arguments.rounds):
            for processes in (1, 2) if number % 2 else (2, 1):
                times[processes].append(seconds(data, processes, arguments, Path(folder) / "run"))
            print(
                f"{times[1][-1]:.2f} s alone, {times[2][-1]:.2f} s in two: {times[1][-1] / times[2][-1]:.2f}",
                flush=True,
            )
    ratios = [alone / both for alone, both in zip(times[1], times[2], strict=True)]
    content = {
        "command": " ".join(["python", *sys.argv]),
        "environment": measure.environment(torch.device("cpu")),
        "model": "resnet18",
        "image": [3, 32, 32],
        "images": arguments.images,
        "batch_size": arguments.batch_size,
        "seconds": {str(processes): values for processes, values in times.items()},
        "images_per_second": {str(n): arguments.images / statistics.median(values) for n, values in times.items()},
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }
    print(f"two processes have {content['ratio']:.2f} times the throughput of one")
    if arguments.out:
        disk.write_json(arguments.out, content)


if __name__ == "__main__":
    main()
