"""The registry of problems: sizes of real pairs of models, and what varies at each size."""

from __future__ import annotations

from typing import NamedTuple

# Which tokens are hard decides what a gated objective computes: none of them, all of them, half of them.
TOKENS = ("easy", "hard", "mixed")
TEACHERS = ("near", "far")


class Shape(NamedTuple):
    """``N`` tokens, hidden sizes ``H_s`` (student) and ``H_t`` (teacher), vocabulary ``V``."""

    name: str
    N: int
    H_s: int
    H_t: int
    V: int

    def __str__(self) -> str:
        return f"{self.name} ({self.N}, {self.H_s}, {self.H_t}, {self.V})"


class Variant(NamedTuple):
    """What is measured at one shape.

    ``tokens``: which are hard. ``valid``: the share that is not ignored. ``teacher``: near the student (it agrees, but
    not quite) or far (independent of it). ``chunk``: fused_kd's preferred chunk (None: the planner's).
    """

    tokens: str = "mixed"
    valid: float = 1.0
    teacher: str = "near"
    chunk: int | None = None

    def __str__(self) -> str:
        parts = [self.tokens]
        if self.valid != 1.0:
            parts.append(f"{100 * self.valid:.0f} % valid")
        if self.teacher != "near":
            parts.append(f"{self.teacher} teacher")
        if self.chunk is not None:
            parts.append(f"chunk {self.chunk}")
        return ", ".join(parts)


EVERY = tuple(Variant(tokens) for tokens in TOKENS)
FAR = Variant("hard", teacher="far")

# The vocabularies of Llama 2, Llama 3, Qwen 2.5 and Gemma 3, by the sizes that the name of a shape starts with.
VOCABULARIES = {"32k": 32000, "128k": 128256, "152k": 151936, "262k": 262144}

# Two cores take about a second for a step of these.
CPU_SHAPES = (
    Shape("32k", 1024, 512, 1024, 32000),
    Shape("128k", 512, 256, 512, 128256),
)
# The peers', whose objectives have no gate.
CPU_PEER_SHAPE = Shape("32k-512", 512, 256, 512, 32000)
# Student and teacher of Llama 3 (8B head, a 13B-sized teacher), Qwen 2.5 (0.5B, 7B) and GPT-2 (small, XL), whose
# vocabulary is odd.
GPU_SHAPES = (
    Shape("A", 8192, 4096, 5120, 128256),
    Shape("B", 8192, 896, 3584, 151936),
)
ODD_SHAPE = Shape("odd", 8192, 768, 1600, 50257)
REHEARSAL_SHAPES = (Shape("A", 64, 32, 48, 1024), Shape("B", 64, 16, 32, 1504), Shape("odd", 64, 16, 24, 517))
QUICK_SHAPES = (Shape("tiny", 96, 32, 48, 1000),)


def _curve(name: str, base: Shape, **values: tuple[int, ...]) -> tuple[Shape, ...]:
    ((axis, points),) = values.items()
    return tuple(base._replace(name=f"{name}={x}", **{axis: x}) for x in points)


# Curves: the same problem, one size varied. The last N of each is where memory bites.
CPU_CURVES = {
    "N": _curve("N", Shape("", 0, 128, 256, 32000), N=(256, 1024, 4096)),
    "V": _curve("V", Shape("", 256, 128, 256, 0), V=tuple(VOCABULARIES[name] for name in ("32k", "128k", "262k"))),
}
QUICK_CURVES = {
    "N": _curve("N", Shape("", 0, 16, 24, 500), N=(16, 64)),
    "V": _curve("V", Shape("", 32, 16, 24, 0), V=(200, 400)),
}
VALID = (1.0, 0.5, 0.25)
