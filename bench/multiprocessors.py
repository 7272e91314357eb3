"""What a GPU's multiprocessors add to its two numbers: waves of tiles, and the row's instructions.

A GEMM's result is made in tiles, one a multiprocessor at a time, and the last wave takes as long as a full one; smaller
tiles, or a long inner dimension split over several, would lose less where tiles are few. The row is arithmetic as well
as memory: a multiprocessor issues :data:`ISSUED` instructions of threads a clock and does :data:`SPECIAL` special
functions (CUDA C++ programming guide, arithmetic instructions of 9.0). Each sweep takes the longest of its bytes,
instructions and special functions. A row that stays on chip reads the next one's logits in its first and last sweep;
what it asks for ahead, so that memory works in the sums between, is not counted. No kernel issues at every clock: these
are least times.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from fused_kd.engines.waves import GEMM_TILE

ISSUED = 4 * 32
SPECIAL = 16


class Sweep(NamedTuple):
    """Of an element in one sweep."""

    instructions: float
    specials: float


class RowCost(NamedTuple):
    """A dense teacher's row under a gated mixture; the gradient of a ``hard`` token and of an ``easy`` one."""

    statistics: Sweep
    sums: Sweep
    hard: Sweep
    easy: Sweep
    on_chip: bool


# Counted from sm_90 machine code of SelfEvolution on fp32 logits with bf16 gradients: Triton's are the main loops of
# tests/kernel_budget.json; the CUDA row's what a thread executes, with what it asks for ahead.
ROW_COSTS = {
    "triton": RowCost(Sweep(17.4, 2.25), Sweep(45.8, 3), Sweep(29.6, 3), Sweep(19.1, 2), on_chip=False),
    "cuda": RowCost(Sweep(29.7, 2.5), Sweep(49.8, 3), Sweep(15.8, 0), Sweep(26.5, 2), on_chip=True),
}


def waste(results: Iterable[tuple[int, int]], multiprocessors: int) -> float:
    """Time over that of full waves without a margin, at least 1, of GEMMs with results of these (rows, columns)."""
    made = useful = 0
    for rows, columns in results:
        tiles = min(-(-rows // a) * -(-columns // b) for a, b in (GEMM_TILE, GEMM_TILE[::-1]))
        made += -(-tiles // multiprocessors) * multiprocessors * GEMM_TILE[0] * GEMM_TILE[1]
        useful += rows * columns
    return made / useful


def row_seconds(
    cost: RowCost, elements: float, hard: float, written: int, bandwidth: float, multiprocessors: float, clock: float
) -> float:
    """Of ``elements`` fp32 logits a side, a share ``hard`` of them in hard rows; ``written`` bytes a logit gradient."""

    def arithmetic(*sweeps: Sweep) -> float:
        instructions, specials = (sum(column) for column in zip(*sweeps, strict=True))
        return max(instructions / ISSUED, specials / SPECIAL) / (multiprocessors * clock)

    read = 8 / bandwidth
    gradient = Sweep(*(hard * a + (1 - hard) * b for a, b in zip(cost.hard, cost.easy, strict=True)))
    if cost.on_chip:
        moving = max(read + written / bandwidth, arithmetic(cost.statistics, gradient))
        return elements * (moving + hard * arithmetic(cost.sums))
    sums = max(read, arithmetic(cost.sums))
    return elements * (
        max(read, arithmetic(cost.statistics)) + hard * sums + max(read + written / bandwidth, arithmetic(gradient))
    )
