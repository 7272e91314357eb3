"""Objectives from text, for command lines and configs."""

from __future__ import annotations

import re
from dataclasses import fields
from difflib import get_close_matches

from .base import Objective
from .table import OBJECTIVES


def parse(text: str) -> Objective:
    """The objective of a text: ``name``, ``name:key=value,...``, or a sum of multiples, as ``str(objective)`` has it.

    >>> parse("0.5*sft+0.5*generalized_jsd:beta=0.5")
    0.5 * SFT() + 0.5 * GeneralizedJSD(beta=0.5)

    Raises:
        TypeError, ValueError: for anything else; the message names what is known.
    """
    if not isinstance(text, str):
        raise TypeError(f"objective must be a text such as '0.5*sft+0.5*forward_kd:lam=1', got {text!r}")
    parts = [_parse_multiple(part.strip(), text) for part in split_sum(text)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def split_sum(text: str) -> list[str]:
    """The multiples of a sum; the + of 1e+3 is none of its."""
    return re.split(r"(?<!\d[eE])\+", text)


def _parse_multiple(part: str, text: str) -> Objective:
    factor, star, single = part.rpartition("*")
    name, _, settings = (word.strip() for word in single.partition(":"))
    if name not in OBJECTIVES:
        near = get_close_matches(name, OBJECTIVES, 1)
        hint = f": did you mean {near[0]}?" if near else ""
        names = ", ".join(OBJECTIVES)
        raise ValueError(f"objective must be one of {names}, or a sum of them, got {name!r} in {text!r}{hint}")
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
