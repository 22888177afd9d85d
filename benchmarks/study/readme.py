"""README's tables of the demo, between their marks, from the demo's results."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from benchmarks.study.cells import difference, table
from robustfast import disk
from robustfast.evaluation.intervals import paired
from robustfast.training import comparison

MARKS = re.compile(r"(<!-- demo: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
RECIPE = "discriminative-both"


def readme(text: str, results: Path) -> str:
    """README with the tables of the results that its marks name; of more than three seeds paired differences too."""

    def tables(match: re.Match) -> str:
        demo = disk.read_json(results / f"{match[2]}.json")
        shown = [accuracies(demo["summary"])]
        if max(point["runs"] for point in demo["summary"]) > 3:
            shown.append(differences(demo))
        return match[1] + "\n" + "\n".join(shown) + "\n" + match[3]

    return MARKS.sub(tables, text)


def accuracies(summary: list[dict[str, Any]]) -> str:
    """Accuracy by method and noise; bold where the spread carries a winner."""
    leading = comparison.winners(summary)
    points = {
        (point["method"], point["sigma"]): f"{100 * point['mean']:.1f} ± {100 * point['std']:.1f}" for point in summary
    }
    points |= {at: f"**{points[at]}**" for at in leading}
    methods, sigmas = (list(dict.fromkeys(at[place] for at in points)) for place in (0, 1))
    rows = [[f"`{method}`", *(points[method, sigma] for sigma in sigmas)] for method in methods]
    return table(["", *(f"{sigma:g}" if sigma else "clean" for sigma in sigmas)], rows)


def differences(demo: dict[str, Any]) -> str:
    """The recipe less each other method, of the same seeds."""
    accuracy: dict[str, dict[int, list[float]]] = {}
    for run in demo["runs"]:
        of_method = accuracy.setdefault(run["config"]["method"], {})
        of_method[run["config"]["seed"]] = [point["accuracy"] for point in run["test"]]
    sigmas = [point["sigma"] for point in demo["runs"][0]["test"]]
    own = accuracy.pop(RECIPE)
    rows = [
        [f"− `{method}`", *(_paired(own, others, place) for place in range(len(sigmas)))]
        for method, others in accuracy.items()
    ]
    return table([f"`{RECIPE}`", *(f"{sigma:g}" if sigma else "clean" for sigma in sigmas)], rows)


def _paired(own: dict[int, list[float]], others: dict[int, list[float]], place: int) -> str:
    found = paired(*([of[seed][place] for seed in own] for of in (own, others)))
    text = difference(found._asdict(), "")
    return f"**{text}**" if found.low > 0 or found.high < 0 else text
