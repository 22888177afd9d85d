"""Tune each method's own settings on validation images of digits, the same number of trials for every method.

    python benchmarks/tune_digits.py                                  # all methods
    python benchmarks/tune_digits.py --method discriminative-both     # this one anew, the others as the file has them

writes benchmarks/results/digits_tuning.json, whose "best" are the settings of the preset digits
(robustfast/training/presets.py). Test images play no part: the score of a trial is the best epoch's validation score
(mean of the accuracies on clean images and at the trained sigma), averaged over seeds that the demo does not use.
"""

import argparse
from itertools import product
from pathlib import Path
from statistics import fmean

from robustfast import disk
from robustfast.training import comparison
from robustfast.training.config import METHODS, Config

SEEDS = (100, 101)
CROSS_ENTROPY = {"lr": (0.005, 0.01, 0.02, 0.04), "weight_decay": (5e-4, 2e-3, 5e-3)}
SPACE = {
    "normal": CROSS_ENTROPY,
    "noisy": CROSS_ENTROPY,
    "both": CROSS_ENTROPY,
    "stability": {"lr": (0.005, 0.01, 0.03), "loss_weight": (0.03, 0.1, 0.3, 1.0)},
    "discriminative": {"lr": (0.01, 0.02), "delta_dist": (1.0, 3.0), "alpha": (0.3, 1.0, 3.0)},
    "discriminative-both": {"loss_weight": (0.1, 0.3), "noisy_share": (0.5, 0.75, 1.0), "delta_var": (0.5, 1.5)},
}
FIXED = {"discriminative-both": {"lr": 0.02, "alpha": 0.3}}  # as the method that it extends was tuned


def trials(method: str) -> list[dict[str, float]]:
    space = SPACE[method]
    return [{**FIXED.get(method, {}), **dict(zip(space, values, strict=True))} for values in product(*space.values())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", action="append", choices=METHODS, help="tune this one alone; repeat the option")
    parser.add_argument("--workers", type=int, help="runs at a time (default: one per core)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "digits_tuning.json")
    arguments = parser.parse_args()

    chosen = arguments.method or METHODS
    tried = [(method, settings) for method in chosen for settings in trials(method)]
    configs = [Config(method, seed=seed, **settings) for method, settings in tried for seed in SEEDS]
    results = comparison.compare(configs, workers=arguments.workers)
    scores = [result["history"][result["best_epoch"] - 1]["validation"] for result in results]
    records: dict[str, list[dict]] = disk.read_json(arguments.out)["trials"] if arguments.method else {}
    records |= {method: [] for method in chosen}
    for index, (method, settings) in enumerate(tried):
        mine = scores[index * len(SEEDS) : (index + 1) * len(SEEDS)]
        records[method].append({"settings": settings, "validation": mine, "mean": fmean(mine)})
    best = {
        method: max(records[method], key=lambda record: record["mean"])["settings"]
        for method in METHODS
        if method in records
    }
    disk.write_json(arguments.out, {"seeds": SEEDS, "space": SPACE, "best": best, "trials": records})
    for method in best:
        top = max(record["mean"] for record in records[method])
        print(f"{method:15} {100 * top:.2f}% with {best[method]}")


if __name__ == "__main__":
    main()
