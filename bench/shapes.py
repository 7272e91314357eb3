"""The problem sizes that are measured."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """``N`` tokens, hidden sizes ``H_s`` (student) and ``H_t`` (teacher), vocabulary ``V``."""

    name: str
    N: int
    H_s: int
    H_t: int
    V: int

    def __str__(self) -> str:
        return f"{self.name} ({self.N}, {self.H_s}, {self.H_t}, {self.V})"


CPU_SHAPES = (
    Shape("32k", 1024, 512, 1024, 32000),
    Shape("128k", 512, 256, 512, 128256),
)
GPU_SHAPES = (
    Shape("A", 8192, 4096, 5120, 128256),
    Shape("B", 8192, 896, 3584, 151936),
)
# Of these the row alone, beside GPU_SHAPES.
ROW_SHAPES = (Shape("C", 8192, 2048, 4096, 32000),)
QUICK_SHAPES = (Shape("tiny", 96, 32, 48, 1000),)

# Which tokens are hard decides what a gated objective computes: none of them, all of them, half of them.
TOKENS = ("easy", "hard", "mixed")
