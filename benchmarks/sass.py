"""The machine code of the CUDA kernels, counted: what docs/performance.md shows of it, from the sources as they are.

python benchmarks/sass.py        # compiles for sm_90a; needs nvcc, and cuobjdump, which comes with Triton too
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

CSRC = Path(__file__).resolve().parents[1] / "csrc"
ARCH = "90a"
LINE = re.compile(r"^\s*/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@!?U?P\d+\s+)?(?P<text>[^;]+?)\s*;", re.MULTILINE)


class Instruction(NamedTuple):
    address: int
    text: str  # without its predicate

    @property
    def name(self) -> str:
        return self.text.split()[0]

    @property
    def registers(self) -> list[str]:
        """Those that it names; of what writes one it is the first."""
        return re.findall(r"\bR\d+", self.text)

    @property
    def writes(self) -> set[str]:
        """What a load, a shuffle or a product fills."""
        if not self.name.startswith(("LD", "SHFL", "HMMA")):
            return set()
        words = 4 if "128" in self.name or self.name.startswith("HMMA") else 2 if ".64" in self.name else 1
        return {f"R{int(self.registers[0][1:]) + word}" for word in range(words)} if self.registers else set()

    @property
    def reads(self) -> set[str]:
        writes_nothing = self.name.startswith(("ST", "BAR", "BRA", "RED", "ISETP", "FSETP"))
        return set(self.registers[0 if writes_nothing else 1 :])

    @property
    def target(self) -> int | None:
        found = re.fullmatch(r"BRA.* (0x[0-9a-f]+)", self.text)
        return int(found[1], 16) if found else None


Code = list[Instruction]


def cuobjdump() -> str | None:
    if found := shutil.which("cuobjdump"):
        return found
    try:
        import triton
    except ImportError:
        return None
    beside = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return str(beside) if beside.exists() else None


def kernels(binary: Path, arch: str = ARCH) -> dict[str, Code]:
    """Mangled names and instructions of what is compiled for an architecture."""
    dumped = subprocess.run(
        [str(cuobjdump()), "-sass", "-arch", f"sm_{arch}", str(binary)], capture_output=True, text=True, check=True
    ).stdout
    found = {}
    for part in dumped.split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        found[name] = [Instruction(int(m["address"], 16), m["text"]) for m in LINE.finditer(body)]
    return found


def kernel(found: dict[str, Code], *parts: str) -> Code:
    """The one kernel whose name has all parts, its own first."""
    names = [name for name in found if re.search(rf"\d{parts[0]}I", name) and all(part in name for part in parts[1:])]
    (name,) = names
    return found[name]


def loops(code: Code) -> list[Code]:
    """Of every backward branch the instructions that it repeats."""
    return [
        [i for i in code if branch.target <= i.address <= branch.address]
        for branch in code
        if branch.target is not None and branch.target < branch.address
    ]


def innermost(code: Code, name: str) -> Code:
    """The shortest loop with an instruction of this name."""
    return min((body for body in loops(code) if count(body, name)), key=len)


def count(code: Code, *names: str) -> int:
    """Instructions of these names, whatever follows a dot unless the name has one."""
    return sum(any(i.name == name or i.name.startswith(name + ".") for name in names) for i in code)


def in_flight(code: Code, name: str) -> int:
    """The most instructions of a name of which none has been waited for, in the order of the code."""
    most, pending = 0, []
    for i in code:
        if any(i.reads & registers for registers in pending):
            pending = []
        if i.name == name or i.name.startswith(name + "."):
            pending.append(i.writes)
            most = max(most, len(pending))
    return most


def waited_for(code: Code, load: str, product: str) -> Code:
    """Loads that an instruction needs before the last of the products that follow them was issued."""
    last = max(k for k, i in enumerate(code) if i.name.startswith(product))
    loads = [(k, i) for k, i in enumerate(code[:last]) if i.name.startswith(load)]
    return [i for k, i in loads if any(i.writes & later.reads for later in code[k + 1 : last])]


def margin_search(found: dict[str, Code]) -> dict[str, str]:
    code = kernel(found, "search_kernel", "8bfloat16", "Lb1")
    step = innermost(code, "HMMA")
    last = max(k for k, i in enumerate(code) if i.name.startswith("HMMA"))
    first_vote = next(k for k, i in enumerate(code) if k > last and i.name.startswith("VOTE"))
    scores = code[last + 1 : first_vote]
    waited, loads = len(waited_for(step, "LDG.E.128", "HMMA")), count(step, "LDG.E.128")
    # Eight warps; 128 bytes of shared memory and 4096 flops of the matrix units a cycle.
    cycles = f"{32 * count(step, 'LDSM')} + {32 * count(step, 'STS.128')}, {8 * count(step, 'HMMA')}"
    return {
        "instructions of a step of 32 columns": f"{len(step)}",
        "its loads that are waited for before the step's products": f"{waited} of {loads}",
        "its cycles of ldmatrix + of stores in shared memory, of the matrix units": cycles,
        "instructions from a tile's last product to the pairs that are compared directly": f"{len(scores)}",
        "of them branches / calls / loads": " / ".join(str(count(scores, name)) for name in ("BRA", "CALL", "LDG")),
    }


def variance(found: dict[str, Code]) -> dict[str, str]:
    code = kernel(found, "variance_kernel", "8bfloat16ELi2ELi8ELb1")
    batch = max((body for body in loops(code) if count(body, "LDG.E.128") >= 8), key=len)
    return {
        "loops around a single shuffle": f"{sum(count(body, 'SHFL') == 1 for body in loops(code))}",
        "16-byte loads of a batch in flight": f"{in_flight(batch, 'LDG.E.128')}",
    }


def variance_backward(found: dict[str, Code]) -> dict[str, str]:
    code = kernel(found, "variance_backward_kernel", "8bfloat16ELi2ELi8")
    return {"16-byte loads in flight": f"{in_flight(code, 'LDG.E.128')}"}


def load_widths(code: Code) -> dict[str, str]:
    wide, half = count(code, "LDG.E.128"), count(code, "LDG.E.64")
    return {"loads of 16 / 8 / fewer bytes": f"{wide} / {half} / {count(code, 'LDG') - wide - half}"}


def finish(found: dict[str, Code]) -> dict[str, str]:
    return load_widths(kernel(found, "finish_kernel", "ILi2Ef"))


def centroids(found: dict[str, Code]) -> dict[str, str]:
    return load_widths(kernel(found, "centroids_kernel", "8bfloat16ELi2ELi8"))


def prepare(found: dict[str, Code]) -> dict[str, str]:
    code = kernel(found, "prepare_kernel", "If")
    a_pass = max((body for body in loops(code) if count(body, "BAR") == 8), key=lambda body: count(body, "LDS"))
    return {
        "64-bit labels in flight": f"{in_flight(code, 'LDG.E.64')}",
        "instructions of a pass of the sort": f"{len(a_pass)}",
        "of them loads from shared memory": f"{count(a_pass, 'LDS')}",
    }


EVIDENCE: dict[str, tuple[Callable[[dict[str, Code]], dict[str, str]], ...]] = {
    "margin_search": (margin_search,),
    "variance": (variance, variance_backward),
    "finish": (finish,),
    "centroids": (centroids,),
    "loss": (prepare,),
}


def evidence(source: str, found: dict[str, Code]) -> dict[tuple[str, str], str]:
    """What the page says of the kernels of a source: {(kernel, what): figures}."""
    return {(of.__name__, what): value for of in EVIDENCE.get(source, ()) for what, value in of(found).items()}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for source in EVIDENCE:
            binary = Path(folder) / f"{source}.cubin"
            options = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", f"-arch=sm_{ARCH}", f"-I{CSRC}", "-cubin"]
            subprocess.run(["nvcc", *options, str(CSRC / f"cuda/{source}.cu"), "-o", str(binary)], check=True)
            for (name, what), value in evidence(source, kernels(binary)).items():
                print(f"{name}: {what}: {value}")


if __name__ == "__main__":
    main()
