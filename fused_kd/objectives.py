"""Training objectives: frozen, validated dataclasses that pick a divergence and carry its scalars.

Per valid token, with student ``q``, teacher ``p``, label ``y`` and the label-mixed target
``yt = (1 - lam) * onehot(y) + lam * p`` (Song et al., COLING 2025, eq. 4). Targets are constants; ``q`` carries the
gradient, also inside a mixture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from numbers import Real
from typing import ClassVar, NamedTuple

from torch import Tensor

from .divergences import LOG_ZERO


class RowSpec(NamedTuple):
    """What a row must know before it is compiled; everything else is a run-time scalar.

    ``divergence`` is a key of :data:`fused_kd.divergences.DIVERGENCES` or None for cross-entropy alone; ``mixed``
    picks the target ``yt`` instead of ``p``; ``hard_label`` splits the loss into ``(1 - lam) * CE + lam * divergence``;
    ``gated`` applies the divergence to hard tokens (``difficulty > gamma``) and ``KL(yt||q)`` to the others;
    ``ranked`` makes hard instead the ``fraction`` of all tokens with the largest difficulties.
    """

    divergence: str | None
    mixed: bool = False
    hard_label: bool = False
    gated: bool = False
    ranked: bool = False

    @property
    def reads_label(self) -> bool:
        return self.mixed or self.hard_label


class Scalars(NamedTuple):
    """Run-time scalars of a row, in the order in which kernels read them: host numbers, or 0-d tensors on a device.

    ``rest`` is ``1 - lam`` and ``alpha`` is ``1 - beta``: formed from fp32 numbers near 1 they would lose their digits.
    ``log_lam`` is ``log lam``, and :data:`fused_kd.divergences.LOG_ZERO` where ``lam`` is 0.
    """

    lam: float | Tensor
    beta: float | Tensor
    gamma: float | Tensor
    temperature: float | Tensor
    fraction: float | Tensor
    rest: float | Tensor
    alpha: float | Tensor
    log_lam: float | Tensor


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Base of all objectives. Subclasses set ``name`` and ``kind`` and add the scalars that they use."""

    name: ClassVar[str]
    kind: ClassVar[RowSpec]

    def __post_init__(self) -> None:
        for field in fields(self):
            limit = _LIMITS[field.name]
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"{field.name} must be a number in {limit.text}, got {value!r}")
            if not limit.low <= value <= limit.high:  # type: ignore[operator]  # also false for NaN
                raise ValueError(f"{field.name} must be in {limit.text}, got {value!r}")
            try:
                object.__setattr__(self, field.name, float(value))
            except OverflowError:  # an integer that only infinity exceeds
                object.__setattr__(self, field.name, math.inf)

    @property
    def spec(self) -> RowSpec:
        """``kind``, unless a scalar is at a limit where another formula holds."""
        return self.kind

    def scalars(self, temperature: float = 1.0) -> Scalars:
        """Values for the row; a scalar that the objective does not have gets its neutral value."""
        lam, beta = getattr(self, "lam", 1.0), getattr(self, "beta", 1.0)
        return Scalars(
            lam=lam,
            beta=beta,
            gamma=getattr(self, "gamma", math.inf),
            temperature=temperature,
            fraction=getattr(self, "fraction", 1.0),
            rest=1.0 - lam,
            alpha=1.0 - beta,
            log_lam=math.log(lam) if lam > 0.0 else LOG_ZERO,
        )


class _Limit(NamedTuple):
    low: float
    high: float
    text: str


_LIMITS = {
    "lam": _Limit(0.0, 1.0, "[0, 1]"),
    "beta": _Limit(0.0, 1.0, "[0, 1]"),
    "gamma": _Limit(0.0, math.inf, "[0, inf]"),
    "alpha": _Limit(0.0, 1.0, "[0, 1]"),
    "fraction": _Limit(0.0, 1.0, "[0, 1]"),
}


@dataclass(frozen=True, kw_only=True)
class SFT(Objective):
    """Cross-entropy with the label, ``-log q_y``, in nats. Needs no teacher."""

    name: ClassVar[str] = "sft"
    kind: ClassVar[RowSpec] = RowSpec(None, hard_label=True)


@dataclass(frozen=True, kw_only=True)
class ForwardKD(Objective):
    """``(1 - lam) * CE + lam * KL(p||q)``, eq. 3: the usual word-level distillation.

    At temperature 1 its gradient is that of :class:`NoEvo`; the values differ by a constant of the batch.

    Args:
        lam: the teacher's share, in [0, 1]; 0 leaves cross-entropy, 1 the divergence.
    """

    lam: float = 0.5
    name: ClassVar[str] = "forward_kd"
    kind: ClassVar[RowSpec] = RowSpec("kl", hard_label=True)


@dataclass(frozen=True, kw_only=True)
class ReverseKD(Objective):
    """``(1 - lam) * CE + lam * KL(q||p)``: mode-seeking distillation.

    Args:
        lam: the teacher's share, in [0, 1]; 0 leaves cross-entropy, 1 the divergence.
    """

    lam: float = 0.5
    name: ClassVar[str] = "reverse_kd"
    kind: ClassVar[RowSpec] = RowSpec("reverse_kl", hard_label=True)


@dataclass(frozen=True, kw_only=True)
class NoEvo(Objective):
    """``KL(yt||q)``: Self-Evolution KD without its hard branch (every token is easy).

    Args:
        lam: the teacher's share of the target ``yt`` (eq. 4), in [0, 1]; 0 is cross-entropy with the label.
    """

    lam: float = 0.5
    name: ClassVar[str] = "no_evo"
    kind: ClassVar[RowSpec] = RowSpec("kl", mixed=True)


@dataclass(frozen=True, kw_only=True)
class Skew(Objective):
    """``KL(yt||beta * q + (1 - beta) * yt)``: the hard branch of Self-Evolution KD for every token.

    The loss is bounded by ``-log(1 - beta)`` and its gradient vanishes with ``q_y``, so an untrained student hardly
    learns from it: start from a trained one, or anneal ``beta`` from 1 (``beta=1`` is :class:`NoEvo`).

    Args:
        lam: the teacher's share of the target ``yt`` (eq. 4), in [0, 1].
        beta: the student's share of the mixture, in [0, 1]; 0 has no gradient.
    """

    lam: float = 0.5
    beta: float = 0.5
    name: ClassVar[str] = "skew"
    kind: ClassVar[RowSpec] = RowSpec("skew_kl", mixed=True)


@dataclass(frozen=True, kw_only=True)
class SkewTeacher(Objective):
    """``(1 - lam) * CE + lam * KL(p||beta * q + (1 - beta) * p)``, eq. 10: skewed towards the teacher alone.

    Args:
        lam: the teacher's share, in [0, 1]; 0 leaves cross-entropy, 1 the divergence.
        beta: the student's share of the mixture, in [0, 1]; 1 is :class:`ForwardKD`.
    """

    lam: float = 0.5
    beta: float = 0.9
    name: ClassVar[str] = "skew_teacher"
    kind: ClassVar[RowSpec] = RowSpec("skew_kl", hard_label=True)


@dataclass(frozen=True, kw_only=True)
class SelfEvolution(Objective):
    """Self-Evolution KD, eq. 4-9: :class:`Skew` for hard tokens, :class:`NoEvo` for easy ones.

    A token is hard when its difficulty ``d = KL(yt||q)``, in nats, exceeds ``gamma``. The loss jumps down at
    ``d = gamma``: a hard token's loss is at most ``min(beta * d, -log(1 - beta))``.

    Args:
        lam: the teacher's share of the target ``yt`` (eq. 4), in [0, 1].
        beta: the student's share of a hard token's mixture, in [0, 1]; 1 is :class:`NoEvo` for all tokens.
        gamma: difficulty above which a token is hard, in nats, in [0, inf]; inf makes every token easy.
    """

    lam: float = 0.5
    beta: float = 0.5
    gamma: float = 0.4
    name: ClassVar[str] = "self_evolution"
    kind: ClassVar[RowSpec] = RowSpec("skew_kl", mixed=True, gated=True)


@dataclass(frozen=True, kw_only=True)
class SelfEvolutionTopK(Objective):
    """Self-Evolution KD by rank: hard tokens are the ``ceil(fraction * n)`` largest difficulties of the n valid tokens.

    The difficulty is ``KL(yt||q)``, the losses are those of :class:`SelfEvolution`. Ranked over all tokens of the call
    (ties by position), so the share of hard tokens is fixed where :class:`SelfEvolution` fixes their difficulty.
    Difficulties of all tokens are needed before the first gradient: the student's and the teacher's logits are computed
    twice, unless all tokens fit one chunk.

    Args:
        lam: the teacher's share of the target ``yt`` (eq. 4), in [0, 1].
        beta: the student's share of a hard token's mixture, in [0, 1].
        fraction: share of the valid tokens that are hard, in [0, 1].
    """

    lam: float = 0.5
    beta: float = 0.5
    fraction: float = 0.5
    name: ClassVar[str] = "self_evolution_top_k"
    kind: ClassVar[RowSpec] = RowSpec("skew_kl", mixed=True, gated=True, ranked=True)


@dataclass(frozen=True, kw_only=True)
class GeneralizedJSD(Objective):
    """``beta * KL(p||m) + (1 - beta) * KL(q||m)`` with ``m = beta * p + (1 - beta) * q`` (GKD, Agarwal et al. 2024).

    Weights and limits are those of TRL's GKD trainer: ``beta = 0`` is ``KL(p||q)``, ``beta = 1`` is ``KL(q||p)``, both
    by definition: the formula itself tends to 0 there. (Each limit is a kernel of its own, so annealing ``beta`` onto
    one compiles once more.) DistiLLM's JS with ``lam`` is this with ``beta = 1 - lam``.

    Args:
        beta: the teacher's share of the mixture ``m`` and the weight of ``KL(p||m)``, in [0, 1].
    """

    beta: float = 0.5
    name: ClassVar[str] = "generalized_jsd"
    kind: ClassVar[RowSpec] = RowSpec("jsd")

    @property
    def spec(self) -> RowSpec:
        return RowSpec({0.0: "kl", 1.0: "reverse_kl"}[self.beta]) if self.beta in (0.0, 1.0) else self.kind

    def scalars(self, temperature: float = 1.0) -> Scalars:
        return super().scalars(temperature)._replace(beta=1.0 - self.beta, alpha=self.beta)


@dataclass(frozen=True, kw_only=True)
class SkewForward(Objective):
    """``KL(p||(1 - alpha) * q + alpha * p)``: DistiLLM's skew KL (Ko et al. 2024).

    DistiLLM's code leaves out the teacher's entropy, a constant: its loss differs from this one by ``sum p log p``, its
    gradient does not.

    Args:
        alpha: the teacher's share of the mixture, in [0, 1]; 0 is ``KL(p||q)``, 1 has no gradient.
    """

    alpha: float = 0.1
    name: ClassVar[str] = "skew_forward"
    kind: ClassVar[RowSpec] = RowSpec("skew_kl")

    def scalars(self, temperature: float = 1.0) -> Scalars:
        return super().scalars(temperature)._replace(beta=1.0 - self.alpha, alpha=self.alpha)


@dataclass(frozen=True, kw_only=True)
class SkewReverse(Objective):
    """``KL(q||alpha * q + (1 - alpha) * p)``: DistiLLM's skew reverse KL (Ko et al. 2024).

    ``alpha = 0`` is ``KL(q||p)``. The gradient flows through the mixture, as in DistiLLM; DistiLLM-2 detaches the
    student inside it, which gives another gradient.

    Args:
        alpha: the student's share of the mixture, in [0, 1]; 1 has no gradient.
    """

    alpha: float = 0.1
    name: ClassVar[str] = "skew_reverse"
    kind: ClassVar[RowSpec] = RowSpec("skew_reverse_kl")

    @property
    def spec(self) -> RowSpec:
        return RowSpec("reverse_kl") if self.alpha == 0.0 else self.kind

    def scalars(self, temperature: float = 1.0) -> Scalars:
        return super().scalars(temperature)._replace(beta=self.alpha, alpha=1.0 - self.alpha)


@dataclass(frozen=True, kw_only=True)
class TotalVariation(Objective):
    """``sum |p - q| / 2``, in [0, 1]. Where ``p`` and ``q`` are equal the subgradient is 0."""

    name: ClassVar[str] = "total_variation"
    kind: ClassVar[RowSpec] = RowSpec("total_variation")


@dataclass(frozen=True, kw_only=True)
class AdaptiveKL(Objective):
    """``w * KL(p||q) + (1 - w) * KL(q||p)`` with a weight of each token (Wu et al. 2024).

    ``w`` is the share of ``sum |p - q|`` that lies in the teacher's head: its most probable entries up to ``fraction``
    of the mass, and always the most probable one. It is a constant, as in the authors' code, which leaves it undefined
    for equal distributions (here 1/2) and splits entries of equal probability by their order (here all are in or out).
    Finding the head costs a sort of the teacher's row (torch) or 30 more sweeps of it (Triton).

    Args:
        fraction: the teacher's mass that is its head, in [0, 1].
    """

    fraction: float = 0.5
    name: ClassVar[str] = "adaptive_kl"
    kind: ClassVar[RowSpec] = RowSpec("adaptive_kl")


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
    )
}
