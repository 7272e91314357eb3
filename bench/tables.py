"""Numbers as text, rows as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from .shapes import Variant


def table(head: list[str], lines: Iterable[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def shape_of(row: dict[str, Any]) -> str:
    s = row["shape"]
    return f"{s['name']}: {s['N']}, {s['H_s']}, {s['H_t']}, {s['V']}"


def variant_of(row: dict[str, Any]) -> Variant:
    return Variant(*(row[name] for name in Variant._fields))


def memory_of(row: dict[str, Any]) -> float | None:
    """Bytes over inputs and gradients."""
    return row.get("memory", {}).get("over_inputs_and_gradients")


def error_of(row: dict[str, Any], name: str) -> float | None:
    return float(row["error"][name]) if "error" in row else None


def over(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def median(values: list[float] | None) -> float | None:
    return statistics.median(values) if values else None


def spread(values: list[float]) -> str:
    """The median and, in brackets, quartiles."""
    if len(values) < 2:
        return f"{values[0]:.2f}"
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{statistics.median(values):.2f} ({low:.2f}-{high:.2f})"


def judged(value: float | None, limit: float | None, strict: bool = False) -> str:
    if value is None:
        return "not measured"
    if limit is None:
        return f"{value:.2f}"
    met = value < limit if strict else value <= limit
    return f"{value:.2f} {'met' if met else 'not met'}"


def fixed(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def scientific(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def size(value: float | None) -> str:
    return "" if value is None else f"{value / 1e9:.3f}"


def giga(value: float | None) -> str:
    return "" if value is None else f"{value / 1e9:.4g}"
