"""``python -m bench report RESULTS.json``: Markdown, plots and the README's table from a results file alone."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from . import end_to_end, gpu
from .machine import COPY, GEMM
from .prediction import beside_model
from .problems import Variant
from .registry import GROUPS, SELF_EVOLUTION
from .session import ROOT
from .tables import (
    Row,
    error_of,
    fixed,
    median,
    memory_of,
    over,
    over_floor,
    quartiles,
    ratios,
    scientific,
    shape_of,
    signed,
    size,
    table,
)

SHAPE = "shape (N, H_s, H_t, V)"
OURS = "fused_kd"
WORST = 5
# The axis of a curve, by the purpose of its rows, and its title.
AXES = {"N": "tokens N", "V": "vocabulary V", "valid": "share of valid tokens"}
METHOD = """\
- **Time**: forward + backward, each implementation in a process of its own. Floor and implementation take turns, after
  warm-up; each sample is divided by the floor's of the same round; median and, in brackets, quartiles. Gradients are
  dropped before each step, so allocating them is part of it. "Forward alone" is the loss without gradients, over the
  GEMMs of the logits; "half ignored" a step with half of the labels ignored, over a whole one.
- **Floor**: the bare GEMMs of the valid tokens (student logits, teacher logits, dH, dW), `torch.mm`, into outputs
  allocated beforehand. Without a teacher, or with a top-k teacher, the three of the student: its lists are cut
  beforehand, untimed.
- **Memory**: peak of one forward + backward after warm-up, by resident memory (Linux: VmHWM, reset). "Over inputs +
  gradients" subtracts what is in use with the inputs and the gradients of hidden states and weight in place; "over
  inputs" adds the size of those gradients.
- **Work**: counted from the algorithm as `bench/counts.py` says; a multiply-add is two FLOPs, and counted are those
  of the GEMMs that nobody can do without. Bytes of GEMMs are operands and results, those of the row each logit read
  and written once, or swept as often as the design says.
- **Predicted**: from those counts and this machine's {rates}, by `bench/prediction.py`; errors are predicted / measured
  - 1. What the numbers leave out (on a CPU exponentials and how a BLAS packs its operands) makes them too low.
- **Error**: relative Frobenius norm against float64, on the first {tokens} tokens; dH of the hidden states,
  dW of the weight. A peer is compared with its own objective in float64.
- **Inputs**: the same for all. Logits of standard deviation 4, a teacher near the student ("far teacher": independent
  of it), labels drawn from the teacher. Tokens: none hard, all hard, or about half of them (the threshold lies near
  the median difficulty); implementations without a gate compute the same for all of them."""


def markdown(data: dict[str, Any]) -> str:
    """The whole report of one results file."""
    hardware, source, settings = data["hardware"], data["source"], data["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items() if version)
    commit = (source["commit"] or "unknown")[:12] + (" with uncommitted changes" if source["dirty"] else "")
    sections = {
        "Where fused_kd stands": verdict(data),
        "Forward + backward": steps(data),
        "Scaling": scaling(data),
        "A training step, end to end": end_to_end.markdown(data["end_to_end"]) if data.get("end_to_end") else "",
        "Work counted, and what it predicts": work(data),
        "How it was measured": _method(data),
    }
    parts = [
        f"# fused_kd, {data['suite']} suite: {hardware['cpu']}, {hardware['usable_cores']} cores, "
        f"{hardware['threads']} threads",
        f"- commit {commit}, written {data['written']}\n- {versions}\n"
        f"- {settings['dtype']}, {settings['rounds']} rounds",
    ]
    for title, text in sections.items():
        if text:
            parts += [f"## {title}", text]
    return "\n\n".join(parts) + "\n"


def _method(data: dict[str, Any]) -> str:
    machine = data.get("machine", {})
    rates = " and ".join(
        f"{machine[name] / 1e9:.4g} G{unit}/s" for name, unit in ((GEMM, "FLOP"), (COPY, "B")) if machine
    )
    errors = [row["error"]["tokens"] for row in data["rows"] if "error" in row]
    return METHOD.format(rates=rates or "two numbers", tokens=max(errors, default=0))


def _tabled(data: dict[str, Any]) -> list[Row]:
    return [row for row in data["rows"] if row["purpose"] == "table"]


class Standing(NamedTuple):
    """Ratios of one of our rows to the best rival's, below 1 where ours is better; the rivals' names beside them.

    Times are compared as multiples of the floor that each was interleaved with. A rival in another process met
    other noise, but the same floor.
    """

    row: Row
    floor: float
    time: tuple[float | None, str]
    memory: tuple[float | None, str]
    error: tuple[float | None, str]

    @property
    def lost(self) -> bool:
        return max(ratio or 0 for ratio, _ in (self.time, self.memory, self.error)) > 1


def standings(data: dict[str, Any]) -> list[Standing]:
    """Of all our rows in tables, the weakest against the floor first; a top-k teacher has no rival."""
    rows = [row for row in _tabled(data) if row["status"] == "ok"]
    theirs = [row for row in rows if not row["implementation"].startswith(OURS)]
    found = []
    for row in rows:
        own = over_floor(row)
        if row["implementation"].startswith(OURS) and own is not None:
            rivals = [] if row["top_k"] else [rival for rival in theirs if _same_problem(row, rival)]
            values: list[Callable[[Row], float | None]] = [over_floor, memory_of, error_of]
            found.append(Standing(row, own, *(_best(value, row, rivals) for value in values)))
    return sorted(found, key=lambda s: -s.floor)


def _same_problem(ours: Row, theirs: Row) -> bool:
    """Which tokens are hard changes nothing of a rival's work: it computes both losses of every token."""
    same = all(ours[name] == theirs[name] for name in ("shape", "group", "valid", "teacher"))
    return same and theirs["tokens"] in (ours["tokens"], "mixed")


def _best(value: Callable[[Row], float | None], row: Row, rivals: list[Row]) -> tuple[float | None, str]:
    known = {rival["implementation"]: found for rival in rivals if (found := value(rival)) is not None}
    if not known:
        return None, ""
    name = min(known, key=lambda name: known[name])
    return over(value(row), known[name]), name


def verdict(data: dict[str, Any]) -> str:
    """Rows in which a rival beats us, then our weakest and best against the floor."""
    found = standings(data)
    if not found:
        return "Nothing of fused_kd was measured."
    lost = [s for s in found if s.lost]
    compared = [s for s in found if s.time[0] is not None]
    parts = [
        f"Of {len(compared)} rows of fused_kd that have a rival, {len(compared) - len(lost)} beat the best of them in "
        "time, in memory and in exactness alike."
    ]
    if lost:
        parts += ["Rows that do not, ratios above 1 being losses:", _listed(lost)]
    parts += [f"The {WORST} weakest rows against the floor of bare GEMMs:", _listed(found[:WORST])]
    parts += [f"And the {WORST} best:", _listed(found[: -WORST - 1 : -1])]
    return "\n\n".join(parts)


def _listed(found: list[Standing]) -> str:
    lines = [
        [
            *(shape_of(s.row), str(Variant.of(s.row)), s.row["implementation"], fixed(s.floor)),
            *("" if ratio is None else f"{ratio:.2f} ({name})" for ratio, name in (s.time, s.memory, s.error)),
            scientific(error_of(s.row)),
        ]
        for s in found
    ]
    against = ["time / fastest rival", "memory / smallest rival", "dH error / exactest rival"]
    return table([SHAPE, "variant", "implementation", "time / floor", *against, "dH error"], lines)


def steps(data: dict[str, Any]) -> str:
    """A table for each group of implementations that compute the same."""
    parts = []
    for group, formula in GROUPS.items():
        if here := [row for row in _tabled(data) if row["group"] == group]:
            here.sort(key=lambda r: (list(r["shape"].values())[1:], r["shape"]["name"]))
            parts += [f"### {formula}", _steps(here)]
    return "\n\n".join(parts)


def _steps(rows: list[Row]) -> str:
    head = [
        SHAPE, "variant", "implementation", "time / floor", "forward alone / its GEMMs", "half ignored / whole", "ms",
        "GB over inputs + gradients", "GB over inputs", "loss error", "dH error", "dW error", "again",
    ]  # fmt: skip
    lines = []
    for row in rows:
        name = row["implementation"]
        note = row["objective"].removeprefix(GROUPS[row["group"]]).removeprefix(", ")
        lead = [shape_of(row), str(Variant.of(row)), name + (f" ({note})" if note else "")]
        again = f'`python -m bench run --trial --shapes {row["shape"]["name"]} --only "{name}"`'
        if row["status"] != "ok":
            lines.append([*lead, f"{row['status']}: {row['reason']}", *[""] * (len(head) - 5), again])
            continue
        times, half = ratios(row), ratios(row, "half_ignored", "step")
        errors = (scientific(error_of(row, what)) or row.get("error_status", "") for what in _ERRORS)
        lines.append(
            [
                *lead,
                spread(times) if times else f"floor {row.get('floor_status', 'not measured')}",
                spread(ratios(row, "forward", "forward_floor")),
                fixed(median(half)),
                f"{milliseconds(row):.4g}",
                size(memory_of(row)),
                size(row.get("memory", {}).get("over_inputs")),
                *errors,
                again,
            ]
        )
    return table(head, lines)


_ERRORS = ("loss", "d_hidden", "d_weight")


def spread(values: list[float] | None) -> str:
    """The median and, in brackets, quartiles."""
    return "{:.2f} ({:.2f}-{:.2f})".format(statistics.median(values), *quartiles(values)) if values else ""


def milliseconds(row: Row, of: str = "step") -> float:
    return 1e3 * statistics.median(row["seconds"][of])


def work(data: dict[str, Any]) -> str:
    """FLOPs and bytes as counted, and what the performance model makes of those of fused_kd's rows."""
    lines = []
    for row in _tabled(data):
        if row["status"] != "ok" or "counts" not in row:
            continue
        counts = row["counts"]
        model = beside_model(row, data["machine"]) if data.get("machine") else None
        swept = [f"{1e-9 * counts[k]:.2f}" for k in ("row_bytes_once", "row_bytes_swept") if k in counts]
        lines.append(
            [
                *(shape_of(row), str(Variant.of(row)), row["implementation"], str(counts.get("chunk", ""))),
                f"{sum(counts['flops'].values()) / 1e9:.4g}",
                f"{sum(counts['gemm_bytes'].values()) / 1e9:.4g}" if "gemm_bytes" in counts else "",
                " - ".join(swept),
                f"{1e3 * model['predicted_seconds']:.4g} ({signed(model['seconds_error'])})" if model else "",
                size(counts.get("workspace_bytes")),
                signed(model["memory_error"]) if model else "",
            ]
        )
    head = [
        SHAPE, "variant", "implementation", "tokens a chunk", "GFLOP", "GEMMs' GB", "row's GB, once - swept",
        "ms predicted (error)", "workspace planned, GB", "its error",
    ]  # fmt: skip
    return table(head, lines) if lines else ""


def scaling(data: dict[str, Any]) -> str:
    """Time and memory as one size of the problem grows: a table an axis, a line a place on it."""
    parts = []
    for axis, title in AXES.items():
        rows = [row for row in data["rows"] if row["purpose"] == axis and row["status"] == "ok"]
        if not rows:
            continue
        found = {(row["shape"].get(axis, row.get(axis)), row["implementation"]): row for row in rows}
        names = list(dict.fromkeys(name for _, name in found))
        lines = []
        for place in sorted({place for place, _ in found}):
            line = [f"{place:g}"]
            for row in (found.get((place, name)) for name in names):
                numbers = [f"{milliseconds(row):.4g}", fixed(over_floor(row)), size(memory_of(row))] if row else []
                line += numbers or [""] * 3
            lines.append(line)
        sizes = ", ".join(f"{k} = {v}" for k, v in rows[0]["shape"].items() if k not in ("name", axis))
        head = [axis, *(f"{name}: {what}" for name in names for what in ("ms", "time / floor", "GB"))]
        parts += [f"### {title}", f"At {sizes}.", table(head, lines)]
    return "\n\n".join(parts)


README = ROOT / "README.md"
_BLOCK = re.compile(r"(<!-- measured: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def summary(data: dict[str, Any]) -> str:
    """The README's table: a line for each implementation at each shape; several variants are separated by slashes."""
    cells: dict[tuple[str, str, str], list[Row]] = {}
    for group in GROUPS:
        rows = [
            r for r in _tabled(data) if (r["status"], r["group"], r["valid"], r["teacher"]) == ("ok", group, 1, "near")
        ]
        for row in sorted(rows, key=lambda r: r["shape"]["V"]):
            cells.setdefault((group, shape_of(row).partition(": ")[2], row["implementation"]), []).append(row)
    lines = [
        [
            *place,
            " / ".join(fixed(over_floor(r)) for r in rows),
            " / ".join(fixed(over(memory_of(r), 1e9)) for r in rows),
            " / ".join(scientific(error_of(r)) for r in rows),
        ]
        for place, rows in cells.items()
    ]
    return table(["objective", "N, H_s, H_t, V", "", "time / GEMMs", "GB", "dH error"], lines)


def write_readme(path: Path, data: dict[str, Any], readme: Path = README) -> bool:
    """Put the table into the README where its mark names the results file; say whether it does."""
    text = readme.read_text()
    mark = _BLOCK.search(text)
    if mark is None or (ROOT / mark[2]).resolve() != path.resolve():
        return False
    readme.write_text(_BLOCK.sub(lambda m: f"{m[1]}{summary(data)}\n{m[3]}", text))
    return True


def draw(data: dict[str, Any], path: Path) -> None:
    """A PNG of the gated objective, a line of panels a shape: time over the floor (with quartiles), and memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels: dict[tuple, list[Row]] = {}
    for row in data["rows"]:
        if row["status"] == "ok" and row["purpose"] == "table" and row["group"] == SELF_EVOLUTION:
            panels.setdefault(tuple(row["shape"].values()), []).append(row)
    if not panels:
        return
    figure, axes = plt.subplots(
        len(panels), 2, squeeze=False, figsize=(12, sum(1.1 + 0.28 * len(rows) for rows in panels.values())),
        height_ratios=[3 + len(rows) for rows in panels.values()],
    )  # fmt: skip
    for (left, right), (shape, rows) in zip(axes, panels.items(), strict=True):
        names = [f"{r['implementation']}, {Variant.of(r)}" for r in rows]
        colors = ["tab:blue" if r["implementation"].startswith(OURS) else "tab:gray" for r in rows]
        times = [ratios(r) or [0.0] for r in rows]
        middle = [statistics.median(t) for t in times]
        low, high = zip(*map(quartiles, times), strict=True)
        errors = [[m - x for m, x in zip(middle, low, strict=True)], [x - m for m, x in zip(middle, high, strict=True)]]
        left.barh(names, middle, xerr=errors, color=colors)
        left.axvline(1.0, color="black", linewidth=0.8)
        left.set(
            xlabel="forward + backward, multiples of its bare GEMMs",
            title="{}: {}, {}, {}, {}".format(*shape),
        )
        right.barh(names, [(memory_of(r) or 0) / 1e9 for r in rows], color=colors)
        right.set(xlabel="GB over inputs and gradients", title="peak memory", yticklabels=[])
        for axis in (left, right):
            axis.invert_yaxis()
            axis.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_report(path: Path) -> str:
    """Write the Markdown and the plots beside the results, and the README's table; return the Markdown."""
    data = json.loads(path.read_text())
    text = markdown(data)
    path.with_suffix(".md").write_text(text)
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed", file=sys.stderr)
    else:
        draw(data, path.with_suffix(".png"))
    write_readme(path, data)
    return text


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench report")
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULTS", help="a run's .json, a GPU's gpu.jsonl")
    code = 0
    try:
        for path in parser.parse_args(arguments).results:
            if path.name == "gpu.jsonl":
                code = max(code, gpu.report(path.parent))
            else:
                print(write_report(path))
    except (OSError, ValueError) as error:
        print(f"bench report: {error}", file=sys.stderr)
        return 2
    return code


if __name__ == "__main__":
    raise SystemExit(main())
