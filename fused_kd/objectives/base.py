"""What objectives have in common: checked numbers, sums of them, and a text form for configs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import TEMPERATURE, Limit, checked_number, is_looked_at
from ..divergences import LOG_ZERO
from ..terms import Number, RowSpec, Scalars, Term


@dataclass(frozen=True, repr=False, eq=False)
class Objective:
    """Base of all objectives. Subclasses set ``name``, and ``kind`` or ``summands``, and add the numbers that they use.

    A number may be a tensor that gives each token its own: 0-d, or of as many dimensions as the labels and of their
    sizes or 1, as (B, 1) for each sequence. It is copied, a constant. Objectives add up, ``0.5 * SFT() + 0.5 *
    GeneralizedJSD()``: one loss in one pass.
    """

    name: ClassVar[str]
    kind: ClassVar[Term]
    # so that a product with an array of numpy's is refused, not one of as many objectives
    __array_ufunc__ = None

    def __post_init__(self) -> None:
        if type(self) is Objective:
            raise TypeError("Objective is what objectives have in common; take one of fused_kd.objectives")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in _NAMES:
                if value not in _NAMES[field.name]:
                    known = ", ".join(map(repr, _NAMES[field.name]))
                    raise ValueError(f"{field.name} must be one of {known}, got {value!r}")
            else:
                object.__setattr__(self, field.name, checked_number(field.name, value, self.limit_of(field.name)))

    def limit_of(self, name: str) -> Limit:
        """The range of a number."""
        return _LIMITS[name]

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
        """Those of one term."""
        lam, beta, floor = (getattr(self, name, neutral) for name, neutral in _NEUTRAL)
        for name, value in (*self.numbers.items(), ("weight", weight), ("temperature", temperature)):
            if isinstance(value, Tensor) and not is_looked_at(value):
                known = torch.as_tensor(weight, dtype=value.dtype, device=value.device)
                weight = known.where(self.limit_of(name).has(value), math.nan)
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
        return Sum(tuple((factor * own, objective) for own, objective in parts_of(self)))

    __rmul__ = __mul__

    def __radd__(self, other: Any) -> Objective:
        return self if isinstance(other, int) and other == 0 else NotImplemented  # of sum([...])

    def __truediv__(self, divisor: Any) -> Objective:
        if isinstance(divisor, Objective):
            return NotImplemented
        return self * (1.0 / checked_number("divisor", divisor, DIVISOR))

    def __eq__(self, other: Any) -> bool:
        return type(self) is type(other) and all(
            _equal(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)
        )

    def __hash__(self) -> int:
        return hash((type(self), *(_key(getattr(self, f.name)) for f in fields(self))))

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
        return any(isinstance(value, Tensor) for _, value in numbers_of(self))


@dataclass(frozen=True, repr=False, eq=False)
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
        pairs = isinstance(self.parts, tuple) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in self.parts)
        if not pairs or not self.parts or not all(isinstance(each, Objective) for _, each in self.parts):
            raise TypeError(f"parts must be a tuple of (weight, objective), at least one, got {self.parts!r}")
        parts = tuple((checked_number("weight", weight, WEIGHT), each) for weight, each in self.parts)
        object.__setattr__(self, "parts", parts)
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


def is_number(value: Number, number: float) -> bool:
    """Of a number of the call; a tensor's limits are those of its formula."""
    return not isinstance(value, Tensor) and value == number


def numbers_of(objective: Objective) -> list[tuple[str, Number]]:
    """Names and values of all weights and numbers, as written."""
    return [own for weight, part in parts_of(objective) for own in (("weight", weight), *part.numbers.items())]


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
    "weight": WEIGHT,
    "temperature": TEMPERATURE,
}
_NAMES: dict[str, Sequence[str]] = {"gate": ("difficulty", "excess", "kl")}
_NEUTRAL = (("lam", 1.0), ("beta", 1.0), ("floor", 0.0))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.device == b.device and torch.equal(a, b)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)


def _key(value: Any) -> Any:
    """What equal values have in common, to hash."""
    if isinstance(value, Tensor):
        return value.shape
    return tuple(map(_key, value)) if isinstance(value, tuple) else value


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
