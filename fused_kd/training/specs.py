"""Objectives written as text, with a β schedule: ``self_evolution:gamma=0.4,beta_warmup=0.3``."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from fused_kd.integrations.parts import annealed_part
from fused_kd.objectives import Objective, parse
from fused_kd.objectives.base import parts_of
from fused_kd.objectives.text import split_sum
from fused_kd.training.trainer import BetaSchedule

_WARMUP = re.compile(r"(?<=[:,])\s*beta_warmup\s*=\s*([^,+]*),?")


@dataclass(frozen=True)
class ObjectiveSpec:
    """One trained student: its objective, its β schedule, the text it came from."""

    text: str
    objective: Objective
    beta_schedule: BetaSchedule | None = None

    @property
    def slug(self) -> str:
        """The text as a folder name; a long one is cut, and kept apart from others by a digest."""
        name = re.sub(r"[^\w.=-]+", "-", re.sub(r"(?<=\d[eE])\+", "", self.text))
        return name if len(name) <= 80 else f"{name[:70]}-{hashlib.sha256(self.text.encode()).hexdigest()[:8]}"


def parse_objective(text: str, beta_schedule: BetaSchedule | None = None) -> ObjectiveSpec:
    """The text of :func:`fused_kd.objectives.parse`, and behind it ``beta_warmup``, as one more setting.

    ``self_evolution:beta_warmup=0.3`` moves β linearly from 1 to the objective's value over the first 30 % of the
    steps; a ``beta_schedule`` goes before it.

    Raises:
        ValueError: a text that is none, or a ``beta_warmup`` without a β; the message names what is known.
    """
    found = list(_WARMUP.finditer(text))
    objective = parse(_WARMUP.sub("", text))
    if len(found) > 1:
        raise ValueError(f"beta_warmup must be given once, got it {len(found)} times in {text!r}")
    if not found:
        return ObjectiveSpec(text, objective, beta_schedule)
    part, place = annealed_part(objective), len(split_sum(text[: found[0].start()])) - 1
    if parts_of(objective)[place][1] is not part:
        raise ValueError(f"beta_warmup must stand with {part.name}, whose beta it moves, got {text!r}")
    try:
        schedule = beta_schedule or BetaSchedule(fraction=float(found[0][1]))
    except ValueError as error:
        raise ValueError(f"beta_warmup must be a number in (0, 1], got {found[0][1]!r} in {text!r}") from error
    return ObjectiveSpec(text, objective, schedule)
