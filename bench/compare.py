"""Two results files, row by row: ``python -m bench compare BEFORE.json AFTER.json``; exit code 1 past a regression."""

from __future__ import annotations

from statistics import quantiles
from typing import Any, NamedTuple

from .samples import ratios
from .store import row_key
from .tables import error_of, fixed, median, memory_of, table, variant_of

# A digit more or less of an error that is rounding alone says nothing.
ERROR_LIMIT = 2.0


class Change(NamedTuple):
    """AFTER over BEFORE: of time as a multiple of the floor, memory, dH error. ``worse`` names what exceeds limits."""

    row: dict[str, Any]
    time: float | None
    memory: float | None
    error: float | None
    worse: tuple[str, ...]


def compare(before: dict[str, Any], after: dict[str, Any], limit: float) -> list[Change]:
    """Of the rows in both files; one that was measured before and no longer is counts as worse.

    Args:
        limit: the largest ratio of time and of memory that is no regression, > 1. Times are compared as multiples of
            the floor measured with each, and a row is slower only if its quartiles, too, are apart: noise is no
            regression.

    Raises:
        ValueError: for results that cannot be compared (another device or dtype), or a limit of 1 or below.
    """
    if not limit > 1:
        raise ValueError(f"limit must be above 1, got {limit}")
    for name in ("device", "dtype"):
        old, new = before["settings"][name], after["settings"][name]
        if old != new:
            raise ValueError(f"results must have the same {name}, got {old} and {new}")
    earlier = {row_key(row): row for row in before["rows"] if row["status"] == "ok"}
    later = {row_key(row): row for row in after["rows"]}
    return [_change(earlier[key], later[key], limit) for key in earlier if key in later]


def _change(old: dict[str, Any], new: dict[str, Any], limit: float) -> Change:
    if new["status"] != "ok":
        return Change(new, None, None, None, (f"{new['status']}: {new['reason']}",))
    olds, news = ratios(old), ratios(new)
    time = _over(median(news), median(olds))
    memory, error = _over(memory_of(new), memory_of(old)), _over(error_of(new, "d_hidden"), error_of(old, "d_hidden"))
    worse = []
    if time and time > limit and _apart(olds, news):
        worse.append("time")
    if memory and memory > limit:
        worse.append("memory")
    if error and error > ERROR_LIMIT:
        worse.append("dH error")
    return Change(new, time, memory, error, tuple(worse))


def _apart(olds: list[float] | None, news: list[float] | None) -> bool:
    if not olds or not news:
        return False
    if min(len(olds), len(news)) < 2:
        return True
    return quantiles(news, n=4, method="inclusive")[0] > quantiles(olds, n=4, method="inclusive")[2]


def _over(new: float | None, old: float | None) -> float | None:
    return new / old if new is not None and old else None


def markdown(changes: list[Change], limit: float) -> str:
    """Worst first."""
    lines = [
        [
            change.row["shape"]["name"],
            str(variant_of(change.row)),
            change.row["implementation"],
            fixed(change.time, 3),
            fixed(change.memory, 3),
            fixed(change.error, 3),
            ", ".join(change.worse),
        ]
        for change in sorted(changes, key=lambda c: (not c.worse, -(c.time or 0)))
    ]
    head = ["shape", "variant", "implementation", "time", "memory", "dH error", "regression"]
    worse = sum(bool(change.worse) for change in changes)
    limits = f"limits: time and memory {limit:g}, dH error {ERROR_LIMIT:g}"
    return f"{table(head, lines)}\n\n{worse} of {len(changes)} rows are worse ({limits}; after / before)."
