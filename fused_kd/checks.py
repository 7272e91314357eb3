"""Whether a number, or a tensor of numbers, is one that kernels can work with."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .terms import Number

# Logits of a size up to 1e4 stay far from fp32's end, and their losses from what stands for infinity.
LARGEST = 1e12


class Limit(NamedTuple):
    low: float
    high: float
    text: str

    def has(self, value: Tensor) -> Tensor:
        """Not what is NaN."""
        return (value >= self.low) & (value <= self.high)


# At less, differences of what stands for log 0 would overflow: its inverse is COLDEST in the kernels.
TEMPERATURE = Limit(1e-8, LARGEST, f"[1e-08, {LARGEST:g}]")


def checked_number(name: str, value: Any, limit: Limit) -> Number:
    """``value`` as a float, or a tensor of tokens' numbers as a copy in float64, of which what is formed is exact.

    Values on an accelerator, and in what is being compiled, are not looked at: where they are out of range, the token's
    loss is NaN.

    Raises:
        TypeError, ValueError: with the name, the value and the range.
    """
    if isinstance(value, Tensor):
        if value.dtype == torch.bool or value.is_complex():
            raise TypeError(f"{name} must be a tensor of real numbers in {limit.text}, got one of {value.dtype}")
        check_dense(name, value)
        if value.requires_grad:
            raise ValueError(f"{name} must be a constant, got a tensor that requires grad; detach it")
        if is_looked_at(value):
            bad = ~limit.has(value)
            if bool(bad.any()):
                raise ValueError(f"{name} must be in {limit.text}, got {value[bad][0].item()!r} in a tensor")
        return value.to(torch.float64, copy=True)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number in {limit.text}, or a tensor of such, got {value!r}")
    if not limit.low <= value <= limit.high:  # type: ignore[operator]  # also false for NaN
        raise ValueError(f"{name} must be in {limit.text}, got {value!r}")
    try:
        return float(value)
    except OverflowError:  # an integer that only infinity exceeds
        return math.inf


def is_looked_at(value: Tensor) -> bool:
    return value.device.type == "cpu" and not torch.compiler.is_compiling()


def check_dense(name: str, value: Tensor) -> None:
    """Refuse what is not one array of numbers: sparse, nested and oneDNN's own tensors."""
    if value.layout != torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else str(value.layout)
        raise TypeError(f"{name} must be a dense tensor, got one that is {kind}")


def check_number(name: str, value: object, *, low: float = -LARGEST) -> None:
    """A number that fp32 kernels can multiply logits by, and divide them by if ``low`` is positive."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number in [{low:g}, {LARGEST:g}], got {value!r}")
    if not low <= value <= LARGEST:  # type: ignore[operator]
        raise ValueError(f"{name} must be in [{low:g}, {LARGEST:g}], got {value!r}")


def check_columns(name: str, columns: Tensor, size: int) -> None:
    """Of a map, (V_s,) int64 on the host: the first that is none of ``size`` columns, or one of them again.

    Raises:
        ValueError: there is one.
    """
    outside = (columns < -1) | (columns >= size)
    if bool(outside.any()):
        at = int(outside.nonzero()[0])
        raise ValueError(f"{name} must be in [0, {size}) or -1, got {int(columns[at])} at {at}")
    ordered, order = columns.sort(stable=True)
    twice = ((ordered[1:] == ordered[:-1]) & (ordered[1:] >= 0)).nonzero()
    if len(twice):
        first, second = order[twice[0] + torch.arange(2)].tolist()
        raise ValueError(
            f"{name} must hold each teacher column once, got {int(columns[first])} at {first} and at {second}"
        )
