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


class RowSpec(NamedTuple):
    """What a row must know before it is compiled; everything else is a run-time scalar.

    ``divergence`` is a key of :data:`fused_kd.divergences.DIVERGENCES` or None for cross-entropy alone; ``mixed``
    picks the target ``yt`` instead of ``p``; ``hard_label`` splits the loss into ``(1 - lam) * CE + lam * divergence``;
    ``gated`` applies the divergence to hard tokens (``difficulty > gamma``) and ``KL(yt||q)`` to the others.
    """

    divergence: str | None
    mixed: bool
    hard_label: bool
    gated: bool


class Scalars(NamedTuple):
    """Run-time scalars of a row, in the order in which kernels read them: host numbers, or 0-d tensors on a device."""

    lam: float | Tensor
    beta: float | Tensor
    gamma: float | Tensor
    temperature: float | Tensor


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Base of all objectives. Subclasses set ``name`` and ``spec`` and add the scalars that they use."""

    name: ClassVar[str]
    spec: ClassVar[RowSpec]

    def __post_init__(self) -> None:
        for field in fields(self):
            limit = _LIMITS[field.name]
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"{field.name} must be a number in {limit.text}, got {value!r}")
            if not limit.low <= float(value) <= limit.high:  # also false for NaN
                raise ValueError(f"{field.name} must be in {limit.text}, got {value!r}")
            object.__setattr__(self, field.name, float(value))

    def scalars(self, temperature: float = 1.0) -> Scalars:
        """Values for the row; a scalar that the objective does not have gets its neutral value."""
        return Scalars(
            lam=getattr(self, "lam", 0.0),
            beta=getattr(self, "beta", 1.0),
            gamma=getattr(self, "gamma", math.inf),
            temperature=temperature,
        )


class _Limit(NamedTuple):
    low: float
    high: float
    text: str


_LIMITS = {
    "lam": _Limit(0.0, 1.0, "[0, 1]"),
    "beta": _Limit(0.0, 1.0, "[0, 1]"),
    "gamma": _Limit(0.0, math.inf, "[0, inf]"),
}


@dataclass(frozen=True, kw_only=True)
class SFT(Objective):
    """Cross-entropy with the label, ``-log q_y``. Needs no teacher."""

    name: ClassVar[str] = "sft"
    spec: ClassVar[RowSpec] = RowSpec(None, mixed=False, hard_label=True, gated=False)


@dataclass(frozen=True, kw_only=True)
class ForwardKD(Objective):
    """``(1 - lam) * CE + lam * KL(p||q)``, eq. 3: the usual word-level distillation.

    At temperature 1 its gradient is that of :class:`NoEvo`; the values differ by a constant of the batch.
    """

    lam: float = 0.5
    name: ClassVar[str] = "forward_kd"
    spec: ClassVar[RowSpec] = RowSpec("kl", mixed=False, hard_label=True, gated=False)


@dataclass(frozen=True, kw_only=True)
class ReverseKD(Objective):
    """``(1 - lam) * CE + lam * KL(q||p)``: mode-seeking distillation."""

    lam: float = 0.5
    name: ClassVar[str] = "reverse_kd"
    spec: ClassVar[RowSpec] = RowSpec("reverse_kl", mixed=False, hard_label=True, gated=False)


@dataclass(frozen=True, kw_only=True)
class NoEvo(Objective):
    """``KL(yt||q)``: Self-Evolution KD without its hard branch (every token is easy)."""

    lam: float = 0.5
    name: ClassVar[str] = "no_evo"
    spec: ClassVar[RowSpec] = RowSpec("kl", mixed=True, hard_label=False, gated=False)


@dataclass(frozen=True, kw_only=True)
class Skew(Objective):
    """``KL(yt||beta * q + (1 - beta) * yt)``: the hard branch of Self-Evolution KD for every token.

    The loss is bounded by ``-log(1 - beta)`` and its gradient vanishes with ``q_y``, so an untrained student hardly
    learns from it: start from a trained one, or anneal ``beta`` from 1 (``beta=1`` is :class:`NoEvo`).
    """

    lam: float = 0.5
    beta: float = 0.5
    name: ClassVar[str] = "skew"
    spec: ClassVar[RowSpec] = RowSpec("skew_kl", mixed=True, hard_label=False, gated=False)


@dataclass(frozen=True, kw_only=True)
class SkewTeacher(Objective):
    """``(1 - lam) * CE + lam * KL(p||beta * q + (1 - beta) * p)``, eq. 10: skewed towards the teacher alone."""

    lam: float = 0.5
    beta: float = 0.9
    name: ClassVar[str] = "skew_teacher"
    spec: ClassVar[RowSpec] = RowSpec("skew_kl", mixed=False, hard_label=True, gated=False)


@dataclass(frozen=True, kw_only=True)
class SelfEvolution(Objective):
    """Self-Evolution KD, eq. 4-9: :class:`Skew` for hard tokens, :class:`NoEvo` for easy ones.

    A token is hard when its difficulty ``d = KL(yt||q)``, in nats, exceeds ``gamma``. The loss jumps down at
    ``d = gamma``: a hard token's loss is at most ``min(beta * d, -log(1 - beta))``.
    """

    lam: float = 0.5
    beta: float = 0.5
    gamma: float = 0.4
    name: ClassVar[str] = "self_evolution"
    spec: ClassVar[RowSpec] = RowSpec("skew_kl", mixed=True, hard_label=False, gated=True)


OBJECTIVES: dict[str, type[Objective]] = {
    cls.name: cls for cls in (SFT, ForwardKD, ReverseKD, NoEvo, Skew, SkewTeacher, SelfEvolution)
}
