"""Triton kernels that make tiles of logits, use them and forget them: statistics over the vocabulary; and the tiles.

A program owns BM tokens. It makes tiles (BM, BN) of both sides' final logits, by ``tl.dot`` over blocks of BK hidden
units or by loading them where logits were given. What becomes of a tile is the row's arithmetic, from
:mod:`fused_kd.rows.triton.math`. A token's *position* is its place in the engine's order: valid ones first.
Nothing that depends on the number of tokens is compiled in.

A side is a tuple ``(source, token stride, unit stride, weight, row stride, unit stride, bias, H, scale, softcap)``:
``weight`` None says that the source holds logits, ``softcap`` None that there is no cap. ``ROUND_*`` is the dtype to
which a side's operands are rounded; UPCAST multiplies them in fp32 all the same (the interpreter has no bf16 product).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...rows.triton.math import (
    ALPHA,
    BETA,
    EXCLUDED,
    GAMMA,
    LN_2,
    LOG2_E,
    OUTSIDE,
    above_zero,
    cross_entropy,
    exponent,
    exponent_scale,
    final_logits,
    inverse_temperature,
    label_scalars,
    label_terms,
    moved,
    weighed,
)
from . import plan

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
FIELDS = tl.constexpr(plan.FIELDS)

# What later sweeps must know of a token: (NORMS, n) fp32.
_NORM_S_MAX = tl.constexpr(0)  # as are the next four: the norms of rows.triton.math.arguments
_NORM_S_INV = tl.constexpr(1)
_NORM_T_MAX = tl.constexpr(2)
_NORM_T_INV = tl.constexpr(3)
_NORM_LOG_RATIO = tl.constexpr(4)
_LABEL_D = tl.constexpr(5)
COLD_MAX = tl.constexpr(6)
COLD_INV = tl.constexpr(7)
BASE = tl.constexpr(8)  # the part of the loss that no sum over h gives
G_TOTAL = tl.constexpr(9)
NORMS = 10


@triton.jit(do_not_specialize=["n"])
def statistics_kernel(
    student,
    teacher,  # None without TEACHER; before triton 3.7 a tuple that holds a None cannot be compared with None
    tokens_ptr,  # (n,) the token at a position
    labels_ptr,  # (n,)
    count_ptr,  # number of valid tokens, int32
    scalars_ptr,
    partials_ptr,  # (splits, FIELDS, n)
    n,
    V,
    span,  # columns of a split, a multiple of BN: specialised for, or loads would lose their alignment
    TEACHER: tl.constexpr,
    COLD: tl.constexpr,
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
    k = exponent_scale(scalars_ptr)

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
    for start in range(split * span, tl.minimum((split + 1) * span, V), BN):
        columns = start + tl.arange(0, BN)
        z_s, _slope = tile(student, tokens, start, V, ROUND_S, UPCAST, BM, BN, BK)
        if TEACHER:
            z_t, _slope_t = tile(teacher, tokens, start, V, ROUND_T, UPCAST, BM, BN, BK)
        at_label = columns[None, :] == labels[:, None]
        s_label += tl.sum(tl.where(at_label, z_s, 0.0), axis=1)
        new_s = tl.maximum(s_max, tl.max(z_s, axis=1))
        if COLD or not TEACHER:
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
            a_s = exponent(z_s, k, new_s[:, None])
            a_t = exponent(z_t, k, new_t[:, None])
            e_t = tl.exp2(a_t)
            kl = moved(kl, t_sum, s_step, t_step) + tl.sum(e_t * (a_t - a_s), axis=1)
            t_sum = t_sum * tl.exp2(t_step) + tl.sum(e_t, axis=1)
            s_sum = s_sum * tl.exp2(s_step) + tl.sum(tl.exp2(a_s), axis=1)
            t_max = new_t
        s_max = new_s

    valid = positions < count
    out = partials_ptr + (split.to(tl.int64) * FIELDS) * n + positions
    tl.store(out + _S_MAX * n, s_max, mask=valid)
    tl.store(out + _S_LABEL * n, s_label, mask=valid)
    if COLD or not TEACHER:
        tl.store(out + _COLD_SUM * n, cold_sum, mask=valid)
    if TEACHER:
        tl.store(out + _S_SUM * n, s_sum, mask=valid)
        tl.store(out + _T_MAX * n, t_max, mask=valid)
        tl.store(out + _T_SUM * n, t_sum, mask=valid)
        tl.store(out + _T_LABEL * n, t_label, mask=valid)
        tl.store(out + _KL * n, kl, mask=valid)
        if EXCLUDES:
            tl.store(out + _S_OVER * n, s_over, mask=valid)
            tl.store(out + _T_OVER * n, t_over, mask=valid)


@triton.jit(do_not_specialize=["n", "splits"])
def combine_kernel(
    partials_ptr,
    norms_ptr,  # (NORMS, n)
    count_ptr,
    scalars_ptr,
    loss_ptr,  # (n,) as are the next two
    difficulty_ptr,
    hard_ptr,
    n,
    splits,
    TEACHER: tl.constexpr,
    MIXED: tl.constexpr,
    HARD_LABEL: tl.constexpr,
    GATED: tl.constexpr,
    COLD: tl.constexpr,
    EXCLUDES: tl.constexpr,
    EVERYWHERE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The splits' statistics, in their order, into norms, difficulty, hardness and the loss where it needs no sums."""
    positions = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(count_ptr)
    valid = positions < count
    of_label = label_scalars(scalars_ptr)
    lam, rest, _log_lam = of_label
    inv_T = inverse_temperature(scalars_ptr)
    gamma = tl.load(scalars_ptr + GAMMA)
    k = exponent_scale(scalars_ptr)
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
    for split in range(0, splits):
        part = partials_ptr + tl.cast(split, tl.int64) * FIELDS * n + positions
        part_s = tl.load(part + _S_MAX * n, mask=valid, other=0.0)
        new_s = tl.maximum(s_max, part_s)
        s_label += tl.load(part + _S_LABEL * n, mask=valid, other=0.0)
        if COLD or not TEACHER:
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
            kl = moved(kl, t_sum, s_step, t_step) + moved(part_kl, part_t_sum, part_s_step, part_t_step)
            t_sum = t_sum * tl.exp2(t_step) + part_t_sum * tl.exp2(part_t_step)
            s_sum = s_sum * tl.exp2(s_step) + part_s_sum * tl.exp2(part_s_step)
            t_max = new_t
        s_max = new_s

    norms = norms_ptr + positions
    ce = 0.0
    if COLD or not TEACHER:
        ce = cross_entropy(s_label, s_max, tl.log(cold_sum), 1.0)
        tl.store(norms + COLD_MAX * n, s_max, mask=valid)
        tl.store(norms + COLD_INV * n, 1.0 / cold_sum, mask=valid)
    if TEACHER:
        s_log = tl.log(s_sum)
        t_log = tl.log(t_sum)
        kl = (kl / t_sum) * LN_2 - (t_log - s_log)
        kl = tl.where(kl < 0.0, 0.0, kl)  # unlike a maximum, keeps NaN
        if EXCLUDES:
            kl += tl.where(above_zero(t_over, k, t_max, t_log, s_max), float("inf"), 0.0)
        label_log_q = exponent(s_label, k, s_max) * LN_2 - s_log
        label_log_p = exponent(t_label, k, t_max) * LN_2 - t_log
        warm = cross_entropy(s_label, s_max, s_log, inv_T)
        difficulty, label_log_t = label_terms(kl, label_log_p, label_log_q, warm, of_label)
        if not COLD:
            ce = warm
        base = tl.zeros((BLOCK,), tl.float32)
        if HARD_LABEL:
            base = weighed(rest, ce)
        loss = difficulty
        if not MIXED:
            loss = weighed(lam, kl) + base
        if EXCLUDES and EVERYWHERE:
            base += weighed(lam, tl.where(above_zero(s_over, k, s_max, s_log, t_max), float("inf"), 0.0))
        tl.store(norms + _NORM_S_MAX * n, s_max, mask=valid)
        tl.store(norms + _NORM_S_INV * n, 1.0 / s_sum, mask=valid)
        tl.store(norms + _NORM_T_MAX * n, t_max, mask=valid)
        tl.store(norms + _NORM_T_INV * n, 1.0 / t_sum, mask=valid)
        tl.store(norms + _NORM_LOG_RATIO * n, t_log - s_log, mask=valid)
        tl.store(norms + _LABEL_D * n, label_log_t - label_log_q, mask=valid)
        tl.store(norms + BASE * n, base, mask=valid)
    else:
        loss = ce
        difficulty = ce
    hard = tl.zeros((BLOCK,), tl.int1)
    if GATED:
        hard = difficulty > gamma
    within = positions < n
    tl.store(loss_ptr + positions, tl.where(valid, loss, 0.0), mask=within)
    tl.store(difficulty_ptr + positions, tl.where(valid, difficulty, 0.0), mask=within)
    tl.store(hard_ptr + positions, hard & valid, mask=within)


@triton.jit
def placed(GROUP: tl.constexpr):
    """The program's place in a grid (blocks of tokens, parts of the vocabulary).

    Programs start in the order of their numbers, blocks first. Here GROUP blocks go through all parts before the next
    do, so that those that run together share both hidden states and weights in the L2 cache.
    """
    blocks = tl.num_programs(0)
    parts = tl.num_programs(1)
    started = tl.program_id(1) * blocks + tl.program_id(0)
    first = started // (GROUP * parts) * GROUP
    size = tl.minimum(blocks - first, GROUP)
    place = started - first * parts
    block = first + place % size
    part = place // size
    return block, part


@triton.jit
def tile(
    side,
    tokens,
    first_column,
    V,
    ROUND: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Final logits (BM, BN) from a column on, ``OUTSIDE`` from V on, and d final / d raw."""
    source, token_stride, unit_stride, weight, row_stride, weight_stride, bias, H, scale, cap = side
    lanes = tl.arange(0, BN)
    columns = first_column + lanes
    within = (columns < V)[None, :]
    source_rows = source + tokens.to(tl.int64)[:, None] * token_stride
    if weight is None:
        source_rows += tl.cast(first_column, tl.int64) * unit_stride
        z = tl.load(source_rows + (lanes * unit_stride)[None, :], mask=within, other=0.0).to(tl.float32)
    else:
        units = tl.arange(0, BK)
        # Columns beyond the vocabulary read its last one: the loop's loads need one mask less.
        held = tl.minimum(columns, V - 1)
        a_ptrs = source_rows + units[None, :] * unit_stride
        b_ptrs = weight + held.to(tl.int64)[None, :] * row_stride + units[:, None] * weight_stride
        z = tl.zeros((BM, BN), tl.float32)
        for start in range(0, H, BK):
            left = H - start
            a = tl.load(a_ptrs, mask=(units < left)[None, :], other=0.0).to(ROUND)
            b = tl.load(b_ptrs, mask=(units < left)[:, None], other=0.0).to(ROUND)
            if UPCAST:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            z = tl.dot(a, b, z, input_precision="ieee")
            a_ptrs += BK * unit_stride
            b_ptrs += BK * weight_stride
        if bias is not None:
            z += tl.load(bias + held).to(ROUND).to(tl.float32)[None, :]
    z, slope = final_logits(z, scale, cap)
    return tl.where(within, z, OUTSIDE), slope


@triton.jit
def norm(norms_ptr, field: tl.constexpr, positions, n):
    return tl.load(norms_ptr + field * n + positions)[:, None]


@triton.jit
def row_terms(norms_ptr, scalars_ptr, positions, n):
    """``target`` and ``norms`` of rows.triton.math.arguments, as columns."""
    label_d = norm(norms_ptr, _LABEL_D, positions, n)
    beta, alpha = tl.load(scalars_ptr + BETA), tl.load(scalars_ptr + ALPHA)
    target = (label_scalars(scalars_ptr), beta, alpha, exponent_scale(scalars_ptr), label_d)
    s_max, s_inv = norm(norms_ptr, _NORM_S_MAX, positions, n), norm(norms_ptr, _NORM_S_INV, positions, n)
    t_max, t_inv = norm(norms_ptr, _NORM_T_MAX, positions, n), norm(norms_ptr, _NORM_T_INV, positions, n)
    return target, (s_max, s_inv, t_max, t_inv, norm(norms_ptr, _NORM_LOG_RATIO, positions, n))
