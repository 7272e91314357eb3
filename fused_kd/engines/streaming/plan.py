"""Tile and buffer sizes of the streaming engine, and the memory that they come to."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..plan import BudgetTooSmall
from ..problem import Problem, gradient_dtype
from ..waves import GEMM_TILE, MULTIPROCESSORS, fitting, gemm_waves, waves

# Blocks of tokens whose programs run at about the same time, each beside as many parts of the vocabulary as fill the
# device: 11 x 12 tiles at a time read 11 blocks' hidden states and 12 parts' weights, 64 x 2 tiles 66 of the two.
GROUP = 11
# Splits of the vocabulary at the least, for that; and programs, which a few blocks of tokens make by more splits.
LEAST_SPLITS = 12
PROGRAMS = 512

# dlogits on their way to dH: small enough to stay in the L2 cache (40-50 MB on an A100 or H100), large enough for GEMMs
# near their peak.
SLAB_BYTES = 8 << 20
# A chunk's fp32 dH, what it is rounded to and its gathered hidden states: fewer would read the weights more often.
CHUNK_BYTES = 32 << 20
# All tokens' dlogits of a slab and its fp32 dW, on their way to a low-precision dW.
WEIGHT_BYTES = 32 << 20
# Likewise where the fp32 dH of all tokens is summed beside it: longer slabs, as dH is read and written for each, but of
# no fewer columns than repay that four times over. Without a budget all memory may come to DEFAULT_BYTES.
JOINT_BYTES = 128 << 20
LEAST_JOINT_COLUMNS = 1024
DEFAULT_BYTES = 60_000_000
# FLOPs that a GEMM makes while a byte comes from memory.
FLOPS_A_BYTE = 256
# Triton reads 16 bytes at a time where it knows that this divides sizes and strides.
ALIGNED = 16
# Statistics of a token and split.
FIELDS = 11
# Vectors over the tokens, with torch's temporaries while tokens are ordered (int64) and ranked.
TOKEN_BYTES = 240


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


class KernelTiles(NamedTuple):
    """The tiles of each kernel: what its arithmetic leaves of the registers bounds them."""

    statistics: Tiles
    sums: Tiles
    gradient: Tiles


class Sizes(NamedTuple):
    """What the plan depends on.

    ``n`` of N tokens take part. ``sums`` terms have sums, ``gated`` says that only some rows need them; ``joinable``
    that one pass may make both gradients. For a student given as a head, else 0: ``H`` and the teacher's ``H_t``; the
    bytes of an element of dlogits, of a chunk's hidden states once they are gathered, and of a GEMM operand's copy in
    another dtype; and which passes there are: by chunks of tokens, with or without an fp32 dW, and by slabs of columns,
    for a low-precision dW.
    """

    N: int
    n: int
    V: int
    sums: int
    gated: bool
    H: int = 0
    H_t: int = 0
    dlogits_bytes: int = 0
    hidden_bytes: int = 0
    copy_bytes: int = 0
    by_tokens: bool = False
    weight_by_tokens: bool = False
    by_columns: bool = False
    joinable: bool = True


def sizes_of(problem: Problem, n: int, *, upcast: bool) -> Sizes:
    """``upcast``: low-precision operands of GEMMs are made fp32 first."""
    student, teacher, wanted, spec = problem.student, problem.teacher, problem.wanted, problem.spec
    joinable = problem.grad_filter_eps == 0.0
    sizes = Sizes(len(student.source), n, problem.vocab, len(spec.tabled), bool(spec.gate), joinable=joinable)
    if student.weight is None:
        return sizes
    dtype = problem.dtype or student.source.dtype
    copy_bytes = dtype.itemsize * (not student.source.dtype == student.weight.dtype == dtype) + 4 * upcast
    low = gradient_dtype(student.weight.dtype) != torch.float32
    return sizes._replace(
        H=student.source.shape[1],
        H_t=0 if teacher is None or teacher.weight is None else teacher.source.shape[1],
        dlogits_bytes=4 if upcast else dtype.itemsize,
        hidden_bytes=student.source.element_size() + copy_bytes,
        copy_bytes=copy_bytes,
        by_tokens=wanted.source or (wanted.weight and not low) or (wanted.bias and not (wanted.weight and low)),
        weight_by_tokens=wanted.weight and not low,
        by_columns=wanted.weight and low,
    )


class Plan(NamedTuple):
    """Sizes of one call.

    ``tokens`` x ``columns`` dlogits at a time by tokens, all tokens x ``columns_of_all`` by columns, and
    ``together`` for dH as well; ``splits`` of the vocabulary for the statistics, ``sum_splits``
    for the sums; ``workspace`` bytes beyond inputs, results and their gradients.
    """

    tokens: int
    columns: int
    columns_of_all: int
    together: bool
    splits: int
    sum_splits: int
    workspace: int


def choose_tiles(
    *dtypes: torch.dtype | None, capped: bool = False, plain: bool = True, target: str = "sm_90", terms: int = 1
) -> KernelTiles:
    """Tiles for operands of these dtypes (None: logits), with a softcap or without, on "sm_90", "gfx942" or the like.

    ``plain``: no bias, operands that need no rounding, and rows of both in 16-byte pieces; all else takes registers.
    So do the sums of several ``terms``, and what their gradient has of each.

    The largest that leave all of a row's arithmetic in registers, by compiling for every target. Student's and
    teacher's accumulators live side by side, so they are half of a plain GEMM's: 128 x 128 in fp32, twice, are 128
    registers of each of 256 threads. What feeds a tile from the L2 cache bounds it: 64 FLOPs a byte there, 43 at
    64 x 128. fp32 products, on the ordinary cores, hold their operands in registers too, and a softcap needs registers
    for its tanh. A limit of 255 keeps ptxas from spilling to fit a second program instead. The wide tile in two of the
    kernels makes an H200 1.2 to 1.5 times as fast.
    """
    nvidia = target.startswith("sm_")
    if not any(dtypes):  # loads of logits alone, whose addresses take registers too
        return _all(Tiles(16, 128, 16, 8, 1, 255 if nvidia else None))
    if torch.float32 in dtypes:
        return _all(Tiles(64, 64, 16, 8, 2, 255 if nvidia else None))
    if not nvidia:  # AMD: 64 KB of local memory, waves of 64 threads
        return _all(Tiles(128, 64, 64, 8, 2))
    narrow = Tiles(64, 128, 32 if capped else 64, 8, 3, 255)
    if capped or not plain or target != "sm_90":  # 128 x 128 would spill
        return KernelTiles(narrow, narrow._replace(columns=64) if terms > 1 else narrow, narrow)
    wide = Tiles(128, 128, 64, 8, 3, 255)
    return KernelTiles(wide, narrow, wide if terms < 2 else narrow)


def _all(tiles: Tiles) -> KernelTiles:
    return KernelTiles(tiles, tiles, tiles)


def plan_streaming(sizes: Sizes, tiles: KernelTiles, memory_budget: int | None) -> Plan:
    """The largest buffers of at most the default sizes that fit ``memory_budget``.

    dlogits are made once for both gradients wherever the budget, or without one :data:`DEFAULT_BYTES`, has room for
    the fp32 dH of all tokens: the cheapest memory there is, a third of the tiles' products against 4 N H bytes.

    Raises:
        BudgetTooSmall: where one tile of dlogits at a time does not fit.
    """
    if sizes.by_tokens and sizes.by_columns and sizes.joinable:
        limit = DEFAULT_BYTES if memory_budget is None else memory_budget
        plan = _plan(sizes, tiles, 0, joint=limit)
        if plan.workspace <= limit and plan.columns_of_all >= min(LEAST_JOINT_COLUMNS, sizes.V):
            return plan
    for halvings in range(CHUNK_BYTES.bit_length()):
        plan = _plan(sizes, tiles, halvings)
        if memory_budget is None or plan.workspace <= memory_budget:
            return plan
    assert memory_budget is not None
    raise BudgetTooSmall(plan.workspace, "a tile at a time", memory_budget)


def _plan(sizes: Sizes, tiles: KernelTiles, halvings: int, joint: int | None = None) -> Plan:
    """``joint``: the bytes that a plan for both gradients together may come to."""
    N, n, V, H = sizes.N, max(sizes.n, 1), sizes.V, sizes.H
    splits = _splits(n, V, tiles.statistics, halvings)
    # Hard rows may be few: more splits keep the device busy with them.
    sum_splits = _splits(n, V, tiles.sums, halvings, 4 if sizes.gated and not halvings else 1)
    partials = 4 * n * max(splits * FIELDS, 2 * sizes.sums * sum_splits)

    by_tokens = by_columns = 0
    BM, BN = tiles.gradient.tokens, tiles.gradient.columns
    tokens, columns = min(BM, n), min(BN, V)
    columns_of_all = columns
    if sizes.by_tokens:
        # dH, what it is rounded to, and the hidden states of a chunk.
        per_token = H * (8 + (sizes.hidden_bytes if sizes.weight_by_tokens else 0))
        tokens = fitting((CHUNK_BYTES >> halvings) // per_token, BM, n, lambda rows: gemm_waves(rows, H))
    if sizes.by_tokens and joint is None:
        per_column = tokens * sizes.dlogits_bytes + H * sizes.copy_bytes
        blocks = -(-tokens // BM)
        columns = fitting((SLAB_BYTES >> halvings) // per_column, BN, V, lambda c: waves(blocks * -(-c // BN)))
        by_tokens = tokens * per_token + columns * per_column
    if sizes.by_columns:
        per_column = N * sizes.dlogits_bytes + H * (4 + sizes.copy_bytes)
        blocks = -(-n // BM)

        def work(width: int) -> int:
            """In FLOPs a multiprocessor: tiles of both sides, at half of a GEMM's speed; dW's GEMM; adding to dH."""
            logits = waves(blocks * -(-width // BN)) * BM * BN * 4 * (H + sizes.H_t)
            d_weight = gemm_waves(width, H) * GEMM_TILE[0] * GEMM_TILE[1] * 2 * N
            adding = 0 if joint is None else 8 * N * H * FLOPS_A_BYTE // MULTIPROCESSORS
            return logits + d_weight + adding

        fixed = tokens * H * sizes.copy_bytes + (0 if joint is None else 4 * N * H)
        slab = WEIGHT_BYTES >> halvings if joint is None else min(JOINT_BYTES, joint - TOKEN_BYTES * N - fixed)
        columns_of_all = fitting(slab // per_column, BN, V, work)
        by_columns = columns_of_all * per_column + fixed
        if joint is not None and not sizes.copy_bytes:
            tokens = n
    workspace = TOKEN_BYTES * N + max(partials, by_tokens, by_columns)
    return Plan(tokens, columns, columns_of_all, joint is not None, splits, sum_splits, workspace)


def _splits(n: int, V: int, tiles: Tiles, halvings: int, times: int = 1) -> int:
    """Of the vocabulary for n tokens: the fewest of those that take the least time, a tile at a time."""
    blocks, most = -(-n // tiles.tokens), -(-V // tiles.columns)
    least = max(LEAST_SPLITS, PROGRAMS // blocks)
    splits = min(range(least, least + LEAST_SPLITS), key=lambda splits: waves(blocks * splits) * -(-most // splits))
    return min(most, max(1, times * splits >> halvings))
