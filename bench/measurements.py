"""Tables of what was measured and of the work behind it."""

from __future__ import annotations

import statistics
from typing import Any

from .implementation import GROUPS
from .samples import rates, ratios
from .tables import (
    error_of,
    giga,
    judged,
    median,
    memory_of,
    over,
    percent,
    scientific,
    shape_of,
    size,
    spread,
    table,
    variant_of,
)

SHAPE = "shape (N, H_s, H_t, V)"


def targets(data: dict[str, Any]) -> str:
    """The aims of a CPU, of the gated objective."""
    rows = {
        (r["shape"]["name"], r["implementation"], str(variant_of(r))): r
        for r in data["rows"]
        if r["status"] == "ok"
        and r["purpose"] == "table"
        and r["group"] == "self-evolution"
        and str(variant_of(r)) == r["tokens"]
    }
    lines = []
    for (shape, implementation, variant), row in rows.items():
        own, half = median(ratios(row)), median(ratios(row, "half_ignored", "step"))
        halved = "" if half is None else judged(half, 0.6)
        if row["top_k"]:
            cells = ["", judged(own, 1.1 if shape == "32k" else None), "", halved, ""]
        elif implementation == "fused_kd":
            compiled = rows.get((shape, "torch.compile", "mixed"), {})
            theirs = median(ratios(compiled))
            cells = [
                judged(own, 1.2),
                "",
                judged(over(own, theirs), 1.0, strict=True),
                halved,
                judged(over(memory_of(row), memory_of(compiled)), 0.5),
            ]
        else:
            continue
        lines.append([shape_of(row), variant, implementation, *cells])
    head = [
        SHAPE, "variant", "implementation", "time / four GEMMs, at most 1.2",
        "time / three student GEMMs, at most 1.1", "time / torch.compile, below 1",
        "half ignored / own full time, at most 0.6", "memory / torch.compile, at most 0.5",
    ]  # fmt: skip
    return table(head, lines)


def steps(data: dict[str, Any]) -> str:
    """A table for each group of implementations that compute the same."""
    rows = [r for r in data["rows"] if r["purpose"] == "table"]
    parts = []
    for group, formula in GROUPS.items():
        if here := [r for r in rows if r["group"] == group]:
            parts += [f"### {formula}", _steps(here)]
    return "\n\n".join(parts)


def _steps(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in sorted(rows, key=lambda r: (list(r["shape"].values())[1:], r["shape"]["name"])):
        lead = [shape_of(row), str(variant_of(row)), row["implementation"], row["objective"] or ""]
        if row["status"] != "ok":
            lines.append([*lead, f"{row['status']}: {row['reason']}", *[""] * 8, command(row)])
            continue
        times, forward = ratios(row), ratios(row, "forward", "forward_floor")
        lines.append(
            [
                *lead,
                spread(times) if times else f"floor {row.get('floor_status', 'not measured')}",
                percent(1 / statistics.median(times)) if times else "",
                spread(forward) if forward else "",
                f"{1e3 * statistics.median(row['seconds']['step']):.4g}",
                size(memory_of(row)),
                size(row.get("memory", {}).get("over_inputs")),
                *(scientific(error_of(row, name)) or row.get("error_status", "") for name in _ERRORS),
                command(row),
            ]
        )
    head = [
        SHAPE, "variant", "implementation", "objective", "time / floor", "floor's share",
        "forward alone / its GEMMs", "ms", "GB over inputs + gradients", "GB over inputs",
        "loss error", "dH error", "dW error", "again",
    ]  # fmt: skip
    return table(head, lines)


_ERRORS = ("loss", "d_hidden", "d_weight")


def command(row: dict[str, Any]) -> str:
    """What measures a row again."""
    return f'`python -m bench run --trial --shapes {row["shape"]["name"]} --only "{row["implementation"]}"`'


def work(data: dict[str, Any]) -> str:
    """FLOPs and bytes, counted and measured, and the rates that follow."""
    lines = []
    for row in data["rows"]:
        if row["status"] != "ok" or "counts" not in row or row["purpose"] != "table":
            continue
        counts, rate = row["counts"], rates(row)
        swept = [f"{1e-9 * counts[k]:.2f}" for k in ("row_bytes_once", "row_bytes_swept") if k in counts]
        lines.append(
            [
                shape_of(row),
                str(variant_of(row)),
                row["implementation"],
                str(counts.get("chunk", "")),
                giga(sum(counts["flops"].values())),
                giga(row.get("measured_flops")),
                giga(rate.flops),
                percent(rate.share),
                giga(sum(counts["gemm_bytes"].values()) if "gemm_bytes" in counts else None),
                " - ".join(swept),
                giga(rate.bytes),
                giga(counts.get("row_specials")),
                size(counts.get("workspace_bytes")),
                size(row.get("row_scratch_bytes")) if "chunk" in counts else "",
                size(memory_of(row)),
            ]
        )
    head = [
        SHAPE, "variant", "implementation", "tokens a chunk", "GFLOP counted", "GFLOP measured",
        "GFLOP/s", "share of the floor's", "GEMMs' GB counted", "row's GB counted, once - swept", "GB/s",
        "row's special functions counted, 1e9", "workspace counted, GB", "row's scratch measured, GB",
        "peak measured, GB",
    ]  # fmt: skip
    return table(head, lines) if lines else ""
