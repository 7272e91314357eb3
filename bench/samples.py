"""From raw samples to ratios."""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple


class Rates(NamedTuple):
    """What a row's seconds make of its work; None where that is not known.

    ``flops`` a second, from the measured number where there is one, ``share`` of what the floor reaches, and
    ``bytes`` a second, those of the GEMMs and of the row with every logit read once.
    """

    flops: float | None
    share: float | None
    bytes: float | None


def rates(row: dict[str, Any]) -> Rates:
    """Medians over the rounds."""
    counts, seconds = row.get("counts", {}), row.get("seconds", {})
    least = sum(counts.get("flops", {}).values())
    flops = row.get("measured_flops") or least
    if "step" not in seconds or not flops:
        return Rates(None, None, None)
    step = statistics.median(seconds["step"])
    moved = sum(counts["gemm_bytes"].values()) + counts["row_bytes_once"] if "gemm_bytes" in counts else None
    times = ratios(row)
    share = flops / least / statistics.median(times) if times and least else None
    return Rates(flops / step, share, None if moved is None else moved / step)


def ratios(row: dict[str, Any], of: str = "step", to: str = "floor") -> list[float] | None:
    """Sample by sample; by the median of ``to`` where the two were not interleaved."""
    seconds = row.get("seconds", {})
    if of not in seconds or to not in seconds:
        return None
    if not row.get("interleaved", True):
        base = statistics.median(seconds[to])
        return [x / base for x in seconds[of]]
    return [x / y for x, y in zip(seconds[of], seconds[to], strict=True)]
