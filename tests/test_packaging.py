"""What a build takes along and records, and what an import says and finds where nothing was built."""

import ast
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from graphlib import TopologicalSorter
from pathlib import Path
from types import SimpleNamespace

import pytest

from robustfast import backends, extension

ROOT = Path(__file__).resolve().parents[1]
SETUP = runpy.run_path(str(ROOT / "setup.py"))
# Without the finder of an editable installation, which would show these tests the checkout.
SHOW = """
import sys
editable = [f for f in sys.meta_path if str(getattr(f, "__module__", "")).startswith("__editable__")]
sys.meta_path = [finder for finder in sys.meta_path if finder not in editable]
import robustfast
print(robustfast.__file__, robustfast.backends()["cpu"])
"""


@pytest.fixture
def clone(tmp_path):
    """The package's Python files and the extension's sources, where nothing is built."""
    folder = tmp_path / "clone"
    ignore = shutil.ignore_patterns("*.so", extension.RECORD, "__pycache__")
    shutil.copytree(ROOT / "robustfast", folder / "robustfast", ignore=ignore)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    return folder


@pytest.fixture
def installed(tmp_path):
    """A folder of installed packages with this robustfast, as pip leaves it."""
    if backends()["cpu"] is not None:
        pytest.skip(backends()["cpu"])
    site = tmp_path / "site"
    shutil.copytree(ROOT / "robustfast", site / "robustfast", ignore=shutil.ignore_patterns("__pycache__"))
    binary = Path(sys.modules["robustfast._C"].__file__)
    shutil.copy(binary, site / "robustfast" / binary.name)
    record(site, None)
    (site / "robustfast-0.dist-info").mkdir()
    (site / "robustfast-0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: robustfast\nVersion: 0\n")
    return site


def record(folder, missing, **other):
    content = {"missing": {"cpu": missing, "cuda": missing}, "sources": extension.digest(ROOT / "csrc")} | other
    (folder / "robustfast" / extension.RECORD).write_text(json.dumps(content))


def cpu_backend(clone, *site):
    """What README's check says in the clone: why the CPU's kernels cannot run, or None as text."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, site))}
    done = subprocess.run([sys.executable, "-c", SHOW], cwd=clone, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    file, _, reason = done.stdout.strip().partition(" ")
    assert Path(file).parent == clone / "robustfast"
    return reason


def test_clone_finds_the_installed_extension(clone, installed):
    assert cpu_backend(clone, installed) == "None"


def test_clone_refuses_an_extension_of_other_sources(clone, installed):
    (clone / "csrc/cpu/new.h").write_text("// an op that the installed one lacks\n")
    reason = cpu_backend(clone, installed)
    assert reason.startswith(f"{installed / 'robustfast'} was built from other sources") and extension.BUILD in reason


@pytest.mark.parametrize("where", ["clone", "installed"])
def test_what_was_missing_at_build_time(clone, installed, where):
    record({"clone": clone, "installed": installed}[where], "no C++ compiler was found (g++ ...)")
    reason = cpu_backend(clone, installed)
    because = "robustfast._C was not built, since no C++ compiler was found (g++ ...); then build it again"
    assert reason == f"{because}: {extension.BUILD}"


def test_extension_that_cannot_be_loaded(clone):
    (clone / "robustfast/_C.so").write_text("no library")
    reason = cpu_backend(clone)
    assert reason.startswith("robustfast._C cannot be loaded (") and reason.endswith(extension.BUILD)


def test_nothing_built_and_nothing_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(extension, "HERE", tmp_path)
    monkeypatch.setattr(extension, "find_spec", lambda name: None)
    monkeypatch.setattr(extension.metadata, "distributions", lambda name: [])
    assert extension.problem.__wrapped__() == f"robustfast._C is not built in {tmp_path}; build it: {extension.BUILD}"


def test_why_there_is_no_cuda(monkeypatch, tmp_path):
    module = SimpleNamespace(__file__=str(tmp_path / "_C.so"))
    monkeypatch.setattr(extension, "import_module", lambda name: module)
    assert extension.without_cuda().startswith("the extension was built without CUDA; build it again")
    (tmp_path / extension.RECORD).write_text(json.dumps({"missing": {"cuda": "PyTorch 2.13 has no CUDA"}}))
    assert "without CUDA (PyTorch 2.13 has no CUDA); build it again" in extension.without_cuda()


def test_build_without_a_compiler(tmp_path):
    """The package builds, tagged for this machine, and says afterwards what was missing."""
    environment = os.environ | {"CXX": "no-such-compiler"}
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path, "build", "--build-base", tmp_path]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = tmp_path.glob("lib.*/robustfast")  # of this machine: a package of Python alone lies in lib
    missing = json.loads((built / extension.RECORD).read_text())["missing"]
    assert missing["cpu"] == missing["cuda"] == "CXX='no-such-compiler' is not a command"


def test_compiler(monkeypatch):
    monkeypatch.setenv("CXX", f"ccache {sys.executable} --an 'argument of words'")
    assert SETUP["compiler"]() == [sys.executable, "--an", "argument of words"]
    assert SETUP["compiler_problem"]() is None
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    assert "no C++ compiler was found (g++ " in SETUP["compiler_problem"]()


def test_missing_pybind11(monkeypatch):
    monkeypatch.setitem(sys.modules, "pybind11", None)
    assert SETUP["pybind11_problem"]().startswith("pybind11 was not installed (")


def toolkit(folder, version="13.0", compiles=True, headers=True):
    """A CUDA toolkit as setup.py looks at it."""
    (folder / "bin").mkdir(parents=True)
    trial = "exit 0" if compiles else "echo unsupported host compiler >&2; exit 1"
    (folder / "bin/nvcc").write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo "release {version}, V1" || {{ {trial}; }}\n'
    )
    (folder / "bin/nvcc").chmod(0o755)
    if headers:
        (folder / "include").mkdir()
        (folder / "include/cuda_runtime_api.h").touch()
    return folder


def test_toolkit_behind_a_wrapper(monkeypatch, tmp_path):
    """nvcc on the PATH lies where no headers are; the toolkit that it links to has them."""
    home = toolkit(tmp_path / "toolkit")
    (tmp_path / "usr/bin").mkdir(parents=True)
    (tmp_path / "usr/bin/nvcc").symlink_to(home / "bin/nvcc")
    monkeypatch.setenv("PATH", f"{tmp_path / 'usr/bin'}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("CUDA_HOME", "")
    assert SETUP["find_toolkit"]("13.0") is None
    assert os.environ["CUDA_HOME"] == str(home)


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"headers": False}, "include/cuda_runtime_api.h is not there"),
        ({"version": "12.8"}, "is of CUDA 12, PyTorch of 13.0"),
        ({"compiles": False}, "compiles nothing: unsupported host compiler"),
    ],
)
def test_toolkit_that_does_not_fit(monkeypatch, tmp_path, options, reason):
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "toolkit", **options)))
    assert reason in SETUP["find_toolkit"]("13.0")


def test_source_distribution_holds_what_a_clone_holds(tmp_path):
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path, "sdist", "-d", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as content:
        packed = {name.partition("/")[2] for name in content.getnames()}
    tracked = {name for name in listed.stdout.split("\n") if (ROOT / name).is_file()}
    assert {name for name in tracked - packed if not name.startswith((".ci/", ".gitignore"))} == set()
    assert not [name for name in packed if name.endswith((".so", ".pyc", extension.RECORD))]


def test_every_setuptools_reads_the_project():
    """Releases disagree about these two keys: before 77 they are refused, or demanded in another form."""
    project = (ROOT / "pyproject.toml").read_text().partition("[project]")[2].partition("\n[")[0]
    keys = {line.partition("=")[0].strip() for line in project.splitlines()}
    assert "dependencies" in keys and not {"license", "license-files"} & keys


def test_no_circles_of_imports():
    """Of the package's modules and folders, imports within functions too: each can be read after those it imports."""
    package = ROOT / "robustfast"
    parts = {path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    imports: dict[str, set[str]] = {part: set() for part in parts}
    for file in package.rglob("*.py"):
        part = file.relative_to(package).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in getattr(node, "names", []) if isinstance(alias, ast.alias)]
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{name}" for name in names]
            found = {name.split(".")[1] for name in names if name.startswith("robustfast.")}
            imports[part] |= found & (parts - {part})
    assert {"evaluation", "losses"} <= imports["training"]
    tuple(TopologicalSorter(imports).static_order())  # raises CycleError, which names the circle


def included(source: Path) -> set[str]:
    """What a source of csrc includes of csrc, directly or not."""
    found, left = set(), [source]
    while left:
        names = set(re.findall(r'^#include "(.+)"', left.pop().read_text(), re.MULTILINE))
        beside = {name for name in names if (ROOT / "csrc" / name).is_file()} - found
        found |= beside
        left += [ROOT / "csrc" / name for name in beside]
    return found


def test_cuda_includes_nothing_of_the_cpu():
    csrc = ROOT / "csrc"
    sources = [*csrc.glob("ops/*_cuda.cpp"), *csrc.glob("cuda/*.cu")]
    found = set().union(*map(included, sources))
    assert "cuda/kernels.h" in found and "ops/tensors.h" in found
    assert not {name for name in found if name.startswith("cpu/") or name == "ops/memory.h"}
