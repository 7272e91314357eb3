"""Bars of time and memory, from a results file alone."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from .implementation import GROUPS
from .samples import ratios
from .tables import memory_of, variant_of

MAIN = "self-evolution"


def draw(data: dict[str, Any], path: Path) -> None:
    """A PNG of the gated objective, a line of panels a shape: time over the floor (with quartiles), and memory."""
    _bars(data, path, [MAIN], labels="{implementation}, {variant}")


def draw_peers(data: dict[str, Any], path: Path) -> None:
    """The same of the objectives that peers have."""
    _bars(data, path, [group for group in GROUPS if group != MAIN], labels="{implementation}")


def _bars(data: dict[str, Any], path: Path, groups: list[str], labels: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels: dict[tuple, list[dict[str, Any]]] = {}
    for row in data["rows"]:
        if row["status"] == "ok" and row["purpose"] == "table" and row["group"] in groups:
            panels.setdefault((row["group"], *row["shape"].values()), []).append(row)
    if not panels:
        return
    panels = dict(sorted(panels.items(), key=lambda item: groups.index(item[0][0])))
    figure, axes = plt.subplots(
        len(panels), 2, squeeze=False, figsize=(12, sum(1.1 + 0.28 * len(rows) for rows in panels.values())),
        height_ratios=[3 + len(rows) for rows in panels.values()],
    )  # fmt: skip
    for (left, right), ((group, *shape), rows) in zip(axes, panels.items(), strict=True):
        names = [labels.format(implementation=r["implementation"], variant=variant_of(r)) for r in rows]
        colors = ["tab:blue" if r["implementation"].startswith("fused_kd") else "tab:gray" for r in rows]
        times = [ratios(r) for r in rows]
        middle = [statistics.median(t) if t else 0.0 for t in times]
        spans = [statistics.quantiles(t, n=4, method="inclusive") if t and len(t) > 1 else None for t in times]
        errors = [
            [m - s[0] if s else 0.0 for m, s in zip(middle, spans, strict=True)],
            [s[2] - m if s else 0.0 for m, s in zip(middle, spans, strict=True)],
        ]
        left.barh(names, middle, xerr=errors, color=colors)
        left.axvline(1.0, color="black", linewidth=0.8)
        left.set(
            xlabel="forward + backward, multiples of its bare GEMMs",
            title="{}, {}: {}, {}, {}, {}".format(group, *shape),
        )
        right.barh(names, [(memory_of(r) or 0) / 1e9 for r in rows], color=colors)
        right.set(xlabel="GB over inputs and gradients", title="peak memory", yticklabels=[])
        for axis in (left, right):
            axis.invert_yaxis()
            axis.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
