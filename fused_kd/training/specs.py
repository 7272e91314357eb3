"""Objectives written as text, for command lines and configs: ``self_evolution:gamma=0.4,beta=0.5``."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

import fused_kd as fk
from fused_kd.objectives import Objective
from fused_kd.training.trainer import BetaSchedule


@dataclass(frozen=True)
class ObjectiveSpec:
    """One trained student: its objective, its β schedule, the text it came from."""

    text: str
    objective: Objective
    beta_schedule: BetaSchedule | None = None

    @property
    def slug(self) -> str:
        """The text as a folder name."""
        return re.sub(r"[^\w.=-]+", "-", self.text)


def parse_objective(text: str, beta_schedule: BetaSchedule | None = None) -> ObjectiveSpec:
    """``name`` or ``name:key=value,...``; keys are the objective's parameters, and ``beta_warmup``.

    ``beta_warmup=0.3`` moves β linearly from 1 to the objective's value over the first 30 % of the steps; a
    ``beta_schedule`` goes before it.

    Raises:
        ValueError: an unknown name or key, a value that is no number or out of range; the message names the
        known ones.
    """
    name, _, tail = text.partition(":")
    if name not in fk.OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(fk.OBJECTIVES)}, got {name!r}")
    known = [field.name for field in dataclasses.fields(fk.OBJECTIVES[name])]
    if "beta" in known:
        known.append("beta_warmup")
    values: dict[str, float] = {}
    for item in filter(None, tail.split(",")):
        key, equals, value = (part.strip() for part in item.partition("="))
        if key not in known or not equals or key in values:
            raise ValueError(
                f"{text!r}: expected key=value once for each of {', '.join(known) or 'no key'}, got {item!r}"
            )
        try:
            values[key] = float(value)
        except ValueError as error:
            raise ValueError(f"{text!r}: {key} must be a number, got {value!r}") from error
    warmup = values.pop("beta_warmup", None)
    schedule = None if warmup is None else BetaSchedule(fraction=warmup)
    return ObjectiveSpec(text, fk.OBJECTIVES[name](**values), beta_schedule or schedule)
