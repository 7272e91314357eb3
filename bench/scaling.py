"""Time and memory as one size of the problem grows: curves, and where one implementation overtakes another."""

from __future__ import annotations

import math
import statistics
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

from .samples import ratios
from .tables import fixed, median, memory_of, size, table

# The axis of a curve, by the purpose of its rows, and its title.
AXES = {"N": "tokens N", "V": "vocabulary V", "valid": "share of valid tokens", "chunk": "tokens a chunk"}

Curve = dict[float, dict[str, Any]]


def curves(data: dict[str, Any]) -> dict[str, dict[str, Curve]]:
    """Rows by axis, implementation and place on the axis."""
    found: dict[str, dict[str, Curve]] = {}
    for row in data["rows"]:
        axis = row["purpose"]
        if axis in AXES and row["status"] == "ok":
            found.setdefault(axis, {}).setdefault(row["implementation"], {})[_place(row, axis)] = row
    return {
        axis: {name: dict(sorted(curve.items())) for name, curve in by_name.items()} for axis, by_name in found.items()
    }


def _place(row: dict[str, Any], axis: str) -> float:
    if axis == "chunk":
        return row["counts"]["chunk"]
    return row["shape"][axis] if axis in row["shape"] else row[axis]


def milliseconds(row: dict[str, Any], of: str = "step") -> float:
    return 1e3 * statistics.median(row["seconds"][of])


def markdown(data: dict[str, Any]) -> str:
    parts = []
    for axis, by_name in curves(data).items():
        shape = next(iter(next(iter(by_name.values())).values()))["shape"]
        fixed_sizes = ", ".join(f"{k} = {v}" for k, v in shape.items() if k not in ("name", axis))
        parts += [f"### {AXES[axis]}", f"At {fixed_sizes}.", _table(axis, by_name), *overtakes(axis, by_name)]
    return "\n\n".join(parts)


def _table(axis: str, by_name: dict[str, Curve]) -> str:
    lines = []
    for place in sorted({place for curve in by_name.values() for place in curve}):
        line = [f"{place:g}"]
        for curve in by_name.values():
            row = curve.get(place)
            line += [""] * 3 if row is None else [
                f"{milliseconds(row):.4g}", fixed(median(ratios(row))), size(memory_of(row)),
            ]  # fmt: skip
        planned = by_name.get("fused_kd", {}).get(place, {})
        lines.append([*line, _planned(planned)])
    head = [axis, *(f"{name}: {what}" for name in by_name for what in ("ms", "time / floor", "GB"))]
    return table([*head, "fused_kd's chunk"], lines)


def _planned(row: dict[str, Any]) -> str:
    chunk = row.get("counts", {}).get("chunk")
    return "" if chunk is None else f"{chunk}" + ("" if row["chunk"] else ", the planner's")


def overtakes(axis: str, by_name: dict[str, Curve]) -> list[str]:
    """A sentence for each pair and measure: who is below the other, and from where on."""
    sentences = []
    for a, b in combinations(by_name, 2):
        for what, value in (("time", _relative_time), ("memory", memory_of)):
            places = [p for p in by_name[a] if p in by_name[b]]
            pairs = [(p, value(by_name[a][p]), value(by_name[b][p])) for p in places]
            logs = [(p, math.log(x / y)) for p, x, y in pairs if x and y and x > 0 and y > 0]
            if logs:
                sentences.append(f"- {what}: {_who(axis, a, b, logs)}")
    return ["\n".join(sentences)] if sentences else []


def _relative_time(row: dict[str, Any]) -> float | None:
    """As a multiple of the floor: the curves' rows were measured at different moments."""
    return median(ratios(row))


def _who(axis: str, a: str, b: str, logs: list[tuple[float, float]]) -> str:
    crossings = [f"{_between(p0, y0, p1, y1):.4g}" for (p0, y0), (p1, y1) in pairwise(logs) if (y0 < 0) != (y1 < 0)]
    first, second = (a, b) if logs[0][1] < 0 else (b, a)
    if not crossings:
        factors = [math.exp(abs(y)) for _, y in logs]
        return f"{first} is below {second} throughout, by {min(factors):.2f} to {max(factors):.2f} times."
    near = ", ".join(crossings)
    return f"{first} is below {second} at {axis} = {logs[0][0]:g}; they change places near {axis} = {near}."


def _between(p0: float, y0: float, p1: float, y1: float) -> float:
    """Where the line through both points, on a logarithmic axis, is zero."""
    share = y0 / (y0 - y1)
    return math.exp(math.log(p0) + share * (math.log(p1) - math.log(p0)))


def draw(data: dict[str, Any], path: Path) -> None:
    """A PNG: time above memory, a column an axis; the floor dashed, the planner's choice ringed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = curves(data)
    if not found:
        return
    figure, axes = plt.subplots(2, len(found), figsize=(4.2 * len(found), 7.5), squeeze=False)
    for (axis, by_name), above, below in zip(found.items(), axes[0], axes[1], strict=True):
        for number, (name, curve) in enumerate(by_name.items()):
            places = list(curve)
            color = "tab:blue" if name == "fused_kd" else f"C{number + 1}"
            above.plot(places, [milliseconds(r) for r in curve.values()], marker="o", color=color, label=name)
            known = [(p, gb / 1e9) for p, r in curve.items() if (gb := memory_of(r)) is not None]
            below.plot([p for p, _ in known], [gb for _, gb in known], marker="o", color=color, label=name)
        ours = by_name.get("fused_kd", {})
        bare = [(p, milliseconds(r, "floor")) for p, r in ours.items() if "floor" in r["seconds"]]
        above.plot([p for p, _ in bare], [ms for _, ms in bare], "k--", linewidth=1, label="bare GEMMs")
        for place, row in ours.items():
            if row["chunk"] is None:
                above.plot(place, milliseconds(row), "o", markersize=12, fillstyle="none", color="tab:blue")
                above.annotate(
                    f"chunk {row['counts']['chunk']}", (place, milliseconds(row)), textcoords="offset points",
                    xytext=(0, -18), ha="center", fontsize=8,
                )  # fmt: skip
        above.set(title=AXES[axis], ylabel="forward + backward, ms")
        below.set(xlabel=AXES[axis], ylabel="GB over inputs and gradients")
        for panel in (above, below):
            panel.set(xscale="log", yscale="log")
            panel.set_xticks(sorted({p for curve in by_name.values() for p in curve}))
            panel.xaxis.set_major_formatter("{x:g}")
            panel.tick_params(axis="x", labelrotation=35)
            panel.margins(x=0.12, y=0.12)
            panel.xaxis.set_minor_formatter("")
            panel.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.suptitle("ringed: the chunk that the planner chose", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
