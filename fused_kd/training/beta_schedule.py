"""β as a function of the training's progress."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BetaSchedule:
    """β stays at ``start`` for a while, moves linearly to ``end``, then stays there.

    Just below 1 β already bounds what a hard token can pull, so a student that knows nothing needs the ``hold``.

    Args:
        start: β at the first step, in [0, 1]; default 1, which is NoEvo and teaches an untrained student.
        end: β at last, in [0, 1]; None (default) takes the objective's β.
        fraction: share of the optimizer steps that the move takes, in (0, 1]; default 0.5.
        hold: share of the steps before the move, in [0, 1 - fraction]; default 0.
    """

    start: float = 1.0
    end: float | None = None
    fraction: float = 0.5
    hold: float = 0.0

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value!r}")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must be in (0, 1], got {self.fraction!r}")
        if not (self.hold >= 0 and self.hold + self.fraction <= 1 + 1e-9):
            raise ValueError(f"hold must be in [0, 1 - fraction] = [0, {1 - self.fraction:g}], got {self.hold!r}")

    def beta(self, progress: float, end: float) -> float:
        """β at ``progress`` in [0, 1]; ``end`` stands in for a ``self.end`` of None."""
        end = end if self.end is None else self.end
        share = min(max((progress - self.hold) / self.fraction, 0.0), 1.0)
        return self.start + (end - self.start) * share
