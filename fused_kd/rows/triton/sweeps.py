"""The sweeps of a row's Triton kernels, and their loads: what a program does with the V logits of its row.

``student`` is (row pointer, scale or None, softcap or None); ``teacher`` the same, then the entries, the rest, the row
and K of a sparse one. ``k``, a term's ``target`` and ``norms`` as of :func:`fused_kd.rows.triton.math.arguments`;
``TABLED`` and ``ROW`` as of :mod:`fused_kd.rows.triton.terms`.

A sweep takes the row's whole blocks unmasked, so that a row that begins at a multiple of 16 bytes is read in vectors
whatever V is, and what is left of it, if anything, masked.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .math import EXCLUDED, LOG2_E, LOG_ZERO, OUTSIDE, arguments, exponent, final_logits, first_entry, moved
from .shares import linear
from .terms import ALL_P, ALL_Y, COLD, KL_AT_ONE, MIXED, MIXTURE, POWERS, SUMS_P, SUMS_Y, G, H, Z


@triton.jit
def sweep_student(student, V, ENTROPY: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, PACK: tl.constexpr):
    """The maximum, and the sum of exponentials over it at temperature 1; with ``ENTROPY`` that of their products with
    their exponents, else 0."""
    z_max = tl.full((LANES,), OUTSIDE, tl.float32)
    z_sum = tl.zeros((LANES,), tl.float32)
    product = tl.zeros((LANES,), tl.float32)
    whole = V // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        z_max, z_sum, product = _add_student(
            student, start, None, z_max, z_sum, product, ENTROPY, BLOCK, LANES, PACK
        )  # fmt: skip
    if whole < V:
        z_max, z_sum, product = _add_student(student, whole, V, z_max, z_sum, product, ENTROPY, BLOCK, LANES, PACK)
    top = tl.max(z_max, axis=0)
    step = exponent(z_max, LOG2_E, top)
    if ENTROPY:
        product = tl.exp2(step) * (product + z_sum * step)
    return top, tl.sum(z_sum * tl.exp2(step), axis=0), tl.sum(product, axis=0)


@triton.jit
def _add_student(
    student,
    start,
    end,
    z_max,
    z_sum,
    product,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    PACK: tl.constexpr,
):
    z, _slope, _offsets = student_block(student, start, end, BLOCK)
    z = by_lane(z, LANES, PACK)
    if ENTROPY:
        new = tl.maximum(z_max, lane_max(z))
        product = add_products(z, LOG2_E, z_max, new, z_sum, product)
    new_max, z_sum = add_exponentials(z, LOG2_E, z_max, z_sum)
    return new_max, z_sum, product


@triton.jit
def sweep_both(
    student,
    teacher,
    V,
    k,
    COLD: tl.constexpr,
    EXCLUDES: tl.constexpr,
    ENTROPY_S: tl.constexpr,
    ENTROPY_T: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    PACK: tl.constexpr,
):
    """Maxima and sums over them: of the student's exponentials, the teacher's, ``sum e_t * (a_t - a_s)`` of their
    exponents, and the student's at temperature 1. Of each side's logits the largest where the other excludes a token,
    ``OUTSIDE`` without ``EXCLUDES``. ``sum e_s * a_s`` and ``sum e_t * a_t``, 0 unless asked for."""
    s_max = tl.full((LANES,), OUTSIDE, tl.float32)
    t_max = tl.full((LANES,), OUTSIDE, tl.float32)
    s_sum = tl.zeros((LANES,), tl.float32)
    t_sum = tl.zeros((LANES,), tl.float32)
    kl_sum = tl.zeros((LANES,), tl.float32)
    cold_sum = tl.zeros((LANES,), tl.float32)
    s_over = tl.full((LANES,), OUTSIDE, tl.float32)
    t_over = tl.full((LANES,), OUTSIDE, tl.float32)
    s_product = tl.zeros((LANES,), tl.float32)
    t_product = tl.zeros((LANES,), tl.float32)
    whole = V // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        s_max, s_sum, t_max, t_sum, kl_sum, cold_sum, s_over, t_over, s_product, t_product = _add_both(
            student, teacher, start, None, k, s_max, s_sum, t_max, t_sum, kl_sum, cold_sum, s_over, t_over, s_product,
            t_product, COLD, EXCLUDES, ENTROPY_S, ENTROPY_T, BLOCK, LANES, PACK,
        )  # fmt: skip
    if whole < V:
        s_max, s_sum, t_max, t_sum, kl_sum, cold_sum, s_over, t_over, s_product, t_product = _add_both(
            student, teacher, whole, V, k, s_max, s_sum, t_max, t_sum, kl_sum, cold_sum, s_over, t_over, s_product,
            t_product, COLD, EXCLUDES, ENTROPY_S, ENTROPY_T, BLOCK, LANES, PACK,
        )  # fmt: skip
    s_top = tl.max(s_max, axis=0)
    t_top = tl.max(t_max, axis=0)
    s_step = exponent(s_max, k, s_top)
    t_step = exponent(t_max, k, t_top)
    kl_sum = moved(kl_sum, t_sum, s_step, t_step)
    if ENTROPY_S:
        s_product = tl.exp2(s_step) * (s_product + s_sum * s_step)
    if ENTROPY_T:
        t_product = tl.exp2(t_step) * (t_product + t_sum * t_step)
    t_sum = t_sum * tl.exp2(t_step)
    s_sum = s_sum * tl.exp2(s_step)
    cold_sum = cold_sum * tl.exp2(exponent(s_max, LOG2_E, s_top))
    return (
        s_top, tl.sum(s_sum, axis=0), t_top, tl.sum(t_sum, axis=0), tl.sum(kl_sum, axis=0), tl.sum(cold_sum, axis=0),
        tl.max(s_over, axis=0), tl.max(t_over, axis=0), tl.sum(s_product, axis=0), tl.sum(t_product, axis=0),
    )  # fmt: skip


@triton.jit
def _add_both(
    student,
    teacher,
    start,
    end,
    k,
    s_max,
    s_sum,
    t_max,
    t_sum,
    kl_sum,
    cold_sum,
    s_over,
    t_over,
    s_product,
    t_product,
    COLD: tl.constexpr,
    EXCLUDES: tl.constexpr,
    ENTROPY_S: tl.constexpr,
    ENTROPY_T: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    PACK: tl.constexpr,
):
    z_s, _slope, offsets = student_block(student, start, end, BLOCK)
    z_t = teacher_block(teacher, start, offsets, end, BLOCK)
    z_s = by_lane(z_s, LANES, PACK)
    z_t = by_lane(z_t, LANES, PACK)
    if EXCLUDES:
        s_over = tl.maximum(s_over, lane_max(tl.where(z_t < EXCLUDED, z_s, OUTSIDE)))
        t_over = tl.maximum(t_over, lane_max(tl.where(z_s < EXCLUDED, z_t, OUTSIDE)))
    if COLD:
        _new, cold_sum = add_exponentials(z_s, LOG2_E, s_max, cold_sum)
    new_s = tl.maximum(s_max, lane_max(z_s))
    new_t = tl.maximum(t_max, lane_max(z_t))
    a_s = exponent(z_s, k, new_s[None, :, None])
    a_t = exponent(z_t, k, new_t[None, :, None])
    e_t = tl.exp2(a_t)
    s_step = exponent(s_max, k, new_s)
    t_step = exponent(t_max, k, new_t)
    shrink = tl.exp2(t_step)
    if ENTROPY_S:
        s_product = add_products(z_s, k, s_max, new_s, s_sum, s_product)
    if ENTROPY_T:
        t_product = add_products(z_t, k, t_max, new_t, t_sum, t_product)
    t_sum = t_sum * shrink
    # From the maxima, so offsets of the logits cost no digits.
    kl_sum = kl_sum * shrink + t_sum * (t_step - s_step) + lane_sum(e_t * (a_t - a_s))
    t_sum = t_sum + lane_sum(e_t)
    s_sum = s_sum * tl.exp2(s_step) + lane_sum(tl.exp2(a_s))
    return new_s, s_sum, new_t, t_sum, kl_sum, cold_sum, s_over, t_over, s_product, t_product


@triton.jit
def add_products(z, k, z_max, new_max, z_sum, product):
    """The lanes' sums of exponentials times exponents, over ``new_max``, with those of (GROUPS, LANES, PACK) logits;
    ``z_sum`` are exponentials over ``z_max``. All of one sign: nothing cancels."""
    a = exponent(z, k, new_max[None, :, None])
    step = exponent(z_max, k, new_max)
    return tl.exp2(step) * (product + z_sum * step) + lane_sum(tl.exp2(a) * a)


@triton.jit
def add_exponentials(z, k, z_max, z_sum):
    """The lanes' maxima, and sums of exponentials over them, with those of (GROUPS, LANES, PACK) logits."""
    new_max = tl.maximum(z_max, lane_max(z))
    z_sum = z_sum * tl.exp2(exponent(z_max, k, new_max))
    return new_max, z_sum + lane_sum(tl.exp2(exponent(z, k, new_max[None, :, None])))


@triton.jit
def by_lane(z, LANES: tl.constexpr, PACK: tl.constexpr):
    """(BLOCK,) as (GROUPS, LANES, PACK): of a lane is what one thread has loaded, so that no thread waits for another
    before the row's end."""
    return tl.reshape(z, (z.shape[0] // (LANES * PACK), LANES, PACK))


@triton.jit
def lane_max(z):
    return tl.max(tl.max(z, axis=2), axis=0)


@triton.jit
def lane_sum(x):
    return tl.sum(tl.sum(x, axis=2), axis=0)


@triton.jit
def sweep_sums(
    student, teacher, V, label, targets, norms, TABLED: tl.constexpr, EXCLUDES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """``sum h`` and ``sum g`` of each term."""
    sums = ()
    for _i in tl.static_range(2 * len(TABLED)):
        sums = sums + (tl.zeros((BLOCK,), tl.float32),)
    whole = V // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        sums = _add_sums(student, teacher, start, None, label, targets, norms, sums, TABLED, EXCLUDES, BLOCK)
    if whole < V:
        sums = _add_sums(student, teacher, whole, V, label, targets, norms, sums, TABLED, EXCLUDES, BLOCK)
    totals = ()
    for i in tl.static_range(2 * len(TABLED)):
        totals = totals + (tl.sum(sums[i], axis=0),)
    return totals


@triton.jit
def _add_sums(
    student,
    teacher,
    start,
    end,
    label,
    targets,
    norms,
    sums,
    TABLED: tl.constexpr,
    EXCLUDES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    z_s, _slope, offsets = student_block(student, start, end, BLOCK)
    z_t = teacher_block(teacher, start, offsets, end, BLOCK)
    at_label = offsets == label
    added = ()
    for i in tl.static_range(len(TABLED)):
        t, q, d, r, log_r, s, log_s, beta, alpha, w, u, v = arguments(
            z_s, z_t, at_label, targets[i], norms, TABLED[i][MIXED], TABLED[i][MIXTURE], TABLED[i][POWERS], EXCLUDES
        )
        of_h = TABLED[i][H](t, q, d, r, log_r, s, log_s, beta, alpha, w, u, v)
        of_g = TABLED[i][G](t, q, d, r, log_r, s, log_s, beta, alpha, w, u, v)
        added = added + (sums[2 * i] + of_h, sums[2 * i + 1] + of_g)
    return added


@triton.jit
def sweep_agreement(student, teacher, V, k, norms, BLOCK: tl.constexpr):
    """Whether some token has the largest logit of both sides, and ``sum min(p, q)``."""
    s_max, s_inv, t_max, t_inv, _log_ratio = norms
    best = tl.full((BLOCK,), OUTSIDE, tl.float32)
    overlap = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        z_s, _slope, offsets = student_block(student, start, V, BLOCK)
        z_t = teacher_block(teacher, start, offsets, V, BLOCK)
        best = tl.maximum(best, tl.where(z_t == t_max, z_s, OUTSIDE))
        q = tl.exp2(exponent(z_s, k, s_max)) * s_inv
        overlap += tl.minimum(q, tl.exp2(exponent(z_t, k, t_max)) * t_inv)
    return tl.max(best, axis=0) == s_max, tl.sum(overlap, axis=0)


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


@triton.jit
def student_block(student, start, end, BLOCK: tl.constexpr):
    """Final fp32 logits of a block before the temperature, ``OUTSIDE`` from ``end`` on; d final / d raw; columns.

    No ``end`` says that the row has the whole block."""
    row_ptr, scale, cap = student
    offsets = start + tl.arange(0, BLOCK)
    if end is None:
        z, slope = final_logits(tl.load(row_ptr + offsets).to(tl.float32), scale, cap)
    else:
        z, slope = logits_and_slope(row_ptr, offsets, offsets < end, scale, cap)
    return z, slope, offsets


@triton.jit
def teacher_block(teacher, start, offsets, end, BLOCK: tl.constexpr):
    """As :func:`student_block`, the logits; a sparse teacher's are made here: one value, and its entries in this
    block."""
    row_ptr, scale, cap, entries_ptr, rest_ptr, row, K = teacher
    if entries_ptr is None:
        if end is None:
            z, _slope = final_logits(tl.load(row_ptr + offsets).to(tl.float32), scale, cap)
        else:
            z = logits(row_ptr, offsets, offsets < end, scale, cap)
    else:
        entries = entries_ptr + row * K
        z = tl.zeros((BLOCK,), tl.float32) + tl.maximum(tl.load(rest_ptr + row), LOG_ZERO)
        for j in range(first_entry(entries, K, start), first_entry(entries, K, start + BLOCK)):
            own = tl.maximum(tl.load(row_ptr + j), LOG_ZERO)
            z = tl.where(offsets == tl.load(entries + j), own, z)
        if end is not None:
            z = tl.where(offsets < end, z, OUTSIDE)
    return z


@triton.jit
def write_zeros(dlogits_row, V, BLOCK: tl.constexpr):
    zeros = tl.zeros((BLOCK,), tl.float32)
    whole = V // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        store_block(dlogits_row, start + tl.arange(0, BLOCK), None, zeros)
    if whole < V:
        store_block(dlogits_row, whole + tl.arange(0, BLOCK), V, zeros)


@triton.jit
def store_block(dlogits_row, offsets, end, gradient):
    if end is None:
        tl.store(dlogits_row + offsets, gradient)
    else:
        tl.store(dlogits_row + offsets, gradient, mask=offsets < end)


@triton.jit
def logits(row_ptr, offsets, mask, scale, cap):
    """Final fp32 logits before the temperature; ``OUTSIDE`` where masked."""
    z, _slope = logits_and_slope(row_ptr, offsets, mask, scale, cap)
    return z


@triton.jit
def logits_and_slope(row_ptr, offsets, mask, scale, cap):
    """As :func:`logits`, and d final / d raw."""
    z = tl.load(row_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    z, slope = final_logits(z, scale, cap)
    return tl.where(mask, z, OUTSIDE), slope
