"""FLOPs, special functions and bytes of one forward and backward, counted from the algorithm; nothing is run.

**The chunked engine.** n valid tokens of N, hidden sizes H_s and H_t, vocabulary V, m chunks of C tokens in k groups of
G, as planned. b bytes an operand of a GEMM and a logit gradient (both of the inputs' dtype); logits, dH and the sum of
dW are fp32. Operands are read once a chunk or group, results written once; dW is read and written by every group but
the first, which only writes:

=============== ========== ===================================================
GEMM            FLOPs      bytes
=============== ========== ===================================================
student logits  2 n V H_s  b (n H_s + m V H_s) + 4 n V
teacher logits  2 n V H_t  b (n H_t + m V H_t) + 4 n V; none for a top-k teacher
dH              2 n V H_s  b (n V + k V H_s) + 4 n H_s
dW              2 n V H_s  b (n V + n H_s) + 4 (2 k - 1) V H_s
=============== ========== ===================================================

Passes over a finished dW come on top: rounding a bf16 one, 4 + b an entry; for fp16, whose factor no row can carry,
scaling in fp32, 8, and rounding in the backward pass, 4 + b. Where one group holds all tokens, a bf16 dW is made in s
fp32 slabs that are rounded while they are in the L2 cache: then b (n V + s n H_s + V H_s) is all, and 8 V H_s more if
the slabs do not stay there. Groups are chunks in fp32, under a tight budget and with ``tuning.device_chunk=0``.
A backward pass with the factor 1 moves nothing.

Where low-precision operands must be upcast first, groups are chunks, b is 4 for operands and logit gradients, b + 8 for
a weight's entry, and a slab's products take 8 n V more. The factor then rides on operands, as in fp32.

The row, an element of the n x V logits: a dense teacher's reads both logits in two sweeps (statistics, gradient), in
three where a token is hard (sums), and writes b; a top-k teacher's sweeps the student's alone, twice. "Once" counts
one read and one write, what is left where blocks stay in cache between the sweeps; "swept" counts every sweep.
Special functions: a dense row takes 2 exponentials where they are kept (CPU rows) and 2 a sweep where they are made
again (Triton's), a hard token's also 1 logarithm and 1 division (2 where made again). A top-k row takes 1, or 2.

Left out as small: vectors, passes over n x H, the columns that a buffer's rows are padded by, the lists of a top-k
teacher and the row over its K + 2 categories.

**The streaming engine.** By its plan m chunks of tokens, where dH and an fp32 dW are made, and s slabs of the
vocabulary, where a low-precision dW is; where the plan says together, dH too comes from those (then m = 1 and there is
no dlogits_again). H = H_s + H_t; x the share of tokens that need sums, the hard ones; b bytes an operand.

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
backward pass with the factor 1 moves nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fused_kd.engines.gemm import has_fp32_output
from fused_kd.engines.head_gradient import made_at_once, weight_slab
from fused_kd.engines.plan import Plan
from fused_kd.engines.problem import gradient_dtype
from fused_kd.engines.streaming.plan import ALIGNED, GROUP, Sizes, Tiles, choose_tiles, plan_streaming
from fused_kd.engines.streaming.plan import Plan as StreamingPlan
from fused_kd.engines.waves import MULTIPROCESSORS
from fused_kd.forecast import chunked_plan

from .problems import Inputs, Shape


class Counts(NamedTuple):
    """FLOPs and bytes by GEMM; of the row special functions and bytes; bytes of workspace as planned."""

    chunk: int
    group: int
    flops: dict[str, int]
    gemm_bytes: dict[str, int]
    row_specials: int
    row_bytes_once: int
    row_bytes_swept: int
    workspace_bytes: int


class Product(NamedTuple):
    """One of the GEMMs by itself: bytes ``read`` and ``written``, and the (rows, columns) of its ``results``, one a
    chunk, group or slab."""

    read: int
    written: int
    results: list[tuple[int, int]]


def gemm_flops(shape: Shape, top_k: bool = False, valid: float = 1.0) -> dict[str, int]:
    """FLOPs (a multiply-add is two) of the GEMMs that no implementation can do without."""
    nV = round(valid * shape.N) * shape.V
    student = 2 * nV * shape.H_s
    teacher = {} if top_k else {"teacher_logits": 2 * nV * shape.H_t}
    return {"student_logits": student, **teacher, "d_hidden": student, "d_weight": student}


def row_bytes(elements: int, written: int, sides: int = 2, sweeps: float = 1.0) -> int:
    """Bytes of ``sweeps`` reads of fp32 logits of ``sides`` models and one write of ``written`` bytes an element."""
    return int((4 * sides * sweeps + written) * elements)


def in_slabs(dtype: torch.dtype, plan: Plan, n: int, upcasts: bool) -> bool:
    """Whether dW is made at once, rounded slab by slab."""
    return made_at_once(dtype, whole=plan.group >= n, upcast=upcasts)


def gemm_products(
    shape: Shape,
    dtype: torch.dtype,
    plan: Plan,
    *,
    top_k: bool = False,
    valid: float = 1.0,
    upcasts: bool = False,
    slabs: bool = False,
) -> dict[str, Product]:
    """The GEMMs without additions to an earlier dW and passes over a finished one; ``slabs``: see :func:`in_slabs`."""
    n, V, H = round(valid * shape.N), shape.V, shape.H_s
    b = dtype.itemsize
    operand, weight, result = (4, b + 8, 12) if upcasts else (b, b, 4)
    groups = [[span.stop - span.start for span in group] for group in plan.groups(n)]
    chunks, nV = [size for group in groups for size in group], n * V

    def logits(hidden: int) -> Product:
        read = operand * n * hidden + weight * len(chunks) * V * hidden
        return Product(read, result * nV, [(size, V) for size in chunks])

    pieces = [(rows, H) for rows in _pieces(V, weight_slab(V, H) if slabs else V)]
    d_hidden = Product(operand * nV + weight * len(groups) * V * H, 4 * n * H, [(sum(group), H) for group in groups])
    read = operand * (nV + len(pieces) * n * H)
    d_weight = Product(read, 0 if slabs else 4 * V * H, pieces * len(groups))
    teacher = {} if top_k else {"teacher_logits": logits(shape.H_t)}
    return {"student_logits": logits(H), **teacher, "d_hidden": d_hidden, "d_weight": d_weight}


def count_chunked(
    shape: Shape,
    dtype: torch.dtype,
    plan: Plan,
    *,
    top_k: bool = False,
    valid: float = 1.0,
    hard: float = 0.0,
    recomputes: bool = False,
    upcasts: bool = False,
) -> Counts:
    """The chunked engine, all gradients wanted.

    Args:
        shape, dtype: of the inputs. plan: chunk, workspace and group.
        top_k: the teacher is a list of entries.
        valid, hard: fractions of tokens that are not ignored, and of those that are hard.
        recomputes: the row makes its exponentials again in every sweep.
        upcasts: the GEMMs take no low-precision operands (irrelevant in fp32).
    """
    upcasts = upcasts and dtype != torch.float32
    n, V, b = round(valid * shape.N), shape.V, dtype.itemsize
    written = 4 if upcasts else b
    slabs = in_slabs(dtype, plan, n, upcasts)
    products = gemm_products(shape, dtype, plan, top_k=top_k, valid=valid, upcasts=upcasts, slabs=slabs)
    gemm_bytes = {name: product.read + product.written for name, product in products.items()}
    if slabs:
        passes = b
    else:
        rounding = 4 + b if b < 4 else 0
        scaling = 8 if dtype == torch.float16 and not upcasts else 0
        passes = 8 * (len(plan.groups(n)) - 1) + rounding + scaling
    gemm_bytes["d_weight"] += passes * V * shape.H_s
    sides, sweeps = (1, 2.0) if top_k else (2, 2.0 + hard)
    if top_k:
        specials = 2.0 if recomputes else 1.0
    else:
        specials = 2 * sweeps + 3 * hard if recomputes else 2 + 2 * hard
    nV = n * V
    return Counts(
        plan.chunk,
        plan.group,
        gemm_flops(shape, top_k, valid),
        gemm_bytes,
        round(specials * nV),
        row_bytes(nV, written, sides),
        row_bytes(nV, written, sides, sweeps),
        plan.workspace,
    )


def planned(inputs: Inputs, teacher: bool = True) -> Plan:
    """Chunk, workspace and group that fused_kd's planner chooses for these inputs, all gradients wanted.

    Without a ``teacher`` the student's logits are the only ones."""
    (V, H_s), hidden_t, device = inputs.weight_s.shape, inputs.hidden_t, inputs.labels.device
    return chunked_plan(
        len(inputs.labels), H_s, hidden_t.shape[1] if teacher else None, V, dtype=inputs.hidden_s.dtype, device=device,
        upcast=not has_fp32_output(device, inputs.hidden_s.dtype),
        top_k=None if inputs.top_k is None else inputs.top_k.indices.shape[1],
    )  # fmt: skip


def count_fused(shape: Shape, inputs: Inputs, hard: float, backend: str, teacher: bool = True) -> Counts:
    """fused_kd on these inputs with a row implementation, by :func:`fused_kd.rows.select.choose_backend`'s name."""
    return count_chunked(
        shape,
        inputs.hidden_s.dtype,
        planned(inputs, teacher),
        # Without a teacher, as with its lists, two sweeps of the student's logits alone.
        top_k=inputs.top_k is not None or not teacher,
        hard=hard,
        recomputes=backend == "triton",
        upcasts=not has_fp32_output(inputs.labels.device, inputs.hidden_s.dtype),
    )


class StreamingCounts(NamedTuple):
    """FLOPs and bytes by part, those of the products alone; ``traffic``: bytes of additions to an earlier dW or dH and
    of passes over a finished one. ``results``: (rows, columns) of the gradients' GEMMs."""

    plan: StreamingPlan
    flops: dict[str, int]
    gemm_bytes: dict[str, int]
    traffic: int
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

    sweeps = {
        "statistics": 2 * n * V * H,
        "sums": 2 * x * V * H,
        "dlogits": 2 * n * V * H,
        "dlogits_again": 2 * n * V * H if again else 0,
    }
    flops = sweeps | {
        "d_hidden": 2 * (N if plan.together else n) * V * shape.H_s,
        "d_weight": 2 * (N if late else n) * V * shape.H_s,
    }
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
    rows = min(plan.columns_of_all if late else plan.columns, V)
    results = {"d_hidden": (plan.tokens, shape.H_s), "d_weight": (rows, shape.H_s)}
    return StreamingCounts(plan, flops, moved, added, results)


def _rows(tokens: int, columns: int, tiles: Tiles, splits: int | None = None) -> int:
    """Rows of hidden states and weights that a sweep reads, programs of a grid started group by group."""
    blocks, parts = -(-tokens // tiles.tokens), splits or -(-columns // tiles.columns)
    R = min(blocks, max(GROUP, MULTIPROCESSORS // parts))
    C = min(parts, MULTIPROCESSORS // R)
    return tokens * -(-columns // (C * tiles.columns)) + columns * -(-tokens // (R * tiles.tokens))


def _pieces(size: int, step: int) -> list[int]:
    return [min(step, size - start) for start in range(0, size, step)]
