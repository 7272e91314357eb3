"""Changing one objective of a sum: its threshold, its β."""

from __future__ import annotations

import dataclasses
from typing import Any

from fused_kd.objectives import Objective, SelfEvolution, SelfEvolutionTopK, Sum


def ranked_part(objective: Objective) -> SelfEvolutionTopK:
    """The one that ranks tokens."""
    return next(part for _, part in _parts(objective) if isinstance(part, SelfEvolutionTopK))


def with_threshold(objective: Objective, gamma: float) -> Objective:
    """The objective whose ranking of tokens is a threshold on their difficulty."""
    part = ranked_part(objective)
    new = SelfEvolution(lam=part.lam, beta=part.beta, gamma=gamma, floor=part.floor)
    return _replaced(objective, part, new)


def annealed_part(objective: Objective) -> Any:
    """The one whose β a schedule moves: that with a gate, or the only one with a β.

    Raises:
        ValueError: where there is none, or more than one.
    """
    having = [part for _, part in _parts(objective) if hasattr(part, "beta")]
    gated = [part for part in having if part.spec.gate]
    found = gated or having
    if len(found) != 1:
        raise ValueError(f"beta_schedule needs an objective with one beta, got {objective!r}")
    return found[0]


def with_beta(objective: Objective, beta: float) -> Objective:
    """With that β in :func:`annealed_part`."""
    part = annealed_part(objective)
    return _replaced(objective, part, dataclasses.replace(part, beta=beta))


def _replaced(objective: Objective, part: Objective, new: Objective) -> Objective:
    if part is objective:
        return new
    return Sum(tuple((weight, new if each is part else each) for weight, each in _parts(objective)))


def _parts(objective: Objective) -> tuple[tuple[Any, Objective], ...]:
    return objective.parts if isinstance(objective, Sum) else ((1.0, objective),)
