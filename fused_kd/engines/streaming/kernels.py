"""Triton kernels of the streaming engine's first sweep: statistics over the vocabulary, and what later sweeps must know
of them.

A program owns BM tokens. What becomes of a tile of :mod:`.tiles` is the row's arithmetic, from
:mod:`fused_kd.rows.triton.math`. A token's *position* is its place in the engine's order: valid ones first.
Nothing that depends on the number of tokens is compiled in.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...rows.triton.math import (
    ALPHA,
    BETA,
    EXCLUDED,
    LN_2,
    LOG2_E,
    OUTSIDE,
    SCALARS,
    above_zero,
    cross_entropy,
    exponent,
    exponent_scale,
    inverse_temperature,
    label_scalars,
    moved,
    weighed,
)
from ...rows.triton.shares import (
    any_takes_sums,
    difficulty_of,
    free_loss,
    is_hard,
    label_factors,
    linear_factors,
    tabled_shares,
    target_of,
)
from ...rows.triton.terms import (
    BY_ENTROPY,
    COLD,
    COVERS,
    EVERYWHERE,
    GATE,
    INDEX,
    KL_AT_ONE,
    MIXED,
    NO_GATE,
    ROW_GATE,
)
from . import plan
from .tiles import placed, tile

# What a split of the vocabulary says of a token: (splits, FIELDS, n) fp32. Maxima are those before the temperature.
_S_MAX = tl.constexpr(0)
_S_SUM = tl.constexpr(1)
_S_LABEL = tl.constexpr(2)
_COLD_SUM = tl.constexpr(3)
_T_MAX = tl.constexpr(4)
_T_SUM = tl.constexpr(5)
_T_LABEL = tl.constexpr(6)
_KL = tl.constexpr(7)
_S_OVER = tl.constexpr(8)  # the largest logit where the other side excludes a token
_T_OVER = tl.constexpr(9)
_T_PRODUCT = tl.constexpr(10)  # of the teacher's exponentials and their exponents, for its entropy
FIELDS = tl.constexpr(plan.FIELDS)

# What later sweeps must know of a token: (NORMS + 3 terms, n) fp32.
_NORM_S_MAX = tl.constexpr(0)  # as are the next four: the norms of rows.triton.math.arguments
_NORM_S_INV = tl.constexpr(1)
_NORM_T_MAX = tl.constexpr(2)
_NORM_T_INV = tl.constexpr(3)
_NORM_LOG_RATIO = tl.constexpr(4)
FACTORS = tl.constexpr(5)  # and the next five: of rows.triton.shares.linear
KL_OF_TOKEN = tl.constexpr(11)
TOTAL = tl.constexpr(12)  # the sum of the terms' factors times sum g, which of KL is -1
TERM_NORMS = tl.constexpr(13)  # from here on three of each term with sums: d at the label, the factors of g and of KL
NORMS = 13


@triton.jit(do_not_specialize=["n", "scalars_stride"])
def statistics_kernel(
    student,
    teacher,  # None without TEACHER; before triton 3.7 a tuple that holds a None cannot be compared with None
    tokens_ptr,  # (n,) the token at a position
    labels_ptr,  # (n,)
    count_ptr,  # number of valid tokens, int32
    scalars_ptr,
    scalars_stride,
    partials_ptr,  # (splits, FIELDS, n)
    n,
    V,
    span,  # columns of a split, a multiple of BN: specialised for, or loads would lose their alignment
    TEACHER: tl.constexpr,
    PER_TOKEN: tl.constexpr,  # whether each token has its own scalars
    ROW: tl.constexpr,
    EXCLUDES: tl.constexpr,
    ROUND_S: tl.constexpr,
    ROUND_T: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Maxima, sums of exponentials, ``KL(p||q)`` and the label's logits over a split of the vocabulary."""
    block, split = placed(GROUP)
    first = block * BM
    count = tl.load(count_ptr)
    if first >= count:
        return
    positions = first + tl.arange(0, BM)
    held = tl.minimum(positions, count - 1)
    tokens = tl.load(tokens_ptr + held)
    labels = tl.load(labels_ptr + held).to(tl.int32)
    # Numbers that all tokens share are one, not a vector: they take no registers.
    if PER_TOKEN:
        k = exponent_scale(scalars_ptr + tokens * scalars_stride)
        k_column = k[:, None]
    else:
        k = exponent_scale(scalars_ptr)
        k_column = k

    s_max = tl.full((BM,), OUTSIDE, tl.float32)
    t_max = tl.full((BM,), OUTSIDE, tl.float32)
    s_sum = tl.zeros((BM,), tl.float32)
    t_sum = tl.zeros((BM,), tl.float32)
    cold_sum = tl.zeros((BM,), tl.float32)
    kl = tl.zeros((BM,), tl.float32)
    s_label = tl.zeros((BM,), tl.float32)
    t_label = tl.zeros((BM,), tl.float32)
    s_over = tl.full((BM,), OUTSIDE, tl.float32)
    t_over = tl.full((BM,), OUTSIDE, tl.float32)
    t_product = tl.zeros((BM,), tl.float32)
    for start in range(split * span, tl.minimum((split + 1) * span, V), BN):
        columns = start + tl.arange(0, BN)
        z_s, _slope = tile(student, tokens, start, V, ROUND_S, UPCAST, BM, BN, BK)
        if TEACHER:
            z_t, _slope_t = tile(teacher, tokens, start, V, ROUND_T, UPCAST, BM, BN, BK)
        at_label = columns[None, :] == labels[:, None]
        s_label += tl.sum(tl.where(at_label, z_s, 0.0), axis=1)
        new_s = tl.maximum(s_max, tl.max(z_s, axis=1))
        if ROW[COLD] or (not TEACHER):
            cold = tl.exp2(exponent(z_s, LOG2_E, new_s[:, None]))
            cold_sum = cold_sum * tl.exp2(exponent(s_max, LOG2_E, new_s)) + tl.sum(cold, axis=1)
        if TEACHER:
            t_label += tl.sum(tl.where(at_label, z_t, 0.0), axis=1)
            if EXCLUDES:
                s_over = tl.maximum(s_over, tl.max(tl.where(z_t < EXCLUDED, z_s, OUTSIDE), axis=1))
                t_over = tl.maximum(t_over, tl.max(tl.where(z_s < EXCLUDED, z_t, OUTSIDE), axis=1))
            new_t = tl.maximum(t_max, tl.max(z_t, axis=1))
            s_step = exponent(s_max, k, new_s)
            t_step = exponent(t_max, k, new_t)
            a_s = exponent(z_s, k_column, new_s[:, None])
            a_t = exponent(z_t, k_column, new_t[:, None])
            e_t = tl.exp2(a_t)
            if ROW[ROW_GATE] == BY_ENTROPY:
                t_product = tl.exp2(t_step) * (t_product + t_sum * t_step) + tl.sum(e_t * a_t, axis=1)
            kl = moved(kl, t_sum, s_step, t_step) + tl.sum(e_t * (a_t - a_s), axis=1)
            t_sum = t_sum * tl.exp2(t_step) + tl.sum(e_t, axis=1)
            s_sum = s_sum * tl.exp2(s_step) + tl.sum(tl.exp2(a_s), axis=1)
            t_max = new_t
        s_max = new_s

    valid = positions < count
    out = partials_ptr + (split.to(tl.int64) * FIELDS) * n + positions
    tl.store(out + _S_MAX * n, s_max, mask=valid)
    tl.store(out + _S_LABEL * n, s_label, mask=valid)
    if ROW[COLD] or (not TEACHER):
        tl.store(out + _COLD_SUM * n, cold_sum, mask=valid)
    if TEACHER:
        tl.store(out + _S_SUM * n, s_sum, mask=valid)
        tl.store(out + _T_MAX * n, t_max, mask=valid)
        tl.store(out + _T_SUM * n, t_sum, mask=valid)
        tl.store(out + _T_LABEL * n, t_label, mask=valid)
        tl.store(out + _KL * n, kl, mask=valid)
        if ROW[ROW_GATE] == BY_ENTROPY:
            tl.store(out + _T_PRODUCT * n, t_product, mask=valid)
        if EXCLUDES:
            tl.store(out + _S_OVER * n, s_over, mask=valid)
            tl.store(out + _T_OVER * n, t_over, mask=valid)


@triton.jit(do_not_specialize=["n", "splits", "scalars_stride"])
def combine_kernel(
    partials_ptr,
    norms_ptr,  # (NORMS + 3 terms, n)
    count_ptr,
    tokens_ptr,
    scalars_ptr,
    scalars_stride,
    loss_ptr,  # (n,) as are the next two
    difficulty_ptr,
    hard_ptr,
    given_ptr,  # (n,) which are hard, or None
    chosen_ptr,  # (n,) which take sums, or None where all do or none
    n,
    splits,
    TEACHER: tl.constexpr,
    TERMS: tl.constexpr,
    TABLED: tl.constexpr,
    ROW: tl.constexpr,
    EXCLUDES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The splits' statistics, in their order, into norms, difficulty, hardness and the loss where it needs no sums."""
    positions = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(count_ptr)
    valid = positions < count
    scalars = scalars_ptr + tl.load(tokens_ptr + positions, mask=valid, other=0) * scalars_stride
    inv_T = inverse_temperature(scalars)
    k = exponent_scale(scalars)
    s_max = tl.full((BLOCK,), OUTSIDE, tl.float32)
    t_max = tl.full((BLOCK,), OUTSIDE, tl.float32)
    s_sum = tl.zeros((BLOCK,), tl.float32)
    t_sum = tl.zeros((BLOCK,), tl.float32)
    cold_sum = tl.zeros((BLOCK,), tl.float32)
    kl = tl.zeros((BLOCK,), tl.float32)
    s_label = tl.zeros((BLOCK,), tl.float32)
    t_label = tl.zeros((BLOCK,), tl.float32)
    s_over = tl.full((BLOCK,), OUTSIDE, tl.float32)
    t_over = tl.full((BLOCK,), OUTSIDE, tl.float32)
    t_product = tl.zeros((BLOCK,), tl.float32)
    for split in range(0, splits):
        part = partials_ptr + tl.cast(split, tl.int64) * FIELDS * n + positions
        part_s = tl.load(part + _S_MAX * n, mask=valid, other=0.0)
        new_s = tl.maximum(s_max, part_s)
        s_label += tl.load(part + _S_LABEL * n, mask=valid, other=0.0)
        if ROW[COLD] or (not TEACHER):
            part_cold = tl.load(part + _COLD_SUM * n, mask=valid, other=1.0)
            cold_sum = cold_sum * tl.exp2(exponent(s_max, LOG2_E, new_s))
            cold_sum += part_cold * tl.exp2(exponent(part_s, LOG2_E, new_s))
        if TEACHER:
            t_label += tl.load(part + _T_LABEL * n, mask=valid, other=0.0)
            if EXCLUDES:
                s_over = tl.maximum(s_over, tl.load(part + _S_OVER * n, mask=valid, other=OUTSIDE))
                t_over = tl.maximum(t_over, tl.load(part + _T_OVER * n, mask=valid, other=OUTSIDE))
            part_t = tl.load(part + _T_MAX * n, mask=valid, other=0.0)
            part_s_sum = tl.load(part + _S_SUM * n, mask=valid, other=1.0)
            part_t_sum = tl.load(part + _T_SUM * n, mask=valid, other=1.0)
            part_kl = tl.load(part + _KL * n, mask=valid, other=0.0)
            new_t = tl.maximum(t_max, part_t)
            s_step = exponent(s_max, k, new_s)
            t_step = exponent(t_max, k, new_t)
            part_s_step = exponent(part_s, k, new_s)
            part_t_step = exponent(part_t, k, new_t)
            if ROW[ROW_GATE] == BY_ENTROPY:
                part_product = tl.load(part + _T_PRODUCT * n, mask=valid, other=0.0)
                t_product = tl.exp2(t_step) * (t_product + t_sum * t_step)
                t_product += tl.exp2(part_t_step) * (part_product + part_t_sum * part_t_step)
            kl = moved(kl, t_sum, s_step, t_step) + moved(part_kl, part_t_sum, part_s_step, part_t_step)
            t_sum = t_sum * tl.exp2(t_step) + part_t_sum * tl.exp2(part_t_step)
            s_sum = s_sum * tl.exp2(s_step) + part_s_sum * tl.exp2(part_s_step)
            t_max = new_t
        s_max = new_s

    norms = norms_ptr + positions
    within = positions < n
    hard = tl.zeros((BLOCK,), tl.int1)
    ce = tl.zeros((BLOCK,), tl.float32)
    lse = tl.zeros((BLOCK,), tl.float32)
    cold_inv = 1.0
    if ROW[COLD] or (not TEACHER):
        cold_log = tl.log(cold_sum)
        ce = cross_entropy(s_label, s_max, cold_log, 1.0)
        lse = s_max + cold_log
        cold_inv = 1.0 / cold_sum
    if TEACHER:
        s_log = tl.log(s_sum)
        t_log = tl.log(t_sum)
        kl = (kl / t_sum) * LN_2 - (t_log - s_log)
        kl = tl.where(kl < 0.0, 0.0, kl)  # unlike a maximum, keeps NaN
        student_above = above_zero(s_over, k, s_max, s_log, t_max)
        teacher_above = above_zero(t_over, k, t_max, t_log, s_max)
        if EXCLUDES:
            kl += tl.where(teacher_above, float("inf"), 0.0)
        log_q_y = exponent(s_label, k, s_max) * LN_2 - s_log
        log_p_y = exponent(t_label, k, t_max) * LN_2 - t_log
        warm = cross_entropy(s_label, s_max, s_log, inv_T)
        if not ROW[COLD]:
            ce = warm
            lse = s_max * inv_T + s_log
        entropy_t = t_log - (t_product / t_sum) * LN_2
        token = (kl, log_p_y, log_q_y, warm, ce, lse, entropy_t)
        difficulty = difficulty_of(scalars, token, ROW)
        if ROW[ROW_GATE] != NO_GATE:
            if given_ptr is None:
                hard = is_hard(scalars, token, difficulty, ROW)
            else:
                hard = tl.load(given_ptr + positions, mask=valid, other=0) != 0
        loss, free = free_loss(scalars, token, difficulty, hard, TERMS, ROW)
        total = tl.zeros((BLOCK,), tl.float32)
        for i in tl.static_range(len(TABLED)):
            own = scalars + TABLED[i][INDEX] * SCALARS
            factor, floor = tabled_shares(own, hard, TABLED[i][MIXED], TABLED[i][GATE], TABLED[i][KL_AT_ONE])
            if EXCLUDES and TABLED[i][EVERYWHERE]:
                beyond = student_above
                if TABLED[i][COVERS]:
                    beyond = student_above | teacher_above
                loss += weighed(factor, tl.where(beyond, float("inf"), 0.0))
            _label, _beta, _alpha, _k, label_d = target_of(own, k, token)
            tl.store(norms + (TERM_NORMS + 3 * i) * n, label_d, mask=valid)
            tl.store(norms + (TERM_NORMS + 3 * i + 1) * n, factor, mask=valid)
            tl.store(norms + (TERM_NORMS + 3 * i + 2) * n, floor * inv_T, mask=valid)
            total -= floor * inv_T
        if chosen_ptr is not None:
            tl.store(chosen_ptr + positions, any_takes_sums(scalars, hard, TABLED) & valid, mask=within)
        tl.store(norms + _NORM_S_MAX * n, s_max, mask=valid)
        tl.store(norms + _NORM_S_INV * n, 1.0 / s_sum, mask=valid)
        tl.store(norms + _NORM_T_MAX * n, t_max, mask=valid)
        tl.store(norms + _NORM_T_INV * n, 1.0 / t_sum, mask=valid)
        tl.store(norms + _NORM_LOG_RATIO * n, t_log - s_log, mask=valid)
        tl.store(norms + KL_OF_TOKEN * n, kl, mask=valid)
        tl.store(norms + TOTAL * n, total, mask=valid)
        factors = linear_factors(scalars, free, inv_T, lse, cold_inv, TERMS, ROW)
    else:
        difficulty = ce
        of_ce, of_z = label_factors(scalars, TERMS)
        loss = weighed(of_ce, ce) + of_z * lse * lse
        factors = (0.0, 0.0, 0.0, 0.0, (of_ce + 2.0 * of_z * lse) * cold_inv, of_ce)
        tl.store(norms + _NORM_S_MAX * n, s_max, mask=valid)
    for i in tl.static_range(6):
        tl.store(norms + (FACTORS + i) * n, factors[i], mask=valid)
    tl.store(loss_ptr + positions, tl.where(valid, loss, 0.0), mask=within)
    tl.store(difficulty_ptr + positions, tl.where(valid, difficulty, 0.0), mask=within)
    tl.store(hard_ptr + positions, hard & valid, mask=within)


@triton.jit
def norm(norms_ptr, field: tl.constexpr, positions, n):
    return tl.load(norms_ptr + field * n + positions)[:, None]


@triton.jit
def row_norms(norms_ptr, positions, n):
    """``norms`` of rows.triton.math.arguments, as columns."""
    s_max, s_inv = norm(norms_ptr, _NORM_S_MAX, positions, n), norm(norms_ptr, _NORM_S_INV, positions, n)
    t_max, t_inv = norm(norms_ptr, _NORM_T_MAX, positions, n), norm(norms_ptr, _NORM_T_INV, positions, n)
    return s_max, s_inv, t_max, t_inv, norm(norms_ptr, _NORM_LOG_RATIO, positions, n)


@triton.jit
def row_scalars(scalars_ptr, scalars_stride, tokens, PER_TOKEN: tl.constexpr):
    """Pointers to the tokens' scalars, as a column, or the one that they share."""
    if PER_TOKEN:
        scalars = scalars_ptr + (tokens * scalars_stride)[:, None]
    else:
        scalars = scalars_ptr
    return scalars


@triton.jit
def row_targets(norms_ptr, scalars, positions, n, TABLED: tl.constexpr):
    """Of each term with sums its ``target`` of rows.triton.math.arguments, as columns."""
    k = exponent_scale(scalars)
    targets = ()
    for i in tl.static_range(len(TABLED)):
        own = scalars + TABLED[i][INDEX] * SCALARS
        label_d = tl.load(norms_ptr + (TERM_NORMS + 3 * i) * n + positions)[:, None]
        beta, alpha = tl.load(own + BETA), tl.load(own + ALPHA)
        targets = targets + ((label_scalars(own), beta, alpha, k, label_d),)
    return targets


@triton.jit
def row_factors(norms_ptr, positions, n):
    """Those of rows.triton.shares.linear, as columns."""
    factors = ()
    for i in tl.static_range(6):
        factors = factors + (tl.load(norms_ptr + (FACTORS + i) * n + positions)[:, None],)
    return factors


@triton.jit
def row_own(norms_ptr, positions, n, TABLED: tl.constexpr):
    """Those of rows.triton.gradient.tabled_gradient, as columns. Rows that took no sums have 0 for g: all rows of a
    tile do the same."""
    own = ()
    for i in tl.static_range(len(TABLED)):
        factor = tl.load(norms_ptr + (TERM_NORMS + 3 * i + 1) * n + positions)[:, None]
        floor = tl.load(norms_ptr + (TERM_NORMS + 3 * i + 2) * n + positions)[:, None]
        own = own + (factor, floor)
    return own + (norm(norms_ptr, TOTAL, positions, n),)
