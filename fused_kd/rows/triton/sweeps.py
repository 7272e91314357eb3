"""The sweeps of a row's Triton kernels before its gradient: what a program does with the V logits of its row.

``student`` and ``teacher`` as of :mod:`fused_kd.rows.triton.blocks`; ``k``, a term's ``target`` and ``norms`` as of
:func:`fused_kd.rows.triton.math.arguments`; ``TABLED`` and ``ROW`` as of :mod:`fused_kd.rows.triton.terms`.

A sweep takes the row's whole blocks unmasked, so that a row that begins at a multiple of 16 bytes is read in vectors
whatever V is, and what is left of it, if anything, masked.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import student_block, teacher_block
from .math import EXCLUDED, LOG2_E, OUTSIDE, arguments, exponent, moved
from .terms import MIXED, MIXTURE, POWERS, G, H


@triton.jit
def sweep_student(
    student, V, k, ENTROPY: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, PACK: tl.constexpr
):  # fmt: skip
    """The maximum, and the sum of exponentials over it; with ``ENTROPY`` that of their products with their exponents,
    else 0."""
    z_max = tl.full((LANES,), OUTSIDE, tl.float32)
    z_sum = tl.zeros((LANES,), tl.float32)
    product = tl.zeros((LANES,), tl.float32)
    whole = V // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        z_max, z_sum, product = _add_student(
            student, start, None, k, z_max, z_sum, product, ENTROPY, BLOCK, LANES, PACK
        )  # fmt: skip
    if whole < V:
        z_max, z_sum, product = _add_student(student, whole, V, k, z_max, z_sum, product, ENTROPY, BLOCK, LANES, PACK)
    top = tl.max(z_max, axis=0)
    step = exponent(z_max, k, top)
    if ENTROPY:
        product = tl.exp2(step) * (product + z_sum * step)
    return top, tl.sum(z_sum * tl.exp2(step), axis=0), tl.sum(product, axis=0)


@triton.jit
def _add_student(
    student,
    start,
    end,
    k,
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
        product = add_products(z, k, z_max, new, z_sum, product)
    new_max, z_sum = add_exponentials(z, k, z_max, z_sum)
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
