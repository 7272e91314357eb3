"""Objectives that compare student and teacher by a divergence alone, from the literature of distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..checks import Limit
from ..terms import ENTROPY, Number, Scalars, Term
from .base import Objective, is_number
from .self_evolution import ForwardKD, ReverseKD

EXPONENT = Limit(1e-3, 1.0, "[0.001, 1], where alpha and beta are not (1, 0) or (0, 1)")
SHARE_OF_TOKENS = Limit(1e-6, 1.0, "[1e-06, 1]")
ORDER = Limit(1e-3, 1 - 1e-3, "[0.001, 0.999]")


@dataclass(frozen=True, repr=False, eq=False)
class GeneralizedJSD(Objective):
    """``beta * KL(p||m) + (1 - beta) * KL(q||m)`` with ``m = beta * p + (1 - beta) * q`` (GKD, Agarwal et al. 2024).

    Weights and limits are those of TRL's GKD trainer: ``beta = 0`` is ``KL(p||q)``, ``beta = 1`` is ``KL(q||p)``, both
    by definition: the formula itself tends to 0 there. (Each limit is a kernel of its own, so annealing ``beta`` onto
    one compiles once more.) DistiLLM's JS with ``lam`` is this with ``beta = 1 - lam``.

    Args:
        beta: the teacher's share of the mixture ``m`` and the weight of ``KL(p||m)``, in [0, 1]. A tensor's ends are
            those of the formula, 0.
    """

    beta: Number = 0.5
    name: ClassVar[str] = "generalized_jsd"
    kind: ClassVar[Term] = Term("jsd")

    @property
    def term(self) -> Term:
        return self.kind if isinstance(self.beta, Tensor) else _LIMITS_OF_JSD.get(self.beta, self.kind)

    def own_scalars(self, weight: Number, temperature: Number) -> Scalars:
        return super().own_scalars(weight, temperature)._replace(beta=1.0 - self.beta, alpha=self.beta)


@dataclass(frozen=True, repr=False, eq=False)
class SkewForward(Objective):
    """``KL(p||(1 - alpha) * q + alpha * p)``: DistiLLM's skew KL (Ko et al. 2024).

    DistiLLM's code leaves out the teacher's entropy, a constant: its loss differs from this one by ``sum p log p``, its
    gradient does not.

    Args:
        alpha: the teacher's share of the mixture, in [0, 1]; 0 is ``KL(p||q)``, 1 has no gradient.
    """

    alpha: Number = 0.1
    name: ClassVar[str] = "skew_forward"
    kind: ClassVar[Term] = Term("skew_kl")

    def own_scalars(self, weight: Number, temperature: Number) -> Scalars:
        return super().own_scalars(weight, temperature)._replace(beta=1.0 - self.alpha, alpha=self.alpha)


@dataclass(frozen=True, repr=False, eq=False)
class SkewReverse(Objective):
    """``KL(q||alpha * q + (1 - alpha) * p)``: DistiLLM's skew reverse KL (Ko et al. 2024).

    ``alpha = 0`` is ``KL(q||p)``. The gradient flows through the mixture, as in DistiLLM; DistiLLM-2 detaches the
    student inside it, which gives another gradient.

    Args:
        alpha: the student's share of the mixture, in [0, 1]; 1 has no gradient. Of tensors in [1e-6, 1]: 0 is another
            kernel.
    """

    alpha: Number = 0.1
    name: ClassVar[str] = "skew_reverse"
    kind: ClassVar[Term] = Term("skew_reverse_kl")

    def limit_of(self, name: str) -> Limit:
        return SHARE_OF_TOKENS if isinstance(self.alpha, Tensor) else super().limit_of(name)

    @property
    def term(self) -> Term:
        return Term("reverse_kl") if is_number(self.alpha, 0.0) else self.kind

    def own_scalars(self, weight: Number, temperature: Number) -> Scalars:
        return super().own_scalars(weight, temperature)._replace(beta=self.alpha, alpha=1.0 - self.alpha)


@dataclass(frozen=True, repr=False, eq=False)
class SkewReverseDetached(SkewReverse):
    """``KL(q||m)`` with ``m = alpha * q + (1 - alpha) * p`` a constant: DistiLLM-2's skew reverse KL (Ko et al. 2025).

    The value is that of :class:`SkewReverse`; the gradient lacks what flows through ``m``.

    Args:
        alpha: the student's share of the mixture, in [0, 1]; 0 is ``KL(q||p)``, 1 has no gradient: ``m`` is ``q``. Of
            tensors in [1e-6, 1].
    """

    name: ClassVar[str] = "skew_reverse_detached"
    kind: ClassVar[Term] = Term("skew_reverse_kl_detached")


@dataclass(frozen=True, repr=False, eq=False)
class TotalVariation(Objective):
    """``sum |p - q| / 2``, in [0, 1]. Where ``p`` and ``q`` are equal the subgradient is 0."""

    name: ClassVar[str] = "total_variation"
    kind: ClassVar[Term] = Term("total_variation")


@dataclass(frozen=True, repr=False, eq=False)
class AdaptiveKL(Objective):
    """``w * KL(p||q) + (1 - w) * KL(q||p)`` with a weight of each token (Wu et al. 2024).

    ``w`` is the share of ``sum |p - q|`` that lies in the teacher's head: its most probable entries up to ``fraction``
    of the mass, and always the most probable one. It is a constant, as in the authors' code, which leaves it undefined
    for equal distributions (here 1/2) and splits entries of equal probability by their order (here all are in or out).
    Finding the head costs a sort of the teacher's row (torch) or 30 more sweeps of it (Triton).

    Args:
        fraction: the teacher's mass that is its head, in [0, 1].
    """

    fraction: Number = 0.5
    name: ClassVar[str] = "adaptive_kl"
    kind: ClassVar[Term] = Term("adaptive_kl")


@dataclass(frozen=True, repr=False, eq=False)
class SymmetricKL(Objective):
    """``beta * KL(p||q) + (1 - beta) * KL(q||p)`` with a fixed weight; twice that of ``beta = 0.5`` is Jeffreys.

    The sum ``beta * ForwardKD(lam=1) + (1 - beta) * ReverseKD(lam=1)`` under a name.

    Args:
        beta: the weight of ``KL(p||q)``, in [0, 1].
    """

    beta: Number = 0.5
    name: ClassVar[str] = "symmetric_kl"

    @property
    def summands(self) -> tuple[tuple[Number, Objective], ...]:
        return ((self.beta, ForwardKD(lam=1.0)), (1.0 - self.beta, ReverseKD(lam=1.0)))


@dataclass(frozen=True, repr=False, eq=False)
class EntropyGated(Objective):
    """``KL(q||p)``, plus ``KL(p||q)`` where the teacher's entropy ``H(p)`` exceeds ``tau`` (arXiv 2603.07079).

    Reverse KL where the teacher is sure, both where it is not. ``is_hard`` says where both are.

    Args:
        tau: entropy above which ``KL(p||q)`` is added, in nats, in [0, inf].
    """

    tau: Number = 0.8
    name: ClassVar[str] = "entropy_gated"

    @property
    def summands(self) -> tuple[tuple[Number, Objective], ...]:
        return ((1.0, ReverseKD(lam=1.0)), (1.0, _WhereUnsure(gamma=self.tau)))


@dataclass(frozen=True, repr=False, eq=False)
class _WhereUnsure(Objective):
    """``KL(p||q)`` where ``H(p) > gamma``, else 0."""

    gamma: Number
    kind: ClassVar[Term] = Term("kl", gate=ENTROPY)

    def __post_init__(self) -> None:
        """Checked as ``tau``."""


@dataclass(frozen=True, repr=False, eq=False)
class ToDi(Objective):
    """``sum a * p * log(p / q) + (1 - a) * q * log(q / p)``, token-wise distillation (Jung et al., EMNLP 2025).

    ``a = sigmoid(log p - log q) = p / (p + q)`` is each vocabulary entry's own and a constant: forward KL where the
    student is below its teacher, reverse KL where it is above.
    """

    name: ClassVar[str] = "todi"
    kind: ClassVar[Term] = Term("todi")

    def own_scalars(self, weight: Number, temperature: Number) -> Scalars:
        # With a mixture of halves, a is r / 2 and 1 - a is s / 2.
        return super().own_scalars(weight, temperature)._replace(beta=0.5, alpha=0.5)


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class AlphaBeta(Objective):
    """``-sum (p**a * q**b - a / (a + b) * p**(a + b) - b / (a + b) * q**(a + b)) / (a * b)``: ABKD (Wang et al., 2025).

    ``alpha`` alone weighs errors by the teacher's confidence, ``beta`` by the student's. (1, 0) is ``KL(p||q)`` and
    (0, 1) is ``KL(q||p)``, their limits, each a kernel of its own; (0.5, 0.5) is 4 times the squared Hellinger
    distance. Costs three exponentials more an entry and sweep.

    Args:
        alpha, beta: exponents a and b of the teacher and the student, in [1e-3, 1], or (1, 0) or (0, 1). Near 1e-3, and
            where student and teacher are all but equal, differences of powers lose digits: 1e-4 of the loss and more.
    """

    alpha: Number = 0.2
    beta: Number = 0.7
    name: ClassVar[str] = "alpha_beta"
    kind: ClassVar[Term] = Term("alpha_beta")

    def limit_of(self, name: str) -> Limit:
        return EXPONENT if name in ("alpha", "beta") and self.term == self.kind else super().limit_of(name)

    @property
    def term(self) -> Term:
        if is_number(self.alpha, 1.0) and is_number(self.beta, 0.0):
            return Term("kl")
        return Term("reverse_kl") if is_number(self.alpha, 0.0) and is_number(self.beta, 1.0) else self.kind

    def own_scalars(self, weight: Number, temperature: Number) -> Scalars:
        return super().own_scalars(weight, temperature)._replace(beta=self.beta, alpha=self.alpha)


@dataclass(frozen=True, repr=False, eq=False)
class Renyi(Objective):
    """``-log(sum p**a * q**(1 - a)) / (1 - a)``: the Renyi divergence of order a, below ``KL(p||q)``, its limit at 1.

    Args:
        alpha: the order a, in [1e-3, 1 - 1e-3]; 0.5 is twice the Bhattacharyya distance. Near the ends 4 digits are
            left, not 6.
    """

    alpha: Number = 0.5
    name: ClassVar[str] = "renyi"
    kind: ClassVar[Term] = Term("renyi")

    def limit_of(self, name: str) -> Limit:
        return ORDER if name == "alpha" else super().limit_of(name)

    def own_scalars(self, weight: Number, temperature: Number) -> Scalars:
        own = super().own_scalars(weight, temperature)
        return own._replace(beta=1.0 - self.alpha, alpha=self.alpha, weight=own.weight / (1.0 - self.alpha))


@dataclass(frozen=True, repr=False, eq=False)
class Acceptance(Objective):
    """``-log sum min(p, q)``: of a draft model, minus the logarithm of the rate at which its tokens are accepted.

    ``sum min(p, q)`` is the probability that speculative sampling keeps a token that ``q`` drafts for ``p`` (Leviathan
    et al. 2023), and ``1 - TotalVariation``, whose gradient this divides by it: a draft far from its target learns too
    ("nla" of speculators).
    """

    name: ClassVar[str] = "acceptance"
    kind: ClassVar[Term] = Term("acceptance")


@dataclass(frozen=True, repr=False, eq=False)
class AcceptanceMix(Objective):
    """``w * KL(p||q) + (1 - w) * TV(p, q)`` with ``w = exp(-3 * sum min(p, q))`` of each token, a constant.

    KL while a draft is far from its target, total variation, which is one minus the acceptance rate, where it is near
    (arXiv 2602.23881; "lk_hybrid" of speculators). Some take one ``w`` for a batch instead.
    """

    name: ClassVar[str] = "acceptance_mix"
    kind: ClassVar[Term] = Term("acceptance_mix")


_LIMITS_OF_JSD = {0.0: Term("kl"), 1.0: Term("reverse_kl")}
