"""Where fused_kd stands: each of its rows against the best rival that was measured on the same problem."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from .samples import ratios
from .tables import error_of, fixed, median, memory_of, over, scientific, shape_of, table, variant_of

OURS = "fused_kd"
WORST = 5


class Standing(NamedTuple):
    """Ratios of one of our rows to the best rival's, below 1 where ours is better; the rivals' names beside them.

    Times are compared as multiples of the floor that each was interleaved with. A rival in another process met
    other noise, but the same floor.
    """

    row: dict[str, Any]
    floor: float
    time: float | None
    fastest: str
    memory: float | None
    smallest: str
    error: float | None
    exactest: str


def standings(data: dict[str, Any]) -> Iterator[Standing]:
    """Of all our rows in tables; a top-k teacher has no rival."""
    rows = [r for r in data["rows"] if r["status"] == "ok" and r["purpose"] == "table"]
    theirs = [r for r in rows if not r["implementation"].startswith(OURS)]
    for row in rows:
        own = median(ratios(row))
        if row["implementation"].startswith(OURS) and own is not None:
            rivals = [] if row["top_k"] else [r for r in theirs if _same_problem(row, r)]
            yield Standing(
                row,
                own,
                *_best(own, {r["implementation"]: median(ratios(r)) for r in rivals}),
                *_best(memory_of(row), {r["implementation"]: memory_of(r) for r in rivals}),
                *_best(error_of(row, "d_hidden"), {r["implementation"]: error_of(r, "d_hidden") for r in rivals}),
            )


def _same_problem(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Which tokens are hard changes nothing of a rival's work: it computes both losses of every token."""
    a, b = variant_of(ours), variant_of(theirs)
    return (
        ours["shape"] == theirs["shape"]
        and ours["group"] == theirs["group"]
        and (a.valid, a.teacher) == (b.valid, b.teacher)
        and (a.tokens == b.tokens or b.tokens == "mixed")
    )


def _best(own: float | None, rivals: dict[str, float | None]) -> tuple[float | None, str]:
    known = {name: value for name, value in rivals.items() if value is not None}
    if not known:
        return None, ""
    name = min(known, key=lambda name: known[name])
    return over(own, known[name]), name


def verdict(data: dict[str, Any]) -> str:
    """Rows in which a rival beats us, then our weakest and best against the floor."""
    found = sorted(standings(data), key=lambda s: -s.floor)
    if not found:
        return "Nothing of fused_kd was measured."
    lost = [s for s in found if max(s.time or 0, s.memory or 0, s.error or 0) > 1]
    compared = [s for s in found if s.time is not None]
    head = (
        f"Of {len(compared)} rows of fused_kd that have a rival, {len(compared) - len(lost)} beat the best of them in "
        "time, in memory and in exactness alike."
    )
    parts = [head]
    if lost:
        parts += ["Rows that do not, ratios above 1 being losses:", _listed(lost)]
    parts += [f"The {WORST} weakest rows against the floor of bare GEMMs:", _listed(found[:WORST])]
    parts += [f"And the {WORST} best:", _listed(found[: -WORST - 1 : -1])]
    return "\n\n".join(parts)


def _listed(found: list[Standing]) -> str:
    head = [
        "shape (N, H_s, H_t, V)", "variant", "implementation", "time / floor", "time / fastest rival",
        "memory / smallest rival", "dH error / exactest rival", "dH error",
    ]  # fmt: skip
    lines = [
        [
            shape_of(s.row),
            str(variant_of(s.row)),
            s.row["implementation"],
            fixed(s.floor),
            _against(s.time, s.fastest),
            _against(s.memory, s.smallest),
            _against(s.error, s.exactest),
            scientific(error_of(s.row, "d_hidden")),
        ]
        for s in found
    ]
    return table(head, lines)


def _against(ratio: float | None, rival: str) -> str:
    return "" if ratio is None else f"{ratio:.2f} ({rival})"
