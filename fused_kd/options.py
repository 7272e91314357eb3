"""What a loss may be told beside its tensors: options, their ranges; numbers of each token; names of statistics."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, TypedDict

import torch
from torch import Tensor

from .engines.dispatch import ENGINES
from .inputs import LARGEST, TopK, check_number
from .objectives.base import Limit, checked_number
from .rows.select import BACKENDS
from .terms import STATISTICS, WITHOUT_SWEEP, Number, RowSpec, Scalars

# At less, differences of what stands for log 0 would overflow: its inverse is COLDEST in the kernels.
LEAST_TEMPERATURE = 1e-8
TEMPERATURE = Limit(LEAST_TEMPERATURE, LARGEST, f"[{LEAST_TEMPERATURE:g}, {LARGEST:g}]")
REDUCTIONS = ("mean", "sum", "none")
_INT64 = 2**63


class LossOptions(TypedDict, total=False):
    """Keyword options of :class:`KDLoss`, accepted by :func:`kd_loss` too."""

    ignore_index: int
    reduction: str
    temperature: float | Tensor
    vocab_size: int | None
    shift: bool
    memory_budget: int | None
    backend: str | None
    validate: bool
    signed: bool
    engine: str | None
    grad_filter_eps: float
    tp_group: Any


def checked_option(name: str, value: Any) -> Any:
    """``value`` as :class:`KDLoss` keeps it.

    Raises:
        TypeError, ValueError: where it is none of what the option of this name may be.
    """
    if name in ("shift", "validate", "signed"):
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
        if isinstance(value, Tensor):
            return checked_number(name, value, TEMPERATURE)
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


def token_scalars(terms: list[Scalars], shape: torch.Size, device: torch.device) -> Tensor:
    """(N, terms, n) fp32 on the device: numbers of the call, and those of each token, in the tokens' shape or 0-d."""

    def spread(value: Number) -> Tensor:
        if not isinstance(value, Tensor):
            return torch.full((math.prod(shape),), value, dtype=torch.float32, device=device)
        if value.dim() and value.shape != shape:
            raise ValueError(
                f"numbers of the objective and the temperature must be 0-d or have the labels' shape {tuple(shape)}, "
                f"got a tensor of shape {tuple(value.shape)}"
            )
        return value.to(device, torch.float32, non_blocking=True).expand(shape).reshape(-1)

    return torch.stack([torch.stack([spread(value) for value in own], 1) for own in terms], 1)


def statistics_columns(wanted: tuple[str, ...], teacher: Any, spec: RowSpec) -> int:
    """How many columns of :data:`fused_kd.terms.STATISTICS` have those of these names.

    Raises:
        ValueError: for a name that is none, or one that this call has nothing to say of.
    """
    alone = ("log_sum_exp_s", "entropy_s", "cross_entropy", "log_q_y")
    for name in wanted:
        if name not in STATISTICS:
            raise ValueError(f"statistics must be among {', '.join(map(repr, STATISTICS))}, got {name!r}")
        if not spec.needs_teacher and name not in alone:
            raise ValueError(f"statistics must be among {', '.join(map(repr, alone))} without a teacher, got {name!r}")
    if wanted and spec.needs_teacher and isinstance(teacher, TopK):
        raise ValueError("statistics must be empty with a TopK, which does not know all of p; give an LMHead or logits")
    if not wanted:
        return 0
    return WITHOUT_SWEEP if all(STATISTICS.index(name) < WITHOUT_SWEEP for name in wanted) else len(STATISTICS)
