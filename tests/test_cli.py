"""The command line from end to end, and the imports it does and does not need."""

import io
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import robustfast
from robustfast import cli, disk
from robustfast.commands import runs
from robustfast.training import Config, comparison, data, files, loop, preset, train

ROOT = Path(__file__).parents[1]
runner = CliRunner()


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    """A working directory that holds tiny.npz alone, and one thread, as the demo's runs have."""
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 2
    images = (rng.integers(0, 200, (40, 8, 8)) + 55 * labels[:, None, None]).astype(np.uint8)
    np.savez(tmp_path / "tiny.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


TRAIN = ("train", "--data", "npz:tiny.npz", "--epochs", "2", "--out", "run", "--test-sigmas", "0.2", "--flip")


def invoke(*arguments):
    return runner.invoke(cli.app, arguments)


def test_train_then_evaluate(run_dir):
    shown = invoke(*TRAIN, "--milestones", "1", "--milestones", "2")
    assert shown.exit_code == 0, shown.output
    results = disk.read_json(run_dir / "run" / files.RESULTS)
    config = results["config"]
    assert config["flip"] is True and config["milestones"] == [1, 2] and config["method"] == "discriminative"
    for point in results["test"]:
        assert f"{100 * point['accuracy']:.2f}" in shown.output
    assert f"best epoch {results['best_epoch']} of 2" in shown.output

    again = invoke("evaluate", "run", "--page", "page.html")
    assert again.exit_code == 0, again.output
    settings = disk.read_json(Path("run/evaluation-quick/results.json"))["summary"]["settings"]
    assert settings[0]["accuracy"] == results["test"][0]["accuracy"], "of clean images"
    assert f"{100 * settings[0]['accuracy']:.2f}" in again.output and Path("page.html").exists()


def test_train_resumes_where_it_was_interrupted(run_dir, monkeypatch):
    whole = train(preset("digits", data="npz:tiny.npz", epochs=3), run_dir / "whole")
    arguments = ("train", "--data", "npz:tiny.npz", "--epochs", "3", "--out", "cut")
    train_epoch = loop.train_epoch

    def interrupted(setup, run):
        if len(run.history) == 1:
            raise KeyboardInterrupt
        return train_epoch(setup, run)

    monkeypatch.setattr(loop, "train_epoch", interrupted)
    shown = invoke(*arguments)
    assert shown.exit_code == 130 and "robustfast train --resume --out cut" in shown.output
    monkeypatch.setattr(loop, "train_epoch", train_epoch)
    assert "--resume goes on with it, --overwrite replaces it" in str(invoke(*arguments).exception)
    assert f"lr: the run in cut has {whole['config']['lr']}" in str(
        invoke("train", "--resume", "--out", "cut", "--lr", "1").exception
    )
    shown = invoke("train", "--resume", "--out", "cut", "--epochs", "3")
    assert shown.exit_code == 0, shown.output
    results = disk.read_json(run_dir / "cut" / files.RESULTS)
    assert results["history"] == whole["history"] and results["test"] == whole["test"]


def test_default_folder_and_threads(run_dir):
    arguments = ("train", "--data", "npz:tiny.npz", "--epochs", "1", "--method", "noisy", "--seed", "7")
    shown = invoke(*arguments, "--threads", "2")
    assert shown.exit_code == 0, shown.output
    assert disk.read_json(Path("runs/digits-noisy-7") / files.RESULTS)["config"]["threads"] == 2
    assert torch.get_num_threads() == 1, "restored"


def test_every_setting_is_an_option():
    shown = runner.invoke(cli.app, ["train", "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    for name in Config().as_json():
        assert f"--{name.replace('_', '-')} " in shown, name


def test_demo_and_going_on_with_it(run_dir, monkeypatch):
    monkeypatch.setattr(cli, "METHODS", ("noisy", "discriminative"))
    arguments = ("demo", "--epochs", "2", "--seeds", "1", "--workers", "1", "--out", "demo", "--suite", "quick")
    config = preset("digits", "discriminative", epochs=2, threads=1)

    def interrupt(record):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, Path("demo/runs/discriminative-0"), interrupt)
    shown = invoke(*arguments)
    assert shown.exit_code == 0, shown.output
    content = disk.read_json(run_dir / "demo" / files.RESULTS)
    assert {point["sigma"] for point in content["summary"]} >= {0.0, 0.15, 0.25, 0.4, 0.6}
    assert len(content["runs"]) == 2 and all(method in shown.output for method in cli.METHODS)
    assert all(f"{100 * point['mean']:.1f}" in shown.output for point in content["summary"])
    assert "±" not in shown.output and "2 of 2" in shown.output, "one seed has no spread, a pipe gets lines"
    assert "noisy" in (run_dir / "demo" / "report.html").read_text()
    assert (run_dir / "demo" / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert content["runs"][1]["history"] == train(config)["history"], "no trace of interruption or neighbours"
    documented = (ROOT / "docs" / "results.md").read_text().partition("field of the demo")[2]
    assert all(f"| `{field}` |" in documented for field in content)

    files.remove_run(Path("demo"))
    monkeypatch.setattr(comparison, "compare", lambda configs, *rest: [loop.resume(folder) for folder in rest[-1]])
    monkeypatch.setattr(cli, "_demo_page", lambda *arguments: None)
    again = invoke(*arguments)
    assert "2 of 2 runs have finished before; --overwrite trains them anew." in again.output
    assert disk.read_json(run_dir / "demo" / files.RESULTS)["runs"] == content["runs"]


def test_the_demo_begun_anew_keeps_no_old_figures(run_dir, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison, "compare", interrupted)
    Path("demo/runs/noisy-0").mkdir(parents=True)
    kept = [Path("demo/mine.txt"), Path("demo/runs/noisy-0/mine.txt")]
    for path in (Path("demo") / files.RESULTS, Path("demo/runs/noisy-0") / files.STATE, *kept):
        path.touch()
    shown = invoke("demo", "--overwrite")
    assert shown.output == "Interrupted. To go on: the same command again, without --overwrite\n"
    assert sorted(path for path in Path("demo").rglob("*") if path.is_file()) == kept


def test_the_demo_does_not_go_on_with_other_settings(tmp_path):
    train(preset("digits", epochs=1, threads=1), tmp_path)
    with pytest.raises(ValueError, match=f"^{tmp_path} holds a run of other settings: overwrite it, or"):
        comparison.train_or_go_on(preset("digits", epochs=2), tmp_path)


def hear_interrupts():
    """A shell's background jobs, these tests among them, are started deaf to Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start_demo(out, workers):
    """A demo in a process group of its own, all of whose workers have begun a run."""
    command = [sys.executable, "-m", "robustfast", "demo", "--epochs", "300", "--workers", str(workers), "--out", out]
    demo = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=True, preexec_fn=hear_interrupts)  # fmt: skip
    while len(list(out.glob(f"runs/*/{files.STATE}"))) < workers:
        assert demo.poll() is None, demo.stdout.read()
        time.sleep(0.05)
    return demo


def test_one_interruption_ends_the_demo_and_its_workers(tmp_path):
    """Ctrl-C reaches the whole group. The pipe ends when the last process that holds it has."""
    demo = start_demo(tmp_path, workers=2)
    os.killpg(demo.pid, signal.SIGINT)
    shown, _ = demo.communicate()
    assert demo.returncode == 130 and not (tmp_path / files.RESULTS).exists()
    assert shown.splitlines() == ["Interrupted. To go on: the same command again"]


def test_workers_end_with_the_demo(tmp_path):
    demo = start_demo(tmp_path, workers=1)
    demo.kill()
    assert "Traceback" not in demo.communicate()[0]


def result(method, *accuracies):
    return {
        "config": {"method": method},
        "test": [{"sigma": sigma, "accuracy": value} for sigma, value in zip((0.0, 0.5), accuracies, strict=True)],
    }


def test_summary_is_mean_and_sample_deviation():
    summary = comparison.summarise([result("a", 0.5, 0.1), result("b", 1.0, 0.2), result("a", 0.7, 0.1)])
    assert [(point["method"], point["sigma"], point["runs"]) for point in summary] == [
        ("a", 0.0, 2), ("a", 0.5, 2), ("b", 0.0, 1), ("b", 0.5, 1),
    ]  # fmt: skip
    assert [point["mean"] for point in summary] == pytest.approx([0.6, 0.1, 1.0, 0.2])
    assert [point["std"] for point in summary] == pytest.approx([np.std([0.5, 0.7], ddof=1), 0, 0, 0])


def test_a_winner_is_one_that_the_spread_carries():
    def summary(**results):
        return [
            {"method": method, "sigma": 0.5, "mean": mean, "std": std, "runs": runs}
            for method, (mean, std, runs) in results.items()
        ]

    assert comparison.winners(summary(a=(0.9, 0.01, 3), b=(0.85, 0.03, 3), c=(0.1, 0.0, 3))) == {("a", 0.5)}
    assert comparison.winners(summary(a=(0.9, 0.03, 3), b=(0.85, 0.03, 3), c=(0.1, 0.0, 3))) == set()
    assert comparison.winners(summary(a=(0.9, 0.0, 1), b=(0.85, 0.0, 1))) == set()


def test_the_demos_table_is_whole_in_80_columns(capsys):
    summary = [
        {"method": method, "sigma": sigma, "mean": 0.987, "std": 0.012, "runs": 3}
        for method in cli.METHODS
        for sigma in (0.0, 0.15, 0.25, 0.4, 0.6)
    ]
    Console(width=80).print(cli._summary_table(summary))
    shown = capsys.readouterr().out
    assert all(f"{method} " in shown for method in cli.METHODS) and shown.count("98.7 ± 1.2") == 5 * len(cli.METHODS)


def test_a_failed_run_can_be_begun_anew(run_dir):
    failed = invoke(*TRAIN, "--lr", "1e20")
    assert isinstance(failed.exception, FloatingPointError) and "--overwrite replaces" in str(failed.exception)
    assert isinstance(invoke(*TRAIN).exception, FileExistsError)
    shown = invoke(*TRAIN, "--overwrite")
    assert shown.exit_code == 0, shown.output
    assert disk.read_json(Path("run") / files.RESULTS)["config"]["lr"] < 1


@pytest.mark.parametrize(
    "arguments",
    [["train", "--out", "file/run"], ["demo", "--out", "file/demo"], ["evaluate", "run", "--page", "file/page.html"]],
)
def test_a_folder_that_cannot_be_written_is_noticed_first(run_dir, monkeypatch, arguments):
    Path("file").touch()
    for place, name in ((loop, "prepare"), (comparison, "compare"), (runs, "evaluate")):
        monkeypatch.setattr(place, name, None)
    with pytest.raises(OSError, match=r"cannot be written to: .*: 'file"):
        runner.invoke(cli.app, arguments, catch_exceptions=False)


def test_an_interruption_before_the_first_epoch_promises_nothing(run_dir, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "load", interrupted)
    shown = invoke(*TRAIN)
    assert shown.exit_code == 130 and shown.output == "Interrupted.\n"


def test_brackets_and_blanks_in_a_path(run_dir, monkeypatch):
    out = "a [bold]run[/bold] with a name that is longer than the eighty columns of a narrow terminal"
    shown = invoke(*TRAIN[:6], out, *TRAIN[7:])
    assert f"Results and model: {out}\n" in shown.output


def test_resume_keeps_to_the_run(run_dir):
    invoke(*TRAIN)
    for more, message in ((["--preset", "cifar10"], "--preset: the run in run keeps"), (["--overwrite"], "exclude")):
        assert message in str(invoke("train", "--resume", "--out", "run", *more).exception)
    shown = invoke("train", "--resume", "--out", "run", "--threads", "1")
    assert shown.output.startswith("Going on after epoch 2 of 2, on 1 thread(s) as the run began.\n")
    assert "threads: the run in run has 1" in str(
        invoke("train", "--resume", "--out", "run", "--threads", "2").exception
    )


def test_progress_on_a_terminal_begins_at_the_epoch_reached(monkeypatch):
    screen = Console(file=io.StringIO(), force_terminal=True, width=100)
    monkeypatch.setattr(cli, "console", screen)
    with cli._progress("normal", total=40, done=17) as step:
        pass
    assert "17/40" in screen.file.getvalue()
    with cli._progress("normal", total=40, done=17) as step:
        step(18, "normal  loss 0.1")
    assert "normal  loss 0.1" in screen.file.getvalue() and "18/40" in screen.file.getvalue()


def test_warnings_of_the_data_are_one_line_on_stderr(run_dir, monkeypatch, capsys):
    arrays = dict(np.load("tiny.npz"))
    np.savez("tiny.npz", **{name: a + 1 if name[0] == "y" else a for name, a in arrays.items()})
    monkeypatch.setattr(sys, "argv", ["robustfast", *TRAIN])
    monkeypatch.setattr(warnings, "showwarning", None)
    with pytest.raises(SystemExit) as exit, warnings.catch_warnings():
        warnings.simplefilter("default")
        cli.main()
    assert exit.value.code == 0
    assert capsys.readouterr().err == "robustfast: tiny.npz: no training images of class 0; labels count from 0\n"
    cli._show_warning("old", DeprecationWarning, "/elsewhere.py", 3)
    assert capsys.readouterr().err == "/elsewhere.py:3: DeprecationWarning: old\n"


@pytest.mark.parametrize(("rank", "name"), [("0", "robustfast"), ("3", "robustfast (rank 3)")])
def test_a_rank_says_which_it_is(run_dir, monkeypatch, rank, name):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(sys, "argv", ["robustfast", "train", "--lr", "-1"])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert str(exit.value.code).startswith(f"{name}: lr: expected")


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_shows_defaults(option):
    shown = runner.invoke(cli.app, ["train", option], env={"COLUMNS": "200", "TERM": "dumb"}).output
    for default in ("0.02; cifar10: 0.001", "20, 30; cifar10: 60, 120, 160", "runs/PRESET-METHOD-SEED", "(digits)"):
        assert default in shown


def test_version():
    shown = invoke("--version")
    assert shown.exit_code == 0 and shown.output == f"robustfast {robustfast.__version__}\n"


def test_imports_are_light_and_go_one_way():
    code = (
        "import sys, robustfast.evaluation\n"
        "print([name for name in sys.modules if name.startswith(('robustfast.training', 'robustfast.bench'))])\n"
        "import robustfast.cli\n"
        "heavy = ('triton', 'sklearn', 'matplotlib', 'PIL', 'scipy', 'torch._dynamo', 'torch._inductor')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert shown.stdout == "[]\n[]\n", shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train", "--data", "mnist"],
            f"data: expected {data.SOURCES}, got 'mnist'",
        ),
        (["train", "--data", "npz:nowhere.npz"], "nowhere.npz: No such file or directory"),
        (["train", "--resume", "--out", "nowhere"], "nowhere: no run to go on with: there is no state.safetensors"),
        (["train", "--backend", "fast"], "backend: expected auto, cuda, triton, cpu, reference, got 'fast'"),
    ],
)
def test_mistakes_are_one_line(run_dir, monkeypatch, arguments, message):
    monkeypatch.setattr(sys, "argv", ["robustfast", *arguments])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == f"robustfast: {message}"


def test_the_package_works_without_the_extra_and_the_command_line_names_it():
    code = (
        "import sys\n"
        "for name in ('typer', 'rich', 'sklearn', 'matplotlib', 'safetensors', 'PIL'): sys.modules[name] = None\n"
        "import robustfast\n"
        "print(robustfast.DiscriminativeLoss(), 'robustfast.training' in sys.modules)\n"
        "import robustfast.cli\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert shown.stdout.startswith("DiscriminativeLoss(") and shown.stdout.endswith("False\n")
    assert shown.returncode == 1
    assert shown.stderr == "robustfast: typer is not installed; install it with: pip install '.[train]'\n"


@pytest.mark.parametrize("start", [("-m", "robustfast"), ("-c", "import robustfast_command as r; r.main()")])
@pytest.mark.parametrize(
    ("found", "status", "said"),
    [
        (
            "raise ModuleNotFoundError(name=name)",
            1,
            "robustfast: PyTorch is not installed; install it with: pip install torch\n",
        ),
        ("raise KeyboardInterrupt", 130, "Interrupted.\n"),
    ],
)
def test_an_import_that_fails_or_is_interrupted_is_no_traceback(start, found, status, said, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Finder:\n"
        "    def find_spec(name, path, target=None):\n"
        f"        if name == 'torch': {found}\n"
        "sys.meta_path.insert(0, Finder)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    shown = subprocess.run([sys.executable, *start], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (shown.returncode, shown.stderr) == (status, said)
    assert 'robustfast = "robustfast_command:main"' in (ROOT / "pyproject.toml").read_text()


def test_a_missing_package_is_named_as_it_is_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"^scikit-learn is not installed; .*'\.\[train\]'"):
        data.load("digits")
