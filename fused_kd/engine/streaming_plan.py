"""Tile and buffer sizes of the streaming engine, and the memory that they come to."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .plan import BudgetTooSmall

# dlogits on their way to the GEMMs: small enough to stay in the L2 cache (40-50 MB on an A100 or H100), large enough
# for GEMMs near their peak.
SLAB_BYTES = 8 << 20
# A chunk's fp32 dH and its gathered hidden states: 1024 tokens at H = 4096. Fewer would read the weights more often.
CHUNK_BYTES = 32 << 20
# More rows than this gain a GEMM nothing.
MOST_TOKENS = 2048
# The fp32 dW of a slab on its way to a low-precision result.
LATE_BYTES = 16 << 20
# Programs that fill any current GPU (132-304 multiprocessors) about twice; more would only enlarge their statistics.
PROGRAMS = 512
# Vectors over the tokens, with torch's temporaries while tokens are ordered (int64) and ranked.
TOKEN_BYTES = 200


class Tiles(NamedTuple):
    """A program's tile: ``tokens`` x ``columns`` logits, made from blocks of ``units`` hidden units.

    ``registers`` is the most that a thread may take, or None where the compiler has no such option.
    """

    tokens: int
    columns: int
    units: int
    warps: int
    stages: int
    registers: int | None = None


class Sizes(NamedTuple):
    """What the plan depends on.

    ``n`` of N tokens take part. The statistics hold ``fields`` floats a token and split; ``sums`` says that some rows
    need sums, ``gated`` that only some do. For a student given as a head, else 0: ``H``; the bytes of an element of
    ``dlogits``, of a chunk's hidden states once ``gathered``, and of a GEMM operand ``copied`` into another dtype.
    ``early`` is the pass over chunks of tokens, with or without an fp32 dW, ``late`` the one for a low-precision dW.
    """

    N: int
    n: int
    V: int
    fields: int
    sums: bool
    gated: bool
    H: int = 0
    dlogits: int = 0
    gathered: int = 0
    copied: int = 0
    early: bool = False
    early_weight: bool = False
    late: bool = False


class Plan(NamedTuple):
    """Sizes of one call.

    ``tokens`` x ``columns`` dlogits at a time for dH (and an fp32 dW), all tokens x ``late_columns`` for a
    low-precision dW; ``splits`` of the vocabulary for the statistics, ``sum_splits`` for the sums; ``workspace`` bytes
    beyond inputs, results and their gradients.
    """

    tokens: int
    columns: int
    late_columns: int
    splits: int
    sum_splits: int
    workspace: int


def choose_tiles(*dtypes: torch.dtype | None, capped: bool = False, target: str = "cuda") -> Tiles:
    """Tiles for operands of these dtypes (None: logits), with a softcap or without, on a ``target`` of Triton's.

    The largest that leave all of a row's arithmetic in registers, by compiling for every target. Student's and
    teacher's accumulators live side by side, so they are half of a plain GEMM's: 64 x 128 in fp32, twice, are 64
    registers of each of 256 threads. fp32 products, on the ordinary cores, hold their operands in registers too, and a
    softcap needs registers for its tanh. A limit of 255 keeps ptxas from spilling to fit a second program instead.
    """
    if not any(dtypes):  # loads of logits alone, whose addresses take registers too
        return Tiles(16, 128, 16, 8, 1, 255 if target == "cuda" else None)
    if torch.float32 in dtypes:
        return Tiles(64, 64, 16, 8, 2, 255 if target == "cuda" else None)
    if target == "cuda":
        return Tiles(64, 128, 32 if capped else 64, 8, 3, 255)
    # AMD: 64 KB of local memory, waves of 64 threads.
    return Tiles(128, 64, 64, 8, 2)


def plan_streaming(sizes: Sizes, tiles: Tiles, memory_budget: int | None) -> Plan:
    """The largest buffers of at most the default sizes that fit ``memory_budget``.

    Raises:
        BudgetTooSmall: where one tile of dlogits at a time does not fit.
    """
    for halvings in range(CHUNK_BYTES.bit_length()):
        plan = _plan(sizes, tiles, halvings)
        if memory_budget is None or plan.workspace <= memory_budget:
            return plan
    assert memory_budget is not None
    raise BudgetTooSmall(plan.workspace, "a tile at a time", memory_budget)


def _plan(sizes: Sizes, tiles: Tiles, halvings: int) -> Plan:
    N, n, V, H = sizes.N, max(sizes.n, 1), sizes.V, sizes.H
    blocks = -(-n // tiles.tokens)
    most = -(-V // tiles.columns)
    splits = min(most, max(1, (PROGRAMS >> halvings) // blocks))
    # Hard rows may be few: more splits keep the device busy with them.
    sum_splits = min(most, splits * (4 if sizes.gated and not halvings else 1))
    statistics = 4 * n * (splits * sizes.fields + (2 * sum_splits if sizes.sums else 0))

    early = late = 0
    tokens, columns = min(tiles.tokens, n), min(tiles.columns, V)
    late_columns = columns
    if sizes.early:
        # dH, what it is rounded to, and the hidden states of a chunk.
        per_token = H * (8 + (sizes.gathered if sizes.early_weight else 0))
        tokens = _multiple(min(MOST_TOKENS, (CHUNK_BYTES >> halvings) // per_token), tiles.tokens, n)
        per_column = tokens * sizes.dlogits + H * sizes.copied
        columns = _multiple((SLAB_BYTES >> halvings) // per_column, tiles.columns, V)
        early = tokens * per_token + columns * per_column
    if sizes.late:
        per_column = N * sizes.dlogits + H * sizes.copied
        affordable = min((SLAB_BYTES >> halvings) // per_column, (LATE_BYTES >> halvings) // (4 * H))
        late_columns = _multiple(affordable, tiles.columns, V)
        late = late_columns * (per_column + 4 * H) + tokens * H * sizes.copied
    workspace = TOKEN_BYTES * N + statistics + max(early, late)
    return Plan(tokens, columns, late_columns, splits, sum_splits, workspace)


def _multiple(wanted: int, of: int, limit: int) -> int:
    """``wanted`` rounded down to a multiple of ``of``, at least one and at most ``limit``."""
    return min(max(of, wanted // of * of), limit)
