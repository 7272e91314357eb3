"""The options of a loss, checked when they are given and whenever they are assigned."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypedDict

from .engines.dispatch import ENGINES
from .inputs import check_number
from .rows.select import BACKENDS

# At less, differences of what stands for log 0 would overflow: its inverse is COLDEST in the kernels.
LEAST_TEMPERATURE = 1e-8
REDUCTIONS = ("mean", "sum", "none")
_INT64 = 2**63


class LossOptions(TypedDict, total=False):
    """Keyword options of :class:`KDLoss`, accepted by :func:`kd_loss` too."""

    ignore_index: int
    reduction: str
    temperature: float
    vocab_size: int | None
    shift: bool
    memory_budget: int | None
    backend: str | None
    validate: bool
    engine: str | None
    grad_filter_eps: float
    tp_group: Any


def checked_option(name: str, value: Any) -> Any:
    """``value`` as :class:`KDLoss` keeps it.

    Raises:
        TypeError, ValueError: where it is none of what the option of this name may be.
    """
    if name in ("shift", "validate"):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")
    elif name == "reduction":
        _check_name(name, value, REDUCTIONS)
    elif name in ("engine", "backend"):
        if value is not None:
            _check_name(name, value, ENGINES if name == "engine" else BACKENDS, "None or ")
    elif name in ("vocab_size", "memory_budget"):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"{name} must be a positive integer or None, got {value!r}")
        if value is not None and value < 1:
            raise ValueError(f"{name} must be a positive integer or None, got {value!r}")
    elif name == "ignore_index":
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"ignore_index must be an integer, got {value!r}")
        if not -_INT64 <= value < _INT64:
            raise ValueError(f"ignore_index must be a 64-bit integer, got {value!r}")
    elif name == "temperature":
        check_number(name, value, low=LEAST_TEMPERATURE)
        return float(value)
    elif name == "grad_filter_eps":
        check_number(name, value)
        if value < 0:
            raise ValueError(f"grad_filter_eps must be at least 0, got {value!r}")
        return float(value)
    return value


def _check_name(name: str, value: Any, known: Iterable[str], or_none: str = "") -> None:
    if value not in known:
        raise ValueError(f"{name} must be {or_none}one of {', '.join(map(repr, known))}, got {value!r}")
