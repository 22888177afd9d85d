"""The paper's claims and the recipe, each against what the seeds say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from benchmarks.study import cells
from benchmarks.study.collected import CURVATURE


def verdicts(found: Sequence[dict[str, Any]]) -> str:
    """The paper's claims, each against what the seeds say."""

    def compared(other: str, measure: str, lower: bool = False) -> Callable[[dict[str, Any]], str]:
        return lambda study: _verdict(study, "discriminative", other, measure.format(sigma=study["sigma"]), lower)

    noise = "gaussian {sigma:g}"
    others = ("noisy", "both", "stability")
    claims = {
        "more accurate under the trained noise than normal training": compared("normal", noise),
        **{f"more accurate under the trained noise than `{other}`": compared(other, noise) for other in others},
        **{f"more accurate on clean images than `{other}`": compared(other, "clean") for other in ("normal", *others)},
        **{
            f"more accurate under σ = {sigma:g} than `noisy`": compared("noisy", f"gaussian {sigma:g}")
            for sigma in (0.15, 0.4, 0.6)
        },
        **{
            f"less curved (median over images) than `{other}`": compared(other, CURVATURE, lower=True)
            for other in ("normal", *others)
        },
        **{f"more accurate under L∞ attacks than `{other}`": _attacked(other) for other in ("normal", *others)},
        **{
            f"more accurate under the trained noise than {words}": _left_out(name)
            for name, words in {
                "without margin": "without its margin",
                "without alignment": "without its alignment",
                "own centroids": "with alignment to the noisy view's own centroids",
                "momentum 0": "with centroids of the batch alone",
            }.items()
        },
        "curvature that falls with survival of the noise (`normal`; r of the groups' means; the paper: −0.92)": _groups,
        "curvature that explains survival beyond margin, confidence and gradient (`normal`; ρ → ρ given these)": _given,
    }
    head = ["the paper's method is, or has", *(cells.TITLES[study["data"]] for study in found)]
    rows = [[claim, *(verdict(study) for study in found)] for claim, verdict in claims.items()]
    note = "Differences are percentage points of accuracy (of curvature: decades), with the interval over seeds.\n"
    return note + "\n" + cells.table(head, rows)


def _verdict(study: dict[str, Any], arm: str, other: str, measure: str, lower: bool = False) -> str:
    pair = cells.pair_of(study, arm, other, measure)
    if pair is None or pair["seeds"] is None:
        return "–"
    low, high = pair["seeds"]["low"], pair["seeds"]["high"]
    better, worse = (high < 0, low > 0) if lower else (low > 0, high < 0)
    word = "**yes**" if better else "**no, the opposite**" if worse else "not decided"
    return f"{word}: {cells.difference(pair['seeds'], measure)}"


def _left_out(variation: str) -> Callable[[dict[str, Any]], str]:
    """The paper's method without a part: the verdict is on the part, the difference that of leaving it out."""
    return lambda study: _verdict(study, variation, "discriminative", f"gaussian {study['sigma']:g}", lower=True)


def _attacked(other: str) -> Callable[[dict[str, Any]], str]:
    """At the radius in the middle."""

    def verdict(study: dict[str, Any]) -> str:
        names = sorted(name for name in study["attacks"]["discriminative"][0] if name.startswith("linf"))
        return f"ε = {names[1].removeprefix('linf ')}: {_verdict(study, 'discriminative', other, names[1])}"

    return verdict


def _groups(study: dict[str, Any]) -> str:
    return cells.spread([e[f"gaussian {study['sigma']:g}"]["of groups"] for e in study["explained"]["normal"]], 1, 2)


def _given(study: dict[str, Any]) -> str:
    found = [e[f"gaussian {study['sigma']:g}"] for e in study["explained"]["normal"]]
    return " → ".join(cells.spread([e[part] for e in found], 1, 2) for part in ("per image", "given"))


def _baseline(arm: dict[str, Any]) -> bool:
    return arm["base"] in (None, "noisy")


def recipe(found: Sequence[dict[str, Any]]) -> str:
    """What discriminative-both is worth: whether any other method is ahead of it by more than the seeds' spread."""
    parts = [
        "\n### The recipe `discriminative-both`\n",
        "Cross entropy of both views beside the discriminative loss. `noisy with a sigma each`, whose noise reaches 2σ "
        "in training, was not tuned.\n",
    ]
    for study in found:
        noises = cells.noises_of(study)
        own = {name: cells.values(study, "discriminative-both", name) for name in noises}
        others = [arm["name"] for arm in study["arms"] if arm["name"] != "discriminative-both" and _baseline(arm)]
        ahead = [
            f"`{other}` at {cells.noise_name(name)} ({cells.POINTS * (fmean(theirs) - fmean(own[name])):+.1f})"
            for name in noises
            for other in others
            if fmean(theirs := cells.values(study, other, name)) - fmean(own[name])
            > max(map(cells.deviation, (theirs, own[name])))
        ]
        found_text = ", ".join(ahead) if ahead else "no other method is, at any σ"
        parts.append(
            f"{cells.TITLES[study['data']]}: ahead of it by more than the larger of both deviations: {found_text}.\n"
        )
        rows = [
            [
                f"`{other}`",
                *(cells.shown(cells.pair_of(study, "discriminative-both", other, name), name) for name in noises),
            ]
            for other in others
        ]
        head = [f"{cells.TITLES[study['data']]}: `discriminative-both` −", *map(cells.noise_name, noises)]
        parts.append(cells.table(head, rows))
    return "\n".join(parts)
