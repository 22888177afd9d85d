from collections.abc import Sequence
from typing import TypedDict

class BuildInfo(TypedDict):
    compiler: str
    torch: str
    cuda_architectures: list[str]
    instruction_sets: list[str]
    instruction_set: str

def build_info() -> BuildInfo: ...
def philox4x32(counter: Sequence[int], key: Sequence[int]) -> list[int]: ...
def box_muller(w0: int, w1: int) -> list[float]: ...
