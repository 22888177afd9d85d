"""python tests/torch_headers.py FOLDER VERSION...: what compiling against releases of PyTorch needs, of their wheels.

FOLDER/VERSION/include gets the headers of the stable interface, FOLDER/VERSION/symbols.txt the C functions that the
release's library has. The wheels, of an architecture whose wheels are small, are not kept.
"""

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HEADERS = ("torch/headeronly/", "torch/csrc/stable/", "torch/csrc/inductor/aoti_torch/")
WHEEL = ["--no-deps", "--only-binary=:all:", "--platform=manylinux_2_28_aarch64", "--python-version=3.11"]
PREFIXES = ("aoti_torch_", "torch_")


def symbols(library: Path, undefined: bool = False) -> set[str]:
    """The C functions of PyTorch that a library has, or those that it needs."""
    done = subprocess.run(["readelf", "-W", "--dyn-syms", library], capture_output=True, text=True, check=True)
    pattern = re.compile(r"\sGLOBAL\s+\S+\s+(UND|\d+)\s+([^\s@]+)")  # WEAK ones may be missing
    found = {name for index, name in pattern.findall(done.stdout) if (index == "UND") is undefined}
    return {name for name in found if name.startswith(PREFIXES)}


def fetch(version: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as download:
        pip = [sys.executable, "-m", "pip", "download", "-q", *WHEEL, "-d", download, f"torch=={version}"]
        subprocess.run(pip, check=True)
        with zipfile.ZipFile(next(Path(download).glob("*.whl"))) as wheel:
            for name in wheel.namelist():
                inner = name.removeprefix("torch/include/")
                if inner != name and inner.startswith(HEADERS) and inner.endswith(".h"):
                    target = folder / "include" / inner
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(wheel.read(name))
            library = Path(wheel.extract("torch/lib/libtorch_cpu.so", download))
            (folder / "symbols.txt").write_text("\n".join(sorted(symbols(library))) + "\n")


if __name__ == "__main__":
    for version in sys.argv[2:]:
        if not Path(sys.argv[1], version, "symbols.txt").exists():
            print(f"torch {version}: fetching its headers", flush=True)
            fetch(version, Path(sys.argv[1], version))
