"""From raw samples to ratios."""

from __future__ import annotations

import statistics
from typing import Any


def ratios(row: dict[str, Any], of: str = "step", to: str = "floor") -> list[float] | None:
    """Sample by sample; by the median of ``to`` where the two were not interleaved."""
    seconds = row.get("seconds", {})
    if of not in seconds or to not in seconds:
        return None
    if not row.get("interleaved", True):
        base = statistics.median(seconds[to])
        return [x / base for x in seconds[of]]
    return [x / y for x, y in zip(seconds[of], seconds[to], strict=True)]
