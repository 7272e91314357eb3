"""Rows of results as numbers and text."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]


def ratios(row: Row, of: str = "step", to: str = "floor") -> list[float] | None:
    """Sample by sample; by the median of ``to`` where the two were not interleaved."""
    seconds = row.get("seconds") or {}
    if of not in seconds or to not in seconds:
        return None
    if not row.get("interleaved", True):
        base = statistics.median(seconds[to])
        return [x / base for x in seconds[of]]
    return [x / y for x, y in zip(seconds[of], seconds[to], strict=True)]


def over_floor(row: Row) -> float | None:
    """The median of a step's time as a multiple of the floor."""
    return median(ratios(row))


def memory_of(row: Row) -> float | None:
    """Bytes over inputs and gradients."""
    return row.get("memory", {}).get("over_inputs_and_gradients")


def error_of(row: Row, name: str = "d_hidden") -> float | None:
    return float(row["error"][name]) if "error" in row else None


def shape_of(row: Row) -> str:
    s = row["shape"]
    return f"{s['name']}: {s['N']}, {s['H_s']}, {s['H_t']}, {s['V']}"


def over(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def median(values: list[float] | None) -> float | None:
    return statistics.median(values) if values else None


def quartiles(values: list[float]) -> tuple[float, float]:
    """The first and the third."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def table(head: list[str], lines: Iterable[list[str]]) -> str:
    """Markdown."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def fixed(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def scientific(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def signed(share: float | None) -> str:
    return "" if share is None else f"{100 * share:+.1f} %"


def size(value: float | None) -> str:
    """Bytes in GB."""
    return "" if value is None else f"{value / 1e9:.3f}"
