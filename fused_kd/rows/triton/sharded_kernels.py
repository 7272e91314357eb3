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
from .blocks import fill, logits
from .gradient import write_gradient, write_label_gradient
from .math import ALPHA, BETA, LOG2_E, SCALARS, exponent_scale, label_scalars
from .sweeps import sweep_both, sweep_student, sweep_sums
from .terms import COLD, INDEX

# The columns of a message.
TOP, TOTAL, LABEL, TOP_T, TOTAL_T, EXCESS, LABEL_T, BESIDE, BESIDE_T, COLD_TOP, COLD_TOTAL, COLD_LABEL = (
    tl.constexpr(i) for i in range(Statistics._fields.index("rest_top"))
)
STATISTICS = tl.constexpr(Statistics._fields.index("rest_top"))


class Known(NamedTuple):
    """What later sweeps must know of each token, (C, 1) each: ``norms`` of
    :func:`fused_kd.rows.triton.math.arguments`. After them comes d at the label of each term with sums."""

    s_max: Tensor
    s_inv: Tensor
    t_max: Tensor
    t_inv: Tensor
    log_ratio: Tensor


KNOWN = tl.constexpr(len(Known._fields))
FACTORS = tl.constexpr(6)


@triton.jit(do_not_specialize=["scalars_stride"])
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
    scalars_stride,
    student_scale,
    student_cap,
    teacher_scale,
    teacher_cap,
    ROW: tl.constexpr,
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
        s_max, s_total, _product = sweep_student(student, V, LOG2_E, False, BLOCK, LANES, PACK)
    else:
        k = exponent_scale(scalars_ptr + row * scalars_stride)
        teacher_row = teacher_ptr + row * teacher_stride
        teacher = (teacher_row, teacher_scale, teacher_cap, None, None, row, 0)
        s_max, s_total, t_max, t_total, kl_total, cold_total, s_over, t_over, _products_s, _products_t = sweep_both(
            student, teacher, V, k, ROW[COLD], EXCLUDES, False, False, BLOCK, LANES, PACK
        )
        label_t = tl.where(label >= 0, logits(teacher_row, label, label >= 0, teacher_scale, teacher_cap), 0.0)
        tl.store(out + TOP_T, t_max)
        tl.store(out + TOTAL_T, t_total)
        tl.store(out + EXCESS, kl_total)
        tl.store(out + LABEL_T, label_t)
        tl.store(out + BESIDE, s_over)
        tl.store(out + BESIDE_T, t_over)
        if ROW[COLD]:
            tl.store(out + COLD_TOP, s_max)
            tl.store(out + COLD_TOTAL, cold_total)
            tl.store(out + COLD_LABEL, label_z)
    tl.store(out + TOP, s_max)
    tl.store(out + TOTAL, s_total)
    tl.store(out + LABEL, label_z)


@triton.jit(do_not_specialize=["scalars_stride"])
def sums_kernel(
    student_ptr,
    teacher_ptr,
    labels_ptr,
    scalars_ptr,
    known_ptr,  # (C, KNOWN + terms)
    use_ptr,  # (C,) which rows take the sweep; the others' sums are 0
    out_ptr,  # (C, 2 terms)
    first,
    V,
    student_stride,
    teacher_stride,
    scalars_stride,
    student_scale,
    student_cap,
    teacher_scale,
    teacher_cap,
    TABLED: tl.constexpr,
    EXCLUDES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    out = out_ptr + row * (2 * len(TABLED))
    if tl.load(use_ptr + row) != 0:
        label = _own_label(tl.load(labels_ptr + row), first, V)
        student = (student_ptr + row * student_stride, student_scale, student_cap)
        teacher = (teacher_ptr + row * teacher_stride, teacher_scale, teacher_cap, None, None, row, 0)
        scalars = scalars_ptr + row * scalars_stride
        targets, norms = _known(known_ptr, scalars, row, TABLED)
        sums = sweep_sums(student, teacher, V, label, targets, norms, TABLED, EXCLUDES, BLOCK)
        for i in tl.static_range(2 * len(TABLED)):
            tl.store(out + i, sums[i])
    else:
        for i in tl.static_range(2 * len(TABLED)):
            tl.store(out + i, 0.0)


@triton.jit(do_not_specialize=["scalars_stride"])
def gradient_kernel(
    student_ptr,
    teacher_ptr,  # or None
    dlogits_ptr,  # may be student_ptr
    labels_ptr,
    weights_ptr,  # or None
    scalars_ptr,
    known_ptr,
    factors_ptr,  # (C, FACTORS) of fused_kd.rows.triton.shares.linear
    use_ptr,  # (C,) or None: no row takes sums
    own_ptr,  # (C, terms + 1): of each term's g, over T, and the sum of their products with sum g; None as use_ptr is
    first,
    V,
    student_stride,
    teacher_stride,
    dlogits_stride,
    scalars_stride,
    student_scale,
    student_cap,
    teacher_scale,
    teacher_cap,
    TABLED: tl.constexpr,
    ROW: tl.constexpr,
    EXCLUDES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    given = tl.load(labels_ptr + row)
    dlogits_row = dlogits_ptr + row * dlogits_stride
    if given < 0:
        fill(dlogits_row, V, 0.0, BLOCK)
        return
    label = _own_label(given, first, V)
    student = (student_ptr + row * student_stride, student_scale, student_cap)
    scalars = scalars_ptr + row * scalars_stride
    targets, norms = _known(known_ptr, scalars, row, TABLED)
    factors = ()
    for i in tl.static_range(FACTORS):
        factors = factors + (tl.load(factors_ptr + row * FACTORS + i),)
    if teacher_ptr is None:
        write_label_gradient(
            student, dlogits_row, V, row, label, norms[0], factors[0] * norms[1], factors[2], weights_ptr, BLOCK
        )  # fmt: skip
    else:
        teacher = (teacher_ptr + row * teacher_stride, teacher_scale, teacher_cap, None, None, row, 0)
        k = exponent_scale(scalars)
        if use_ptr is None:
            write_gradient(
                student, teacher, dlogits_row, V, row, label, k, targets, norms, norms[0], factors, (), weights_ptr,
                False, True, TABLED, ROW, False, BLOCK,
            )  # fmt: skip
        elif tl.load(use_ptr + row) != 0:
            at = own_ptr + row * (len(TABLED) + 1)
            own = ()
            for i in tl.static_range(len(TABLED)):
                factor = tl.load(at + i)
                own = own + (factor, factor)
            own = own + (tl.load(at + len(TABLED)),)
            write_gradient(
                student, teacher, dlogits_row, V, row, label, k, targets, norms, norms[0], factors, own, weights_ptr,
                True, True, TABLED, ROW, EXCLUDES, BLOCK,
            )  # fmt: skip
        else:
            write_gradient(
                student, teacher, dlogits_row, V, row, label, k, targets, norms, norms[0], factors, (), weights_ptr,
                False, True, TABLED, ROW, False, BLOCK,
            )  # fmt: skip


@triton.jit
def _own_label(label, first, V):
    """The label's column in this slice, or -1: a lane beyond the end must not take itself for it."""
    local = label - first
    return tl.where((label >= 0) & (local >= 0) & (local < V), local, -1).to(tl.int32)


@triton.jit
def _known(known_ptr, scalars, row, TABLED: tl.constexpr):
    """``targets`` and ``norms`` of a row, as the functions of the whole row's kernel take them."""
    at = known_ptr + row * (KNOWN + len(TABLED))  # a Known, and d at the label
    norms = (tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4))
    targets = ()
    for i in tl.static_range(len(TABLED)):
        own = scalars + TABLED[i][INDEX] * SCALARS
        beta, alpha = tl.load(own + BETA), tl.load(own + ALPHA)
        label_d = tl.load(at + KNOWN + i)
        targets = targets + ((label_scalars(own), beta, alpha, exponent_scale(scalars), label_d),)
    return targets, norms
