"""What the kernels would take on a card if all went as well as it can: a model, no measurement.

python benchmarks/roofline.py [--card H100] [--sizes 8192,2048,1000] [--images 512,3,224,224]     # --help: other shapes

Each kernel moves bytes through memory or the L2, multiplies on the matrix units, issues instructions and uses shared
memory, each at the rate of the card's data sheet; the slowest of them is the prediction. Features and W are bfloat16,
every class is in the batch. Launches, latencies and tails are not in it, but whole tiles a multiprocessor are, and that
a kernel of few blocks has no more than these can take.
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


class Step(NamedTuple):
    """Of a search's main loop, by one multiprocessor: what it needs of each part, and a tile beside its steps.

    From the SASS for sm_90a: docs/performance.md, benchmarks/sass.py for CUDA's.
    """

    rows: int
    classes: int
    depth: int
    warps: int
    shared: int  # cycles of loads and stores
    instructions: int
    beside: int  # instructions of a tile that products do not hide
    wait: int = 0  # cycles of a tile for its first operands

    def cycles(self, card: Card, dim: int) -> dict[str, float]:
        """Of a tile, by the part that keeps it waiting."""
        steps, issue = math.ceil(dim / self.depth), self.warps * 32 / 128
        l2 = 2 * (2 * self.rows + self.classes) * self.depth / 35
        parts = {"shared memory": self.shared, "tiles' L2": l2, "tiles' instructions": issue * self.instructions}
        return {part: steps * cycles + issue * self.beside + self.wait for part, cycles in parts.items()}


CUDA_STEP = Step(64, 128, 32, 8, shared=384 + 128, instructions=159, beside=957)
TRITON_STEP = Step(128, 128, 64, 8, shared=768 + 384, instructions=100, beside=1015, wait=700)
# Instructions of an element, from the loops of the SASS for sm_90a.
CENTROIDS, OF_ROW, VARIANCE, VARIANCE_BACKWARD, FINISH, MARGIN_BACKWARD, NORMS = 7, 49, 16, 21, 103, 25, 12
SORT_PASS, SORT_REST = 676 * 1024, 1200 * 1024  # of 8192 entries in one block: a pass, and all else
NOISE = {"add_noise": 36, "add_noise_backward": 40, "noisy_pair": 44, "noisy_pair_backward": 45}
TRITON_NOISE, QUADS, WORDS = 42, 200, 20
RANK = 3  # of a pair of labels
SMALL_PAIR, SMALL_COMPARISON = 4, 60 * 32  # of an element of a pair of rows, and of what a warp does beside for each


class Kernel(NamedTuple):
    """What a kernel does, in all."""

    name: str
    reads: tuple[str, ...]  # tensors
    writes: tuple[str, ...]
    again: tuple[str, ...] = ()  # read a second time since another kernel: from the L2 if they fit there
    flops: int = 0
    instructions: int = 0
    tiles: int = 0  # dealt to the multiprocessors whole
    tile: Step | None = None
    blocks: int = 0  # where these are fewer than the multiprocessors
    runs: str = ""  # the functions of the device, where they have other names than this
    beside: bool = False  # of the kernel before, at the same time

    @property
    def functions(self) -> set[str]:
        """What the sources call it; Triton's with that before it."""
        triton, name = "triton " * self.name.startswith("triton "), self.name.removeprefix("triton ")
        return {triton + function for function in (self.runs or f"{name}_kernel").split()}


def tensors(n: int, dim: int, num_classes: int) -> dict[str, int]:
    """Bytes of the loss's tensors, by the words of docs/ops.md, and its sizes."""
    rows = min(n, num_classes)
    table = 4 * rows * dim
    return {
        "n": n,
        "dim": dim,
        "num_classes": num_classes,
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
        "rows of mu_grad": 4 * n * dim,
        "rows of centroid": 4 * n * dim,
        "norms": 4 * num_classes,
        "keys": 4 * n,
        "counts": 4 * 256 * math.ceil(n / 8192),
        "candidates": 12 * rows * 16 * max(1, math.ceil(132 * 64 / max(rows, 64))),
    }


TABLES = ("centroid", "mu_grad", "boundary_grad")
VARIANCE_BACKWARD_L2 = ("pull", "slot", "rows of mu_grad", "rows of centroid", "rows of centroid")


def passes(num_classes: int) -> int:
    """Of the sort, eight bits of class each."""
    return math.ceil(num_classes.bit_length() / 8)


def sort(of: str, n: int, num_classes: int, entries: tuple[str, ...]) -> list[Kernel]:
    """Entries by class: in one block where they fit it, else by several launches a pass."""
    rounds, tiles = passes(num_classes), math.ceil(n / 8192)
    work = SORT_PASS * rounds * tiles
    if n <= 8192:
        work += SORT_REST
        return [Kernel(of, entries, ("slot",), instructions=work, blocks=1, runs="group_in_block_kernel")]
    keys, some = ("keys",) * rounds, {"instructions": work, "blocks": tiles}
    return [
        Kernel(f"{of}: keys", entries, ("keys", "keys"), blocks=tiles, runs="keys_kernel"),
        Kernel(f"{of}: count, {rounds} times", (), (), keys, runs="count_kernel", **some),
        Kernel(f"{of}: scan, {rounds} times", (), (), ("counts", "counts") * rounds, blocks=1, runs="scan_kernel"),
        Kernel(f"{of}: scatter, {rounds} times", (), (), keys * 4, runs="scatter_kernel", **some),
        Kernel(f"{of}: heads", (), (), ("keys",), blocks=tiles, runs="heads_kernel scan_kernel"),
        Kernel(f"{of}: rows", (), ("slot",), ("keys", "keys"), blocks=tiles, runs="assign_kernel"),
    ]


def search(name: str, n: int, dim: int, num_classes: int, step: Step) -> list[Kernel]:
    rows = min(n, num_classes)
    row_tiles = math.ceil(rows / step.rows)
    return [
        Kernel(
            name, (), (), ("weight",) * row_tiles + ("boundary_grad", "weight_c"), flops=4 * rows * num_classes * dim,
            tiles=row_tiles * math.ceil(num_classes / step.classes), tile=step, runs="search_kernel",
        ),
        Kernel("settle", (), (), ("candidates", *("boundary_grad", "weight_c", "weight_c") * 2)),
    ]  # fmt: skip


def search_rates(dim: int, card: Card) -> dict[str, float]:
    """Seconds of one of 4 R K D operations of CUDA's search and of Triton's: what robustfast/searches.py goes by.

    W is bfloat16. In float16 CUDA's takes five products in the place of two: with them alone it is "cuda, float16".
    """
    cycles = {
        name: max(step.cycles(card, dim).values()) / (4 * step.rows * step.classes * dim)
        for name, step in {"cuda": CUDA_STEP, "triton": TRITON_STEP}.items()
    }
    scores = CUDA_STEP.warps * 32 / 128 * CUDA_STEP.beside / (4 * CUDA_STEP.rows * CUDA_STEP.classes * dim)
    cycles["cuda, float16"] = 2.5 * card.multiprocessors * card.clock / card.matrix + scores
    return {name: of_one / card.multiprocessors / card.clock for name, of_one in cycles.items()}


def cuda(n: int, dim: int, num_classes: int) -> list[Kernel]:
    """The launches of a step of a large problem, forward and backward."""
    rows = min(n, num_classes)
    features, table = n * dim, rows * dim
    first, *others = sort("sort", n, num_classes, ("target",))
    return [
        first._replace(runs="prepare_kernel") if not others else first,
        *others,
        Kernel(
            "norms", ("weight",), ("norms",), instructions=NORMS * num_classes * dim, runs="prepare_kernel",
            beside=not others,
        ),
        Kernel(
            "centroids", ("input", "state"), ("boundary_grad", "centroid", "state"), ("weight_c",),
            instructions=CENTROIDS * features + OF_ROW * table,
        ),
        *search("margin_search", n, dim, num_classes, CUDA_STEP),
        Kernel(
            "variance", ("input_noise",), ("pull", "mu_grad"), ("input", "centroid"),
            instructions=VARIANCE * 2 * features,
        ),
        Kernel(
            "finish", (), ("mu_grad", "boundary_grad", "boundary_bias"), (*TABLES, "weight_c", "weight_c"),
            instructions=FINISH * table,
        ),
        Kernel(
            "variance_backward", ("input", "input_noise"), ("grad_input", "grad_input_noise"), VARIANCE_BACKWARD_L2,
            instructions=VARIANCE_BACKWARD * 2 * features,
        ),
        *(kernel._replace(writes=()) for kernel in sort("sort of boundaries", 2 * rows, num_classes, ())),
        Kernel(
            "margin_backward", (), ("grad_weight", "grad_weight"), ("boundary_grad", "classes", "boundary_bias"),
            instructions=MARGIN_BACKWARD * 2 * table,
        ),
    ]  # fmt: skip


def searches(n: int, dim: int, num_classes: int) -> list[Kernel]:
    """The step that costs where there are many classes, of both backends."""
    of_triton = search("search", n, dim, num_classes, TRITON_STEP)
    return [
        *search("margin_search", n, dim, num_classes, CUDA_STEP),
        *(kernel._replace(name=f"triton {kernel.name}") for kernel in of_triton),
    ]


def small(n: int, dim: int, num_classes: int) -> list[Kernel]:
    """The whole loss in one block, and its backward."""
    rows = min(n, num_classes)
    pairs = rows * num_classes + 2 * n + 2 * rows
    elements = 3 * n * dim + num_classes * dim + 2 * rows * dim
    loads = ("input", "input_noise", "weight", "state", "target")
    return [
        Kernel(
            "small", loads, (*TABLES, "state", "pull"), ("input",) * 2 + ("input_noise",), blocks=1,
            instructions=pairs * (SMALL_PAIR * dim + SMALL_COMPARISON) + 10 * elements,
        ),
        Kernel(
            "small_backward", ("input", "input_noise"), ("grad_input", "grad_input_noise", "grad_weight"),
            VARIANCE_BACKWARD_L2, instructions=VARIANCE_BACKWARD * 2 * n * dim + 12 * rows * num_classes * dim,
        ),
    ]  # fmt: skip


def steps(n: int, dim: int, num_classes: int) -> list[Kernel]:
    """The loss's steps on their own: tables have rows for all classes, and each sorts again."""
    rows, features = min(n, num_classes), n * dim
    return [
        *sort("sort", n, num_classes, ("target",)),
        Kernel("class_sums", ("input",), ("centroid",), ("centroid",), instructions=CENTROIDS * features),
        *sort("sort again", n, num_classes, ("target",)),
        Kernel(
            "class_pulls", ("input", "input_noise"), ("pull", "mu_grad"), ("centroid",),
            instructions=VARIANCE * 2 * features, runs="variance_kernel",
        ),
        Kernel(
            "prepare_search", ("weight", "boundary_grad"), ("norms",), ("weight_c",),
            instructions=NORMS * (num_classes + rows) * dim,
        ),
        *search("margin_search", n, dim, num_classes, CUDA_STEP),
        Kernel("count", (), (), ("boundary_bias",), blocks=1),
        Kernel(
            "finish_step", (), ("mu_grad", "boundary_grad", "boundary_bias"),
            (*TABLES, "centroid", "weight_c", "weight_c", "mu_grad", "boundary_grad"),
            instructions=FINISH * rows * dim,
        ),
    ]  # fmt: skip


def triton(n: int, dim: int, num_classes: int) -> list[Kernel]:
    """The launches of a step: bytes are those of CUDA's kernels, which do the same."""
    grouped = [
        Kernel("triton rank", ("target",), ("keys", "keys"), instructions=RANK * n * n),
        Kernel("triton rows", (), ("slot", "classes"), ("keys", "keys")),
    ]
    if n > 16384:
        grouped[0] = Kernel("triton label", ("target",), ("keys",))  # and torch's sort
    return [
        *grouped,
        Kernel("triton sums", ("input",), (), ("slot",)),
        Kernel("triton variance", ("input_noise", "state"), (*TABLES, "pull"), ("input", "centroid")),
        Kernel("triton prepare", ("weight",), ("norms",), ("boundary_grad", "weight_c", "weight_c")),
        *(
            kernel._replace(name=f"triton {kernel.name}")
            for kernel in search("search", n, dim, num_classes, TRITON_STEP)
        ),
        Kernel(
            "triton finish", (), ("mu_grad", "boundary_grad", "boundary_bias", "state"), (*TABLES, *("weight_c",) * 2)
        ),
        Kernel(
            "triton backward", ("input", "input_noise"), ("grad_input", "grad_input_noise", "grad_weight"),
            (*VARIANCE_BACKWARD_L2, "boundary_grad", "classes", "boundary_bias"),
        ),
    ]  # fmt: skip


def triton_small(n: int, dim: int, num_classes: int) -> list[Kernel]:
    """One program of a class for all that follows the grouping, and the backward."""
    rows = min(n, num_classes)
    return [
        Kernel("triton group", ("target",), ("slot", "classes"), instructions=RANK * n * n, blocks=1),
        Kernel(
            "triton step", ("input", "input_noise", "state"), (*TABLES, "pull", "state"), ("weight",) * rows,
            instructions=OF_ROW * rows * num_classes * dim, blocks=rows,
        ),
        Kernel(
            "triton backward", ("input", "input_noise"), ("grad_input", "grad_input_noise", "grad_weight"),
            VARIANCE_BACKWARD_L2, instructions=VARIANCE_BACKWARD * 2 * n * dim,
        ),
    ]  # fmt: skip


def triton_steps(n: int, dim: int, num_classes: int) -> list[Kernel]:
    """What is not among the launches of the whole loss."""
    return [
        Kernel("triton class_sums", ("input",), ("centroid",), ("slot",)),
        Kernel("triton class_pulls", ("input", "input_noise"), ("pull", "mu_grad"), ("centroid", "slot")),
        Kernel(
            "triton finish_step", (), ("mu_grad", "boundary_grad", "boundary_bias"), (*TABLES, "weight_c", "weight_c")
        ),
    ]  # fmt: skip


def noise(elements: int) -> list[Kernel]:
    """uint8 images to two bfloat16 views; bfloat16 otherwise; words of as many elements."""
    moved = {
        "add_noise": (("clean",), ("noisy",)),
        "add_noise_backward": (("clean", "noisy"), ("grad_images",)),
        "noisy_pair": (("images",), ("clean", "noisy")),
        "noisy_pair_backward": (("clean", "noisy", "grad_images"), ("grad_images",)),
    }
    words = Kernel("words", (), ("words",), instructions=WORDS * elements)
    any_layout = Kernel("noisy_pair of any layout", *moved["noisy_pair"], instructions=QUADS * elements)
    return [
        *(Kernel(name, *moved[name], instructions=NOISE[name] * elements, runs="groups_kernel") for name in moved),
        any_layout._replace(runs="quads_kernel"),
        words,
        *(
            Kernel(f"triton {name}", *moved[name], instructions=TRITON_NOISE * elements)
            for name in moved
            if name != "add_noise_backward"  # the same kernel
        ),
        words._replace(name="triton words"),
    ]


def traffic(kernel: Kernel, sizes: dict[str, int], card: Card) -> tuple[int, int]:
    """Bytes through memory, and those that the L2 has."""
    memory = sum(sizes[name] for name in kernel.reads + kernel.writes)
    l2 = 0
    for name in set(kernel.again):
        times, size = kernel.again.count(name), sizes[name]
        first = 0 if sizes[name.removeprefix("rows of ")] <= card.l2 else size
        memory, l2 = memory + first, l2 + times * size - first
    return memory, l2


def microseconds(kernel: Kernel, sizes: dict[str, int], card: Card) -> dict[str, float]:
    """What each part of a card would take for a kernel alone."""
    memory, l2 = traffic(kernel, sizes, card)
    busy = min(kernel.blocks or card.multiprocessors, card.multiprocessors) / card.multiprocessors
    seconds = {
        "memory": memory / min(card.memory, busy * card.l2_rate),
        "L2": l2 / (busy * card.l2_rate),
        "matrix units": kernel.flops / card.matrix,
        "instructions": kernel.instructions / (busy * card.issue),
    }
    if kernel.tile:
        rounds = math.ceil(kernel.tiles / card.multiprocessors)
        cycles = kernel.tile.cycles(card, sizes["dim"])
        seconds |= {part: rounds * value / card.clock for part, value in cycles.items()}
    return {part: 1e6 * value for part, value in seconds.items()}


def table(card_name: str, title: str, kernels: list[Kernel], sizes: dict[str, int]) -> str:
    """One markdown row a kernel, with a column for what a GPU will say."""
    card, total = CARDS[card_name], 0.0
    lines = [
        f"| {title}, on {card_name} | memory, MB | GFLOP | predicted, µs | by | measured, µs |",
        "|" + " --- |" * 6,
    ]
    for kernel in kernels:
        times = microseconds(kernel, sizes, card)
        part = max(times, key=times.__getitem__)
        moved = traffic(kernel, sizes, card)[0] / 1e6
        total += 0 if kernel.beside else times[part]
        flops = f"{kernel.flops / 1e9:.0f}" if kernel.flops else ""
        lines.append(
            f"| {kernel.name}{', beside it' * kernel.beside} | {moved:.1f} | {flops} | {times[part]:.1f} | {part} | |"
        )
    if any("finish_kernel" in function for kernel in kernels for function in kernel.functions):
        n, dim, num_classes = (sizes[name] for name in ("n", "dim", "num_classes"))
        floor = 1e6 * (14 * n * dim / card.memory + 4 * min(n, num_classes) * num_classes * dim / card.matrix)
        lines.append(f"| the whole step; its floor is {floor:.0f} µs | | | {total:.0f} | | |")
    return "\n".join(lines)


class Shapes(NamedTuple):
    """N, D, K of losses; N, C, H, W of images."""

    sizes: tuple[int, ...] = (8192, 2048, 1000)
    many: tuple[int, ...] = (65536, 512, 1000)
    wide: tuple[int, ...] = (4096, 512, 1_000_000)
    small: tuple[int, ...] = (64, 128, 10)
    images: tuple[int, ...] = (512, 3, 224, 224)


def tables(card: str, shapes: Shapes) -> str:
    groups = [
        ("the loss", cuda, shapes.sizes), ("the loss of many samples", cuda, shapes.many),
        ("the loss of few", small, shapes.small), ("its steps", steps, shapes.sizes),
        ("the search among many classes", searches, shapes.wide), ("Triton's loss", triton, shapes.sizes),
        ("Triton's loss of few", triton_small, shapes.small), ("Triton's steps", triton_steps, shapes.sizes),
    ]  # fmt: skip
    shown = [
        table(card, f"{title}, {' x '.join(map(str, of))}", kernels(*of), tensors(*of)) for title, kernels, of in groups
    ]
    elements = math.prod(shapes.images)
    bytes_of = {"images": elements, "words": 8 * elements}
    bytes_of |= dict.fromkeys(("clean", "noisy", "grad_images"), 2 * elements)
    return "\n\n".join(
        [*shown, table(card, f"noise, {' x '.join(map(str, shapes.images))}", noise(elements), bytes_of)]
    )


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--card", choices=CARDS, action="append", help="default: all")
    for name, shape in Shapes._field_defaults.items():
        parser.add_argument(f"--{name}", type=numbers, default=shape, help=",".join(map(str, shape)))
    arguments = vars(parser.parse_args())
    for card in arguments.pop("card") or CARDS:
        print(tables(card, Shapes(**arguments)), end="\n\n")


if __name__ == "__main__":
    main()
