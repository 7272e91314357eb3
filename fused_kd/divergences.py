"""The one table of divergences: every backend's maths comes from here.

A divergence between a constant target ``t`` and the student ``q = softmax(z)`` is a sum over the vocabulary of
``h(t_v, q_v)``. With ``g = dh/dlog q`` its gradient in the logits is

    dz = g - q * sum(g)

so a row of any backend needs nothing but ``h`` and ``g``. They are written with operators only, each as one
``return``, because the same functions run on tensors (torch), inside kernels (Triton, passed as ``constexpr``) and as
text (CUDA macros). Their arguments, per vocabulary entry:

====== =============================================================================================
t      target probability
q      student probability
d      ``log t - log q``
r      ``t / m`` with the mixture ``m = beta * q + (1 - beta) * t``
log_r  ``log r``
beta   the student's share of the mixture
====== =============================================================================================

Callers pass finite numbers: where ``t`` (or ``q``) is 0 its logarithm is replaced by any finite one, so that
``0 * log 0 = 0``. A multiple of ``q`` may be left out of ``g``: it cancels in ``dz``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


def kl_h(t, q, d, r, log_r, beta):
    return t * d


def kl_g(t, q, d, r, log_r, beta):
    return -t


def reverse_kl_h(t, q, d, r, log_r, beta):
    return -q * d


def reverse_kl_g(t, q, d, r, log_r, beta):
    return -q * d


def skew_kl_h(t, q, d, r, log_r, beta):
    return t * log_r


def skew_kl_g(t, q, d, r, log_r, beta):
    return -beta * q * r


@dataclass(frozen=True)
class Divergence:
    """``h`` and ``g`` of one divergence, and which of the arguments they read.

    ``mixture`` says that they read ``r`` and ``log_r`` (else ``d``). ``free`` says that the value follows from the
    statistics of one online sweep and that ``sum(g) = -1``, so that no sweep of its own is needed: true for
    ``KL(t||q)`` alone.
    """

    h: Callable
    g: Callable
    mixture: bool = False
    free: bool = False


DIVERGENCES: dict[str, Divergence] = {
    "kl": Divergence(kl_h, kl_g, free=True),
    "reverse_kl": Divergence(reverse_kl_h, reverse_kl_g),
    "skew_kl": Divergence(skew_kl_h, skew_kl_g, mixture=True),
}
