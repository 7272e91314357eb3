"""FLOPs, special functions and bytes of one forward and backward, counted from the algorithm; nothing is run.

n valid tokens of N, hidden sizes H_s and H_t, vocabulary V, m = ceil(n / C) chunks of C tokens. b bytes an operand of a
GEMM, g bytes a logit gradient (both of the inputs' dtype); logits, dH and the sum of dW are fp32. Operands are read
once a chunk, results written once, and dW is read and written by every chunk but the first, which only writes:

=============== ========== ===================================================
GEMM            FLOPs      bytes
=============== ========== ===================================================
student logits  2 n V H_s  b (n H_s + m V H_s) + 4 n V
teacher logits  2 n V H_t  b (n H_t + m V H_t) + 4 n V; none for a top-k teacher
dH              2 n V H_s  g n V + b m V H_s + 4 n H_s
dW              2 n V H_s  g n V + b n H_s + 4 (2 m - 1) V H_s
=============== ========== ===================================================

Passes over a finished dW come on top: scaling (8 V H_s) and rounding (4 + b) of a low-precision one, and the factor of
the backward pass (2 b) on an accelerator. Where low-precision operands must be upcast first (b + 8 a weight's entry,
4 an operand's, 8 n V for the slab's products), g is 4.

The row, an element of the n x V logits: a dense teacher's reads both logits in two sweeps (statistics, gradient), in
three where a token is hard (sums), and writes g; a top-k teacher's sweeps the student's alone, twice. "Once" counts
one read and one write, what is left where blocks stay in cache between the sweeps; "swept" counts every sweep.
Special functions: a dense row takes 2 exponentials where they are kept (CPU rows) and 2 a sweep where they are made
again (Triton's), a hard token's also 1 logarithm and 1 division (2 where made again). A top-k row takes 1, or 2.

Left out as small: vectors, passes over n x H, the lists of a top-k teacher and the row over its K + 2 categories.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fused_kd.engine.gemm import has_fp32_output
from fused_kd.engine.plan import Plan
from fused_kd.forecast import chunked_plan

from .inputs import Inputs
from .shapes import Shape


class Counts(NamedTuple):
    """FLOPs and bytes by GEMM; of the row special functions and bytes; bytes of workspace as planned."""

    chunk: int
    flops: dict[str, int]
    gemm_bytes: dict[str, int]
    row_specials: int
    row_bytes_once: int
    row_bytes_swept: int
    workspace_bytes: int


def gemm_flops(shape: Shape, top_k: bool = False, valid: float = 1.0) -> dict[str, int]:
    """FLOPs (a multiply-add is two) of the GEMMs that no implementation can do without."""
    nV = round(valid * shape.N) * shape.V
    student = 2 * nV * shape.H_s
    teacher = {} if top_k else {"teacher_logits": 2 * nV * shape.H_t}
    return {"student_logits": student, **teacher, "d_hidden": student, "d_weight": student}


def row_bytes(elements: int, written: int, sides: int = 2, sweeps: float = 1.0) -> int:
    """Bytes of ``sweeps`` reads of fp32 logits of ``sides`` models and one write of ``written`` bytes an element."""
    return int((4 * sides * sweeps + written) * elements)


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
    on_host: bool = True,
) -> Counts:
    """The chunked engine, all gradients wanted.

    Args:
        shape, dtype: of the inputs. plan: chunk and workspace.
        top_k: the teacher is a list of entries.
        valid, hard: fractions of tokens that are not ignored, and of those that are hard.
        recomputes: the row makes its exponentials again in every sweep.
        upcasts: the GEMMs take no low-precision operands (irrelevant in fp32). on_host: on a CPU.
    """
    upcasts = upcasts and dtype != torch.float32
    n, V = round(valid * shape.N), shape.V
    m = -(-n // plan.chunk)
    b = dtype.itemsize
    g, weight, product = (4, b + 8, 12) if upcasts else (b, b, 4)
    VH, nH, nV = V * shape.H_s, n * shape.H_s, n * V
    passes = (8 if g < 4 else 0) + (4 + b if b < 4 else 0) + (0 if on_host else 2 * b)
    flops = gemm_flops(shape, top_k, valid)
    gemm_bytes = {
        "student_logits": g * nH + weight * m * VH + product * nV,
        "teacher_logits": g * n * shape.H_t + weight * m * V * shape.H_t + product * nV,
        "d_hidden": g * nV + weight * m * VH + 4 * nH,
        "d_weight": g * nV + g * nH + 4 * max(2 * m - 1, 0) * VH + passes * VH,
    }
    sides, sweeps = (1, 2.0) if top_k else (2, 2.0 + hard)
    if top_k:
        specials = 2.0 if recomputes else 1.0
    else:
        specials = 2 * sweeps + 3 * hard if recomputes else 2 + 2 * hard
    return Counts(
        plan.chunk,
        flops,
        {name: gemm_bytes[name] for name in flops},
        round(specials * nV),
        row_bytes(nV, g, sides),
        row_bytes(nV, g, sides, sweeps),
        plan.workspace,
    )


def planned(inputs: Inputs, teacher: bool = True) -> Plan:
    """Chunk and workspace that fused_kd's planner chooses for these inputs, all gradients wanted.

    Without a ``teacher`` the student's logits are the only ones."""
    (V, H_s), hidden_t, device = inputs.weight_s.shape, inputs.hidden_t, inputs.labels.device
    return chunked_plan(
        len(inputs.labels), H_s, hidden_t.shape[1] if teacher else None, V, dtype=inputs.hidden_s.dtype, device=device,
        upcast=not has_fp32_output(device), top_k=None if inputs.top_k is None else inputs.top_k.indices.shape[1],
    )  # fmt: skip


def count_fused(shape: Shape, inputs: Inputs, hard: float, backend: str, teacher: bool = True) -> Counts:
    """fused_kd on these inputs with a row implementation, by :func:`fused_kd.rows.choose_backend`'s name."""
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
        on_host=device.type == "cpu",
    )
