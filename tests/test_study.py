"""The study's page and README's tables say what the committed results say."""

from pathlib import Path

import pytest

from benchmarks.study import claims, collected, page, readme

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def test_pages_are_what_the_results_say():
    assert page.document(RESULTS) == (ROOT / "docs/study.md").read_text(), "python -m benchmarks.study document"
    text = (ROOT / "README.md").read_text()
    assert readme.readme(text, RESULTS) == text, "python -m benchmarks.study document"
    assert len(readme.MARKS.findall(text)) == 2


def test_collecting_nothing_says_so(tmp_path):
    with pytest.raises(SystemExit, match=r"no run of the study is finished there"):
        collected.collect(tmp_path / "runs", {"data": "digits"})


def study(low, high, accuracies=(0.9, 0.9)):
    """A study of two arms with one paired difference over seeds."""
    found = {"difference": (low + high) / 2, "low": low, "high": high}
    names = ("discriminative-both", "noisy")
    return {
        "data": "digits",
        "sigma": 0.25,
        "arms": [{"name": name, "base": None, "seeds": 2} for name in names],
        "settings": {"normal": [{"clean": {}}]} | {
            name: [{"clean": {"accuracy": value - 0.01}}, {"clean": {"accuracy": value + 0.01}}]
            for name, value in zip(names, accuracies, strict=True)
        },
        "paired": [{"arm": names[0], "against": names[1], "measure": "clean", "seeds": found, "images": found}],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("low", "high", "lower", "word"),
    [
        (0.01, 0.03, False, "**yes**: +2.0 (+1.0 to +3.0)"),
        (-0.01, 0.03, False, "not decided: +1.0 (−1.0 to +3.0)"),
        (-0.03, -0.01, False, "**no, the opposite**: −2.0 (−3.0 to −1.0)"),
        (-0.03, -0.01, True, "**yes**: −2.0 (−3.0 to −1.0)"),
    ],
)
def test_verdicts_follow_the_interval(low, high, lower, word):
    assert claims._verdict(study(low, high), "discriminative-both", "noisy", "clean", lower) == word
    assert claims._verdict(study(low, high), "noisy", "discriminative-both", "clean") == "–"


def test_the_recipe_says_who_is_ahead():
    within, beyond = (claims.recipe(study(0, 0, (0.9, other)), "discriminative-both") for other in (0.91, 0.92))
    assert "no other method is, at any σ" in within, "the deviation is 0.014"
    assert "`noisy` at clean (+2.0)" in beyond


def test_the_demos_table_marks_what_the_spread_carries():
    summary = [
        {"method": method, "sigma": 0.0, "mean": mean, "std": 0.01, "runs": 8}
        for method, mean in (("noisy", 0.9), ("both", 0.93))
    ]
    assert "| `both` | **93.0 ± 1.0** |" in readme.accuracies(summary)
    assert "**" not in readme.accuracies([{**point, "std": 0.02} for point in summary])
