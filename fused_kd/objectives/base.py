"""What objectives have in common: checked numbers, sums of them, and a text form for configs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from ..divergences import LOG_ZERO
from ..terms import Number, RowSpec, Scalars, Term


@dataclass(frozen=True, kw_only=True, repr=False)
class Objective:
    """Base of all objectives. Subclasses set ``name``, and ``kind`` or ``summands``, and add the numbers that they use.

    A number may be a tensor that gives each token its own, in the shape of the labels, or 0-d; it is a constant.
    Objectives add up, ``0.5 * SFT() + 0.5 * GeneralizedJSD()``: one loss in one pass.
    """

    name: ClassVar[str]
    kind: ClassVar[Term]

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in _NAMES:
                if value not in _NAMES[field.name]:
                    known = ", ".join(map(repr, _NAMES[field.name]))
                    raise ValueError(f"{field.name} must be one of {known}, got {value!r}")
            else:
                object.__setattr__(self, field.name, checked_number(field.name, value, _LIMITS[field.name]))

    @property
    def summands(self) -> tuple[tuple[Number, Objective], ...]:
        """Weights and objectives, none a sum itself."""
        return ((1.0, self),)

    @property
    def term(self) -> Term:
        """``kind``, unless a number is at a limit where another formula holds."""
        return self.kind

    @property
    def spec(self) -> RowSpec:
        """What a row must know before it is compiled."""
        return RowSpec.of(*(objective.term for _, objective in self.summands))

    def scalars(self, temperature: Number = 1.0) -> list[Scalars]:
        """Of each term; what an objective does not have gets its neutral value."""
        return [objective.own_scalars(weight, temperature) for weight, objective in self.summands]

    def own_scalars(self, weight: Number, temperature: Number) -> Scalars:
        """Those of one term. Numbers of tokens are in float64, as what is formed from them is rounded once."""
        lam, beta, floor = (_exact(getattr(self, name, neutral)) for name, neutral in _NEUTRAL)
        for name, value in self.numbers.items():
            if isinstance(value, Tensor) and value.device.type != "cpu":
                weight = torch.where(_fits(value, name), weight, math.nan)
        return Scalars(
            lam=lam,
            beta=beta,
            gamma=getattr(self, "gamma", math.inf),
            temperature=temperature,
            fraction=getattr(self, "fraction", 1.0),
            rest=1.0 - lam,
            alpha=1.0 - beta,
            log_lam=_log(lam),
            weight=weight,
            floor=floor,
            kept=1.0 - floor,
        )

    def __add__(self, other: Any) -> Objective:
        return Sum((*parts_of(self), *parts_of(other))) if isinstance(other, Objective) else NotImplemented

    def __mul__(self, factor: Any) -> Objective:
        if isinstance(factor, Objective):
            return NotImplemented
        factor = checked_number("weight", factor, WEIGHT)
        multiples = ((checked_number("weight", factor * own, WEIGHT), objective) for own, objective in parts_of(self))
        return Sum(tuple(multiples))

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> Objective:
        if isinstance(divisor, Objective):
            return NotImplemented
        return self * (1.0 / checked_number("divisor", divisor, DIVISOR))

    def __repr__(self) -> str:
        values = {f.name: getattr(self, f.name) for f in fields(self) if not self._is_quiet(f.name, f.default)}
        shown = ", ".join(f"{k}={v!r}" if isinstance(v, str) else f"{k}={shown_value(v)}" for k, v in values.items())
        return f"{type(self).__name__}({shown})"

    def _is_quiet(self, name: str, default: Any) -> bool:
        """Not worth showing at its default, which is the paper's."""
        return name in ("floor", "gate") and _same(getattr(self, name), default)

    def __str__(self) -> str:
        """The text form, which :func:`fused_kd.objectives.parse` reads: ``name`` or ``name:key=value,...``, without
        what is at its default."""
        given = [f for f in fields(self) if not _same(getattr(self, f.name), f.default)]
        values = ",".join(f"{f.name}={shown_value(getattr(self, f.name))}" for f in given)
        return f"{self.name}:{values}" if values else self.name

    @property
    def numbers(self) -> dict[str, Number]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _NAMES}

    @property
    def per_token(self) -> bool:
        """Whether some number is a tensor."""
        return any(
            isinstance(value, Tensor)
            for weight, objective in self.summands
            for value in (weight, *objective.numbers.values())
        )


@dataclass(frozen=True, repr=False)
class Sum(Objective):
    """A weighted sum of objectives, evaluated in one pass over the logits.

    Made by ``+``, ``*`` and ``/``; weights are finite numbers of at least 0, or tensors with one for each token. They
    are run-time numbers: a set of terms is compiled once. One term at most may have a gate (``SelfEvolution``,
    ``SelfEvolutionTopK``, ``EntropyGated``): a token has one answer to ``is_hard``. The difficulty is that of the gated
    term, else of the first with a label-mixed target, else of the first with a teacher.
    """

    parts: tuple[tuple[Number, Objective], ...]
    name: ClassVar[str] = "sum"

    def __post_init__(self) -> None:
        gated = [objective for _, objective in self.parts if objective.spec.gate]
        if len(gated) > 1:
            raise ValueError(f"a sum takes one objective with a gate, got {' and '.join(map(repr, gated))}")

    @property
    def summands(self) -> tuple[tuple[Number, Objective], ...]:
        return tuple((weight * own, each) for weight, objective in self.parts for own, each in objective.summands)

    def __repr__(self) -> str:
        return " + ".join(f"{_multiple(weight, ' * ')}{objective!r}" for weight, objective in self.parts)

    def __str__(self) -> str:
        return "+".join(f"{_multiple(weight, '*')}{objective}" for weight, objective in self.parts)


def parts_of(objective: Objective) -> tuple[tuple[Number, Objective], ...]:
    """Weights and objectives as written: those that stand for a sum are whole."""
    return objective.parts if isinstance(objective, Sum) else ((1.0, objective),)


class Limit(NamedTuple):
    low: float
    high: float
    text: str


SHARE = Limit(0.0, 1.0, "[0, 1]")
WEIGHT = Limit(0.0, 1e12, "[0, 1e12]")
DIVISOR = Limit(1e-12, math.inf, "[1e-12, inf]")
_LIMITS = {
    "lam": SHARE,
    "beta": SHARE,
    "gamma": Limit(0.0, math.inf, "[0, inf]"),
    "alpha": SHARE,
    "fraction": SHARE,
    "floor": SHARE,
    "tau": Limit(0.0, math.inf, "[0, inf]"),
}
_NAMES: dict[str, Sequence[str]] = {"gate": ("difficulty", "excess", "kl")}
_NEUTRAL = (("lam", 1.0), ("beta", 1.0), ("floor", 0.0))


def checked_number(name: str, value: Any, limit: Limit) -> Number:
    """``value`` as a float, or a tensor of tokens' numbers without its graph.

    Values on an accelerator are not looked at: where they are out of range, the token's loss is NaN.

    Raises:
        TypeError, ValueError: with the name, the value and the range.
    """
    if isinstance(value, Tensor):
        if value.dtype == torch.bool or value.is_complex():
            raise TypeError(f"{name} must be a tensor of real numbers in {limit.text}, got one of {value.dtype}")
        value = value.detach()
        if value.device.type == "cpu":
            bad = ~((value >= limit.low) & (value <= limit.high))  # also NaN
            if bool(bad.any()):
                raise ValueError(f"{name} must be in {limit.text}, got {value[bad][0].item()!r} in a tensor")
        return cast(Tensor, value)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number in {limit.text}, got {value!r}")
    if not limit.low <= value <= limit.high:  # type: ignore[operator]  # also false for NaN
        raise ValueError(f"{name} must be in {limit.text}, got {value!r}")
    try:
        return float(value)
    except OverflowError:  # an integer that only infinity exceeds
        return math.inf


def _fits(value: Tensor, name: str) -> Tensor:
    return (value >= _LIMITS[name].low) & (value <= _LIMITS[name].high)


def _exact(value: Number) -> Number:
    return value.double() if isinstance(value, Tensor) else value


def _log(lam: Number) -> Number:
    if isinstance(lam, Tensor):
        return lam.log().clamp(min=LOG_ZERO)
    return math.log(lam) if lam > 0.0 else LOG_ZERO


def _same(value: Any, default: Any) -> bool:
    return not isinstance(value, Tensor) and value == default


def _multiple(weight: Number, times: str) -> str:
    return "" if not isinstance(weight, Tensor) and weight == 1.0 else f"{shown_value(weight)}{times}"


def shown_value(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"tensor{tuple(value.shape)}"
    return str(value) if isinstance(value, str) else repr(value)
