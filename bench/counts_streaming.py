"""FLOPs and bytes of the streaming engine, counted from the algorithm as bench/counts.py does for the chunked one.

By its plan m chunks of tokens, where dH and an fp32 dW are made, and s slabs of the vocabulary, where a low-precision
dW is. H = H_s + H_t; x the share of tokens that need sums, the hard ones; b bytes an operand. A sweep over tiles reads
what it walks over once for each piece that stays; slabs of dlogits and the sums of a chunk or slab stay in the cache:

============= ================================== ==========================================
part          FLOPs                              bytes
============= ================================== ==========================================
statistics    2 n V H                            b (n + V) H
sums          2 x n V H                          b (x n + V) H; none for x = 0
dlogits       2 n V H                            b (n + m V) H
dlogits_again 2 n V H, low-precision dW          b (s N + V) H
d_hidden      2 n V H_s                          b m V H_s + 4 n H_s
d_weight      2 n V H_s, fp32 dW                 b n H_s + 4 (2 m - 1) V H_s
              2 N V H_s, low-precision dW: all   b s N H_s + b V H_s
              tokens, ignored ones as zeros
============= ================================== ==========================================

No bytes for a row: its arithmetic sits in the sweeps. A backward pass with the factor 1 moves nothing. From the L2
cache, every tile of tokens x columns logits reads both of its operands: b / tokens + b / columns a multiply-add.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fused_kd.engine.head_gradient import gradient_dtype
from fused_kd.engine.streaming_plan import Plan, Sizes, choose_tiles, plan_streaming

from .counts import gemm_flops
from .shapes import Shape

# ``streaming_kernels.FIELDS``, which only Triton can import.
FIELDS = 8


class StreamingCounts(NamedTuple):
    """FLOPs and bytes by part, those of the products alone; ``traffic``: bytes of additions to an earlier dW and of
    passes over a finished one. ``cache_bytes`` by sweep; ``results``: (rows, columns) of the gradients' GEMMs."""

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
        N, n, V, FIELDS, sums=teacher, gated=teacher, H=shape.H_s,
        dlogits=b, gathered=b, early=True, early_weight=not late, late=late,
    )  # fmt: skip
    tiles = choose_tiles(dtype, dtype if teacher else None)
    plan = plan_streaming(sizes, tiles, memory_budget)
    m, s = -(-n // plan.tokens), -(-V // plan.late_columns)
    H = shape.H_s + (shape.H_t if teacher else 0)

    def logits(tokens: int) -> int:
        flops = gemm_flops(shape, not teacher, tokens / N)
        return flops["student_logits"] + flops.get("teacher_logits", 0)

    sweeps = {
        "statistics": logits(n),
        "sums": logits(x),
        "dlogits": logits(n),
        "dlogits_again": logits(n) if late else 0,
    }
    gradients = gemm_flops(shape, not teacher, n / N)
    flops = sweeps | {"d_hidden": gradients["d_hidden"], "d_weight": gradients["d_weight"]}
    if late:
        flops["d_weight"] = gemm_flops(shape)["d_weight"]
    VH, nH = V * shape.H_s, n * shape.H_s
    moved = {
        "statistics": b * (n + V) * H,
        "sums": b * (x + V) * H if x else 0,
        "dlogits": b * (n + m * V) * H,
        "dlogits_again": b * (s * N + V) * H if late else 0,
        "d_hidden": b * m * VH + 4 * nH,
        "d_weight": b * s * N * shape.H_s + b * VH if late else b * nH + 4 * VH,
    }
    each = b * (1 / tiles.tokens + 1 / tiles.columns) / 2
    cached = {name: each * work for name, work in sweeps.items()}
    rows = min(plan.late_columns if late else plan.columns, V)
    results = {"d_hidden": (plan.tokens, shape.H_s), "d_weight": (rows, shape.H_s)}
    return StreamingCounts(plan, flops, moved, 0 if late else 8 * (m - 1) * VH, cached, results)
