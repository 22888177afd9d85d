"""Measures this machine and writes the results and the pages: about ten minutes in which nothing else should run.

python benchmarks/measure.py [--seconds 6]    # then commit benchmarks/results, docs/benchmarks.md and README.md

Where the machine has AVX-512 it is measured once more, held to AVX2: kernels, PyTorch, its compiler and its libraries.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from robustfast import _C
from robustfast.bench.measure import HELD_TO_AVX2

ROOT = Path(__file__).resolve().parents[1]


def measure(name: str, arguments: list[str], limits: dict[str, str]) -> Path:
    out = ROOT / "build" / "bench" / name
    command = [sys.executable, "-m", "robustfast", "bench", "--device", "cpu", "--out", str(out), *arguments]
    subprocess.run(command, cwd=ROOT, env=os.environ | limits, check=True)
    return out / "results.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=6.0, help="to spend on each table")
    seconds = ["--seconds", str(parser.parse_args().seconds)]
    isa = _C.build_info()["instruction_set"]
    measured = {isa: measure(isa, ["--scaling", *seconds], {})}
    if isa == "avx512":
        measured["avx512_held_to_avx2"] = measure("avx512_held_to_avx2", seconds, HELD_TO_AVX2)
    for name, results in measured.items():  # only now: a change of the checkout would show beside its commit
        shutil.copy(results, ROOT / "benchmarks" / "results" / f"bench_{name}.json")
    subprocess.run([sys.executable, ROOT / "benchmarks" / "make_docs.py"], check=True)


if __name__ == "__main__":
    main()
