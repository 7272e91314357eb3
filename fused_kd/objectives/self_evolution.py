"""The objectives of Self-Evolution KD (Song et al., COLING 2025), and the label's own.

Per valid token, with student ``q``, teacher ``p``, label ``y`` and the label-mixed target
``yt = (1 - lam) * onehot(y) + lam * p`` (eq. 4). Targets are constants; ``q`` carries the gradient, also inside a
mixture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..divergences import LOG_ZERO
from ..terms import RANK, Number, Scalars, Term
from .base import Objective, is_number


@dataclass(frozen=True, repr=False, eq=False)
class SFT(Objective):
    """Cross-entropy with the label, ``-log q_y``, in nats. Needs no teacher.

    With labels smoothed by ``eps`` it is ``NoEvo(lam=eps)`` with a teacher of zeros, up to the target's entropy, a
    constant; with class weights it is this with ``token_weights=class_weights[labels.clamp(min=0)]``
    (of the labels that positions predict: with ``shift``, ``labels.roll(-1)``).
    """

    name: ClassVar[str] = "sft"
    kind: ClassVar[Term] = Term(None, hard_label=True)

    def own_scalars(self, weight: Number, temperature: Number) -> Scalars:
        return super().own_scalars(weight, temperature)._replace(lam=0.0, rest=1.0, log_lam=LOG_ZERO)


@dataclass(frozen=True, repr=False, eq=False)
class ZLoss(Objective):
    """``(log sum exp z)**2`` of the student's logits at temperature 1: keeps them from drifting (PaLM, 2022).

    For sums, ``SFT() + 1e-4 * ZLoss()``; costs no sweep. Needs no teacher.
    """

    name: ClassVar[str] = "z_loss"
    kind: ClassVar[Term] = Term(None, z_loss=True)


@dataclass(frozen=True, repr=False, eq=False)
class ForwardKD(Objective):
    """``(1 - lam) * CE + lam * KL(p||q)``, eq. 3: the usual word-level distillation.

    At temperature 1 its gradient is that of :class:`NoEvo`; the values differ by a constant of the batch.

    Args:
        lam: the teacher's share, in [0, 1]; 0 leaves cross-entropy, 1 the divergence.
    """

    lam: Number = 0.5
    name: ClassVar[str] = "forward_kd"
    kind: ClassVar[Term] = Term("kl", hard_label=True)

    @property
    def term(self) -> Term:
        return _without_label(self.kind, self.lam)


@dataclass(frozen=True, repr=False, eq=False)
class ReverseKD(Objective):
    """``(1 - lam) * CE + lam * KL(q||p)``: mode-seeking distillation.

    Args:
        lam: the teacher's share, in [0, 1]; 0 leaves cross-entropy, 1 the divergence.
    """

    lam: Number = 0.5
    name: ClassVar[str] = "reverse_kd"
    kind: ClassVar[Term] = Term("reverse_kl", hard_label=True)

    @property
    def term(self) -> Term:
        return _without_label(self.kind, self.lam)


@dataclass(frozen=True, repr=False, eq=False)
class NoEvo(Objective):
    """``KL(yt||q)``: Self-Evolution KD without its hard branch (every token is easy).

    Args:
        lam: the teacher's share of the target ``yt`` (eq. 4), in [0, 1]; 0 is cross-entropy with the label.
    """

    lam: Number = 0.5
    name: ClassVar[str] = "no_evo"
    kind: ClassVar[Term] = Term("kl", mixed=True)

    @property
    def term(self) -> Term:
        return _without_label(self.kind, self.lam)


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
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


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
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

    @property
    def term(self) -> Term:
        return _without_label(self.kind, self.lam)


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
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


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.fraction, Tensor):
            raise TypeError(f"fraction must be one number in [0, 1] for all tokens, got {self.fraction!r}")


def _without_label(kind: Term, lam: Number) -> Term:
    """Where ``lam`` is 1 no label has a part in it."""
    return kind._replace(mixed=False, hard_label=False) if is_number(lam, 1.0) else kind
