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


def _ahead(theirs: Sequence[float], own: Sequence[float]) -> float:
    """By how much the mean over the seeds that both have is ahead, where it is by more than both deviations; else 0."""
    theirs, own = zip(*zip(theirs, own, strict=False), strict=True)
    by = fmean(theirs) - fmean(own)
    return by if by > max(map(cells.deviation, (theirs, own))) else 0.0


def recipes(found: Sequence[dict[str, Any]]) -> str:
    """What discriminative-both is worth, as it was tuned and with a sigma for each image."""
    parts = [
        "\n### The recipe `discriminative-both`\n",
        "Cross entropy of both views beside the discriminative loss. Those `with a sigma each`, whose noise "
        "reaches 2σ in training, were not tuned.\n",
    ]
    for study in found:
        names = [arm["name"] for arm in study["arms"]]
        parts += [recipe(study, name) for name in names if name.startswith("discriminative-both")]
    return "\n".join(parts)


def recipe(study: dict[str, Any], name: str) -> str:
    """Whether any other method is ahead of this one by more than the seeds' spread, and the paired differences."""
    noises, title = cells.noises_of(study), cells.TITLES[study["data"]]
    own = {noise: cells.values(study, name, noise) for noise in noises}
    others = [arm["name"] for arm in study["arms"] if arm["name"] != name and _baseline(arm)]
    ahead = [
        f"`{other}` at {cells.noise_name(noise)} ({cells.POINTS * by:+.1f})"
        for noise in noises
        for other in others
        if (by := _ahead(cells.values(study, other, noise), own[noise]))
    ]
    found = ", ".join(ahead) if ahead else "no other method is, at any σ"
    rows = []
    for other in others:
        pairs = [(cells.pair_of(study, name, other, noise), noise) for noise in noises]
        if any(pair for pair, _ in pairs):
            rows.append([f"`{other}`", *(cells.shown(*pair) for pair in pairs)])
    head = [f"{title}: `{name}` −", *map(cells.noise_name, noises)]
    return f"{title}, ahead of `{name}` by more than both deviations: {found}.\n\n{cells.table(head, rows)}"
