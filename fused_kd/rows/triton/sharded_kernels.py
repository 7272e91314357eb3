"""Triton kernels of a vocabulary slice, a program per row: one for each sweep of :mod:`fused_kd.rows.sharded`.

Statistics, sums and gradient read every logit of the slice once each; between them the ranks exchange what the first
two wrote. The sweeps are those of :mod:`fused_kd.rows.triton.kernel`, and so are their special functions.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..sharded import Statistics
from .math import ALPHA, BETA, exponent_scale, inverse_temperature, label_scalars
from .sweeps import logits, sweep_both, sweep_student, sweep_sums, write_gradient, write_label_gradient, write_zeros

# The columns of a message.
TOP, TOTAL, LABEL, TOP_T, TOTAL_T, EXCESS, LABEL_T, BESIDE, BESIDE_T, COLD_TOP, COLD_TOTAL, COLD_LABEL = (
    tl.constexpr(i) for i in range(Statistics._fields.index("rest_top"))
)
STATISTICS = tl.constexpr(Statistics._fields.index("rest_top"))


class Known(NamedTuple):
    """What later sweeps must know of each token, (C, 1) each: ``norms`` and d at the label of
    :func:`fused_kd.rows.triton.math.arguments`; maximum and inverse sum of the student at temperature 1."""

    s_max: Tensor
    s_inv: Tensor
    t_max: Tensor
    t_inv: Tensor
    log_ratio: Tensor
    label_d: Tensor
    cold_max: Tensor
    cold_inv: Tensor


KNOWN = tl.constexpr(len(Known._fields))


@triton.jit
def statistics_kernel(
    student_ptr,  # (C, V) raw logits of this rank
    teacher_ptr,  # the same or None
    labels_ptr,  # (C,) ids of the whole vocabulary
    scalars_ptr,
    out_ptr,  # (C, STATISTICS) of fused_kd.rows.sharded; logits before the temperature, KL's in powers of 2
    first,  # the slice's first id
    V,
    student_stride,
    teacher_stride,
    student_scale,
    student_cap,
    teacher_scale,
    teacher_cap,
    COLD: tl.constexpr,
    EXCLUDES: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    PACK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = _own_label(tl.load(labels_ptr + row), first, V)
    out = out_ptr + row * STATISTICS
    student_row = student_ptr + row * student_stride
    student = (student_row, student_scale, student_cap)
    label_z = tl.where(label >= 0, logits(student_row, label, label >= 0, student_scale, student_cap), 0.0)
    if teacher_ptr is None:
        s_max, s_total = sweep_student(student, V, BLOCK, LANES, PACK)
    else:
        k = exponent_scale(scalars_ptr)
        teacher_row = teacher_ptr + row * teacher_stride
        teacher = (teacher_row, teacher_scale, teacher_cap, None, None, row, 0)
        s_max, s_total, t_max, t_total, kl_total, cold_total, s_over, t_over = sweep_both(
            student, teacher, V, k, COLD, EXCLUDES, BLOCK, LANES, PACK
        )
        label_t = tl.where(label >= 0, logits(teacher_row, label, label >= 0, teacher_scale, teacher_cap), 0.0)
        tl.store(out + TOP_T, t_max)
        tl.store(out + TOTAL_T, t_total)
        tl.store(out + EXCESS, kl_total)
        tl.store(out + LABEL_T, label_t)
        tl.store(out + BESIDE, s_over)
        tl.store(out + BESIDE_T, t_over)
        if COLD:
            tl.store(out + COLD_TOP, s_max)
            tl.store(out + COLD_TOTAL, cold_total)
            tl.store(out + COLD_LABEL, label_z)
    tl.store(out + TOP, s_max)
    tl.store(out + TOTAL, s_total)
    tl.store(out + LABEL, label_z)


@triton.jit
def sums_kernel(
    student_ptr,
    teacher_ptr,
    labels_ptr,
    scalars_ptr,
    known_ptr,  # (C, KNOWN)
    use_ptr,  # (C,) which rows take the sweep; the others' sums are 0
    out_ptr,  # (C, 2)
    first,
    V,
    student_stride,
    teacher_stride,
    student_scale,
    student_cap,
    teacher_scale,
    teacher_cap,
    h: tl.constexpr,
    g: tl.constexpr,
    MIXTURE: tl.constexpr,
    MIXED: tl.constexpr,
    EXCLUDES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    h_total = 0.0
    g_total = 0.0
    if tl.load(use_ptr + row) != 0:
        label = _own_label(tl.load(labels_ptr + row), first, V)
        student = (student_ptr + row * student_stride, student_scale, student_cap)
        teacher = (teacher_ptr + row * teacher_stride, teacher_scale, teacher_cap, None, None, row, 0)
        target, norms, _cold = _known(known_ptr, scalars_ptr, row)
        h_total, g_total = sweep_sums(student, teacher, V, label, target, norms, h, g, MIXTURE, MIXED, EXCLUDES, BLOCK)
    tl.store(out_ptr + row * 2, h_total)
    tl.store(out_ptr + row * 2 + 1, g_total)


@triton.jit
def gradient_kernel(
    student_ptr,
    teacher_ptr,  # or None
    dlogits_ptr,  # may be student_ptr
    labels_ptr,
    weights_ptr,  # or None
    scalars_ptr,
    known_ptr,
    use_ptr,  # (C,) or None: no row uses the divergence's own gradient
    totals_ptr,  # (C,): sum g over the whole vocabulary; None as use_ptr is
    first,
    V,
    student_stride,
    teacher_stride,
    dlogits_stride,
    student_scale,
    student_cap,
    teacher_scale,
    teacher_cap,
    g: tl.constexpr,
    free_g: tl.constexpr,
    MIXTURE: tl.constexpr,
    MIXED: tl.constexpr,
    HARD_LABEL: tl.constexpr,
    COLD: tl.constexpr,
    EXCLUDES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    given = tl.load(labels_ptr + row)
    dlogits_row = dlogits_ptr + row * dlogits_stride
    if given < 0:
        write_zeros(dlogits_row, V, BLOCK)
        return
    label = _own_label(given, first, V)
    student = (student_ptr + row * student_stride, student_scale, student_cap)
    target, norms, cold = _known(known_ptr, scalars_ptr, row)
    if teacher_ptr is None:
        write_label_gradient(student, dlogits_row, V, row, label, norms[0], norms[1], weights_ptr, BLOCK)
    else:
        teacher = (teacher_ptr + row * teacher_stride, teacher_scale, teacher_cap, None, None, row, 0)
        lam, rest, _log_lam = target[0]
        ce_weight = 0.0
        if HARD_LABEL:
            ce_weight = rest
        share = lam
        if MIXED:
            share = 1.0
        shares = (share * inverse_temperature(scalars_ptr), ce_weight)
        use, total = 0, 0.0
        if use_ptr is not None:
            use, total = tl.load(use_ptr + row).to(tl.int32), tl.load(totals_ptr + row)
        write_gradient(
            use != 0, total, student, teacher, dlogits_row, V, row, label, target, norms, cold, shares, weights_ptr,
            g, free_g, MIXTURE, MIXED, HARD_LABEL, COLD, EXCLUDES, BLOCK,
        )  # fmt: skip


@triton.jit
def _own_label(label, first, V):
    """The label's column in this slice, or -1: a lane beyond the end must not take itself for it."""
    local = label - first
    return tl.where((label >= 0) & (local >= 0) & (local < V), local, -1).to(tl.int32)


@triton.jit
def _known(known_ptr, scalars_ptr, row):
    """``target``, ``norms`` and ``cold`` of a row, as the functions of the whole row's kernel take them."""
    at = known_ptr + row * KNOWN  # a Known
    norms = (tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4))
    label_d = tl.load(at + 5)
    cold = (tl.load(at + 6), tl.load(at + 7))
    beta, alpha = tl.load(scalars_ptr + BETA), tl.load(scalars_ptr + ALPHA)
    return (label_scalars(scalars_ptr), beta, alpha, exponent_scale(scalars_ptr), label_d), norms, cold
