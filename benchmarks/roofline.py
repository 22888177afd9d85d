"""What the CUDA kernels would take on a card if all went as well as it can: a model, no measurement.

python benchmarks/roofline.py [--card H100] [--sizes 8192,2048,1000] [--images 512,3,224,224]

Each kernel moves bytes through memory or the L2, multiplies on the matrix units, issues instructions and uses shared
memory, each at the rate of the card's data sheet; the slowest of them is the prediction. Features and W are bfloat16,
every class is in the batch. Launches, latencies and tails are not in it, but whole tiles a multiprocessor are.
"""

from __future__ import annotations

import argparse
import math
from typing import NamedTuple


class Card(NamedTuple):
    """From the data sheets, but for the L2's bandwidth, which they do not give."""

    multiprocessors: int
    clock: float  # Hz, of the sheet's matrix rate
    memory: float  # bytes/s
    matrix: float  # flop/s, bfloat16 with float32 sums, dense
    l2: float  # bytes

    @property
    def l2_rate(self) -> float:
        """Assumed: 35 bytes a cycle and multiprocessor."""
        return 35 * self.multiprocessors * self.clock

    @property
    def issue(self) -> float:
        """Instructions of single threads a second: four warps of 32 a cycle and multiprocessor."""
        return 128 * self.multiprocessors * self.clock


CARDS = {
    "H100": Card(132, 1.83e9, 3.35e12, 989e12, 50e6),
    "H200": Card(132, 1.83e9, 4.8e12, 989e12, 50e6),
    "A100": Card(108, 1.41e9, 2.04e12, 312e12, 40e6),
    "4090": Card(128, 2.52e9, 1.01e12, 165e12, 72e6),
}

# From the SASS for sm_90a (docs/performance.md, "What the machine code shows").
SEARCH_TILE = (64, 128, 32)  # rows, classes, columns of a step
SEARCH_SHARED_CYCLES = 384 + 128  # of a step: ldmatrix and stores
SEARCH_INSTRUCTIONS = 957 * 256  # of a tile's threads between its last product and the pairs compared directly
# Of Triton's on Hopper, from its SASS for sm_90a (docs/performance.md, "The Triton kernels").
TRITON_TILE = (128, 128, 64)
TRITON_CYCLES = 2000 + 700  # of a tile: issue beside its steps, and waiting for its first operands
NOISE_INSTRUCTIONS = 44  # of an element, uint8 to bfloat16


class Kernel(NamedTuple):
    """What a kernel does, in all."""

    name: str
    reads: tuple[str, ...]  # tensors
    writes: tuple[str, ...]
    again: tuple[str, ...] = ()  # read a second time since another kernel: from the L2 if they fit there
    flops: int = 0
    instructions: int = 0
    tiles: int = 0  # dealt to the multiprocessors whole
    tile_cycles: int = 0  # that one tile keeps its multiprocessor's shared memory and, after it, its issue busy


def tensors(n: int, dim: int, num_classes: int) -> dict[str, int]:
    """Bytes of the loss's tensors, by the words of docs/ops.md."""
    rows = min(n, num_classes)
    table = 4 * rows * dim
    return {
        "input": 2 * n * dim,
        "input_noise": 2 * n * dim,
        "target": 8 * n,
        "weight": 2 * num_classes * dim,
        "weight_c": 2 * rows * dim,
        "state": table,
        "slot": 4 * n,
        "pull": 8 * n,
        "centroid": table,
        "mu_grad": table,
        "boundary_grad": table,  # holds mu before
        "classes": 8 * rows,
        "boundary_bias": 4 * rows,
        "grad_input": 2 * n * dim,
        "grad_input_noise": 2 * n * dim,
        "grad_weight": 2 * num_classes * dim,
    }


def loss(n: int, dim: int, num_classes: int) -> list[Kernel]:
    """The launches of a step of a large problem, forward and backward."""
    rows = min(n, num_classes)
    tile_rows, tile_classes, depth = SEARCH_TILE
    row_tiles, steps = math.ceil(rows / tile_rows), math.ceil(dim / depth)
    tables = ("centroid", "mu_grad", "boundary_grad")
    return [
        Kernel("prepare", ("target", "weight"), ("slot", "classes")),
        Kernel("centroids", ("input", "state"), ("boundary_grad", "centroid", "state"), ("weight_c",)),
        Kernel(
            "margin_search", (), (), ("weight",) * row_tiles + ("boundary_grad", "weight_c"),
            flops=4 * rows * num_classes * dim,
            tiles=row_tiles * math.ceil(num_classes / tile_classes),
            tile_cycles=steps * SEARCH_SHARED_CYCLES + SEARCH_INSTRUCTIONS // 128,
        ),
        Kernel("variance", ("input_noise",), ("pull", "mu_grad"), ("input", "centroid")),
        Kernel("finish", (), ("mu_grad", "boundary_grad", "boundary_bias"), (*tables, "weight_c", "weight_c")),
        Kernel(
            "variance_backward", ("input", "input_noise"), ("grad_input", "grad_input_noise"),
            ("pull", "slot", "rows of mu_grad", "rows of centroid", "rows of centroid"),
        ),
        Kernel("margin_backward", (), ("grad_weight", "grad_weight"), ("boundary_grad", "classes", "boundary_bias")),
    ]  # fmt: skip


def search_rates(dim: int, card: Card) -> dict[str, float]:
    """Seconds of one of 4 R K D operations of CUDA's search and of Triton's: what robustfast/searches.py goes by.

    W is bfloat16. In float16 CUDA's takes five products in the place of two: with them alone it is "cuda, float16".
    """
    (rows, classes, depth), issue = SEARCH_TILE, SEARCH_INSTRUCTIONS // 128
    flops_a_cycle = card.matrix / card.multiprocessors / card.clock
    steps, flops = math.ceil(dim / depth), 4 * rows * classes * dim
    cycles = {"cuda": (steps * SEARCH_SHARED_CYCLES + issue) / flops}
    cycles["cuda, float16"] = 2.5 / flops_a_cycle + issue / flops
    rows, classes, depth = TRITON_TILE
    flops = 4 * rows * classes * depth
    loads = 2 * (2 * rows + classes) * depth / 35  # as Card.l2_rate
    of_step = max(flops / flops_a_cycle, loads)
    cycles["triton"] = (math.ceil(dim / depth) * of_step + TRITON_CYCLES) / (flops * dim / depth)
    return {name: of_one / card.multiprocessors / card.clock for name, of_one in cycles.items()}


def noisy_pair(elements: int) -> Kernel:
    """uint8 images to two bfloat16 views."""
    return Kernel("noisy_pair", ("images",), ("clean", "noisy"), instructions=NOISE_INSTRUCTIONS * elements)


def microseconds(kernel: Kernel, sizes: dict[str, int], card: Card) -> dict[str, float]:
    """What each part of a card would take for a kernel alone."""
    memory = sum(sizes[name] for name in kernel.reads + kernel.writes)
    l2 = 0
    for name in set(kernel.again):
        times, size = kernel.again.count(name), sizes[name]
        first = 0 if sizes[name.removeprefix("rows of ")] <= card.l2 else size
        memory, l2 = memory + first, l2 + times * size - first
    seconds = {
        "memory": memory / card.memory,
        "L2": l2 / card.l2_rate,
        "matrix units": kernel.flops / card.matrix,
        "instructions": kernel.instructions / card.issue,
        "shared memory": math.ceil(kernel.tiles / card.multiprocessors) * kernel.tile_cycles / card.clock,
    }
    return {part: 1e6 * value for part, value in seconds.items()}


def table(card_name: str, sizes: tuple[int, int, int], images: tuple[int, ...]) -> str:
    """One markdown row a kernel, with a column for what a GPU will say."""
    card, (n, dim, num_classes), elements = CARDS[card_name], sizes, math.prod(images)
    bytes_of = tensors(n, dim, num_classes)
    of_samples = {f"rows of {name}": 4 * n * dim for name in ("mu_grad", "centroid")}
    bytes_of |= of_samples | {"images": elements, "clean": 2 * elements, "noisy": 2 * elements}
    lines = [f"| kernel, on {card_name} | memory, MB | GFLOP | predicted, µs | by | measured, µs |", "|" + " --- |" * 6]
    total = 0.0
    for kernel in (*loss(n, dim, num_classes), noisy_pair(elements)):
        times = microseconds(kernel, bytes_of, card)
        part = max(times, key=times.__getitem__)
        moved = times["memory"] * card.memory / 1e12
        total += times[part] if kernel.name != "noisy_pair" else 0
        flops = f"{kernel.flops / 1e9:.0f}" if kernel.flops else ""
        lines.append(f"| {kernel.name} | {moved:.0f} | {flops} | {times[part]:.0f} | {part} | |")
    floor = 1e6 * (7 * 2 * n * dim / card.memory + 4 * min(n, num_classes) * num_classes * dim / card.matrix)
    lines.insert(-1, f"| the loss's step; its floor is {floor:.0f} µs | | | {total:.0f} | | |")
    return "\n".join(lines)


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--card", choices=CARDS, action="append", help="default: all")
    parser.add_argument("--sizes", type=numbers, default=(8192, 2048, 1000), help="N,D,K of the loss")
    parser.add_argument("--images", type=numbers, default=(512, 3, 224, 224), help="N,C,H,W of noisy_pair")
    arguments = parser.parse_args()
    print("\n\n".join(table(card, arguments.sizes, arguments.images) for card in arguments.card or CARDS))


if __name__ == "__main__":
    main()
