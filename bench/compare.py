"""``python -m bench compare BEFORE.json AFTER.json``: two results files, row by row; exit code 1 past a regression."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from .problems import Variant
from .tables import Row, error_of, fixed, median, memory_of, over, quartiles, ratios, table

# A digit more or less of an error that is rounding alone says nothing.
ERROR_LIMIT = 2.0


class Change(NamedTuple):
    """AFTER over BEFORE: of time as a multiple of the floor, memory, dH error. ``worse`` names what exceeds limits."""

    row: Row
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
    earlier = {_key(row): row for row in before["rows"] if row["status"] == "ok"}
    later = {_key(row): row for row in after["rows"]}
    return [_change(earlier[key], later[key], limit) for key in earlier if key in later]


def _key(row: Row) -> tuple:
    return (row["shape"]["name"], row["implementation"], row["purpose"], Variant.of(row))


def _change(old: Row, new: Row, limit: float) -> Change:
    if new["status"] != "ok":
        return Change(new, None, None, None, (f"{new['status']}: {new['reason']}",))
    olds, news = ratios(old), ratios(new)
    time = over(median(news), median(olds))
    memory, error = over(memory_of(new), memory_of(old)), over(error_of(new), error_of(old))
    worse = []
    if olds and news and time and time > limit:
        apart = quartiles(news)[0] > quartiles(olds)[1]
        if apart or min(len(olds), len(news)) < 2:
            worse.append("time")
    if memory and memory > limit:
        worse.append("memory")
    if error and error > ERROR_LIMIT:
        worse.append("dH error")
    return Change(new, time, memory, error, tuple(worse))


def markdown(changes: list[Change], limit: float) -> str:
    """Worst first."""
    lines = [
        [
            *(change.row["shape"]["name"], str(Variant.of(change.row)), change.row["implementation"]),
            *(fixed(value, 3) for value in (change.time, change.memory, change.error)),
            ", ".join(change.worse),
        ]
        for change in sorted(changes, key=lambda c: (not c.worse, -(c.time or 0)))
    ]
    head = ["shape", "variant", "implementation", "time", "memory", "dH error", "regression"]
    worse = sum(bool(change.worse) for change in changes)
    limits = f"limits: time and memory {limit:g}, dH error {ERROR_LIMIT:g}"
    return f"{table(head, lines)}\n\n{worse} of {len(changes)} rows are worse ({limits}; after / before)."


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench compare", description=(__doc__ or "").partition(": ")[2])
    parser.add_argument("before", type=Path, metavar="BEFORE.json")
    parser.add_argument("after", type=Path, metavar="AFTER.json")
    parser.add_argument(
        "--limit", type=float, default=1.1, help="the largest ratio of time or memory that is none (default 1.1)"
    )
    args = parser.parse_args(arguments)
    try:
        before, after = (json.loads(path.read_text()) for path in (args.before, args.after))
        changes = compare(before, after, args.limit)
    except (OSError, ValueError) as error:
        print(f"bench compare: {error}", file=sys.stderr)
        return 2
    print(markdown(changes, args.limit))
    return int(any(change.worse for change in changes))


if __name__ == "__main__":
    raise SystemExit(main())
