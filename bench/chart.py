"""Bars of time and memory, from a results file alone."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from .samples import ratios


def draw(data: dict[str, Any], path: Path) -> None:
    """A PNG: for each shape, time over the floor (with quartiles) and memory over inputs and gradients."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [r for r in data["rows"] if r["status"] == "ok" and not r["implementation"].startswith("row: ")]
    shapes = list(dict.fromkeys(tuple(r["shape"].values()) for r in rows))
    figure, axes = plt.subplots(
        max(len(shapes), 1), 2, figsize=(12, 1.2 + 0.28 * len(rows) + 0.9 * len(shapes)), squeeze=False
    )
    for (left, right), shape in zip(axes, shapes, strict=False):
        here = [r for r in rows if tuple(r["shape"].values()) == shape]
        labels = [_label(r) for r in here]
        colors = ["tab:blue" if r["implementation"].startswith("fused_kd") else "tab:gray" for r in here]
        times = [ratios(r) for r in here]
        middle = [statistics.median(t) if t else 0.0 for t in times]
        spans = [statistics.quantiles(t, n=4, method="inclusive") if t and len(t) > 1 else None for t in times]
        errors = [
            [m - s[0] if s else 0.0 for m, s in zip(middle, spans, strict=True)],
            [s[2] - m if s else 0.0 for m, s in zip(middle, spans, strict=True)],
        ]
        left.barh(labels, middle, xerr=errors, color=colors)
        left.axvline(1.0, color="black", linewidth=0.8)
        left.set(
            xlabel="forward + backward, multiples of its bare GEMMs",
            title="{}: {}, {}, {}, {}".format(*shape),
        )
        sizes = [r.get("memory", {}).get("over_inputs_and_gradients", 0) / 1e9 for r in here]
        right.barh(labels, sizes, color=colors)
        right.set(xlabel="GB over inputs and gradients", title="peak memory")
        for axis in (left, right):
            axis.invert_yaxis()
            axis.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _label(row: dict[str, Any]) -> str:
    chunk = f" @{row['chunk']}" if row["chunk"] else ""
    return f"{row['implementation']}{chunk}, {row['tokens']}"
