"""The arithmetic of a row in Triton, elementwise, for blocks of any shape: what every kernel shares.

Exponents count in powers of 2, which is what GPUs raise: ``k`` is ``log2(e) / T``. Maxima are logits, and subtracted
first, so that a large offset of the logits costs no digits. Log-probabilities, ``d`` and losses are natural.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .base import EXCLUDED, LOG_ZERO

_LOG_ZERO = tl.constexpr(LOG_ZERO)
_EXCLUDED = tl.constexpr(EXCLUDED)
# Beyond the row's end: below LOG_ZERO, to lose even against excluded tokens; still finite when divided by T.
OUTSIDE = tl.constexpr(-1e33)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Keeps ratios of two underflowed probabilities defined; far below any probability that matters.
TINY = tl.constexpr(1e-30)


@triton.jit
def store_loss(ptr, value, mask=None):
    tl.store(ptr, tl.where(value > _EXCLUDED, float("inf"), value), mask=mask)


@triton.jit
def label_terms(kl, label_log_p, label_log_q, lam):
    """``KL(yt||q)`` from ``KL(p||q)`` and what p and q give the label; and ``log yt`` at the label."""
    label_p = tl.exp(label_log_p)
    label_t = lam * label_p + (1.0 - lam)
    label_log_t = tl.log(tl.maximum(label_t, TINY))
    log_lam = tl.log(tl.maximum(lam, TINY))
    difficulty = (
        lam * (kl - label_p * (label_log_p - label_log_q))
        + lam * log_lam * (1.0 - label_p)
        + label_t * (label_log_t - label_log_q)
    )
    return tl.where(difficulty < 0.0, 0.0, difficulty), label_log_t


@triton.jit
def log_off_label(lam):
    """``log yt - log p`` off the label."""
    return tl.where(lam > 0.0, tl.log(tl.maximum(lam, TINY)), _LOG_ZERO)


@triton.jit
def exponent_scale(scalars_ptr):
    """``k`` of a row's scalars."""
    return (1.0 / tl.load(scalars_ptr + 3)) * LOG2_E


@triton.jit
def exponent(z, k, z_max):
    """Of ``exp((z - z_max) / T)``. Not fused: the rounding of ``z_max * k`` has no bound where tokens are excluded."""
    return (z - z_max) * k


@triton.jit
def moved(kl_sum, t_sum, s_step, t_step):
    """``sum e_t * (a_t - a_s)`` over maxima that are larger by minus the steps, whose exponentials ``t_sum`` were."""
    return tl.exp2(t_step) * (kl_sum + t_sum * (t_step - s_step))


@triton.jit
def arguments(z_s, z_t, at_label, target, norms, MIXED: tl.constexpr, MIXTURE: tl.constexpr):
    """``t`` to ``log_s`` of :mod:`fused_kd.divergences`; the compiler drops what is not read.

    ``target`` is ``lam, beta, k, log_off_label(lam)`` and d at the label; ``norms`` the student's maximum and inverse
    of the sum of exponentials over it, the teacher's, and the natural logarithm of the teacher's sum over the
    student's.
    """
    lam, beta, k, off_label, label_d = target
    s_max, s_inv, t_max, t_inv, log_ratio = norms
    a_s = exponent(z_s, k, s_max)
    a_t = exponent(z_t, k, t_max)
    q = tl.exp2(a_s) * s_inv
    t = tl.exp2(a_t) * t_inv
    if MIXED:
        t = lam * t + tl.where(at_label, 1.0 - lam, 0.0)
        d = tl.where(at_label, label_d, tl.fma(a_t - a_s, LN_2, off_label - log_ratio))
    else:
        d = tl.fma(a_t - a_s, LN_2, -log_ratio)
    r = t
    log_r = d
    s = q
    log_s = d
    if MIXTURE:
        t += TINY
        if MIXTURE == 2:
            s = q + TINY
        m = beta * s + (1.0 - beta) * t
        root = tl.rsqrt(m)
        r = quotient(t, m, root * root)
        log_r = log_positive(r)
        s = quotient(s, m, root * root)
        log_s = log_positive(s)
    return t, q, d, r, log_r, s, log_s


@triton.jit
def quotient(x, y, about):
    """``x / y`` from about ``1 / y``, all but correctly rounded, where the compiler's own checks for overflow."""
    ratio = x * about
    return tl.fma(tl.fma(-y, ratio, x), about, ratio)


@triton.jit
def log_positive(x):
    """The logarithm of a positive number that is not subnormal: to 2 ulp also near 1, without tests for the others."""
    n = (x.to(tl.int32, bitcast=True) - 0x3F3504F3) & -0x800000  # exponent of x / sqrt(1/2), not yet shifted
    f = tl.fma(x, (0x3F800000 - n).to(tl.float32, bitcast=True), -1.0)
    p = tl.fma(f, -0.0763327, 0.12762068)  # minimax on [sqrt(1/2), sqrt(2)] - 1
    p = tl.fma(p, f, -0.13160844)
    p = tl.fma(p, f, 0.14201736)
    p = tl.fma(p, f, -0.16623293)
    p = tl.fma(p, f, 0.20001225)
    p = tl.fma(p, f, -0.25000823)
    p = tl.fma(p, f, 0.3333333)
    log_f = tl.fma(f * f, tl.fma(p, f, -0.5), f)
    return tl.fma(n.to(tl.float32), LN_2 / 0x800000, log_f)


@triton.jit
def first_entry(entries, K, start):
    """Position of the first of K ascending entries that is at least ``start``."""
    low = 0
    high = K
    while low < high:
        middle = (low + high) // 2
        if tl.load(entries + middle) < start:
            low = middle + 1
        else:
            high = middle
    return low


@triton.jit
def final_logits(z, scale, cap):
    """Final logits before the temperature from raw ones, and d final / d raw; no scale is one of 1."""
    z = tl.where(z < _LOG_ZERO, _LOG_ZERO, z)
    if cap is None:
        slope = 1.0
        if scale is not None:
            slope = scale
            z = z * scale
    elif scale is None:
        z, slope = tanh(z * (1.0 / cap))
        z = z * cap
    else:
        z, slope = tanh(z * (scale / cap))
        slope = slope * scale
        z = z * cap
    return z, slope


@triton.jit
def tanh(x):
    """tanh and its derivative, both to a few ulp of themselves and without overflow."""
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    inv = 1.0 / (1.0 + e)
    large = (1.0 - e) * inv
    # 1 - e cancels near 0: there an odd polynomial, fitted for relative error (3e-9) on |x| <= 0.6.
    w = x * x
    small = -0.0058951582 * w + 0.0207959718
    small = small * w - 0.0537838303
    small = small * w + 0.133319241
    small = small * w - 0.33333298
    small = x + x * (w * small)
    value = tl.where(tl.abs(x) < 0.6, small, tl.where(x < 0.0, -large, large))
    return value, 4.0 * e * inv * inv
