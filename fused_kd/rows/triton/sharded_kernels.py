"""Triton kernels of a vocabulary slice, a program per row: one for each sweep of :mod:`fused_kd.rows.sharded`.

Statistics, sums and gradient read every logit of the slice once each; between them the ranks exchange what the first
two wrote. The sweeps are those of :mod:`fused_kd.rows.triton.kernel`, and so are their special functions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .math import exponent_scale, inverse_temperature, label_scalars
from .sweeps import logits, sweep_both, sweep_student, sweep_sums, write_gradient, write_label_gradient, write_zeros

STATISTICS = tl.constexpr(12)
KNOWN = tl.constexpr(8)


@triton.jit
def statistics_kernel(
    student_ptr,  # (C, V) raw logits of this rank
    teacher_ptr,  # the same or None
    labels_ptr,  # (C,) ids of the whole vocabulary
    scalars_ptr,
    out_ptr,  # (C, STATISTICS), as sharded_row lays them out; logits before the temperature, KL's in powers of 2
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
        tl.store(out + 3, t_max)
        tl.store(out + 4, t_total)
        tl.store(out + 5, kl_total)
        tl.store(out + 6, label_t)
        tl.store(out + 7, s_over)
        tl.store(out + 8, t_over)
        if COLD:
            tl.store(out + 9, s_max)
            tl.store(out + 10, cold_total)
            tl.store(out + 11, label_z)
    tl.store(out, s_max)
    tl.store(out + 1, s_total)
    tl.store(out + 2, label_z)


@triton.jit
def sums_kernel(
    student_ptr,
    teacher_ptr,
    labels_ptr,
    scalars_ptr,
    known_ptr,  # (C, KNOWN), see _known
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
        if use != 0:
            write_gradient(
                student, teacher, dlogits_row, V, row, label, target, norms, cold, shares,
                weights_ptr, total, g, MIXTURE, MIXED, HARD_LABEL, COLD, EXCLUDES, BLOCK,
            )  # fmt: skip
        else:
            write_gradient(
                student, teacher, dlogits_row, V, row, label, target, norms, cold, shares,
                weights_ptr, -1.0, free_g, False, MIXED, HARD_LABEL, COLD, False, BLOCK,
            )  # fmt: skip


@triton.jit
def _own_label(label, first, V):
    """The label's column in this slice, or -1: a lane beyond the end must not take itself for it."""
    local = label - first
    return tl.where((label >= 0) & (local >= 0) & (local < V), local, -1).to(tl.int32)


@triton.jit
def _known(known_ptr, scalars_ptr, row):
    """``target``, ``norms`` and ``cold`` of a row, as the functions of the whole row's kernel take them."""
    at = known_ptr + row * KNOWN
    beta, alpha = tl.load(scalars_ptr + 1), tl.load(scalars_ptr + 6)
    target = (label_scalars(scalars_ptr), beta, alpha, exponent_scale(scalars_ptr), tl.load(at + 5))
    norms = (tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4))
    return target, norms, (tl.load(at + 6), tl.load(at + 7))
