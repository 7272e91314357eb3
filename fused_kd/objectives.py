"""Training objectives: frozen, validated dataclasses that pick a divergence and carry its numbers.

Per valid token, with student ``q``, teacher ``p``, label ``y`` and the label-mixed target
``yt = (1 - lam) * onehot(y) + lam * p`` (Song et al., COLING 2025, eq. 4). Targets are constants; ``q`` carries the
gradient, also inside a mixture.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import ClassVar

from torch import Tensor

from .divergences import LOG_ZERO
from .objective import Limit, Number, Objective, Sum, checked_number
from .terms import ENTROPY, RANK, Scalars, Term


@dataclass(frozen=True, kw_only=True, repr=False)
class SFT(Objective):
    """Cross-entropy with the label, ``-log q_y``, in nats. Needs no teacher.

    With labels smoothed by ``eps`` it is ``NoEvo(lam=eps)`` with a teacher of zeros, up to the target's entropy, a
    constant; with class weights it is this with ``token_weights=class_weights[labels]``.
    """

    name: ClassVar[str] = "sft"
    kind: ClassVar[Term] = Term(None, hard_label=True)

    def own_scalars(self, weight: Number, temperature: Number) -> Scalars:
        return super().own_scalars(weight, temperature)._replace(lam=0.0, rest=1.0, log_lam=LOG_ZERO)


@dataclass(frozen=True, kw_only=True, repr=False)
class ZLoss(Objective):
    """``(log sum exp z)**2`` of the student's logits at temperature 1: keeps them from drifting (PaLM, 2022).

    For sums, ``SFT() + 1e-4 * ZLoss()``; costs no sweep. Needs no teacher.
    """

    name: ClassVar[str] = "z_loss"
    kind: ClassVar[Term] = Term(None, z_loss=True)


@dataclass(frozen=True, kw_only=True, repr=False)
class ForwardKD(Objective):
    """``(1 - lam) * CE + lam * KL(p||q)``, eq. 3: the usual word-level distillation.

    At temperature 1 its gradient is that of :class:`NoEvo`; the values differ by a constant of the batch.

    Args:
        lam: the teacher's share, in [0, 1]; 0 leaves cross-entropy, 1 the divergence.
    """

    lam: Number = 0.5
    name: ClassVar[str] = "forward_kd"
    kind: ClassVar[Term] = Term("kl", hard_label=True)


@dataclass(frozen=True, kw_only=True, repr=False)
class ReverseKD(Objective):
    """``(1 - lam) * CE + lam * KL(q||p)``: mode-seeking distillation.

    Args:
        lam: the teacher's share, in [0, 1]; 0 leaves cross-entropy, 1 the divergence.
    """

    lam: Number = 0.5
    name: ClassVar[str] = "reverse_kd"
    kind: ClassVar[Term] = Term("reverse_kl", hard_label=True)


@dataclass(frozen=True, kw_only=True, repr=False)
class NoEvo(Objective):
    """``KL(yt||q)``: Self-Evolution KD without its hard branch (every token is easy).

    Args:
        lam: the teacher's share of the target ``yt`` (eq. 4), in [0, 1]; 0 is cross-entropy with the label.
    """

    lam: Number = 0.5
    name: ClassVar[str] = "no_evo"
    kind: ClassVar[Term] = Term("kl", mixed=True)


@dataclass(frozen=True, kw_only=True, repr=False)
class Skew(Objective):
    """``KL(yt||beta * q + (1 - beta) * yt)``: the hard branch of Self-Evolution KD for every token.

    The loss is bounded by ``-log(1 - beta)`` and its gradient vanishes with ``q_y``, so an untrained student hardly
    learns from it: start from a trained one, give it a ``floor``, or anneal ``beta`` from 1 (:class:`NoEvo`).

    Args:
        lam: the teacher's share of the target ``yt`` (eq. 4), in [0, 1].
        beta: the student's share of the mixture, in [0, 1]; 0 has no gradient.
        floor: the share f of ``KL(yt||q)`` in the loss ``(1 - f) * skew + f * KL``, in [0, 1]; its gradient does not
            vanish with ``q_y``. 0 is the paper's, 1 is :class:`NoEvo`.
    """

    lam: Number = 0.5
    beta: Number = 0.5
    floor: Number = 0.0
    name: ClassVar[str] = "skew"
    kind: ClassVar[Term] = Term("skew_kl", mixed=True)


@dataclass(frozen=True, kw_only=True, repr=False)
class SkewTeacher(Objective):
    """``(1 - lam) * CE + lam * KL(p||beta * q + (1 - beta) * p)``, eq. 10: skewed towards the teacher alone.

    Args:
        lam: the teacher's share, in [0, 1]; 0 leaves cross-entropy, 1 the divergence.
        beta: the student's share of the mixture, in [0, 1]; 1 is :class:`ForwardKD`.
    """

    lam: Number = 0.5
    beta: Number = 0.9
    name: ClassVar[str] = "skew_teacher"
    kind: ClassVar[Term] = Term("skew_kl", hard_label=True)


@dataclass(frozen=True, kw_only=True, repr=False)
class SelfEvolution(Objective):
    """Self-Evolution KD, eq. 4-9: :class:`Skew` for hard tokens, :class:`NoEvo` for easy ones.

    A token is hard when its difficulty ``d = KL(yt||q)``, in nats, exceeds ``gamma``. The loss jumps down at
    ``d = gamma``: a hard token's loss is at most ``min(beta * d, -log(1 - beta))``.

    Args:
        lam: the teacher's share of the target ``yt`` (eq. 4), in [0, 1].
        beta: the student's share of a hard token's mixture, in [0, 1]; 1 is :class:`NoEvo` for all tokens.
        gamma: difficulty above which a token is hard, in nats, in [0, inf]; inf makes every token easy.
        floor: the share f of ``KL(yt||q)`` in a hard token's loss ``(1 - f) * skew + f * KL``, in [0, 1]. 0 is the
            paper's, whose gradient vanishes with ``q_y``: students that are not trained yet move backwards.
        gate: what is compared with ``gamma``: "difficulty" is the paper's d; "excess" is ``d - KL(yt||p)``, how much
            harder the token is for the student than for its teacher; "kl" is ``KL(p||q)``, without the label.
    """

    lam: Number = 0.5
    beta: Number = 0.5
    gamma: Number = 0.4
    floor: Number = 0.0
    gate: str = "difficulty"
    name: ClassVar[str] = "self_evolution"
    kind: ClassVar[Term] = Term("skew_kl", mixed=True, gate="difficulty")

    @property
    def term(self) -> Term:
        return self.kind._replace(gate=self.gate)


@dataclass(frozen=True, kw_only=True, repr=False)
class SelfEvolutionTopK(Objective):
    """Self-Evolution KD by rank: hard tokens are the ``ceil(fraction * n)`` largest difficulties of the n valid tokens.

    The difficulty is ``KL(yt||q)``, the losses are those of :class:`SelfEvolution`. Ranked over all tokens of the call
    (ties by position), so the share of hard tokens is fixed where :class:`SelfEvolution` fixes their difficulty.
    Difficulties of all tokens are needed before the first gradient: the student's and the teacher's logits are computed
    twice, unless all tokens fit one chunk.

    Args:
        lam: the teacher's share of the target ``yt`` (eq. 4), in [0, 1].
        beta: the student's share of a hard token's mixture, in [0, 1].
        fraction: share of the valid tokens that are hard, in [0, 1]; one number for the call.
        floor: the share f of ``KL(yt||q)`` in a hard token's loss ``(1 - f) * skew + f * KL``, in [0, 1]. 0 is the
            paper's, whose gradient vanishes with ``q_y``: students that are not trained yet move backwards.
    """

    lam: Number = 0.5
    beta: Number = 0.5
    fraction: Number = 0.5
    floor: Number = 0.0
    name: ClassVar[str] = "self_evolution_top_k"
    kind: ClassVar[Term] = Term("skew_kl", mixed=True, gate=RANK)


@dataclass(frozen=True, kw_only=True, repr=False)
class GeneralizedJSD(Objective):
    """``beta * KL(p||m) + (1 - beta) * KL(q||m)`` with ``m = beta * p + (1 - beta) * q`` (GKD, Agarwal et al. 2024).

    Weights and limits are those of TRL's GKD trainer: ``beta = 0`` is ``KL(p||q)``, ``beta = 1`` is ``KL(q||p)``, both
    by definition: the formula itself tends to 0 there. (Each limit is a kernel of its own, so annealing ``beta`` onto
    one compiles once more.) DistiLLM's JS with ``lam`` is this with ``beta = 1 - lam``.

    Args:
        beta: the teacher's share of the mixture ``m`` and the weight of ``KL(p||m)``, in [0, 1].
    """

    beta: Number = 0.5
    name: ClassVar[str] = "generalized_jsd"
    kind: ClassVar[Term] = Term("jsd")

    @property
    def term(self) -> Term:
        return self.kind if isinstance(self.beta, Tensor) else _LIMITS_OF_JSD.get(self.beta, self.kind)

    def own_scalars(self, weight: Number, temperature: Number) -> Scalars:
        return super().own_scalars(weight, temperature)._replace(beta=1.0 - self.beta, alpha=self.beta)


@dataclass(frozen=True, kw_only=True, repr=False)
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


@dataclass(frozen=True, kw_only=True, repr=False)
class SkewReverse(Objective):
    """``KL(q||alpha * q + (1 - alpha) * p)``: DistiLLM's skew reverse KL (Ko et al. 2024).

    ``alpha = 0`` is ``KL(q||p)``. The gradient flows through the mixture, as in DistiLLM; DistiLLM-2 detaches the
    student inside it, which gives another gradient.

    Args:
        alpha: the student's share of the mixture, in [0, 1]; 1 has no gradient.
    """

    alpha: Number = 0.1
    name: ClassVar[str] = "skew_reverse"
    kind: ClassVar[Term] = Term("skew_reverse_kl")

    @property
    def term(self) -> Term:
        return Term("reverse_kl") if _is(self.alpha, 0.0) else self.kind

    def own_scalars(self, weight: Number, temperature: Number) -> Scalars:
        return super().own_scalars(weight, temperature)._replace(beta=self.alpha, alpha=1.0 - self.alpha)


@dataclass(frozen=True, kw_only=True, repr=False)
class SkewReverseDetached(SkewReverse):
    """``KL(q||m)`` with ``m = alpha * q + (1 - alpha) * p`` a constant: DistiLLM-2's skew reverse KL (Ko et al. 2025).

    The value is that of :class:`SkewReverse`. Its gradient lacks what flows through ``m``, so that it does not vanish
    with ``alpha`` near 1 only because ``m`` follows the student.

    Args:
        alpha: the student's share of the mixture, in [0, 1]; 0 is ``KL(q||p)``, 1 has no gradient.
    """

    name: ClassVar[str] = "skew_reverse_detached"
    kind: ClassVar[Term] = Term("skew_reverse_kl_detached")


@dataclass(frozen=True, kw_only=True, repr=False)
class TotalVariation(Objective):
    """``sum |p - q| / 2``, in [0, 1]. Where ``p`` and ``q`` are equal the subgradient is 0."""

    name: ClassVar[str] = "total_variation"
    kind: ClassVar[Term] = Term("total_variation")


@dataclass(frozen=True, kw_only=True, repr=False)
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


@dataclass(frozen=True, kw_only=True, repr=False)
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


@dataclass(frozen=True, kw_only=True, repr=False)
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


@dataclass(frozen=True, kw_only=True, repr=False)
class _WhereUnsure(Objective):
    """``KL(p||q)`` where ``H(p) > gamma``, else 0."""

    gamma: Number
    kind: ClassVar[Term] = Term("kl", gate=ENTROPY)


@dataclass(frozen=True, kw_only=True, repr=False)
class ToDi(Objective):
    """``sum a * p * log(p / q) + (1 - a) * q * log(q / p)``, token-wise distillation (Jung et al., EMNLP 2025).

    ``a = sigmoid(log p - log q) = p / (p + q)`` is each vocabulary entry's own and a constant: forward KL where the
    student is below its teacher, reverse KL where it is above.
    """

    name: ClassVar[str] = "todi"
    kind: ClassVar[Term] = Term("todi")

    def own_scalars(self, weight: Number, temperature: Number) -> Scalars:
        return super().own_scalars(weight, temperature)._replace(beta=0.5, alpha=0.5)


@dataclass(frozen=True, kw_only=True, repr=False)
class AlphaBeta(Objective):
    """``-sum (p**a * q**b - a / (a + b) * p**(a + b) - b / (a + b) * q**(a + b)) / (a * b)``: ABKD (Wang et al., 2025).

    ``alpha`` alone weighs errors by the teacher's confidence, ``beta`` by the student's. (1, 0) is ``KL(p||q)`` and
    (0, 1) is ``KL(q||p)``, their limits; (0.5, 0.5) is 4 times the squared Hellinger distance. Each limit is a kernel of
    its own. Two exponentials an entry and sweep beside those of the other divergences.

    Args:
        alpha, beta: exponents a and b of the teacher and the student, in [0, 1]; both 0 is refused, and 0 beside
            anything but 1.
    """

    alpha: Number = 0.2
    beta: Number = 0.7
    name: ClassVar[str] = "alpha_beta"
    kind: ClassVar[Term] = Term("alpha_beta")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (_is(self.alpha, 0.0) or _is(self.beta, 0.0)) and self.term == self.kind:
            raise ValueError(
                f"alpha and beta must be in (0, 1], or (1, 0) or (0, 1), got alpha={self.alpha!r}, beta={self.beta!r}"
            )

    @property
    def term(self) -> Term:
        if _is(self.alpha, 1.0) and _is(self.beta, 0.0):
            return Term("kl")
        return Term("reverse_kl") if _is(self.alpha, 0.0) and _is(self.beta, 1.0) else self.kind

    def own_scalars(self, weight: Number, temperature: Number) -> Scalars:
        return super().own_scalars(weight, temperature)._replace(beta=self.beta, alpha=self.alpha)


@dataclass(frozen=True, kw_only=True, repr=False)
class Renyi(Objective):
    """``-log(sum p**a * q**(1 - a)) / (1 - a)``: the Renyi divergence of order a, below ``KL(p||q)``, its limit at 1.

    Args:
        alpha: the order a, in [1e-3, 1 - 1e-3]; 0.5 is twice the Bhattacharyya distance.
    """

    alpha: Number = 0.5
    name: ClassVar[str] = "renyi"
    kind: ClassVar[Term] = Term("renyi")

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha", checked_number("alpha", self.alpha, Limit(1e-3, 1 - 1e-3, "[0.001, 0.999]")))

    def own_scalars(self, weight: Number, temperature: Number) -> Scalars:
        own = super().own_scalars(weight, temperature)
        return own._replace(beta=1.0 - self.alpha, alpha=self.alpha, weight=own.weight / (1.0 - self.alpha))


@dataclass(frozen=True, kw_only=True, repr=False)
class Acceptance(Objective):
    """``-log sum min(p, q)``: of a draft model, minus the logarithm of the rate at which its tokens are accepted.

    ``sum min(p, q)`` is the probability that speculative sampling keeps a token that ``q`` drafts for ``p`` (Leviathan
    et al. 2023), and ``1 - TotalVariation``.
    """

    name: ClassVar[str] = "acceptance"
    kind: ClassVar[Term] = Term("acceptance")


@dataclass(frozen=True, kw_only=True, repr=False)
class AcceptanceMix(Objective):
    """``w * KL(p||q) + (1 - w) * TV(p, q)`` with ``w = exp(-3 * sum min(p, q))`` of each token, a constant.

    KL while a draft is far from its target, total variation, which is one minus the acceptance rate, where it is near
    (speculators' loss for draft models).
    """

    name: ClassVar[str] = "acceptance_mix"
    kind: ClassVar[Term] = Term("acceptance_mix")


def _is(value: Number, number: float) -> bool:
    """Of a number of the call; a tensor's limits are those of its formula."""
    return not isinstance(value, Tensor) and value == number


_LIMITS_OF_JSD = {0.0: Term("kl"), 1.0: Term("reverse_kl")}

OBJECTIVES: dict[str, type[Objective]] = {
    cls.name: cls
    for cls in (
        SFT,
        ForwardKD,
        ReverseKD,
        NoEvo,
        Skew,
        SkewTeacher,
        SelfEvolution,
        SelfEvolutionTopK,
        GeneralizedJSD,
        SkewForward,
        SkewReverse,
        TotalVariation,
        AdaptiveKL,
        SkewReverseDetached,
        SymmetricKL,
        EntropyGated,
        ToDi,
        AlphaBeta,
        Renyi,
        Acceptance,
        AcceptanceMix,
        ZLoss,
    )
}


def parse(text: str) -> Objective:
    """The objective of a text: ``name``, ``name:key=value,...``, or a sum of multiples, as ``str(objective)`` writes it.

    >>> parse("0.5*sft+0.5*generalized_jsd:beta=0.5")
    0.5 * SFT() + 0.5 * GeneralizedJSD(beta=0.5)

    Raises:
        TypeError, ValueError: for anything else; the message names what is known.
    """
    if not isinstance(text, str):
        raise TypeError(f"objective must be a text such as '0.5*sft+0.5*forward_kd:lam=1', got {text!r}")
    parts = [_parse_multiple(part.strip(), text) for part in re.split(r"(?<![eE])\+", text)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _parse_multiple(part: str, text: str) -> Objective:
    factor, star, single = part.rpartition("*")
    name, _, settings = single.strip().partition(":")
    if name not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, or a sum of them, got {name!r} in {text!r}")
    known = [field.name for field in fields(OBJECTIVES[name])]
    values: dict[str, float | str] = {}
    for setting in filter(None, settings.split(",")):
        key, _, value = (word.strip() for word in setting.partition("="))
        if key not in known:
            raise ValueError(f"{name} takes {', '.join(known) or 'no settings'}, got {setting!r} in {text!r}")
        if key in values:
            raise ValueError(f"{key} must be given once, got it twice in {text!r}")
        values[key] = value if key == "gate" else _number(key, value, text)
    objective = OBJECTIVES[name](**values)
    return _number("the weight", factor.strip(), text) * objective if star else objective


def _number(name: str, value: str, text: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"{name} must be a number, got {value!r} in {text!r}") from None
