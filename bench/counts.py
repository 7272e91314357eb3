"""FLOPs, special functions and bytes of one forward and backward, counted from the algorithm; nothing is run.

n valid tokens of N, hidden sizes H_s and H_t, vocabulary V, m chunks of C tokens in k groups of G, as planned. b bytes
an operand of a GEMM and a logit gradient (both of the inputs' dtype); logits, dH and the sum of dW are fp32. Operands
are read once a chunk or group, results written once; dW is read and written by every group but the first, which only
writes:

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
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fused_kd.engines.gemm import has_fp32_output
from fused_kd.engines.head_gradient import made_at_once, weight_slab
from fused_kd.engines.plan import Plan
from fused_kd.forecast import chunked_plan

from .inputs import Inputs
from .shapes import Shape


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

    step = weight_slab(V, H) if slabs else V
    pieces = [(min(step, V - start), H) for start in range(0, V, step)]
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
    n, V = round(valid * shape.N), shape.V
    b = dtype.itemsize
    g = 4 if upcasts else b
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
        row_bytes(nV, g, sides),
        row_bytes(nV, g, sides, sweeps),
        plan.workspace,
    )


def planned(inputs: Inputs, teacher: bool = True) -> Plan:
    """Chunk, workspace and group that fused_kd's planner chooses for these inputs, all gradients wanted.

    Without a ``teacher`` the student's logits are the only ones."""
    (V, H_s), hidden_t, device = inputs.weight_s.shape, inputs.hidden_t, inputs.labels.device
    return chunked_plan(
        len(inputs.labels), H_s, hidden_t.shape[1] if teacher else None, V, dtype=inputs.hidden_s.dtype, device=device,
        upcast=not has_fp32_output(device), top_k=None if inputs.top_k is None else inputs.top_k.indices.shape[1],
    )  # fmt: skip


def count_fused(shape: Shape, inputs: Inputs, hard: float, backend: str, teacher: bool = True) -> Counts:
    """fused_kd on these inputs with a row implementation, by :func:`fused_kd.rows.select.choose_backend`'s name."""
    device = inputs.labels.device
    return count_chunked(
        shape,
        inputs.hidden_s.dtype,
        planned(inputs, teacher),
        # Without a teacher, as with its lists, two sweeps of the student's logits alone.
        top_k=inputs.top_k is not None or not teacher,
        hard=hard,
        recomputes=backend == "triton",
        upcasts=not has_fp32_output(device),
    )
