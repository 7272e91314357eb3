"""FLOPs and bytes of the streaming engine, counted from the algorithm as bench/counts.py does for the chunked one.

By its plan m chunks of tokens, where dH and an fp32 dW are made, and s slabs of the vocabulary, where a low-precision
dW is; where the plan says together, dH too comes from those (then m = 1 and there is no dlogits_again).
H = H_s + H_t; x the share of tokens that need sums, the hard ones; b bytes an operand.

The tiles that are made at the same time, one a multiprocessor, are R blocks of BM tokens beside C parts of BN columns:
they share what they read in the cache, and by the next of them it is gone. So a sweep over t tokens and v columns
reads each token's hidden states v / (C BN) times and each column's weights t / (R BM) times, rounded up:
r(t, v) = b H (t ceil(v / (C BN)) + v ceil(t / (R BM))) bytes. Slabs of dlogits and the sums of a chunk or slab stay in
the cache:

============= ================================== ==========================================
part          FLOPs                              bytes
============= ================================== ==========================================
statistics    2 n V H                            r(n, V)
sums          2 x n V H                          r(x n, V); none for x = 0
dlogits       2 n V H                            r of each chunk and slab
dlogits_again 2 n V H, low-precision dW          r(n, V / s), s times
d_hidden      2 n V H_s, or 2 N V H_s together   b m V H_s + 4 n H_s
d_weight      2 n V H_s, fp32 dW                 b n H_s + 4 (2 m - 1) V H_s
              2 N V H_s, low-precision dW: all   b s N H_s + b V H_s
              tokens, ignored ones as zeros
============= ================================== ==========================================

On top come, together, the additions to dH, 8 (s - 1) N H_s. No bytes for a row: its arithmetic sits in the sweeps. A
backward pass with the factor 1 moves nothing. From the L2 cache, every tile of tokens x columns logits reads both of
its operands: b / tokens + b / columns a multiply-add.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fused_kd.engines.problem import gradient_dtype
from fused_kd.engines.streaming.plan import ALIGNED, GROUP, Plan, Sizes, Tiles, choose_tiles, plan_streaming
from fused_kd.engines.waves import MULTIPROCESSORS

from .counts import gemm_flops
from .shapes import Shape


class StreamingCounts(NamedTuple):
    """FLOPs and bytes by part, those of the products alone; ``traffic``: bytes of additions to an earlier dW or dH and
    of passes over a finished one. ``cache_bytes`` by sweep; ``results``: (rows, columns) of the gradients' GEMMs."""

    plan: Plan
    flops: dict[str, int]
    gemm_bytes: dict[str, int]
    traffic: int
    cache_bytes: dict[str, float]
    results: dict[str, tuple[int, int]]


def count_streaming(
    shape: Shape,
    dtype: torch.dtype,
    *,
    teacher: bool = True,
    valid: float = 1.0,
    hard: float = 0.0,
    memory_budget: int | None = None,
) -> StreamingCounts:
    """The streaming engine on an NVIDIA GPU with a gated mixture as the objective, all gradients wanted.

    Args:
        shape, dtype: of the inputs; ``teacher``: whether there is one.
        valid, hard: fractions of tokens that are not ignored, and of those that are hard.
        memory_budget: bytes of workspace.

    Raises:
        BudgetTooSmall: for a ``memory_budget`` below the smallest plan.
    """
    N, V, b = shape.N, shape.V, dtype.itemsize
    n, x = round(valid * N), round(hard * round(valid * N)) if teacher else 0
    late = gradient_dtype(dtype) != torch.float32
    sizes = Sizes(
        N, n, V, sums=teacher, gated=teacher, H=shape.H_s, H_t=shape.H_t if teacher else 0,
        dlogits_bytes=b, hidden_bytes=b, by_tokens=True, weight_by_tokens=not late, by_columns=late,
    )  # fmt: skip
    plain = shape.H_s % ALIGNED == 0 and (not teacher or shape.H_t % ALIGNED == 0)
    tiles = choose_tiles(*[dtype] * (2 if teacher else 1), plain=plain)
    plan = plan_streaming(sizes, tiles, memory_budget)
    m, s = -(-n // plan.tokens), -(-V // plan.columns_of_all)
    again = late and not plan.together
    H = shape.H_s + (shape.H_t if teacher else 0)

    def logits(tokens: int) -> int:
        flops = gemm_flops(shape, not teacher, tokens / N)
        return flops["student_logits"] + flops.get("teacher_logits", 0)

    sweeps = {
        "statistics": logits(n),
        "sums": logits(x),
        "dlogits": logits(n),
        "dlogits_again": logits(n) if again else 0,
    }
    gradients = gemm_flops(shape, not teacher, n / N)
    flops = sweeps | {"d_hidden": gradients["d_hidden"], "d_weight": gradients["d_weight"]}
    everything = gemm_flops(shape)
    if late:
        flops["d_weight"] = everything["d_weight"]
    if plan.together:
        flops["d_hidden"] = everything["d_hidden"]
    VH, nH = V * shape.H_s, n * shape.H_s
    slab = plan.columns_of_all if plan.together else plan.columns
    reads = {
        "statistics": _rows(n, V, tiles.statistics, plan.splits),
        "sums": _rows(x, V, tiles.sums, plan.sum_splits) if x else 0,
        "dlogits": sum(_rows(t, v, tiles.gradient) for t in _pieces(n, plan.tokens) for v in _pieces(V, slab)),
        "dlogits_again": sum(_rows(n, v, tiles.gradient) for v in _pieces(V, plan.columns_of_all)) if again else 0,
    }
    moved = {part: b * H * rows for part, rows in reads.items()} | {
        "d_hidden": b * m * VH + 4 * nH,
        "d_weight": b * s * N * shape.H_s + b * VH if late else b * nH + 4 * VH,
    }
    added = 8 * (s - 1) * N * shape.H_s if plan.together else 0 if late else 8 * (m - 1) * VH
    kernels = {"statistics": tiles.statistics, "sums": tiles.sums}
    cached = {
        name: b * (1 / tile.tokens + 1 / tile.columns) / 2 * work
        for name, work in sweeps.items()
        for tile in [kernels.get(name, tiles.gradient)]
    }
    rows = min(plan.columns_of_all if late else plan.columns, V)
    results = {"d_hidden": (plan.tokens, shape.H_s), "d_weight": (rows, shape.H_s)}
    return StreamingCounts(plan, flops, moved, added, cached, results)


def _rows(tokens: int, columns: int, tiles: Tiles, splits: int | None = None) -> int:
    """Rows of hidden states and weights that a sweep reads, programs of a grid started group by group."""
    blocks, parts = -(-tokens // tiles.tokens), splits or -(-columns // tiles.columns)
    R = min(blocks, max(GROUP, MULTIPROCESSORS // parts))
    C = min(parts, MULTIPROCESSORS // R)
    return tokens * -(-columns // (C * tiles.columns)) + columns * -(-tokens // (R * tiles.tokens))


def _pieces(size: int, step: int) -> list[int]:
    return [min(step, size - start) for start in range(0, size, step)]
