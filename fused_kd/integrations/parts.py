"""Changing one objective of a sum: its threshold, its β."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from fused_kd.objectives import Objective, SelfEvolution, SelfEvolutionTopK, Skew, SkewTeacher, Sum
from fused_kd.objectives.base import parts_of


def ranked_part(objective: Objective) -> SelfEvolutionTopK:
    """The one that ranks tokens."""
    return next(part for _, part in parts_of(objective) if isinstance(part, SelfEvolutionTopK))


def with_threshold(objective: Objective, gamma: float) -> Objective:
    """The objective whose ranking of tokens is a threshold on their difficulty."""
    part = ranked_part(objective)
    new = SelfEvolution(lam=part.lam, beta=part.beta, gamma=gamma, floor=part.floor)
    return with_part(objective, part, new)


def annealed_part(objective: Objective) -> Any:
    """The one whose β, the student's share of a mixture, a schedule moves from 1, that of KL: that with a gate, or the
    only one with such a β.

    Raises:
        ValueError: where there is none, or more than one, or a β of each token.
    """
    kinds = (Skew, SkewTeacher, SelfEvolution, SelfEvolutionTopK)
    having = [part for _, part in parts_of(objective) if isinstance(part, kinds)]
    gated = [part for part in having if part.spec.gate]
    found = gated or having
    if len(found) != 1 or isinstance(found[0].beta, Tensor):
        raise ValueError(
            "beta_schedule needs an objective with one beta, a number, that is the student's share of a mixture: one "
            f"of {', '.join(kind.__name__ for kind in kinds)}; got {objective!r}"
        )
    return found[0]


def with_beta(objective: Objective, beta: float) -> Objective:
    """With that β in :func:`annealed_part`."""
    part = annealed_part(objective)
    return with_part(objective, part, dataclasses.replace(part, beta=beta))


def thresholded_part(objective: Objective) -> SelfEvolution:
    """The one that compares a token's difficulty with a Γ.

    Raises:
        ValueError: where there is none.
    """
    for _, part in parts_of(objective):
        if isinstance(part, SelfEvolution) and part.gate == "difficulty":
            return part
    raise ValueError(f"a gamma for difficulties needs a SelfEvolution with gate='difficulty', got {objective!r}")


def with_part(objective: Objective, part: Objective, new: Objective) -> Objective:
    """With another objective in the place of one of its parts."""
    if part is objective:
        return new
    return Sum(tuple((weight, new if each is part else each) for weight, each in parts_of(objective)))
