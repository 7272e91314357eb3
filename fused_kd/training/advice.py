"""Which objective suits a student, told from what KDTrainer logs: the rule that docs/evidence.md was measured for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

import fused_kd as fk
from fused_kd.objectives import Objective
from fused_kd.training.baseline import HARD_T

PAGE = "docs/evidence.md#which-objective"
KL, FLOOR = "forward_kd", "self_evolution:floor=0.3"
# of the tokens that are easy for the teacher itself, the share that is hard for the student: above BEGINNER KL is
# better than FLOOR, above STARVED a loss that is skewed without a floor is clearly worse than both
BEGINNER, STARVED = 0.5, 0.3
BEGINNER_OF_ALL = 0.98  # of all tokens, where the teacher's own share is not known
NOTHING_EASY = 0.98  # of all tokens, hard for the teacher
TEACHES = 0.1  # the share of a sum's weights from which on its other parts teach the hard tokens


def still_hard(hard_fraction: float, hard_fraction_t: float) -> float:
    """Of the tokens that are easy for the teacher, the share that is hard for the student.

    About 0 for a student as good as its teacher, below 0 for a better one; 1 for one that knows nothing.

    Args:
        hard_fraction: share of tokens that are hard for the student, in [0, 1], as
            :class:`fused_kd.training.trainer.KDTrainer` logs it.
        hard_fraction_t: the same for the teacher itself, in [0, 1).

    Raises:
        ValueError: a share outside its range.
    """
    if not 0.0 <= hard_fraction <= 1.0:
        raise ValueError(f"hard_fraction must be in [0, 1], got {hard_fraction!r}")
    if not 0.0 <= hard_fraction_t < 1.0:
        raise ValueError(f"hard_fraction_t must be in [0, 1), got {hard_fraction_t!r}")
    return (hard_fraction - hard_fraction_t) / (1.0 - hard_fraction_t)


def advised_objective(hard_fraction: float, hard_fraction_t: float | None = None) -> str:
    """The objective for a student by the shares that its first steps log, as text for ``objective=``.

    "forward_kd" for one that hardly works, "self_evolution:floor=0.3" for one that does; docs/evidence.md has what was
    measured. "forward_kd" too where nearly every token is hard for the teacher itself: then the shares say nothing
    (with a larger Γ they would).

    Args:
        hard_fraction: share of tokens that are hard for the student, in [0, 1].
        hard_fraction_t: the same for the teacher itself, in [0, 1]; None (default): not known.

    Raises:
        ValueError: a share outside its range.
    """
    if hard_fraction_t is None:
        return KL if hard_fraction > BEGINNER_OF_ALL else FLOOR
    if hard_fraction_t > NOTHING_EASY:
        return KL
    return KL if still_hard(hard_fraction, hard_fraction_t) > BEGINNER else FLOOR


def starves(objective: Objective) -> bool:
    """Whether a hard token's gradient vanishes with its probability: a β below 1 of a label-mixed target, no floor.

    Of a sum, whether less than a tenth of the weights is of parts that do not.
    """
    weights: dict[bool, float] = {True: 0.0, False: 0.0}
    for weight, part in objective.summands:
        if isinstance(weight, torch.Tensor):
            return False
        weights[_starves(part)] += abs(float(weight))
    return weights[False] < TEACHES * (weights[False] + weights[True])


def _starves(part: Objective) -> bool:
    if not isinstance(part, (fk.Skew, fk.SelfEvolution, fk.SelfEvolutionTopK)):
        return False
    beta, floor = part.beta, part.floor
    return not isinstance(beta, torch.Tensor) and beta != 1.0 and not isinstance(floor, torch.Tensor) and floor == 0.0


def warning(objective: Objective, log: Sequence[Mapping[str, float]], step: int, max_steps: int) -> str | None:
    """What to tell of a training so far, or None.

    Of an objective that starves, when its student has stayed too weak for it for 5 % of the training and at least 20
    steps.

    Args:
        objective: of the current step.
        log: entries of the Trainer's ``log_history``. step, max_steps: of its state.
    """
    if not starves(objective):
        return None
    entries = [entry for entry in log if "hard_fraction" in entry]
    suited = [entry["step"] for entry in entries if _suited(entry)]
    steps = step - int(suited[-1] if suited else 0)
    if not entries or steps < max(20, 0.05 * max_steps):
        return None
    last = entries[-1]
    own = f" ({last[HARD_T]:.2f} for the teacher itself)" if HARD_T in last else ""
    first = advised_objective(last["hard_fraction"], last.get(HARD_T))
    second = FLOOR if first == KL else KL
    return (
        f"hard_fraction was {last['hard_fraction']:.2f}{own} and has stayed so for {steps} steps: hard tokens of a "
        f"skewed loss get almost no gradient, so this student learns little from them. Take objective={first!r} or "
        f"{second!r}, start from a trained student, or warm β up (beta_schedule=BetaSchedule(hold=0.5)); see {PAGE}"
    )


def _suited(entry: Mapping[str, float]) -> bool:
    """Whether a skewed loss without a floor is good enough for this student, or too little is known to say."""
    own = entry.get(HARD_T)
    if own is None:
        return entry["hard_fraction"] <= BEGINNER_OF_ALL
    return own > NOTHING_EASY or still_hard(entry["hard_fraction"], own) <= STARVED
