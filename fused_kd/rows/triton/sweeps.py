"""The sweeps of a row's Triton kernels, and their loads: what a program does with the V logits of its row.

``student`` is (row pointer, scale or None, softcap or None); ``teacher`` the same, then the entries, the rest, the row
and K of a sparse one. ``k``, ``target`` and ``norms`` as of :func:`fused_kd.rows.triton.math.arguments`.

A sweep takes the row's whole blocks unmasked, so that a row that begins at a multiple of 16 bytes is read in vectors
whatever V is, and what is left of it, if anything, masked.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .math import EXCLUDED, LOG2_E, LOG_ZERO, OUTSIDE, arguments, exponent, final_logits, first_entry, moved


@triton.jit
def sweep_student(student, V, BLOCK: tl.constexpr, LANES: tl.constexpr, PACK: tl.constexpr):
    """The maximum, and the sum of exponentials over it at temperature 1."""
    z_max = tl.full((LANES,), OUTSIDE, tl.float32)
    z_sum = tl.zeros((LANES,), tl.float32)
    whole = V // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        z_max, z_sum = _add_student(student, start, None, z_max, z_sum, BLOCK, LANES, PACK)
    if whole < V:
        z_max, z_sum = _add_student(student, whole, V, z_max, z_sum, BLOCK, LANES, PACK)
    top = tl.max(z_max, axis=0)
    return top, tl.sum(z_sum * tl.exp2(exponent(z_max, LOG2_E, top)), axis=0)


@triton.jit
def _add_student(student, start, end, z_max, z_sum, BLOCK: tl.constexpr, LANES: tl.constexpr, PACK: tl.constexpr):
    z, _slope, _offsets = student_block(student, start, end, BLOCK)
    return add_exponentials(by_lane(z, LANES, PACK), LOG2_E, z_max, z_sum)


@triton.jit
def sweep_both(
    student,
    teacher,
    V,
    k,
    COLD: tl.constexpr,
    EXCLUDES: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    PACK: tl.constexpr,
):
    """Maxima and sums over them: of the student's exponentials, the teacher's, ``sum e_t * (a_t - a_s)`` of their
    exponents, and the student's at temperature 1. Of each side's logits the largest where the other excludes a token,
    ``OUTSIDE`` without ``EXCLUDES``."""
    s_max = tl.full((LANES,), OUTSIDE, tl.float32)
    t_max = tl.full((LANES,), OUTSIDE, tl.float32)
    s_sum = tl.zeros((LANES,), tl.float32)
    t_sum = tl.zeros((LANES,), tl.float32)
    kl_sum = tl.zeros((LANES,), tl.float32)
    cold_sum = tl.zeros((LANES,), tl.float32)
    s_over = tl.full((LANES,), OUTSIDE, tl.float32)
    t_over = tl.full((LANES,), OUTSIDE, tl.float32)
    whole = V // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        s_max, s_sum, t_max, t_sum, kl_sum, cold_sum, s_over, t_over = _add_both(
            student, teacher, start, None, k, s_max, s_sum, t_max, t_sum, kl_sum, cold_sum, s_over, t_over,
            COLD, EXCLUDES, BLOCK, LANES, PACK,
        )  # fmt: skip
    if whole < V:
        s_max, s_sum, t_max, t_sum, kl_sum, cold_sum, s_over, t_over = _add_both(
            student, teacher, whole, V, k, s_max, s_sum, t_max, t_sum, kl_sum, cold_sum, s_over, t_over,
            COLD, EXCLUDES, BLOCK, LANES, PACK,
        )  # fmt: skip
    s_top = tl.max(s_max, axis=0)
    t_top = tl.max(t_max, axis=0)
    s_step = exponent(s_max, k, s_top)
    t_step = exponent(t_max, k, t_top)
    kl_sum = moved(kl_sum, t_sum, s_step, t_step)
    t_sum = t_sum * tl.exp2(t_step)
    s_sum = s_sum * tl.exp2(s_step)
    cold_sum = cold_sum * tl.exp2(exponent(s_max, LOG2_E, s_top))
    return (
        s_top, tl.sum(s_sum, axis=0), t_top, tl.sum(t_sum, axis=0), tl.sum(kl_sum, axis=0), tl.sum(cold_sum, axis=0),
        tl.max(s_over, axis=0), tl.max(t_over, axis=0),
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
    COLD: tl.constexpr,
    EXCLUDES: tl.constexpr,
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
    t_sum = t_sum * shrink
    # From the maxima, so offsets of the logits cost no digits.
    kl_sum = kl_sum * shrink + t_sum * (t_step - s_step) + lane_sum(e_t * (a_t - a_s))
    t_sum = t_sum + lane_sum(e_t)
    s_sum = s_sum * tl.exp2(s_step) + lane_sum(tl.exp2(a_s))
    return new_s, s_sum, new_t, t_sum, kl_sum, cold_sum, s_over, t_over


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
    student,
    teacher,
    V,
    label,
    target,
    norms,
    h: tl.constexpr,
    g: tl.constexpr,
    MIXTURE: tl.constexpr,
    MIXED: tl.constexpr,
    EXCLUDES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``sum h`` and ``sum g``."""
    h_sum = tl.zeros((BLOCK,), tl.float32)
    g_sum = tl.zeros((BLOCK,), tl.float32)
    whole = V // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        of_h, of_g = _summands(
            student, teacher, start, None, label, target, norms, h, g, MIXTURE, MIXED, EXCLUDES, BLOCK
        )
        h_sum += of_h
        g_sum += of_g
    if whole < V:
        of_h, of_g = _summands(student, teacher, whole, V, label, target, norms, h, g, MIXTURE, MIXED, EXCLUDES, BLOCK)
        h_sum += of_h
        g_sum += of_g
    return tl.sum(h_sum, axis=0), tl.sum(g_sum, axis=0)


@triton.jit
def _summands(
    student,
    teacher,
    start,
    end,
    label,
    target,
    norms,
    h: tl.constexpr,
    g: tl.constexpr,
    MIXTURE: tl.constexpr,
    MIXED: tl.constexpr,
    EXCLUDES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    z_s, _slope, offsets = student_block(student, start, end, BLOCK)
    z_t = teacher_block(teacher, start, offsets, end, BLOCK)
    t, q, d, r, log_r, s, log_s, beta, alpha = arguments(
        z_s, z_t, offsets == label, target, norms, MIXED, MIXTURE, EXCLUDES
    )
    return h(t, q, d, r, log_r, s, log_s, beta, alpha), g(t, q, d, r, log_r, s, log_s, beta, alpha)


@triton.jit
def write_label_gradient(student, dlogits_row, V, row, label, z_max, inv_total, weights_ptr, BLOCK: tl.constexpr):
    """``q - y``, times the row's weight and d final / d raw; in place as :func:`write_gradient`."""
    weight = 1.0
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + row)
    blocks = V // BLOCK
    if blocks * BLOCK < V:
        _write_label_block(student, dlogits_row, blocks * BLOCK, V, label, z_max, inv_total, weight, BLOCK)
    for i in range(0, blocks):
        start = (blocks - 1 - i) * BLOCK
        _write_label_block(student, dlogits_row, start, None, label, z_max, inv_total, weight, BLOCK)


@triton.jit
def _write_label_block(student, dlogits_row, start, end, label, z_max, inv_total, weight, BLOCK: tl.constexpr):
    z, slope, offsets = student_block(student, start, end, BLOCK)
    gradient = tl.exp2(exponent(z, LOG2_E, z_max)) * inv_total - tl.where(offsets == label, 1.0, 0.0)
    store_block(dlogits_row, offsets, end, gradient * (slope * weight))


@triton.jit
def write_gradient(
    use,  # whether the row has taken sweep 2; else its gradient is that of KL(t||q)
    g_total,
    student,
    teacher,
    dlogits_row,
    V,
    row,
    label,
    target,
    norms,
    cold,
    shares,
    weights_ptr,
    g: tl.constexpr,
    free_g: tl.constexpr,
    MIXTURE: tl.constexpr,
    MIXED: tl.constexpr,
    HARD_LABEL: tl.constexpr,
    COLD: tl.constexpr,
    EXCLUDES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``(share / T) * (g - q * sum g) + ce_share * (q - y)``, times the row's weight and d final / d raw.

    Safe in place: a stored element is computed from that element's own load, whichever thread does either,
    and no other read of it can come late: stores need the sums, and the sums all threads' earlier loads.
    """
    weight = 1.0
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + row)
    if use:
        _write_blocks(
            student, teacher, dlogits_row, V, label, target, norms, cold, shares, weight, g_total,
            g, MIXTURE, MIXED, HARD_LABEL, COLD, EXCLUDES, BLOCK,
        )  # fmt: skip
    else:
        _write_blocks(
            student, teacher, dlogits_row, V, label, target, norms, cold, shares, weight, -1.0,
            free_g, False, MIXED, HARD_LABEL, COLD, False, BLOCK,
        )  # fmt: skip


@triton.jit
def _write_blocks(
    student,
    teacher,
    dlogits_row,
    V,
    label,
    target,
    norms,
    cold,
    shares,
    weight,
    g_total,
    g: tl.constexpr,
    MIXTURE: tl.constexpr,
    MIXED: tl.constexpr,
    HARD_LABEL: tl.constexpr,
    COLD: tl.constexpr,
    EXCLUDES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Backwards: the end of the row is what the sweep before has left in the cache.
    blocks = V // BLOCK
    if blocks * BLOCK < V:
        _write_block(
            student, teacher, dlogits_row, blocks * BLOCK, V, label, target, norms, cold, shares, weight, g_total,
            g, MIXTURE, MIXED, HARD_LABEL, COLD, EXCLUDES, BLOCK,
        )  # fmt: skip
    for i in range(0, blocks):
        _write_block(
            student, teacher, dlogits_row, (blocks - 1 - i) * BLOCK, None, label, target, norms, cold, shares, weight,
            g_total, g, MIXTURE, MIXED, HARD_LABEL, COLD, EXCLUDES, BLOCK,
        )  # fmt: skip


@triton.jit
def _write_block(
    student,
    teacher,
    dlogits_row,
    start,
    end,
    label,
    target,
    norms,
    cold,
    shares,
    weight,
    g_total,
    g: tl.constexpr,
    MIXTURE: tl.constexpr,
    MIXED: tl.constexpr,
    HARD_LABEL: tl.constexpr,
    COLD: tl.constexpr,
    EXCLUDES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    cold_max, cold_inv = cold
    div_share, ce_share = shares
    z_s, slope, offsets = student_block(student, start, end, BLOCK)
    z_t = teacher_block(teacher, start, offsets, end, BLOCK)
    t, q, d, r, log_r, s, log_s, beta, alpha = arguments(
        z_s, z_t, offsets == label, target, norms, MIXED, MIXTURE, EXCLUDES
    )
    gradient = div_share * (g(t, q, d, r, log_r, s, log_s, beta, alpha) - q * g_total)
    if HARD_LABEL:
        if COLD:
            q = tl.exp2(exponent(z_s, LOG2_E, cold_max)) * cold_inv
        gradient += ce_share * (q - tl.where(offsets == label, 1.0, 0.0))
    store_block(dlogits_row, offsets, end, gradient * (slope * weight))


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
