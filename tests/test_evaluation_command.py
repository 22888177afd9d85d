"""robustfast evaluate and compare from end to end, and the page in a browser."""

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluated_models import Net
from PIL import Image
from safetensors.torch import save_file
from scipy import stats
from typer.testing import CliRunner

from robustfast import cli, disk
from robustfast.commands import runs
from robustfast.commands.evaluate import comparisons
from robustfast.evaluation import input_hessian_spectrum, survival, table
from robustfast.evaluation.evaluated import Evaluated, corruption_errors
from robustfast.evaluation.repeats import tolerance_of
from robustfast.evaluation.report import render, worst_images
from robustfast.training import data, load_classifier, preset, train

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def invoke(*arguments):
    return CliRunner().invoke(cli.app, list(map(str, arguments)), env={"COLUMNS": "100"})


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with tiny.npz, four runs on it, and these runs evaluated; the working directory meanwhile."""
    folder = tmp_path_factory.mktemp("evaluated")
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    images = (rng.integers(0, 140, (60, 8, 8)) + 50 * labels[:, None, None]).astype(np.uint8)
    np.savez(folder / "tiny.npz", x_train=images, y_train=labels, x_test=images[:40], y_test=labels[:40])
    before, threads = Path.cwd(), torch.get_num_threads()
    os.chdir(folder)
    torch.set_num_threads(1)
    for method in ("normal", "discriminative"):
        for seed in (0, 1):
            settings = {"data": "npz:tiny.npz", "epochs": 3, "test_sigmas": (0.2, 0.4), "sigma": 0.2, "seed": seed}
            train(preset("digits", method, **settings, milestones=()), folder / f"{method}-{seed}")
    names = ["normal-0", "normal-1", "discriminative-0", "discriminative-1"]
    shown = invoke("evaluate", *names, "--page", "page.html")
    assert shown.exit_code == 0, (shown.output, shown.exception)
    shown = invoke("evaluate", "normal-0", "discriminative-0", "--suite", "paper", "--page", "paper.html")
    assert shown.exit_code == 0, (shown.output, shown.exception)
    yield folder
    os.chdir(before)
    torch.set_num_threads(threads)


def test_files_agree_with_the_functions(place):
    model = load_classifier("normal-0")
    _, test, _ = data.load("npz:tiny.npz")
    x, y = test.pixels / 255, test.labels
    columns, about = table.read(place / "normal-0/evaluation-quick/images.npz")
    counts = (columns["gaussian 0.2/prediction"] == columns["label"][:, None]).sum(1)
    assert counts.tolist() == survival(model, x, y, scale=0.2).tolist()
    np.testing.assert_allclose(columns["spectrum"], input_hessian_spectrum(model, x, y).float(), rtol=1e-4, atol=1e-7)
    content = disk.read_json(place / "normal-0/evaluation-quick/results.json")
    summary = {setting["name"]: setting for setting in content["summary"]["settings"]}
    assert summary["gaussian 0.2"]["accuracy"] == pytest.approx(counts.mean() / 10)
    assert summary["gaussian 0.2"]["survival"] == np.bincount(counts, minlength=11).tolist()
    assert about == content["about"] and about["data"] == "npz:tiny.npz" and len(about["model"]) == 32
    assert content["environment"]["torch"] == torch.__version__
    documented = (ROOT / "docs/results.md").read_text().partition("field of an evaluation")[2]
    everything = runs.read(place / "normal-0/evaluation-paper").summary
    assert [field for field in (*content, *everything) if f"`{field}`" not in documented] == []
    explained = content["summary"]["explained"][0]
    assert sum(group["images"] for group in explained["groups"]) == 40
    expected = stats.spearmanr((columns["spectrum"].astype(float) ** 2).sum(1), counts).statistic
    assert explained["per image"]["spearman"] == pytest.approx(expected, nan_ok=True)
    counts = np.stack(
        [(columns[f"gaussian {s}/prediction"] == columns["label"][:, None]).sum(1) for s in (0.2, 0.4)], 1
    )
    clean = torch.from_numpy(columns["clean/prediction"][:, 0] == columns["label"])
    scales = tolerance_of(clean, torch.from_numpy(counts), [0.2, 0.4], 10).scale.sort().values
    median = content["summary"]["tolerance"]["median"]
    assert (median is None and scales[19].isinf()) or median == scales[19]
    flips = (columns["gaussian 0.2/prediction"] != columns["clean/prediction"]).mean()
    assert summary["gaussian 0.2"]["flips"] == pytest.approx(flips)


def test_corruption_errors_are_those_of_the_paper(place):
    models = {name: [runs.read(place / f"{name}-0/evaluation-paper")] for name in ("normal", "discriminative")}

    def errors(name):
        return {s["perturbation"]: 1 - s["accuracy"] for s in models[name][0].summary["settings"] if s["severity"] == 3}

    found = corruption_errors(models, "normal")
    assert found["normal"].mean == 1
    ratios = [value / errors("normal")[kind] for kind, value in errors("discriminative").items()]
    assert found["discriminative"].mean == pytest.approx(np.mean(ratios))

    def made(clean, **perturbed):
        settings = [{"name": "clean", "severity": None, "accuracy": clean}] + [
            {"name": kind, "perturbation": kind, "severity": 3, "accuracy": accuracy, "flips": flips}
            for kind, (accuracy, flips) in perturbed.items()
        ]
        return [Evaluated("", "", 0, {}, {}, {"settings": settings})]

    groups = {"base": made(0.9, blur=(0.7, 0.2), fog=(0.5, 0.4)), "mine": made(0.9, blur=(0.85, 0.1), fog=(0.75, 0.3))}
    found = corruption_errors(groups, "base")
    assert found["base"] == pytest.approx((1, 1, 1))
    assert found["mine"] == pytest.approx(((0.5 + 0.5) / 2, (0.05 / 0.2 + 0.15 / 0.4) / 2, (0.5 + 0.75) / 2))


def test_models_are_grouped_where_their_seed_alone_differs(place):
    seeds = [runs.read(place / f"{method}-{seed}/evaluation-quick")
             for method in ("normal", "discriminative") for seed in (0, 1)]  # fmt: skip
    assert [model.group for model in runs.grouped(seeds)] == ["normal", "normal", "discriminative", "discriminative"]
    other = seeds[1]._replace(about={**seeds[1].about, "training": {**seeds[1].about["training"], "lr": 9}})
    assert [model.group for model in runs.grouped([seeds[0], other])] == ["normal-0", "normal-1"]
    again = runs.grouped([seeds[0], seeds[0]._replace(name="copy"), seeds[2]])
    assert [model.group for model in again] == ["normal-0", "copy", "discriminative"]


def test_a_page_of_models_with_different_measurements(place):
    models = [runs.read(place / name) for name in ("normal-0/evaluation-paper", "discriminative-0/evaluation-quick")]
    settings = [s for s in models[1].summary["settings"] if s["name"] != "gaussian 0.4"]
    models[1] = models[1]._replace(summary={**models[1].summary, "settings": settings})
    text = render(models, title="mixed", classes=["a", "b", "c"], provenance={}, sigma=0.2)
    assert "nan" not in text and "<td>\u2013</td>" in text and "mCE" in text


def test_compare_is_paired(place):
    shown = invoke("compare", "discriminative-0", "normal-0")
    assert shown.exit_code == 0, (shown.output, shown.exception)
    a, b = (runs.read(runs.find(place / name)) for name in ("discriminative-0", "normal-0"))
    share = [(m.columns["gaussian 0.2/prediction"] == m.columns["label"][:, None]).mean(1) for m in (a, b)]
    interval = stats.ttest_rel(*share).confidence_interval()
    row = next(line for line in shown.output.splitlines() if line.strip().startswith("gaussian 0.2 "))
    assert f"{100 * (share[0] - share[1]).mean():+.2f}" in row
    assert f"{100 * interval.low:+.2f} to {100 * interval.high:+.2f}" in row
    assert "linf 0.025" in shown.output and "log10 of the curvature" in shown.output, "the largest suite of both"
    rows = comparisons(a, a)
    assert all(found.difference == 0 and found.p_value == 1 for *_, found in rows)
    with pytest.raises(ValueError, match="evaluated on different images"):
        comparisons(a, b._replace(columns={**b.columns, "pixels": b.columns["pixels"] + 1}))


def test_a_finished_evaluation_is_read_and_another_refused(place):
    path = place / "normal-1/evaluation-quick/images.npz"
    before = path.stat().st_mtime_ns
    assert invoke("evaluate", "normal-1").exit_code == 0 and path.stat().st_mtime_ns == before
    assert (place / "normal-1/evaluation-quick/report.html").exists()
    again = invoke("evaluate", "normal-1", "--seed", "3")
    assert "holds another evaluation, with other seed" in str(again.exception)
    assert invoke("evaluate", "normal-1", "--seed", "3", "--overwrite").exit_code == 0
    assert disk.read_json(path.parent / "results.json")["about"]["seed"] == 3
    with pytest.raises(ValueError, match="different seeds"):
        comparisons(*(runs.read(place / f"normal-{seed}/evaluation-quick") for seed in (0, 1)))
    assert invoke("evaluate", "normal-1", "--overwrite").exit_code == 0


def test_a_run_without_noise_is_evaluated_with_some(place):
    settings = {"data": "npz:tiny.npz", "epochs": 1, "milestones": (), "sigma": 0.0, "validation": 0.3}
    train(preset("digits", "normal", **settings, test_sigmas=(0.0, 0.3)), place / "silent")
    shown = invoke("evaluate", "silent")
    assert shown.exit_code == 0, (shown.output, shown.exception)
    assert "gaussian 0.3/prediction" in table.read(place / "silent/evaluation-quick/images.npz")[0]


def test_torchrun_ranks_write_the_same_file(place):
    expected = (place / "normal-0/evaluation-quick/images.npz").read_bytes()
    shutil.copytree(place / "normal-0", place / "shared", ignore=shutil.ignore_patterns("evaluation-*"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "robustfast"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, "evaluate", "shared", "--batch-size", "256"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (place / "shared/evaluation-quick/images.npz").read_bytes() == expected
    assert done.stdout.count("Page:") == 1


def test_a_model_of_ones_own(place, monkeypatch):
    (place / "own.py").write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "from evaluated_models import Net\n"
        "def make(): return Net(classes=3)\n"
        "def nothing(): return 3\n"
    )
    save_file(Net(classes=3, seed=8).state_dict(), place / "own.safetensors")
    arguments = ("evaluate", "--model", "own:make", "--weights", "own.safetensors", "--data", "npz:tiny.npz")
    shown = invoke(*arguments, "--out", "own", "--mean", "0.4", "--pixel-std", "0.3", "--training-sigma", "0.2")
    assert shown.exit_code == 0, (shown.output, shown.exception)
    columns, _ = table.read(place / "own/images.npz")
    net = Net(classes=3, seed=8).eval()
    _, test, _ = data.load("npz:tiny.npz")
    with torch.no_grad():
        expected = net((test.pixels / 255 - 0.4) / 0.3).argmax(1)
    assert columns["clean/prediction"][:, 0].tolist() == expected.tolist() and "features/clean" in columns
    for change, message in (
        (["--model", "own:none"], "--model own:none: expected package.module:factory"),
        (["--model", "nowhere"], "--model nowhere: expected package.module:factory"),
        (["--model", "own:nothing"], "expected a torch.nn.Module, got int"),
        (
            ["--weights", "normal-0/model.safetensors"],
            r"model\.safetensors: not this model's weights: .*Missing",
        ),
        (["--weights", "own.py"], r"own\.py: not this model's weights"),
        (["--mean", "0.4"], "--mean, --pixel-std: expected both or neither"),
    ):
        failed = invoke(*arguments, "--out", "other", *change)
        assert re.search(message, str(failed.exception)), failed.exception
    assert not (place / "other").exists()
    for arguments, message in (
        (["evaluate"], "expected folders of runs, or --model"),
        (["evaluate", "--model", "own:make"], "--data: expected with --model"),
        (["evaluate", "normal-0", "--out", "own", "--mean", "0"], "^--mean, --out: expected with --model alone"),
        (["evaluate", "normal-0", "--suite", "huge"], "suite: expected one of quick, paper, full"),
        (["evaluate", "normal-0", "--data", "digits"], r"digits: the model takes images .* of classes .*, got"),
        (["compare", "own.py", "normal-0"], "no finished evaluation; make one with: robustfast evaluate"),
    ):
        assert re.search(message, str(invoke(*arguments).exception)), message


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.titles, self.open = {}, [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.sources += [value for name, value in attributes if name in ("src", "href", "srcset")]
        if tag == "svg" and ("role", "img") in attributes:
            self.titles.append(dict(attributes)["aria-label"])


FIGURES = (
    "Accuracy against noise", "Flip rate against noise", "Survival, gaussian 0.2", "Survival, uniform 0.2",
    "Curvature against survival", "The published estimate depends on its step", "Certified accuracy",
    "Accuracy under attack, L∞", "Accuracy under attack, L2", "Reliability, clean", "Reliability, gaussian 0.2",
    "Distance of clean features from their centroid", "Distance of noisy features from the clean centroid",
    "Distance of the centroid from the nearest boundary",
)  # fmt: skip


def test_page_holds_everything_and_fetches_nothing(place):
    text = (place / "paper.html").read_text()
    page = Page(text)
    assert "script" not in page.tags and "link" not in page.tags and "iframe" not in page.tags
    assert all(source.startswith("data:image/png;base64,") for source in page.sources) and page.sources
    assert "http" not in re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]*", "", text) and "@import" not in text
    assert [title for title in FIGURES if title not in page.titles] == []
    for projection in ("two principal components", "t-SNE"):
        assert sum(projection in title for title in page.titles) == 2
    audit = text[text.index("Audit of the attacks") :]
    checks = (
        "¼ of the steps", "smaller radius", "black box", "radius 0", "move / ε",
        "no gradient",
    )  # fmt: skip
    assert all(f"<th>{check}</th>" in audit for check in checks) and audit.count("<td>normal, linf") == 3
    for name in ("normal-0", "discriminative-0"):
        about = disk.read_json(place / name / "evaluation-paper/results.json")["about"]
        assert about["model"] in text
    assert "nan" not in re.sub(r"base64,[^\"]*", "", text).lower()
    quick = (place / "page.html").read_text()
    settings = [disk.read_json(place / f"normal-{seed}/evaluation-quick/results.json")["summary"]["settings"][0]
                for seed in (0, 1)]  # fmt: skip
    assert f"{50 * sum(setting['accuracy'] for setting in settings):.1f}" in quick
    assert "<th>over seeds" in quick and "2 seeds" in quick
    assert "<th>over seeds" not in text and "<b>" not in text, "one seed has no spread, and carries no winner"


def test_page_escapes_names(place):
    model = runs.read(place / "normal-0/evaluation-quick")._replace(group="<b>bold</b>")
    text = render([model], title="<i>", classes=["<u>", "b", "c"], provenance={"a": "<s>"}, sigma=0.2)
    assert not any(tag in text for tag in ("<b>bold", "<i>", "<u>", "<s>"))


def test_worst_images_come_first(place):
    columns, _ = table.read(place / "normal-0/evaluation-quick/images.npz")
    rows = worst_images(columns, "gaussian 0.4")
    right = (columns["gaussian 0.4/prediction"] == columns["label"][:, None]).sum(1)
    assert right[rows].tolist() == sorted(right)[: len(rows)]


# A window of headless Chromium is not as narrow as a phone, a frame in it is: it tells the page around it what it is.
PROBE = """<script>onload = () => parent.postMessage(JSON.stringify([
document.documentElement.scrollWidth <= window.innerWidth,
[...document.querySelectorAll('svg[role=img]')].map(s => Math.round(s.getBoundingClientRect().width)),
[...document.images].every(i => i.complete && i.naturalWidth > 0)]), '*')</script>"""
FRAME = """<title>?</title><script>onmessage = event => { document.title = event.data }</script>
<iframe src="page.html" width="%d" height="900"></iframe>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [1200, 390])
def test_page_in_a_browser(place, tmp_path, width):
    text = (place / "paper.html").read_text()
    (tmp_path / "page.html").write_text(text.replace("</body>", PROBE + "</body>"))
    (tmp_path / "frame.html").write_text(FRAME % width)
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    flags += " disable-component-update disable-sync hide-scrollbars"
    flags += f" user-data-dir={tmp_path}/profile window-size=1300,900 virtual-time-budget=10000 dump-dom"
    arguments = [CHROMIUM, *(f"--{flag}" for flag in flags.split()), f"file://{tmp_path}/frame.html"]
    shown = subprocess.run(arguments, capture_output=True, text=True)
    title = re.search(r"<title>(\[.*?\])</title>", shown.stdout)
    assert title, shown.stderr
    fits, widths, loaded = json.loads(title[1])
    assert fits and loaded, "nothing is wider than the window but what scrolls within it"
    assert len(widths) == len(FIGURES) + 4 and min(widths) > 300, "projections of two models besides"


def test_code_of_the_documentation_runs(place, capsys):
    classifier = load_classifier("discriminative-0")
    _, test, _ = data.load("npz:tiny.npz")
    names = {"net": classifier.model, "images": test.pixels / 255, "labels": test.labels, "ids": torch.arange(40)}
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/evaluation.md").read_text(), re.M | re.S)
    for block in blocks:
        exec(compile(block, "docs/evaluation.md", "exec"), names)
    assert len(blocks) == 2 and names["counts"].max() <= 10 and (place / "mine/images.npz").exists()


def test_streamed_folders(place):
    rng = np.random.default_rng(1)
    for i in range(6):
        file = place / f"photos/{'ab'[i % 2]}/{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9 + i, 12, 3), dtype=np.uint8)).save(file)
    (place / "colour.py").write_text(
        "import torch\n"
        "def make(): return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))\n"
    )  # fmt: skip
    shown = invoke(
        "evaluate", "--model", "colour:make", "--data", "images:photos", "--size", 8, "--out", "photographed"
    )
    assert shown.exit_code == 0, (shown.output, shown.exception)
    columns, about = table.read(place / "photographed/images.npz")
    assert columns["label"].tolist() == [0, 0, 0, 1, 1, 1] and about["image"] == [3, 8, 8]
    assert "data:image/png" in (place / "photographed/report.html").read_text()
