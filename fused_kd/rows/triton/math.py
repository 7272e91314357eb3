"""The arithmetic of a row in Triton, elementwise, for blocks of any shape: what every kernel shares.

Exponents count in powers of 2, which is what GPUs raise: ``k`` is ``log2(e) / T``. Maxima are logits, and subtracted
first, so that a large offset of the logits costs no digits. Log-probabilities, ``d`` and losses are natural.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ... import divergences
from ...terms import Scalars

LOG_ZERO = tl.constexpr(divergences.LOG_ZERO)
EXCLUDED = tl.constexpr(divergences.EXCLUDED)
OUTSIDE = tl.constexpr(divergences.OUTSIDE)
LOG_LEAST = tl.constexpr(divergences.LOG_LEAST)
TINY = tl.constexpr(divergences.TINY)
LEFT_OUT = tl.constexpr(divergences.LEFT_OUT)
COLDEST = tl.constexpr(divergences.COLDEST)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# Where a term's scalars lie, and how many they are.
LAM, BETA, GAMMA, TEMPERATURE, FRACTION, REST, ALPHA, LOG_LAM, WEIGHT, FLOOR, KEPT = (
    tl.constexpr(i) for i in range(len(Scalars._fields))
)
SCALARS = tl.constexpr(len(Scalars._fields))


@triton.jit
def weighed(weight, value):
    """Their product, for weights that are not negative; nothing of an infinite value is nothing."""
    product = weight * value
    return tl.where(value == float("inf"), tl.where(product == float("inf"), product, 0.0), product)


@triton.jit
def cross_entropy(label_z, z_max, log_total, temperature_inv):
    """``-log q_y``, infinite where the label is excluded and not all of the row."""
    out = (label_z < EXCLUDED) & (z_max >= EXCLUDED)
    return log_total + tl.where(out, float("inf"), (z_max - label_z) * temperature_inv)


@triton.jit
def above_zero(z, k, z_max, log_total, other_max):
    """Whether the largest logit beside tokens that the other side excludes, if it excludes but some, is above log 0."""
    return (exponent(z, k, z_max) * LN_2 - log_total > LOG_LEAST) & (other_max >= EXCLUDED)


@triton.jit
def label_scalars(scalars_ptr):
    """``lam, 1 - lam, log lam`` of a term; of many tokens where ``scalars_ptr`` is a block of pointers, as below."""
    return tl.load(scalars_ptr + LAM), tl.load(scalars_ptr + REST), tl.load(scalars_ptr + LOG_LAM)


@triton.jit
def mixed_kl(kl, label_log_p, label_log_q, ce, of_label):
    """``KL(yt||q)`` from ``KL(p||q)`` and what p and q give the label."""
    lam, rest, log_lam = of_label
    label_p = tl.exp(label_log_p)
    label_t = lam * label_p + rest
    label_log_t = tl.log(tl.maximum(label_t, TINY))
    difficulty = (
        weighed(lam, kl - label_p * (label_log_p - label_log_q))
        + lam * log_lam * (1.0 - label_p)
        + label_t * (label_log_t - label_log_q)
    )
    difficulty += tl.where(rest * ce == float("inf"), float("inf"), 0.0)
    return tl.where(difficulty < 0.0, 0.0, difficulty)


@triton.jit
def exponent_scale(scalars_ptr):
    """``k`` of a row's scalars."""
    return inverse_temperature(scalars_ptr) * LOG2_E


@triton.jit
def inverse_temperature(scalars_ptr):
    return tl.minimum(1.0 / tl.load(scalars_ptr + TEMPERATURE), COLDEST)


@triton.jit
def exponent(z, k, z_max):
    """Of ``exp((z - z_max) / T)``. Not fused: the rounding of ``z_max * k`` has no bound where tokens are excluded."""
    return (z - z_max) * k


@triton.jit
def moved(kl_sum, t_sum, s_step, t_step):
    """``sum e_t * (a_t - a_s)`` over maxima that are larger by minus the steps, whose exponentials ``t_sum`` were."""
    return tl.exp2(t_step) * (kl_sum + t_sum * (t_step - s_step))


@triton.jit
def arguments(
    z_s,
    z_t,
    at_label,
    target,
    norms,
    MIXED: tl.constexpr,
    MIXTURE: tl.constexpr,
    POWERS: tl.constexpr,
    EXCLUDES: tl.constexpr,
):
    """What ``h`` and ``g`` of :mod:`fused_kd.divergences` take; the compiler drops what is not read.

    ``target`` is a term's ``label_scalars``, ``beta, alpha``, ``k`` and d at the label; ``norms`` the student's maximum
    and inverse of the sum of exponentials over it, the teacher's, and the natural logarithm of the teacher's sum over
    the student's. ``EXCLUDES``: logits may be -inf.
    """
    of_label, beta, alpha, k, label_d = target
    lam, rest, log_lam = of_label
    s_max, s_inv, t_max, t_inv, log_ratio = norms
    a_s = exponent(z_s, k, s_max)
    a_t = exponent(z_t, k, t_max)
    # Not a_t - a_s: fused with a product, that is the product's rounding where both are OUTSIDE, some 1e23.
    difference = (z_t - t_max) - (z_s - s_max)
    q = tl.exp2(a_s) * s_inv
    t = tl.exp2(a_t)
    tiny = 0.0
    if MIXTURE:
        tiny = TINY
    if MIXED:
        t = tl.fma(t, lam * t_inv, tl.where(at_label, rest + tiny, tiny))
        d = tl.where(at_label, label_d, tl.fma(difference, k * LN_2, log_lam - log_ratio))
    else:
        t = t * t_inv
        if MIXTURE:
            t += TINY
        d = tl.fma(difference, k * LN_2, -log_ratio)
    if EXCLUDES:
        # Of what the student excludes too: where the target has underflowed, TINY times d would be something.
        t_bound = tl.where(t_max >= EXCLUDED, EXCLUDED, -float("inf"))
        s_bound = tl.where(s_max >= EXCLUDED, EXCLUDED, -float("inf"))
        d = tl.where((z_t < t_bound) | (z_s < s_bound), LEFT_OUT, d)
    r = t
    log_r = d
    s = q
    log_s = d
    if MIXTURE:
        s = q + TINY
        # beta * s + alpha * t from the side with the larger share, whose rounding would be that of all of them.
        larger = beta >= 0.5
        m = tl.fma(tl.where(larger, alpha, -beta), t - s, tl.where(larger, s, t))
        root = tl.rsqrt(m)
        r = quotient(t, m, root * root)
        log_r = log_positive(r)
        s = quotient(s, m, root * root)
        log_s = log_positive(s)
    w = t
    u = t
    v = q
    if POWERS:  # of targets without the label
        log_t = a_t + tl.log2(t_inv)
        log_q = a_s + tl.log2(s_inv)
        w = tl.exp2(alpha * log_t + beta * log_q)
        u = tl.exp2((alpha + beta) * log_t)
        v = tl.exp2((alpha + beta) * log_q)
    return t, q, d, r, log_r, s, log_s, beta, alpha, w, u, v


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
    slope = 1.0
    if scale is not None:
        slope = scale
    if cap is not None:
        z = z * (slope / cap)
    elif scale is not None:
        z = z * scale
    z = tl.where(z < LOG_ZERO, LOG_ZERO, z)  # not before: a large factor would make it -inf again
    if cap is not None:
        z, steepness = tanh(z)
        slope = slope * steepness
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
