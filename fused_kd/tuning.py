"""Choices between two ways that arithmetic cannot settle: only a GPU's clock can.

Each field's default is what counted bytes and instructions favour; the other value is the way it was before. A
benchmark compares them in one process by :func:`tuned`. Not part of the public interface: once a card has decided, the
field goes, with the way that lost.

A field's metadata name the values to compare and the measurements that it can change::

    field(default=True, metadata={"others": (False,), "affects": ("row", "step")})
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

AFFECTS = ("row", "step")
"""What a field may change: the Triton row alone, or a step of the chunked engine."""


@dataclass(frozen=True)
class Tuning:
    """The choices in force.

    Attributes:
        device_chunk: on a GPU, tokens of a chunk, of which several share the gradients' GEMMs; 0: none shares.
        row_block: columns that a program of the Triton row takes at once. 2048 fp32 elements are whole 16-byte loads in
            any dtype, and 16 KB in flight a program.
        row_threads: threads of such a program.
    """

    device_chunk: int = field(default=1024, metadata={"others": (512, 2048, 4096), "affects": ("step",)})
    row_block: int = field(default=2048, metadata={"others": (1024, 4096), "affects": ("row",)})
    row_threads: int = field(default=256, metadata={"others": (128, 512), "affects": ("row",)})


_current = Tuning()


def current() -> Tuning:
    """What the engines and rows go by."""
    return _current


@contextlib.contextmanager
def tuned(**changes: Any) -> Iterator[Tuning]:
    """Other choices for a while, in this process: ``with tuned(field=value): ...``."""
    global _current
    before = _current
    _current = replace(before, **changes)
    try:
        yield _current
    finally:
        _current = before


class Alternative(NamedTuple):
    """Another ``value`` of the field ``name`` than its ``default``."""

    name: str
    default: object
    value: object


def alternatives(affects: str, of: type = Tuning) -> list[Alternative]:
    """What a benchmark of ``affects`` compares with the defaults: the other values of the fields that name it.

    Raises:
        ValueError: for an ``affects`` that is not in :data:`AFFECTS`, or a field whose metadata are not as above.
    """
    if affects not in AFFECTS:
        raise ValueError(f"affects must be one of {', '.join(AFFECTS)}, got {affects!r}")
    found = []
    for choice in fields(of):
        others, what = choice.metadata.get("others", ()), choice.metadata.get("affects", ())
        if not others or not what or not set(what) <= set(AFFECTS) or choice.default in others:
            raise ValueError(f"{of.__name__}.{choice.name} must name its others and what it affects in its metadata")
        if affects in what:
            found += [Alternative(choice.name, choice.default, other) for other in others]
    return found
