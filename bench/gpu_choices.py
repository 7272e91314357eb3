"""The choices that a run on a GPU suggests, each by one rule that is printed with it."""

from __future__ import annotations

import math
import statistics
from typing import Any

from .samples import ratios

Row = dict[str, Any]

# The CUDA row needs another package and another compiler than everything else: it must earn them.
CUDA_GAIN = 1.15
# A choice is changed for no less.
GAIN = 0.98
PLACES = [f"{shape} {tokens}" for shape in "AB" for tokens in ("easy", "hard")]


def suggestions(found: list[Row]) -> list[str]:
    """A sentence a choice; what was not measured says so."""
    return [row_backend(found), *fields(found)]


def row_backend(found: list[Row]) -> str:
    """The CUDA row where it is faster by the factor at both shapes, easy and hard, and none of the tests failed."""
    rule = f"CUDA row if at least {CUDA_GAIN:g} times as fast at {', '.join(PLACES)} and no test failed"
    rows = {row["key"]: row for row in found if row["stage"] == "rows"}
    gains = {place: _median(ratios(rows.get(place, {}), "triton", "cuda")) for place in PLACES}
    if None in gains.values():
        return f"row backend: not measured ({rule})"
    tests = next((row for row in found if row["stage"] == "tests" and row["key"] == "tests"), {})
    clean = tests.get("status") == "ok"
    chosen = "cuda" if clean and min(x for x in gains.values() if x is not None) >= CUDA_GAIN else "triton"
    listed = ", ".join(f"{place} {gain:.2f}" for place, gain in gains.items())
    return f"row backend: {chosen} (triton / cuda: {listed}; tests {tests.get('status', 'not run')}; rule: {rule})"


def fields(found: list[Row]) -> list[str]:
    """Each other value of a field: taken if it is faster on the whole and nowhere slower beyond its spread."""
    rule = f"changed if the geometric mean is below {GAIN:g} and no lower quartile above 1"
    measured: dict[tuple[str, str, str], list[list[float]]] = {}
    for row in found:
        if row["stage"].startswith("choices:") and row.get("field") and (found_ := ratios(row, "other", "default")):
            measured.setdefault((row["field"], row["default"], row["value"]), []).append(found_)
    lines = []
    for (field, default, value), all_ in measured.items():
        mean = math.exp(statistics.fmean(math.log(statistics.median(x)) for x in all_))
        slower = any(_lower(x) > 1 for x in all_)
        chosen = value if mean < GAIN and not slower else default
        beside = ", slower somewhere" if slower else ""
        lines.append(f"{field}: {chosen} ({value} / {default}: {mean:.3f} over {len(all_)}{beside}; rule: {rule})")
    return lines or [f"fields of fused_kd.tuning: none measured ({rule})"]


def _lower(values: list[float]) -> float:
    return statistics.quantiles(values, n=4, method="inclusive")[0] if len(values) > 1 else values[0]


def _median(values: list[float] | None) -> float | None:
    return statistics.median(values) if values else None
