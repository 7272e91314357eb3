"""The factors of :mod:`fused_kd.rows.shares` in Triton, for one token or a block of them.

``scalars`` points to the scalars of a token's first term, or is a block of such pointers. A ``token`` is a tuple:
``KL(p||q)``, the label's log-probabilities of p and q, its cross-entropies at temperature T and in the loss, the
student's log-sum-exp at the temperature of the latter, and ``H(p)``; what nothing reads may be any number.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ... import divergences
from .math import (
    ALPHA,
    BETA,
    FLOOR,
    GAMMA,
    KEPT,
    LAM,
    LOG2_E,
    REST,
    SCALARS,
    TINY,
    WEIGHT,
    exponent,
    label_scalars,
    mixed_kl,
    weighed,
)
from .terms import (
    BY_ENTROPY,
    BY_EXCESS,
    BY_KL,
    COLD,
    FREE,
    GATE,
    HARD_LABEL,
    HAS_TEACHER,
    INDEX,
    KL_AT_ONE,
    MAIN,
    MINUS_LOG,
    MIX,
    MIXED,
    NO_GATE,
    ROW_GATE,
    Z_LOSS,
    Z,
)

OVERLAP_DECAY = tl.constexpr(divergences.OVERLAP_DECAY)
LEAST_SUM = tl.constexpr(divergences.LEAST_SUM)


@triton.jit
def difficulty_of(scalars, token, ROW: tl.constexpr):
    """``KL(yt||q)`` of the main term."""
    kl, log_p_y, log_q_y, warm_ce, _ce, _lse, _entropy_t = token
    return mixed_kl(kl, log_p_y, log_q_y, warm_ce, label_scalars(scalars + ROW[MAIN] * SCALARS))


@triton.jit
def is_hard(scalars, token, difficulty, ROW: tl.constexpr):
    """Whether what the gate looks at exceeds gamma."""
    kl, log_p_y, _log_q_y, _warm_ce, _ce, _lse, entropy_t = token
    own = scalars + ROW[MAIN] * SCALARS
    gamma = tl.load(own + GAMMA)
    seen = difficulty
    if ROW[ROW_GATE] == BY_KL:
        seen = kl
    if ROW[ROW_GATE] == BY_ENTROPY:
        seen = entropy_t
    if ROW[ROW_GATE] == BY_EXCESS:
        # less KL(yt||p), which is all but nothing off the label
        lam, rest, log_lam = label_scalars(own)
        label_p = tl.exp(log_p_y)
        label_t = lam * label_p + rest
        seen = difficulty - (lam * log_lam * (1.0 - label_p) + label_t * (tl.log(tl.maximum(label_t, TINY)) - log_p_y))
    return seen > gamma


@triton.jit
def label_factors(scalars, TERMS: tl.constexpr):
    """Those of the label's cross-entropy and of the squared log-sum-exp."""
    ce = 0.0
    z = 0.0
    for i in tl.static_range(len(TERMS)):
        own = scalars + i * SCALARS
        if TERMS[i][HARD_LABEL]:
            ce += tl.load(own + WEIGHT) * tl.load(own + REST)
        if TERMS[i][Z_LOSS]:
            z += tl.load(own + WEIGHT)
    return ce, z


@triton.jit
def free_loss(scalars, token, difficulty, hard, TERMS: tl.constexpr, ROW: tl.constexpr):
    """The loss without the table's sums; and ``q, p, y`` of the terms that are nothing but KL."""
    kl, log_p_y, log_q_y, warm_ce, ce, lse, _entropy_t = token
    loss = 0.0
    of_q = 0.0
    of_p = 0.0
    of_y = 0.0
    for i in tl.static_range(len(TERMS)):
        if TERMS[i][HAS_TEACHER]:
            if TERMS[i][FREE] or TERMS[i][KL_AT_ONE] or (TERMS[i][GATE] != NO_GATE):
                own = scalars + i * SCALARS
                if TERMS[i][FREE]:
                    share = kl_share(own, hard, TERMS[i][MIXED], TERMS[i][GATE])
                else:
                    _factor, share = tabled_shares(own, hard, TERMS[i][MIXED], TERMS[i][GATE], TERMS[i][KL_AT_ONE])
                value = kl
                if TERMS[i][MIXED]:
                    value = difficulty
                    if i != ROW[MAIN]:
                        value = mixed_kl(kl, log_p_y, log_q_y, warm_ce, label_scalars(own))
                loss += weighed(share, value)
                if TERMS[i][FREE]:
                    of_q += share
                    if TERMS[i][MIXED]:
                        of_p += share * tl.load(own + LAM)
                        of_y += share * tl.load(own + REST)
                    else:
                        of_p += share
    of_ce, of_z = label_factors(scalars, TERMS)
    loss += weighed(of_ce, ce)
    if ROW[Z]:
        loss += of_z * lse * lse
    return loss, (of_q, of_p, of_y)


@triton.jit
def kl_share(own, hard, MIXED: tl.constexpr, GATE: tl.constexpr):
    """The weight of a term's divergence, whichever that is."""
    share = tl.load(own + WEIGHT)
    if not MIXED:
        share = share * tl.load(own + LAM)
    if GATE == BY_ENTROPY:
        share = tl.where(hard, share, 0.0)
    return share


@triton.jit
def tabled_shares(own, hard, MIXED: tl.constexpr, GATE: tl.constexpr, KL_AT_ONE: tl.constexpr):
    """Of a term with sums of its own: their factor, and that of KL in their place or beside them."""
    share = kl_share(own, hard, MIXED, GATE)
    use = takes_sums(own, hard, GATE, KL_AT_ONE)
    factor = share
    floor = share * 0.0
    if KL_AT_ONE:
        factor = share * tl.load(own + KEPT)
        floor = share * tl.load(own + FLOOR)
    return tl.where(use, factor, 0.0), tl.where(use, floor, share)


@triton.jit
def takes_sums(own, hard, GATE: tl.constexpr, KL_AT_ONE: tl.constexpr):
    use = tl.load(own + WEIGHT) == tl.load(own + WEIGHT)
    if (GATE != NO_GATE) and (GATE != BY_ENTROPY):
        use = hard
    if KL_AT_ONE:
        use = use & (tl.load(own + ALPHA) > 0.0)
    return use


@triton.jit
def any_takes_sums(scalars, hard, TABLED: tl.constexpr):
    """Of terms of which none always does."""
    use = takes_sums(scalars + TABLED[0][INDEX] * SCALARS, hard, TABLED[0][GATE], TABLED[0][KL_AT_ONE])
    for i in tl.static_range(1, len(TABLED)):
        own = scalars + TABLED[i][INDEX] * SCALARS
        use = use | takes_sums(own, hard, TABLED[i][GATE], TABLED[i][KL_AT_ONE])
    return use


@triton.jit
def with_floors(scalars, hard, free, TABLED: tl.constexpr):
    """``q, p, y`` with the KL of terms that have sums."""
    of_q, of_p, of_y = free
    for i in tl.static_range(len(TABLED)):
        if TABLED[i][KL_AT_ONE] or (TABLED[i][GATE] != NO_GATE):
            own = scalars + TABLED[i][INDEX] * SCALARS
            _factor, floor = tabled_shares(own, hard, TABLED[i][MIXED], TABLED[i][GATE], TABLED[i][KL_AT_ONE])
            of_q += floor
            if TABLED[i][MIXED]:
                of_p += floor * tl.load(own + LAM)
                of_y += floor * tl.load(own + REST)
            else:
                of_p += floor
    return of_q, of_p, of_y


@triton.jit
def target_of(own, k, token):
    """``target`` of :func:`fused_kd.rows.triton.math.arguments`, of a term's ``own`` scalars."""
    _kl, log_p_y, log_q_y, _warm_ce, _ce, _lse, _entropy_t = token
    of_label = label_scalars(own)
    lam, rest, _log_lam = of_label
    label_d = tl.log(tl.maximum(lam * tl.exp(log_p_y) + rest, TINY)) - log_q_y
    return of_label, tl.load(own + BETA), tl.load(own + ALPHA), k, label_d


@triton.jit
def after_sum(h_sum, factor, kl, OUTER: tl.constexpr):
    """What a term adds to the loss by its ``sum h``; the factor of its ``g``; and that of KL, for "mix"."""
    value = weighed(factor, h_sum)
    of_kl = 0.0
    if OUTER == MINUS_LOG:
        value = weighed(factor, -tl.log(h_sum))
        factor = -factor / tl.maximum(h_sum, LEAST_SUM)
    if OUTER == MIX:
        w = tl.exp(h_sum * -OVERLAP_DECAY)
        of_kl = factor * w
        value = factor * (1.0 - w) * (1.0 - h_sum) + weighed(of_kl, kl)
        factor = -factor * (1.0 - w)
    return value, factor, of_kl


@triton.jit
def linear_factors(scalars, free, inv_T, lse, cold_inv, TERMS: tl.constexpr, ROW: tl.constexpr):
    """``free`` with the label's cross-entropy and the log-sum-exp, as :func:`linear` takes them.

    Divided by the multiple of q, so that nothing is rounded between q and a target that it is all but equal to.
    """
    of_q, of_p, of_y = free
    of_ce, of_z = label_factors(scalars, TERMS)
    of_lse = 2.0 * of_z * lse
    scale = of_q * inv_T
    y = of_y * inv_T
    if not ROW[COLD]:
        scale += of_ce
        y += of_ce
    some = tl.where(scale > 0.0, scale, 1.0)
    return scale, tl.div_rn(of_p * inv_T, some), tl.div_rn(y, some), of_lse, (of_ce + of_lse) * cold_inv, of_ce


@triton.jit
def linear(
    z_s, z_t, at_label, k, norms, cold_max, factors, P: tl.constexpr, Y: tl.constexpr, ROW: tl.constexpr
):  # fmt: skip
    """The gradient's multiples of softmaxes and the label; ``P``, ``Y``: whether there are those of p and, at the
    temperature of the rest, of the label."""
    s_max, s_inv, t_max, t_inv, _log_ratio = norms
    scale, of_p, of_y, of_lse, of_cold, of_ce = factors
    if P or Y:
        q = tl.exp2(exponent(z_s, k, s_max)) * s_inv
        gap = q
        if P:
            gap = tl.fma(tl.exp2(exponent(z_t, k, t_max)), -of_p * t_inv, gap)
        if Y:
            gap -= tl.where(at_label, of_y, 0.0)
        gradient = scale * gap
        if ROW[Z] and not ROW[COLD]:
            gradient = tl.fma(q, of_lse, gradient)
    else:
        gradient = tl.exp2(exponent(z_s, k, s_max)) * (s_inv * of_lse)
    if ROW[COLD]:
        own = tl.exp2(exponent(z_s, LOG2_E, cold_max)) * of_cold - tl.where(at_label, of_ce, 0.0)
        if P or Y:
            gradient += own
        else:
            gradient = own
    return gradient
