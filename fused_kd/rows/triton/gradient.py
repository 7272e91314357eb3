"""The last sweep of a row's Triton kernels: the gradient. Arguments as of :mod:`fused_kd.rows.triton.sweeps`."""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import store_block, student_block, teacher_block
from .math import LOG2_E, arguments, exponent
from .shares import linear
from .terms import ALL_P, ALL_Y, COLD, KL_AT_ONE, MIXED, MIXTURE, POWERS, SUMS_P, SUMS_Y, G, Z


@triton.jit
def write_label_gradient(student, dlogits_row, V, row, label, z_max, of_q, of_y, weights_ptr, BLOCK: tl.constexpr):
    """``of_q * e - of_y * y`` with exponentials e over the maximum, times the row's weight and d final / d raw; in
    place as :func:`write_gradient`."""
    weight = 1.0
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + row)
    blocks = V // BLOCK
    if blocks * BLOCK < V:
        _write_label_block(student, dlogits_row, blocks * BLOCK, V, label, z_max, of_q, of_y, weight, BLOCK)
    for i in range(0, blocks):
        start = (blocks - 1 - i) * BLOCK
        _write_label_block(student, dlogits_row, start, None, label, z_max, of_q, of_y, weight, BLOCK)


@triton.jit
def _write_label_block(student, dlogits_row, start, end, label, z_max, of_q, of_y, weight, BLOCK: tl.constexpr):
    z, slope, offsets = student_block(student, start, end, BLOCK)
    gradient = tl.exp2(exponent(z, LOG2_E, z_max)) * of_q - tl.where(offsets == label, of_y, 0.0)
    store_block(dlogits_row, offsets, end, gradient * (slope * weight))


@triton.jit
def write_gradient(
    student,
    teacher,
    dlogits_row,
    V,
    row,
    label,
    k,
    targets,
    norms,
    cold_max,
    factors,  # of fused_kd.rows.triton.shares.linear
    own,  # of each term's g, and of the KL beside it, over T; then the sum of their products with sum g
    weights_ptr,
    SUMS: tl.constexpr,  # whether the row takes the terms' own gradients
    ALL: tl.constexpr,  # whether the KL beside them is among ``factors``
    TABLED: tl.constexpr,
    ROW: tl.constexpr,
    EXCLUDES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of :mod:`fused_kd.rows.shares`, times the row's weight and d final / d raw.

    Safe in place: a stored element is computed from that element's own load, whichever thread does either,
    and no other read of it can come late: stores need the sums, and the sums all threads' earlier loads.
    """
    weight = 1.0
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + row)
    # Backwards: the end of the row is what the sweep before has left in the cache.
    blocks = V // BLOCK
    if blocks * BLOCK < V:
        _write_block(
            student, teacher, dlogits_row, blocks * BLOCK, V, label, k, targets, norms, cold_max, factors, own, weight,
            SUMS, ALL, TABLED, ROW, EXCLUDES, BLOCK,
        )  # fmt: skip
    for i in range(0, blocks):
        _write_block(
            student, teacher, dlogits_row, (blocks - 1 - i) * BLOCK, None, label, k, targets, norms, cold_max, factors,
            own, weight, SUMS, ALL, TABLED, ROW, EXCLUDES, BLOCK,
        )  # fmt: skip


@triton.jit
def _write_block(
    student,
    teacher,
    dlogits_row,
    start,
    end,
    label,
    k,
    targets,
    norms,
    cold_max,
    factors,
    own,
    weight,
    SUMS: tl.constexpr,
    ALL: tl.constexpr,
    TABLED: tl.constexpr,
    ROW: tl.constexpr,
    EXCLUDES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    z_s, slope, offsets = student_block(student, start, end, BLOCK)
    z_t = teacher_block(teacher, start, offsets, end, BLOCK)
    at_label = offsets == label
    if SUMS:
        gradient = tabled_gradient(z_s, z_t, at_label, targets, norms, own, not ALL, TABLED, EXCLUDES)
        if ALL:
            if ROW[ALL_P] or ROW[ALL_Y] or ROW[COLD] or ROW[Z]:
                gradient += linear(z_s, z_t, at_label, k, norms, cold_max, factors, ROW[ALL_P], ROW[ALL_Y], ROW)
        elif ROW[SUMS_P] or ROW[SUMS_Y] or ROW[COLD] or ROW[Z]:
            gradient += linear(z_s, z_t, at_label, k, norms, cold_max, factors, ROW[SUMS_P], ROW[SUMS_Y], ROW)
    else:
        gradient = linear(z_s, z_t, at_label, k, norms, cold_max, factors, ROW[ALL_P], ROW[ALL_Y], ROW)
    store_block(dlogits_row, offsets, end, gradient * (slope * weight))


@triton.jit
def tabled_gradient(
    z_s,
    z_t,
    at_label,
    targets,
    norms,
    own,
    FLOORS: tl.constexpr,  # whether KL beside a divergence is to be had here
    TABLED: tl.constexpr,
    EXCLUDES: tl.constexpr,
):
    """``sum_i factor_i * g_i - q * total``"""
    for i in tl.static_range(len(TABLED)):
        t, q, d, r, log_r, s, log_s, beta, alpha, w, u, v = arguments(
            z_s, z_t, at_label, targets[i], norms, TABLED[i][MIXED], TABLED[i][MIXTURE], TABLED[i][POWERS], EXCLUDES
        )
        if i == 0:
            gradient = own[0] * TABLED[i][G](t, q, d, r, log_r, s, log_s, beta, alpha, w, u, v)
        else:
            gradient += own[2 * i] * TABLED[i][G](t, q, d, r, log_r, s, log_s, beta, alpha, w, u, v)
        if FLOORS and TABLED[i][KL_AT_ONE]:
            gradient = tl.fma(-own[2 * i + 1], t, gradient)
        if i == len(TABLED) - 1:
            gradient = tl.fma(-q, own[2 * len(TABLED)], gradient)
    return gradient
