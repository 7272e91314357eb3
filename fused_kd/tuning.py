"""Choices between two ways that arithmetic cannot settle: only a GPU's clock can.

Each field's default is what counted bytes and instructions favour; the other value is the way it was before. A
benchmark compares them in one process by :func:`tuned`. Not part of the public interface: once a card has decided, the
field goes, with the way that lost.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Tuning:
    """The choices in force.

    ``streaming_wide``: 128 x 128 tiles in two of the streaming engine's kernels, else 64 x 128. ``streaming_grouped``:
    its programs start group of tokens by group, else all tokens of a split or tile of the vocabulary first.
    """

    streaming_wide: bool = field(default=True, metadata={"others": (False,), "affects": ("streaming",)})
    streaming_grouped: bool = field(default=True, metadata={"others": (False,), "affects": ("streaming",)})


_current = Tuning()


def current() -> Tuning:
    """What the engines and rows go by."""
    return _current


@contextlib.contextmanager
def tuned(**changes: object) -> Iterator[Tuning]:
    """Other choices for a while, in this process: ``with tuned(field=value): ...``."""
    global _current
    before = _current
    _current = replace(before, **changes)  # type: ignore[arg-type]
    try:
        yield _current
    finally:
        _current = before
