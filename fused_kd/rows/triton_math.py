"""The arithmetic of a row in Triton, elementwise, for blocks of any shape: what every kernel shares."""

from __future__ import annotations

import triton
import triton.language as tl

from .base import EXCLUDED, LOG_ZERO

_LOG_ZERO = tl.constexpr(LOG_ZERO)
_EXCLUDED = tl.constexpr(EXCLUDED)
# Beyond the row's end: below LOG_ZERO, to lose even against excluded tokens; still finite when divided by T.
OUTSIDE = tl.constexpr(-1e33)
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
def arguments(z_s, z_t, at_label, target, norms, MIXED: tl.constexpr, MIXTURE: tl.constexpr):
    """``t`` to ``log_s`` of :mod:`fused_kd.divergences`; the compiler drops what is not read."""
    lam, beta, inv_T, off_label, label_d = target
    s_max, s_inv, t_max, t_inv, log_ratio = norms
    a_s = z_s * inv_T - s_max
    a_t = z_t * inv_T - t_max
    q = tl.exp(a_s) * s_inv
    t = tl.exp(a_t) * t_inv
    d = (a_t - a_s) - log_ratio
    if MIXED:
        t = lam * t + tl.where(at_label, 1.0 - lam, 0.0)
        d = tl.where(at_label, label_d, d + off_label)
    r = t
    log_r = d
    s = q
    log_s = d
    if MIXTURE:
        t += TINY
        if MIXTURE == 2:
            s = q + TINY
        m = beta * s + (1.0 - beta) * t
        r = t / m
        log_r = tl.log(r)
        s = s / m
        log_s = tl.log(s)
    return t, q, d, r, log_r, s, log_s


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
    """Final logits before the temperature from raw ones, and d final / d raw."""
    z = tl.where(z < _LOG_ZERO, _LOG_ZERO, z)
    if cap is None:
        slope = scale
        z = z * scale
    else:
        z, slope = tanh(z * (scale / cap))
        slope = slope * scale
        z = z * cap
    return z, slope


@triton.jit
def tanh(x):
    """tanh and its derivative, both to a few ulp of themselves and without overflow."""
    e = tl.exp(-2.0 * tl.abs(x))
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
