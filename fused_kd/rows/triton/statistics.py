"""What a row's Triton kernel tells of a token beside its loss: the columns of :data:`fused_kd.terms.STATISTICS`."""

from __future__ import annotations

import triton
import triton.language as tl

from ...terms import STATISTICS, WITHOUT_SWEEP
from .blocks import student_block, teacher_block
from .math import LN_2, OUTSIDE, SCALARS, exponent, label_scalars
from .terms import MAIN

LOG_SUM_EXP_S, LOG_SUM_EXP_T, ENTROPY_S, ENTROPY_T, KL = (tl.constexpr(i) for i in range(5))
CROSS_ENTROPY, LOG_Q_Y, LOG_P_Y, TARGET_ENTROPY, TOP_1, OVERLAP = (tl.constexpr(i) for i in range(5, len(STATISTICS)))
WITHOUT = tl.constexpr(WITHOUT_SWEEP)


@triton.jit
def entropy(product, total):
    """Of exponentials' sum, and that of their products with their exponents."""
    return tl.log(total) - (product / total) * LN_2


@triton.jit
def tell_student(told, log_sum_exp, entropy_s, ce, log_q_y, COLUMNS: tl.constexpr):
    """As :func:`tell` without a teacher; NaN of what needs one."""
    for i in tl.static_range(COLUMNS):
        tl.store(told + i, float("nan"))
    tl.store(told + LOG_SUM_EXP_S, log_sum_exp)
    tl.store(told + ENTROPY_S, entropy_s)
    tl.store(told + CROSS_ENTROPY, ce)
    tl.store(told + LOG_Q_Y, log_q_y)


@triton.jit
def tell(
    told,
    student,
    teacher,
    V,
    k,
    inv_T,
    scalars,
    token,
    norms,
    of_sides,  # logarithms of both sums of exponentials, and H(q)
    ROW: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Stores the first ``COLUMNS``; ``top_1`` says whether some token has the largest logit of both sides, also where
    several share it."""
    kl, log_p_y, log_q_y, _warm_ce, ce, _lse, entropy_t = token
    s_max, _s_inv, t_max, _t_inv, _log_ratio = norms
    s_log, t_log, entropy_s = of_sides
    tl.store(told + LOG_SUM_EXP_S, s_max * inv_T + s_log)
    tl.store(told + LOG_SUM_EXP_T, t_max * inv_T + t_log)
    tl.store(told + ENTROPY_S, entropy_s)
    tl.store(told + ENTROPY_T, entropy_t)
    tl.store(told + KL, kl)
    tl.store(told + CROSS_ENTROPY, ce)
    tl.store(told + LOG_Q_Y, log_q_y)
    tl.store(told + LOG_P_Y, log_p_y)
    # H(yt) from H(p)
    lam, rest, log_lam = label_scalars(scalars + ROW[MAIN] * SCALARS)
    p_y = tl.exp(log_p_y)
    t_y = lam * p_y + rest
    of_p = tl.where(p_y > 0.0, p_y * log_p_y, 0.0)
    of_t = tl.where(t_y > 0.0, t_y * tl.log(t_y), 0.0)
    entropy_y = lam * (entropy_t + of_p) - lam * log_lam * (1.0 - p_y) - of_t
    tl.store(told + TARGET_ENTROPY, tl.where(entropy_y < 0.0, 0.0, entropy_y))
    if COLUMNS > WITHOUT:
        top_1, overlap = _agreement(student, teacher, V, k, norms, BLOCK)
        tl.store(told + TOP_1, tl.where(top_1, 1.0, 0.0))
        tl.store(told + OVERLAP, overlap)


@triton.jit
def _agreement(student, teacher, V, k, norms, BLOCK: tl.constexpr):
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
