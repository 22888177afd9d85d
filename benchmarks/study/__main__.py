"""The study: methods and variations of them trained, evaluated and compared over seeds.

    python -m benchmarks.study digits                       # what is missing in build/study, then study_digits.json
    python -m benchmarks.study mnist --mnist mnist.npz      # the same of MNIST
    python -m benchmarks.study document                     # docs/study.md and README's tables from the JSON

Whatever stops it, the same command goes on with the run it was in. Runs come seed by seed, the methods before the
variations, and after each seed the JSON holds all that has been finished.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.study import arms, collected, page, readme
from robustfast import disk
from robustfast.commands import runs
from robustfast.training import comparison

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
MNIST_TRAIN, MNIST_TEST = 20_000, 500  # the first images of each part
MNIST = {"model": "lenet", "epochs": 4, "milestones": (2, 3), "validation": 0.1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("digits", "mnist", "document"))
    parser.add_argument("--out", type=Path, default=Path("build/study"), help="folder of all runs")
    parser.add_argument(
        "--mnist", type=Path, help="x_train, y_train, x_test, y_test of MNIST as numpy.savez writes them"
    )
    parser.add_argument("--seeds", type=int, default=arms.SEEDS, help="of the methods")
    parser.add_argument("--variation-seeds", type=int, default=arms.SEEDS, help="of the variations")
    parser.add_argument("--collect", action="store_true", help="the JSON of what is finished, no runs")
    arguments = parser.parse_args()
    if arguments.what == "document":
        _document()
        return
    out, settings = arguments.out / arguments.what, {}
    disk.make_folder(out)
    if arguments.what == "mnist":
        settings = {**MNIST, "data": f"npz:{_part(arguments.mnist, out / 'data.npz')}"}
    about = {"data": arguments.what, "changes": {**settings, "data": arguments.what}}

    def collect() -> None:
        disk.write_json(RESULTS / f"study_{arguments.what}.json", collected.collect(out / "runs", about))

    if arguments.collect:
        collect()
        return
    for chosen, seeds in ((arms.METHOD_ARMS, arguments.seeds), (arms.VARIATIONS, arguments.variation_seeds)):
        for seed in range(seeds):
            for arm in chosen:
                print(_run(arm, seed, settings, out / "runs"), flush=True)
            collect()


def _document() -> None:
    disk.write(ROOT / "docs" / "study.md", page.document(RESULTS).encode())
    disk.write(ROOT / "README.md", readme.readme((ROOT / "README.md").read_text(), RESULTS).encode())
    demo = disk.read_json(RESULTS / "digits_demo.json")
    comparison.plot(demo["summary"], ROOT / "docs" / "images" / "digits.png", demo["runs"][0]["config"]["sigma"])


def _run(arm: arms.Arm, seed: int, settings: dict[str, Any], place: Path) -> str:
    folder = place / arm.folder(seed)
    results = comparison.train_or_go_on(arm.config(seed, settings), folder)
    runs.evaluate_run(folder, runs.Options(arm.suite))
    return f"{folder.name}: " + " ".join(f"{100 * point['accuracy']:.1f}" for point in results["test"])


def _part(mnist: Path | None, path: Path) -> Path:
    """The first images of MNIST, in a file of their own."""
    if path.exists():
        return path
    if mnist is None:
        sys.exit("--mnist: expected the file of MNIST's images")
    with np.load(mnist, allow_pickle=False) as arrays:
        counts = {"train": MNIST_TRAIN, "test": MNIST_TEST}
        content = io.BytesIO()
        np.savez(content, **{f"{x}_{part}": arrays[f"{x}_{part}"][:n] for part, n in counts.items() for x in "xy"})
    disk.write(path, content.getvalue())
    return path


if __name__ == "__main__":
    main()
