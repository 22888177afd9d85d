"""What is checked and timed: (N, D, K) of losses, the largest first, and shapes of images."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    accuracy: tuple = ((700, 77, 1500), (1000, 512, 300), (64, 128, 10))
    graph: tuple = ((20000, 64, 300), (1000, 512, 300), (64, 128, 10))  # each way of sorting labels
    stream: tuple = ((1000, 512, 300), (64, 128, 10))
    beyond_32_bits: tuple = ("classes", "samples")  # whose product with D passes 2^31
    loss: tuple = (
        ((8192, 2048, 1000), "bfloat16"),
        ((8192, 2048, 1000), "float32"),
        ((8192, 512, 6000), "bfloat16"),
        ((4096, 512, 1000), "bfloat16"),
        ((64, 128, 10), "float32"),
    )
    margin: tuple | None = (4096, 512, 1_000_000)
    images: tuple | None = (512, 3, 224, 224)
    matrix: int = 8192
    copy: int = 1 << 31
    sums: tuple = ((1000, 512, 300), (64, 128, 10))  # the loss's steps, between collectives


# Without a GPU: the same code, at sizes that a processor and Triton's interpreter manage.
TINY = Sizes(
    ((20, 12, 10),), (), (), (), (((20, 12, 10), "float32"),), (16, 8, 50), (2, 3, 8, 8), 64, 1 << 16, ((20, 12, 10),)
)

# For tools that watch every access: each kind of kernel once, and nothing timed.
WATCHED = Sizes(
    ((9000, 16, 40), (200, 77, 150), (64, 128, 10)), (), (), (), (), None, None, 64, 1 << 16, ((200, 77, 150),)
)
