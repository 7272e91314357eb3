"""The one table of divergences, and the numbers that stand for something: every backend's maths comes from here.

A divergence between a constant target ``t`` and the student ``q = softmax(z)`` is a sum over the vocabulary of
``h(t_v, q_v)``. With ``g = dh/dlog q`` its gradient in the logits is

    dz = g - q * sum(g)

so a row of any backend needs nothing but ``h`` and ``g``. They are written with operators only, each as one
``return``, because the same functions run on tensors (torch), inside kernels (Triton, passed as ``constexpr``) and as
text (C). Their arguments, per vocabulary entry, with the mixture ``m = beta * q + alpha * t``:

====== ===========================================================
t      target probability
q      student probability
d      ``log t - log q``
r      ``t / m``
log_r  ``log r``
s      ``q / m``
log_s  ``log s``
beta   the student's share of the mixture, a weight of the row, or an exponent
alpha  ``1 - beta``, which is not formed from it: where it is small, it would lose its digits; or an exponent
w      ``t**alpha * q**beta``
u      ``t**(alpha + beta)``
v      ``q**(alpha + beta)``
====== ===========================================================

Callers pass finite numbers: where ``t`` (or ``q``) is 0 its logarithm is replaced by any finite one, so that
``0 * log 0 = 0``; what is infinite about a sum, rows know from what the sides exclude. A multiple of ``q`` may be left
out of ``g``: it cancels in ``dz``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

LOG_ZERO = -1e30
"""Stands for log 0 and for logits of -inf: ``exp`` of it is 0, differences of it are 0, products with 0 are 0."""

EXCLUDED = -1e18
"""Final logits below this, before the temperature, are those of excluded tokens, unless the row has no others."""

OUTSIDE = -2e30
"""A logit before the temperature of what is no token of the row: loses even against :data:`LOG_ZERO`, and is still
finite when divided by the least temperature."""

NOWHERE = -3e38
"""The same after the temperature: below :data:`LOG_ZERO` divided by the least."""

LOG_LEAST = -126 * math.log(2.0)
"""Smaller log-probabilities, those of numbers that are not normal in fp32, are log 0 where the other side excludes."""

TINY = 1e-30
"""Keeps ratios of two underflowed probabilities defined; far below any probability that matters."""

LEAST_SUM = 1.2e-37
"""The gradient of a sum's logarithm is over no less: much smaller numbers have no reciprocal in fp32."""

LEFT_OUT = 1.0
"""``d`` of an entry that the target excludes: with it, ``h`` and ``g`` are as if it were left out of ``KL(q||t)``."""

OVERLAP_DECAY = 3.0
"""Of the weight ``exp(-3 sum min(p, q))`` of KL beside total variation."""

COLDEST = 1e8
"""The inverse of the least temperature: beyond it, differences of :data:`OUTSIDE` would overflow."""


def kl_h(t, q, d, r, log_r, s, log_s, beta, alpha, w, u, v):
    return t * d


def kl_g(t, q, d, r, log_r, s, log_s, beta, alpha, w, u, v):
    return -t


def reverse_kl_h(t, q, d, r, log_r, s, log_s, beta, alpha, w, u, v):
    return -q * d


def reverse_kl_g(t, q, d, r, log_r, s, log_s, beta, alpha, w, u, v):
    return -q * d


def skew_kl_h(t, q, d, r, log_r, s, log_s, beta, alpha, w, u, v):
    return t * log_r


def skew_kl_g(t, q, d, r, log_r, s, log_s, beta, alpha, w, u, v):
    return -beta * q * r


def skew_reverse_kl_h(t, q, d, r, log_r, s, log_s, beta, alpha, w, u, v):
    return q * log_s


def skew_reverse_kl_g(t, q, d, r, log_r, s, log_s, beta, alpha, w, u, v):
    return q * (log_s - beta * s)


def jsd_h(t, q, d, r, log_r, s, log_s, beta, alpha, w, u, v):
    return alpha * (t * log_r) + beta * (q * log_s)


def jsd_g(t, q, d, r, log_r, s, log_s, beta, alpha, w, u, v):
    return beta * (q * log_s)


def total_variation_h(t, q, d, r, log_r, s, log_s, beta, alpha, w, u, v):
    return ((q > t) * (q - t) + (t > q) * (t - q)) / 2


def total_variation_g(t, q, d, r, log_r, s, log_s, beta, alpha, w, u, v):
    return ((q > t) * q - (t > q) * q) / 2


def adaptive_kl_h(t, q, d, r, log_r, s, log_s, beta, alpha, w, u, v):
    return (beta * t - alpha * q) * d


def adaptive_kl_g(t, q, d, r, log_r, s, log_s, beta, alpha, w, u, v):
    return -beta * t - alpha * (q * d)


def skew_reverse_kl_detached_g(t, q, d, r, log_r, s, log_s, beta, alpha, w, u, v):
    return q * log_s


def todi_h(t, q, d, r, log_r, s, log_s, beta, alpha, w, u, v):
    return (r * t - s * q) * d / 2


def todi_g(t, q, d, r, log_r, s, log_s, beta, alpha, w, u, v):
    return (s * q * (1 - d) - r * t) / 2


def alpha_beta_h(t, q, d, r, log_r, s, log_s, beta, alpha, w, u, v):
    return (alpha * (u - w) + beta * (v - w)) / (alpha * beta * (alpha + beta))


def alpha_beta_g(t, q, d, r, log_r, s, log_s, beta, alpha, w, u, v):
    return (v - w) / alpha


def power_h(t, q, d, r, log_r, s, log_s, beta, alpha, w, u, v):
    return w


def power_g(t, q, d, r, log_r, s, log_s, beta, alpha, w, u, v):
    return beta * w


def overlap_h(t, q, d, r, log_r, s, log_s, beta, alpha, w, u, v):
    return (q > t) * t + (1 - (q > t)) * q


def overlap_g(t, q, d, r, log_r, s, log_s, beta, alpha, w, u, v):
    # Not less q / 2, as total variation's: over a small sum, what is left of the summands' rounding would be large.
    return ((t > q) * q - (q > t) * q + q) / 2


@dataclass(frozen=True)
class Divergence:
    """``h`` and ``g`` of one divergence, and what they need.

    Attributes:
        reads: which of ``d``, ``r`` (with ``log_r``), ``s`` (with ``log_s``), ``w``, ``u`` and ``v`` they read.
        free: the value follows from the statistics of one online sweep and ``sum(g) = -1``, so that no sweep of its
            own is needed: true for ``KL(t||q)`` alone.
        kl_at_one: at ``beta = 1`` it is ``KL(t||q)``, where ``r`` may overflow, so that rows compute that instead.
        adaptive: ``beta`` is not the objective's but the row's own weight: the share of ``sum |t - q|`` that lies in
            the head of the target, its most probable entries up to the objective's ``fraction`` of the mass.
        everywhere: infinite where the target excludes an entry that the student does not.
        covers: infinite where the student excludes an entry that the target does not.
        lumps: where the target is 0, ``h`` is proportional to q, so that entries may be summed before.
        outer: the value is not the sum S of ``h`` but, for "minus_log", ``-log S``; for "mix"
            ``w * KL(t||q) + (1 - w) * (1 - S)`` with the constant ``w = exp(-3 S)``.
    """

    h: Callable[..., Any]
    g: Callable[..., Any]
    reads: frozenset[str] = frozenset()
    free: bool = False
    kl_at_one: bool = False
    adaptive: bool = False
    everywhere: bool = False
    covers: bool = False
    lumps: bool = True
    outer: str = ""

    @property
    def mixture(self) -> bool:
        return bool(self.reads & {"r", "s"})

    @property
    def powers(self) -> bool:
        return bool(self.reads & {"w", "u", "v"})


DIVERGENCES: dict[str, Divergence] = {
    "kl": Divergence(kl_h, kl_g, frozenset("d"), free=True),
    "reverse_kl": Divergence(reverse_kl_h, reverse_kl_g, frozenset("d"), everywhere=True),
    "skew_kl": Divergence(skew_kl_h, skew_kl_g, frozenset("r"), kl_at_one=True),
    "skew_reverse_kl": Divergence(skew_reverse_kl_h, skew_reverse_kl_g, frozenset("s")),
    "jsd": Divergence(jsd_h, jsd_g, frozenset("rs")),
    "total_variation": Divergence(total_variation_h, total_variation_g),
    "adaptive_kl": Divergence(
        adaptive_kl_h, adaptive_kl_g, frozenset("d"), adaptive=True, everywhere=True, covers=True
    ),
    "skew_reverse_kl_detached": Divergence(skew_reverse_kl_h, skew_reverse_kl_detached_g, frozenset("s")),
    "todi": Divergence(todi_h, todi_g, frozenset("drs"), everywhere=True, covers=True),
    "alpha_beta": Divergence(alpha_beta_h, alpha_beta_g, frozenset("wuv"), lumps=False),
    "renyi": Divergence(power_h, power_g, frozenset("w"), outer="minus_log"),
    "acceptance": Divergence(overlap_h, overlap_g, outer="minus_log"),
    "acceptance_mix": Divergence(overlap_h, overlap_g, outer="mix"),
}
