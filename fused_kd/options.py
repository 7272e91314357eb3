"""What a loss may be told beside its tensors: options, their ranges; numbers of each token; names of statistics."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, TypedDict

import torch
from torch import Tensor

from .checks import TEMPERATURE, check_number, checked_number
from .engines.dispatch import ENGINES
from .inputs import Lists, LMHead, TopK
from .objectives import OBJECTIVES, Objective
from .objectives.base import numbers_of
from .rows.select import BACKENDS
from .terms import STATISTICS, WITHOUT_SWEEP, Number, RowSpec

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
    lists: Lists | None


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
        check_number(name, value, low=TEMPERATURE.low)
        return float(value)
    elif name == "lists":
        if value is not None and not isinstance(value, Lists):
            raise TypeError(f"lists must be a fused_kd.Lists or None, got {value!r}")
    elif name == "grad_filter_eps":
        check_number(name, value)
        if value < 0:
            raise ValueError(f"grad_filter_eps must be at least 0, got {value!r}")
        return float(value)
    return value


def _check_name(name: str, value: Any, known: Iterable[str], or_none: str = "") -> None:
    if value not in known:
        raise ValueError(f"{name} must be {or_none}one of {', '.join(map(repr, known))}, got {value!r}")


def check_objective(objective: Any) -> None:
    """
    Raises:
        TypeError: for what is none.
    """
    if not isinstance(objective, Objective):
        hint = "; fused_kd.objectives.parse reads a text" if isinstance(objective, str) else ""
        known = ", ".join(sorted(cls.__name__ for cls in OBJECTIVES.values()))
        raise TypeError(f"objective must be one of {known}, or a sum of them, got {objective!r}{hint}")


def check_tail(objective: Objective, tail: str, temperature: Number, taken_at: float = 1.0) -> None:
    """``temperature`` is the loss's, ``taken_at`` that of the lists.

    Raises:
        ValueError: for lists of a tail with which an objective, or a temperature, is not defined.
    """
    spec = objective.spec
    if tail != "uniform" and any(term.z_loss for term in spec.terms):
        raise ValueError(f"tail must be 'uniform' for {objective!r}, whose ZLoss reads all logits, got {tail!r}")
    for term in spec.terms:
        beyond = term.of.everywhere or (tail == "renormalize" and not term.of.lumps)
        if beyond and (tail == "renormalize" or (tail == "listed" and spec.mixes_label)):
            allowed = "'uniform' or 'bucket'" if spec.mixes_label else "'uniform', 'bucket' or 'listed'"
            why = "is infinite" if term.of.everywhere else "needs each of the student's entries"
            raise ValueError(
                f"tail must be {allowed} for {objective!r}, which {why} where the teacher is 0, got {tail!r}"
            )
    if tail == "bucket" and (isinstance(temperature, Tensor) or temperature != taken_at):
        raise ValueError(
            f"temperature must be {taken_at:g} with tail='bucket', whose mass is known at that of the list alone, got "
            f"{temperature}; list at the temperature of the loss, as fk.top_k_of(head, k, temperature=T) does, or use "
            "another tail"
        )


def check_map_tail(objective: Objective, tail: str) -> None:
    """
    Raises:
        ValueError: for a map of a tail with which an objective is not defined.
    """
    if tail in ("bucket", "listed") and any(term.z_loss for term in objective.spec.terms):
        raise ValueError(
            f"tail must be 'renormalize' or 'uniform' for {objective!r}, whose ZLoss reads all logits, got {tail!r}"
        )


def token_scalars(objective: Objective, temperature: Number, shape: torch.Size, device: torch.device) -> Tensor:
    """(N, terms, n) fp32 on the device: numbers of the call, and those of each token, of labels of this shape.

    Raises:
        ValueError: for a tensor that does not go with the labels.
    """
    for name, value in [*numbers_of(objective), ("temperature", temperature)]:
        if isinstance(value, Tensor) and not _goes_with(value.shape, shape):
            raise ValueError(
                f"{name} must be 0-d or have the labels' shape {tuple(shape)}, or 1 in places of it, got a tensor of "
                f"shape {tuple(value.shape)}"
            )

    def spread(value: Number) -> Tensor:
        if not isinstance(value, Tensor):
            return torch.full((math.prod(shape),), value, dtype=torch.float32, device=device)
        return value.to(device, torch.float32, non_blocking=True).expand(shape).reshape(-1)

    terms = objective.scalars(temperature)
    return torch.stack([torch.stack([spread(value) for value in own], 1) for own in terms], 1)


def _goes_with(numbers: torch.Size, labels: torch.Size) -> bool:
    if len(numbers) != len(labels):
        return not numbers
    return all(n in (1, own) for n, own in zip(numbers, labels, strict=True))


def statistics_names(wanted: Iterable[str]) -> tuple[str, ...]:
    """
    Raises:
        TypeError: for one name alone, whose letters would be taken for names, and what is no sequence.
    """
    if isinstance(wanted, str) or not isinstance(wanted, Iterable):
        raise TypeError(f"statistics must be a sequence of names such as ('kl',), got {wanted!r}")
    return tuple(wanted)


def statistics_columns(wanted: tuple[str, ...], teacher: Any, spec: RowSpec, lists: Lists | None = None) -> int:
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
    if wanted and spec.needs_teacher and lists is not None:
        raise ValueError(f"statistics must be empty with lists, got {', '.join(wanted)}")
    if wanted and spec.needs_teacher and isinstance(teacher, LMHead) and teacher.columns is not None:
        raise ValueError("statistics must be empty with columns, which map a part of p alone")
    if not wanted:
        return 0
    return WITHOUT_SWEEP if all(STATISTICS.index(name) < WITHOUT_SWEEP for name in wanted) else len(STATISTICS)
