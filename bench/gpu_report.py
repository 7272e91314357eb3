"""What a run on a GPU found, from its lines alone: tables, and the choices that they suggest, each by one rule."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from .gpu_choices import suggestions
from .machine import options
from .prediction import compare
from .samples import ratios
from .tables import error_of, fixed, memory_of, scientific, size, table

Row = dict[str, Any]


def current(rows: list[Row]) -> list[Row]:
    """The latest row of each stage and key, of the code that ran last."""
    code = next((row["code"] for row in reversed(rows) if row["stage"] == "environment"), None)
    return list({(row["stage"], row["key"]): row for row in rows if row["code"] == code}.values())


def failed(rows: list[Row]) -> bool:
    """Whether a test or a stage failed; what is missing, or did not fit in memory, is a result."""
    return any(row["status"] == "failed" for row in current(rows))


def markdown(rows: list[Row]) -> str:
    found = current(rows)
    of = _by_stage(found)
    sections = {
        "Stages": stages(found),
        "Tests": _tests(of),
        "The machine": _rates(of.get("machine", [])),
        "GEMMs": _gemms(of),
        "The row alone, against a copy of device memory": _rows(of.get("rows", [])),
        "Steps": _steps(_of_kinds(of, "steps", "streaming"), machine=_machine(of)),
        "Another checkout": _against(of),
        "Choices against their defaults": _choices(of),
        "Peers": _steps(_of_kinds(of, "peers")),
        "A step's kernels": _profile(of.get("profile", [])),
        "What did not run": _reasons(found),
        "Suggested choices": "\n".join(f"- {line}" for line in suggestions(found)),
    }
    parts = ["# fused_kd on a GPU", _about(of)]
    for title, text in sections.items():
        if text:
            parts += [f"## {title}", text]
    return "\n\n".join(parts) + "\n"


def short(rows: list[Row]) -> str:
    """What passed, what failed, what was not reached; steps, rows and choices in a line each."""
    found = current(rows)
    of = _by_stage(found)
    parts = [_rows(of.get("rows", [])), _steps(_of_kinds(of, "steps", "streaming"), brief=True)]
    parts += ["\n".join(suggestions(found)), _tests(of), stages(found)]
    return "\n\n".join(filter(None, parts))


def stages(found: list[Row]) -> str:
    """A line a stage: how it ended, how many of its rows were measured, failed, or are missing here."""
    lines = []
    for name, rows in _by_stage(found).items():
        if name == "environment":
            continue
        end: Row = next((row for row in rows if row["key"] == "stage"), {"status": "running when cut"})
        own = [row["status"] for row in rows if row["key"] != "stage"]
        counts = [str(sum(map(test, own)) or "") for test in (_is_ok, _is_bad, _is_missing)]
        lines.append([name, end["status"], *counts, fixed(end.get("took"), 0), end.get("reason", "")[:120]])
    return table(["stage", "", "rows", "failed", "missing", "s", "why"], lines)


def _is_ok(status: str) -> bool:
    return status == "ok"


def _is_missing(status: str) -> bool:
    return status == "missing"


def _is_bad(status: str) -> bool:
    return not _is_ok(status) and not _is_missing(status)


def _by_stage(found: list[Row]) -> dict[str, list[Row]]:
    stages: dict[str, list[Row]] = {}
    for row in found:
        stages.setdefault(row["stage"], []).append(row)
    return stages


def _of_kinds(of: dict[str, list[Row]], *kinds: str) -> list[Row]:
    return [row for name, rows in of.items() if name.split(":")[0] in kinds for row in rows]


def _about(of: dict[str, list[Row]]) -> str:
    about = of["environment"][0]
    hardware, source = about["hardware"], about["source"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    commit = (source["commit"] or "unknown")[:12] + (" with uncommitted changes" if source["dirty"] else "")
    return "\n".join(
        [
            f"- {hardware.get('gpu', 'a rehearsal on a CPU: its numbers mean nothing')}",
            f"- driver {hardware.get('driver')}; at most {hardware.get('clocks_and_power')}; at first {about['now']}",
            f"- {versions}",
            f"- commit {commit}, code {about['code']}",
            f"- {about.get('cache', 'no')} compiled kernels of Triton brought along",
        ]
    )  # fmt: skip


def _tests(of: dict[str, list[Row]]) -> str:
    row = next((row for row in of.get("tests", []) if row["key"] == "tests"), None)
    if row is None or "passed" not in row:
        return f"Tests: {row['reason'] if row else 'no outcome'}."
    counts = ("passed", "failed", "crashed", "timed out", "skipped", "not reached")
    bad = [f"- `{name}`: {reason}" for name, reason in row["failing"].items()] + [f"- {e}" for e in row["errors"]]
    return "\n".join(["Tests: " + ", ".join(f"{row[kind]} {kind}" for kind in counts) + ".", *bad[:40]])


def milliseconds(samples: list[float]) -> str:
    """The median and, in brackets, the least and the most."""
    low, middle, high = (1e3 * f(samples) for f in (min, statistics.median, max))
    return f"{middle:.3f} ({low:.3f}-{high:.3f})"


def _rates(rows: list[Row]) -> str:
    lines, more = [], ""
    for row in rows:
        if "seconds" in row:
            (samples,) = row["seconds"].values()
            work, unit = (row["flops"], "TFLOP/s") if "flops" in row else (row["bytes"], "TB/s")
            lines.append([row["key"], milliseconds(samples), f"{work / statistics.median(samples) / 1e12:.3f} {unit}"])
        elif "machine" in row:
            more = f"For `python -m bench model`: `{options(row['machine'], row['dtype'].removeprefix('torch.'))}`."
    return "\n\n".join(filter(None, [table(["", "ms", "rate"], lines) if lines else "", more]))


def _machine(of: dict[str, list[Row]]) -> dict[str, float] | None:
    """What the performance model predicts from, as measured here."""
    return next((row["machine"] for row in of.get("machine", []) if "machine" in row), None)


def _gemms(of: dict[str, list[Row]]) -> str:
    peak = next((_rate(row) for row in of.get("machine", []) if "flops" in row), None)
    lines = [
        [row["stage"].partition(":")[2], row["key"], milliseconds(row["seconds"]["gemm"]),
         f"{_rate(row) / 1e12:.0f}", fixed(_rate(row) / peak if peak else None)]
        for row in _of_kinds(of, "gemms") if "seconds" in row
    ]  # fmt: skip
    return table(["shape", "GEMM, result, tokens", "ms", "TFLOP/s", "of the largest GEMM"], lines) if lines else ""


def _rate(row: Row) -> float:
    return float(row["flops"]) / statistics.median(row["seconds"]["gemm"])


def _rows(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        for name, samples in row.get("seconds", {}).items():
            if name != "copy":
                share = row["least_bytes"] / row["copy_bytes"] * statistics.median(ratios(row, "copy", name) or [0.0])
                rate = row["least_bytes"] / statistics.median(samples) / 1e9
                lines.append([row["key"], name, milliseconds(samples), f"{rate:.0f}", fixed(share)])
    return table(["shape, tokens", "row", "ms", "GB/s", "of the copy's"], lines) if lines else ""


def _steps(rows: list[Row], brief: bool = False, machine: dict[str, float] | None = None) -> str:
    lines = []
    for row in rows:
        if "step" not in row.get("seconds", {}):
            continue
        seconds = row["seconds"]
        floor = seconds.get("floor")
        share = statistics.median(1 / x for x in ratios(row) or [float("nan")])
        cells = [
            f"{row['shape']['name']} {row['implementation']}",
            row["key"].removeprefix(row["implementation"]).strip(),
        ]
        cells += [milliseconds(seconds["step"]), fixed(share if floor else None)]
        if not brief:
            half = seconds.get("half_ignored")
            cells += [milliseconds(half) if half else "", milliseconds(floor) if floor else ""]
        if machine:
            model = compare(row, machine)
            cells += [fixed(1 + model["seconds_error"] if model else None)]
        cells += [size(memory_of(row)), scientific(error_of(row, "d_hidden")), scientific(error_of(row, "d_weight"))]
        lines.append(cells)
    more = [] if brief else ["half ignored, ms", "GEMMs, ms"] + ["predicted / measured"] * bool(machine)
    head = ["", "variant", "step, ms", "share of the GEMMs'", *more, "GB over results", "dH error", "dW error"]
    return table(head, lines) if lines else ""


def _against(of: dict[str, list[Row]]) -> str:
    """Both processes of each checkout, side by side with ours in the same turns."""
    samples: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in _of_kinds(of, "against"):
        if "step" in row.get("seconds", {}):
            _, other, whose, _ = row["stage"].split(":")
            samples.setdefault((other, row["key"]), {}).setdefault(whose, []).extend(row["seconds"]["step"])
    lines = [
        [other, key, *(milliseconds(x[w]) for w in ("theirs", "ours")), fixed(_median_over(x["ours"], x["theirs"]), 3)]
        for (other, key), x in samples.items() if len(x) == 2
    ]  # fmt: skip
    return table(["other", "", "theirs, ms", "ours, ms", "ours / theirs"], lines) if lines else ""


def _median_over(a: list[float], b: list[float]) -> float:
    return statistics.median(a) / statistics.median(b)


def _choices(of: dict[str, list[Row]]) -> str:
    lines = []
    for row in _of_kinds(of, "choices"):
        if "field" in row and "seconds" in row:
            quotients = ratios(row, "other", "default") or []
            spread = f"{statistics.median(quotients):.3f} ({min(quotients):.3f}-{max(quotients):.3f})"
            lines.append([row["what"], row["field"], f"{row['value']} / {row['default']}", spread])
    return table(["", "field", "values", "time of the other / default"], lines) if lines else ""


def _profile(rows: list[Row]) -> str:
    lines = [[name, str(count), f"{ms:.3f}"] for row in rows for name, count, ms in row.get("top", ())]
    return table(["kernel", "calls", "ms"], lines) if lines else ""


def _reasons(found: list[Row]) -> str:
    return "\n".join(_lines_of_reasons(found))


def _lines_of_reasons(found: list[Row]) -> Iterator[str]:
    for row in found:
        if row["status"] != "ok" and row["key"] != "stage":
            yield f"- {row['stage']}, {row['key']}: {row['status']}, {row.get('reason', '')}"
