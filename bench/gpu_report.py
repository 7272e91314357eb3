"""What a run on a GPU found, from its lines alone: tables, and the choices that they suggest, each by one rule."""

from __future__ import annotations

import math
import statistics

from .machine import options
from .prediction import beside_model
from .session import Row, current, machine_of
from .tables import error_of, fixed, median, memory_of, quartiles, ratios, scientific, size, table

# The CUDA row needs another package and another compiler than everything else: it must earn them.
CUDA_GAIN = 1.15
# A choice is changed for no less.
GAIN = 0.98
PLACES = [f"{shape} {tokens}" for shape in "AB" for tokens in ("easy", "hard")]
COUNTS = ("passed", "failed", "crashed", "timed out", "skipped", "not reached")


def failed(rows: list[Row]) -> bool:
    """Whether a test or a stage failed; what is missing, or did not fit in memory, is a result."""
    return any(row["status"] == "failed" for row in current(rows))


def markdown(rows: list[Row]) -> str:
    found = current(rows)
    sections = {
        "Stages": stage_table(found),
        "Tests": test_counts(found),
        "The machine": rate_table(found),
        "The row alone, against a copy of device memory": row_table(found),
        "Steps": step_table(of_kinds(found, "steps", "streaming"), machine=machine_of(found)),
        "Choices against their defaults": choice_table(found),
        "Peers": step_table(of_kinds(found, "peers")),
        "A step's kernels": profile_table(found),
        "What did not run": reasons(found),
        "Suggested choices": "\n".join(f"- {line}" for line in suggestions(found)),
    }
    parts = ["# fused_kd on a GPU", about(found)]
    for title, text in sections.items():
        if text:
            parts += [f"## {title}", text]
    return "\n\n".join(parts) + "\n"


def short(rows: list[Row]) -> str:
    """Rows and steps, choices in a line each; what passed, what failed, what was not reached."""
    found = current(rows)
    steps = step_table(of_kinds(found, "steps", "streaming"))
    parts = [row_table(found), steps, "\n".join(suggestions(found)), test_counts(found), stage_table(found)]
    return "\n\n".join(filter(None, parts))


def of_kinds(found: list[Row], *kinds: str) -> list[Row]:
    """The rows of stages by the first part of their name."""
    return [row for row in found if row["stage"].split(":")[0] in kinds]


def about(found: list[Row]) -> str:
    row = of_kinds(found, "environment")[0]
    hardware, source = row["hardware"], row["source"]
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items() if version)
    commit = (source["commit"] or "unknown")[:12] + (" with uncommitted changes" if source["dirty"] else "")
    return f"""\
- {hardware.get("gpu", "a rehearsal on a CPU: its numbers mean nothing")}
- driver {hardware.get("driver")}; at most {hardware.get("clocks_and_power")}; at first {row["now"]}
- {versions}
- commit {commit}, code {row["code"]}
- {row.get("cache", "no")} compiled kernels of Triton brought along"""


def stage_table(found: list[Row]) -> str:
    """A line a stage: how it ended, how many of its rows were measured, failed, or are missing here."""
    by_name: dict[str, list[Row]] = {}
    for row in found:
        if row["stage"] != "environment":
            by_name.setdefault(row["stage"], []).append(row)
    lines = []
    for name, rows in by_name.items():
        end: Row = next((row for row in rows if row["key"] == "stage"), {"status": "running when cut"})
        own = [row["status"] for row in rows if row["key"] != "stage"]
        counts = [own.count("ok"), sum(status not in ("ok", "missing") for status in own), own.count("missing")]
        cells = [str(count or "") for count in counts]
        lines.append([name, end["status"], *cells, fixed(end.get("took"), 0), end.get("reason", "")[:120]])
    return table(["stage", "", "rows", "failed", "missing", "s", "why"], lines)


def test_counts(found: list[Row]) -> str:
    row = next((row for row in of_kinds(found, "tests") if row["key"] == "tests"), None)
    if row is None or "passed" not in row:
        return f"Tests: {row['reason'] if row else 'no outcome'}."
    bad = [f"- `{name}`: {reason}" for name, reason in row["failing"].items()] + [f"- {e}" for e in row["errors"]]
    return "\n".join(["Tests: " + ", ".join(f"{row[kind]} {kind}" for kind in COUNTS) + ".", *bad[:40]])


def milliseconds(samples: list[float]) -> str:
    """The median and, in brackets, the least and the most."""
    low, middle, high = (1e3 * f(samples) for f in (min, statistics.median, max))
    return f"{middle:.3f} ({low:.3f}-{high:.3f})"


def rate_table(found: list[Row]) -> str:
    lines, more = [], ""
    for row in of_kinds(found, "machine"):
        if "seconds" in row:
            (samples,) = row["seconds"].values()
            work, unit = (row["flops"], "TFLOP/s") if "flops" in row else (row["bytes"], "TB/s")
            lines.append([row["key"], milliseconds(samples), f"{work / statistics.median(samples) / 1e12:.3f} {unit}"])
        elif "machine" in row:
            more = f"For `python -m bench model`: `{options(row['machine'], row['dtype'].removeprefix('torch.'))}`."
    return "\n\n".join(filter(None, [table(["", "ms", "rate"], lines) if lines else "", more]))


def row_table(found: list[Row]) -> str:
    lines = []
    for row in of_kinds(found, "rows"):
        for name, samples in row.get("seconds", {}).items():
            if name != "copy":
                share = row["least_bytes"] / row["copy_bytes"] * statistics.median(ratios(row, "copy", name) or [0.0])
                rate = row["least_bytes"] / statistics.median(samples) / 1e9
                lines.append([row["key"], name, milliseconds(samples), f"{rate:.0f}", fixed(share)])
    return table(["shape, tokens", "row", "ms", "GB/s", "of the copy's"], lines) if lines else ""


def step_table(rows: list[Row], machine: dict[str, float] | None = None) -> str:
    lines = []
    for row in rows:
        seconds = row.get("seconds", {})
        if "step" not in seconds:
            continue
        times, floor, half = ratios(row), seconds.get("floor"), seconds.get("half_ignored")
        variant = row["key"].removeprefix(row["implementation"]).strip()
        cells = [f"{row['shape']['name']} {row['implementation']}", variant, milliseconds(seconds["step"])]
        cells.append(fixed(median([1 / x for x in times]) if times else None))
        cells += [milliseconds(samples) if samples else "" for samples in (half, floor)]
        if machine:
            model = beside_model(row, machine)
            cells.append(fixed(1 + model["seconds_error"] if model else None))
        cells += [size(memory_of(row)), scientific(error_of(row)), scientific(error_of(row, "d_weight"))]
        lines.append(cells)
    more = ["half ignored, ms", "GEMMs, ms"] + ["predicted / measured"] * bool(machine)
    head = ["", "variant", "step, ms", "share of the GEMMs'", *more, "GB over results", "dH error", "dW error"]
    return table(head, lines) if lines else ""


def choice_table(found: list[Row]) -> str:
    lines = []
    for row in of_kinds(found, "choices"):
        if quotients := ratios(row, "other", "default"):
            spread = f"{statistics.median(quotients):.3f} ({min(quotients):.3f}-{max(quotients):.3f})"
            lines.append([row["what"], row["field"], f"{row['value']} / {row['default']}", spread])
    return table(["", "field", "values", "time of the other / default"], lines) if lines else ""


def profile_table(found: list[Row]) -> str:
    rows = of_kinds(found, "profile")
    lines = [[name, str(count), f"{ms:.3f}"] for row in rows for name, count, ms in row.get("top", ())]
    return table(["kernel", "calls", "ms"], lines) if lines else ""


def reasons(found: list[Row]) -> str:
    return "\n".join(
        f"- {row['stage']}, {row['key']}: {row['status']}, {row.get('reason', '')}"
        for row in found
        if row["status"] != "ok" and row["key"] != "stage"
    )


def suggestions(found: list[Row]) -> list[str]:
    """A sentence a choice; what was not measured says so."""
    return [row_backend(found), *fields(found)]


def row_backend(found: list[Row]) -> str:
    """The CUDA row where it is faster by the factor at both shapes, easy and hard, and none of the tests failed."""
    rule = f"CUDA row if at least {CUDA_GAIN:g} times as fast at {', '.join(PLACES)} and no test failed"
    rows = {row["key"]: row for row in of_kinds(found, "rows")}
    gains = {place: median(ratios(rows.get(place, {}), "triton", "cuda")) for place in PLACES}
    known = [gain for gain in gains.values() if gain is not None]
    if len(known) < len(gains):
        return f"row backend: not measured ({rule})"
    outcome = next((row["status"] for row in of_kinds(found, "tests") if row["key"] == "tests"), "not run")
    chosen = "cuda" if outcome == "ok" and min(known) >= CUDA_GAIN else "triton"
    listed = ", ".join(f"{place} {gain:.2f}" for place, gain in gains.items())
    return f"row backend: {chosen} (triton / cuda: {listed}; tests {outcome}; rule: {rule})"


def fields(found: list[Row]) -> list[str]:
    """Each other value of a field: taken if it is faster on the whole and nowhere slower beyond its spread."""
    rule = f"changed if the geometric mean is below {GAIN:g} and no lower quartile above 1"
    measured: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for row in of_kinds(found, "choices"):
        if quotients := ratios(row, "other", "default"):
            measured.setdefault((row["field"], row["default"], row["value"]), {})[row["what"]] = quotients
    lines = []
    for (field, default, value), by_place in measured.items():
        mean = math.exp(statistics.fmean(math.log(statistics.median(x)) for x in by_place.values()))
        slower = [place for place, x in by_place.items() if quartiles(x)[0] > 1]
        where = "everywhere" if len(slower) == len(by_place) else f"at {', '.join(slower)}"
        chosen = value if mean < GAIN and not slower else default
        beside = f", slower {where}" if slower else ""
        lines.append(f"{field}: {chosen} ({value} / {default}: {mean:.3f} over {len(by_place)}{beside}; rule: {rule})")
    return lines or [f"fields of fused_kd.tuning: none measured ({rule})"]
