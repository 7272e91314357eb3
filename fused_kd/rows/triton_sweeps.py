"""The sweeps of a row's Triton kernels, and their loads: what a program does with the V logits of its row.

``student`` is (row pointer, scale, softcap or None); ``teacher`` the same, then the entries, the rest, the row and K of
a sparse one. ``target`` and ``norms`` as of :func:`fused_kd.rows.triton_math.arguments`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .base import LOG_ZERO
from .triton_math import OUTSIDE, arguments, final_logits, first_entry

_LOG_ZERO = tl.constexpr(LOG_ZERO)


@triton.jit
def sweep_student(student, V, BLOCK: tl.constexpr):
    """The maximum, and (BLOCK,) parts of the sum of exponentials over it."""
    row_ptr, scale, cap = student
    z_max = tl.cast(OUTSIDE, tl.float32)
    z_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        z = logits(row_ptr, offsets, offsets < V, scale, cap)
        new_max = tl.maximum(z_max, tl.max(z, axis=0))
        z_sum = z_sum * tl.exp(z_max - new_max) + tl.exp(z - new_max)
        z_max = new_max
    return z_max, z_sum


@triton.jit
def sweep_both(student, teacher, V, inv_T, COLD: tl.constexpr, BLOCK: tl.constexpr):
    """Maxima and (BLOCK,) parts of the sums over them: of the student's exponentials, the teacher's, those of the
    student at temperature 1, and ``sum e_t * ((z_t - t_max) - (z_s - s_max))``."""
    student_row, student_scale, student_cap = student
    s_max = tl.cast(OUTSIDE, tl.float32)
    t_max = tl.cast(OUTSIDE, tl.float32)
    cold_max = tl.cast(OUTSIDE, tl.float32)
    s_sum = tl.zeros((BLOCK,), tl.float32)
    t_sum = tl.zeros((BLOCK,), tl.float32)
    cold_sum = tl.zeros((BLOCK,), tl.float32)
    # From the maxima, so offsets of the logits cost no digits.
    kl_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        z_s = logits(student_row, offsets, offsets < V, student_scale, student_cap)
        z_t = teacher_logits(teacher, start, offsets, offsets < V, BLOCK)
        block_max = tl.max(z_s, axis=0)
        if COLD:
            new_cold = tl.maximum(cold_max, block_max)
            cold_sum = cold_sum * tl.exp(cold_max - new_cold) + tl.exp(z_s - new_cold)
            cold_max = new_cold
        new_s = tl.maximum(s_max, block_max * inv_T)
        new_t = tl.maximum(t_max, tl.max(z_t, axis=0) * inv_T)
        a_s = z_s * inv_T - new_s
        a_t = z_t * inv_T - new_t
        e_t = tl.exp(a_t)
        shrink = tl.exp(t_max - new_t)
        t_sum = t_sum * shrink
        kl_sum = kl_sum * shrink + t_sum * ((t_max - new_t) - (s_max - new_s)) + e_t * (a_t - a_s)
        t_sum = t_sum + e_t
        s_sum = s_sum * tl.exp(s_max - new_s) + tl.exp(a_s)
        s_max = new_s
        t_max = new_t
    return s_max, s_sum, t_max, t_sum, kl_sum, cold_max, cold_sum


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
    BLOCK: tl.constexpr,
):
    """(BLOCK,) parts of ``sum h`` and ``sum g``."""
    student_row, student_scale, student_cap = student
    beta = target[1]
    h_sum = tl.zeros((BLOCK,), tl.float32)
    g_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        z_s = logits(student_row, offsets, offsets < V, student_scale, student_cap)
        z_t = teacher_logits(teacher, start, offsets, offsets < V, BLOCK)
        t, q, d, r, log_r, s, log_s = arguments(z_s, z_t, offsets == label, target, norms, MIXED, MIXTURE)
        h_sum += h(t, q, d, r, log_r, s, log_s, beta)
        g_sum += g(t, q, d, r, log_r, s, log_s, beta)
    return h_sum, g_sum


@triton.jit
def write_label_gradient(student, dlogits_row, V, row, label, z_max, inv_total, weights_ptr, BLOCK: tl.constexpr):
    """``q - y``, times the row's weight and d final / d raw; in place as :func:`write_gradient`."""
    row_ptr, scale, cap = student
    weight = 1.0
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + row)
    blocks = tl.cdiv(V, BLOCK)
    for i in range(0, blocks):
        offsets = (blocks - 1 - i) * BLOCK + tl.arange(0, BLOCK)
        z, slope = logits_and_slope(row_ptr, offsets, offsets < V, scale, cap)
        gradient = tl.exp(z - z_max) * inv_total - tl.where(offsets == label, 1.0, 0.0)
        tl.store(dlogits_row + offsets, gradient * (slope * weight), mask=offsets < V)


@triton.jit
def write_gradient(
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
    g_total,
    g: tl.constexpr,
    MIXTURE: tl.constexpr,
    MIXED: tl.constexpr,
    HARD_LABEL: tl.constexpr,
    COLD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``(share / T) * (g - q * sum g) + ce_share * (q - y)``, times the row's weight and d final / d raw.

    Safe in place: a stored element is computed from that element's own load, whichever thread does either,
    and no other read of it can come late: stores need the sums, and the sums all threads' earlier loads.
    """
    student_row, student_scale, student_cap = student
    beta = target[1]
    cold_max, cold_inv = cold
    div_share, ce_share = shares
    weight = 1.0
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + row)
    blocks = tl.cdiv(V, BLOCK)
    # Backwards: the end of the row is what the sweep before has left in the cache.
    for i in range(0, blocks):
        start = (blocks - 1 - i) * BLOCK
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < V
        z_s, slope = logits_and_slope(student_row, offsets, mask, student_scale, student_cap)
        z_t = teacher_logits(teacher, start, offsets, mask, BLOCK)
        t, q, d, r, log_r, s, log_s = arguments(z_s, z_t, offsets == label, target, norms, MIXED, MIXTURE)
        gradient = div_share * (g(t, q, d, r, log_r, s, log_s, beta) - q * g_total)
        if HARD_LABEL:
            if COLD:
                q = tl.exp(z_s - cold_max) * cold_inv
            gradient += ce_share * (q - tl.where(offsets == label, 1.0, 0.0))
        tl.store(dlogits_row + offsets, gradient * (slope * weight), mask=mask)


@triton.jit
def teacher_logits(teacher, start, offsets, mask, BLOCK: tl.constexpr):
    """As :func:`logits`; a sparse teacher's are made here: one value, and its entries in this block."""
    row_ptr, scale, cap, entries_ptr, rest_ptr, row, K = teacher
    if entries_ptr is None:
        z = logits(row_ptr, offsets, mask, scale, cap)
    else:
        entries = entries_ptr + row * K
        z = tl.where(mask, tl.maximum(tl.load(rest_ptr + row), _LOG_ZERO), OUTSIDE)
        for j in range(first_entry(entries, K, start), first_entry(entries, K, start + BLOCK)):
            own = tl.maximum(tl.load(row_ptr + j), _LOG_ZERO)
            z = tl.where(mask & (offsets == tl.load(entries + j)), own, z)
    return z


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
