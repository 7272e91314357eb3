"""Markdown from a results file alone: ``python -m bench.report bench/results/<machine>/cpu.json``."""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .chart import draw
from .samples import rates, ratios

METHOD = """\
- **Time**: forward + backward. Floor and implementation take turns in one process, after warm-up; each sample
  is divided by the floor's of the same round; median and, in brackets, quartiles. Gradients are dropped
  before each step, so allocating them is part of it.
- **Floor**: the four bare GEMMs (student logits, teacher logits, dH, dW), `{gemm}`, into outputs allocated
  beforehand. With a top-k teacher the three of the student: its lists are cut beforehand, untimed.
- **Memory**: peak of one forward + backward after warm-up, in a process that runs one implementation at one
  shape, by {memory}. "Over inputs + gradients" subtracts what is in use with the inputs and the gradients of
  hidden states and weight in place; "over inputs" adds the size of those gradients.
- **Work**: counted from the algorithm as `bench/counts.py` says; a multiply-add is two FLOPs, and counted are those
  of the GEMMs that nobody can do without. Measured FLOPs are those that PyTorch dispatched in one call; under
  torch.compile they cannot be seen. GFLOP/s take the measured number where there is one. Bytes of GEMMs are operands
  and results, those of the row each logit read and written once, or swept as often as the design says; GB/s take
  the GEMMs' and the row's once. "Workspace" is what the planner planned, "scratch" what rows asked for beside it,
  "peak" the measured memory over inputs + gradients.
- **Error**: relative Frobenius norm against float64, on the first {tokens} tokens; dH of the hidden states,
  dW of the weight. A peer is compared with its own objective in float64.
- **Inputs**: the same for all. Logits of standard deviation 4, a teacher near the student, labels drawn from
  the teacher. Tokens: none hard, all hard, or about half of them (the threshold lies near the median
  difficulty)."""


def load(path: str | Path) -> dict[str, Any]:
    return json.loads(Path(path).read_text())


def markdown(data: dict[str, Any]) -> str:
    """The whole report of one results file."""
    is_gpu = data["suite"] == "gpu"
    parts = [f"# fused_kd, {data['suite']} suite: {_machine(data['hardware'])}", _about(data)]
    if is_gpu:
        parts += [_tests(data.get("tests")), "## Forward + backward", _measurements(data)]
        if bandwidth := _bandwidth(data):
            parts += ["## The row alone, against a copy of device memory", bandwidth]
    else:
        parts += ["## Targets", _targets(data), "## Forward + backward", _measurements(data)]
    if work := _work(data):
        parts += ["## Work, counted beside measured", work]
    errors = [row["error"]["tokens"] for row in data["rows"] if "error" in row]
    fp32 = data["settings"]["dtype"] == "float32"
    how = {
        "gemm": "torch.mm" if fp32 else "aten.mm.dtype_out with fp32 outputs",
        "memory": "torch's allocator"
        if data["settings"]["device"] == "cuda"
        else "resident memory (Linux: VmHWM, reset)",
        "tokens": max(errors, default=0),
    }
    parts += ["## How it was measured", METHOD.format(**how)]
    return "\n\n".join(parts) + "\n"


def _machine(hardware: dict[str, Any]) -> str:
    return hardware.get("gpu") or f"{hardware['cpu']}, {hardware['usable_cores']} cores, {hardware['threads']} threads"


def _about(data: dict[str, Any]) -> str:
    source, settings = data["source"], data["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items() if version)
    driver = data["hardware"].get("driver")
    commit = (source["commit"] or "unknown")[:12] + (" with uncommitted changes" if source["dirty"] else "")
    lines = [
        f"- commit {commit}, written {data['written']}",
        f"- {versions}" + (f", driver {driver}" if driver else ""),
        f"- {settings['dtype']}, {settings['rounds']} rounds",
    ]
    return "\n".join(lines)


def _tests(tests: dict[str, Any] | None) -> str:
    if tests is None:
        return "Tests marked gpu: not run."
    if "passed" not in tests:
        return f"Tests marked gpu: {tests['status']}, {tests['reason']}."
    counts = ", ".join(f"{tests[name]} {name}" for name in ("passed", "failed", "errors", "skipped"))
    failing = "".join(f"\n- failing: `{name}`" for name in tests["failing"])
    return f"Tests marked gpu: {counts}.{failing}"


def _targets(data: dict[str, Any]) -> str:
    rows = {(r["shape"]["name"], r["implementation"], r["tokens"]): r for r in data["rows"] if r["status"] == "ok"}
    lines = []
    for (shape, implementation, tokens), row in rows.items():
        own, half = _median(ratios(row)), _judged(_median(ratios(row, "half_ignored", "step")), 0.6)
        if row.get("top_k"):
            # The aim is for the smaller shape; there is nothing to compare a top-k teacher with.
            cells = ["", _judged(own, 1.1 if shape == "32k" else None), "", half, ""]
        elif implementation == "fused_kd":
            compiled = rows.get((shape, "torch.compile", tokens), {})
            theirs = _median(ratios(compiled))
            cells = [
                _judged(own, 1.2),
                "",
                _judged(own / theirs if own and theirs else None, 1.0, strict=True),
                half,
                _judged(_over(_memory(row), _memory(compiled)), 0.5),
            ]
        else:
            continue
        lines.append([_shape(row), tokens, implementation, *cells])
    head = [
        "shape (N, H_s, H_t, V)", "tokens", "implementation", "time / four GEMMs, at most 1.2",
        "time / three student GEMMs, at most 1.1", "time / torch.compile, below 1",
        "half ignored / own full time, at most 0.6", "memory / torch.compile, at most 0.5",
    ]  # fmt: skip
    return _table(head, lines)


def _measurements(data: dict[str, Any]) -> str:
    lines = []
    for row in data["rows"]:
        if row["implementation"].startswith("row: "):
            continue
        lead = [_shape(row), row["tokens"], _name(row), row["objective"] or ""]
        if row["status"] != "ok":
            lines.append([*lead, f"{row['status']}: {row['reason']}", *[""] * 7])
            continue
        seconds = row["seconds"]["step"]
        times = ratios(row)
        memory, error = row.get("memory", {}), row.get("error", {})
        errors = [f"{float(error[k]):.1e}" if error else row.get("error_status", "") for k in _ERRORS]
        lines.append(
            [
                *lead,
                _spread(times) if times else f"floor {row.get('floor_status', 'not measured')}",
                f"{100 / statistics.median(times):.0f} %" if times else "",
                f"{1e3 * statistics.median(seconds):.4g}",
                _size(memory.get("over_inputs_and_gradients")),
                _size(memory.get("over_inputs")),
                *errors,
            ]
        )
    head = [
        "shape (N, H_s, H_t, V)", "tokens", "implementation", "objective", "time / floor", "floor's share",
        "ms", "GB over inputs + gradients", "GB over inputs", "loss error", "dH error", "dW error",
    ]  # fmt: skip
    return _table(head, lines)


_ERRORS = ("loss", "d_hidden", "d_weight")


def _work(data: dict[str, Any]) -> str:
    lines = []
    for row in data["rows"]:
        if row["implementation"].startswith("row: ") or row["status"] != "ok" or "counts" not in row:
            continue
        counts, rate = row["counts"], rates(row)
        swept = [f"{1e-9 * counts[k]:.2f}" for k in ("row_bytes_once", "row_bytes_swept") if k in counts]
        lines.append(
            [
                _shape(row),
                row["tokens"],
                _name(row),
                str(counts.get("chunk", "")),
                _giga(sum(counts["flops"].values())),
                _giga(row.get("measured_flops")),
                _giga(rate.flops),
                "" if rate.share is None else f"{100 * rate.share:.0f} %",
                _giga(sum(counts["gemm_bytes"].values()) if "gemm_bytes" in counts else None),
                " - ".join(swept),
                _giga(rate.bytes),
                _giga(counts.get("row_specials")),
                _size(counts.get("workspace_bytes")),
                _size(row.get("row_scratch_bytes")) if "chunk" in counts else "",
                _size(_memory(row)),
            ]
        )
    head = [
        "shape (N, H_s, H_t, V)", "tokens", "implementation", "tokens a chunk", "GFLOP counted", "GFLOP measured",
        "GFLOP/s", "share of the floor's", "GEMMs' GB counted", "row's GB counted, once - swept", "GB/s",
        "row's special functions counted, 1e9", "workspace counted, GB", "row's scratch measured, GB",
        "peak measured, GB",
    ]  # fmt: skip
    return _table(head, lines) if lines else ""


def _name(row: dict[str, Any]) -> str:
    return row["implementation"] + (f", chunk {row['chunk']}" if row["chunk"] else "")


def _bandwidth(data: dict[str, Any]) -> str:
    lines = []
    for row in data["rows"]:
        if not row["implementation"].startswith("row: "):
            continue
        lead = [
            f"{row['chunk']} x {row['shape']['V']}",
            row["tokens"],
            row["implementation"].removeprefix("row: "),
        ]
        if row["status"] != "ok":
            lines.append([*lead, f"{row['status']}: {row['reason']}", *[""] * 4])
            continue
        seconds, copy = (statistics.median(row["seconds"][k]) for k in ("row", "copy"))
        rate = row["copy_bytes"] / copy
        once, swept = row["row_bytes_once"] / seconds, row["row_bytes_swept"] / seconds
        lines.append(
            [
                *lead,
                f"{1e3 * seconds:.3f}",
                f"{once / 1e9:.0f}",
                f"{100 * once / rate:.0f} %",
                f"{100 * swept / rate:.0f} %",
                f"{rate / 1e9:.0f}",
            ]
        )
    head = [
        "chunk", "tokens", "row", "ms", "GB/s (each logit read once)", "share of the copy",
        "share, every sweep counted", "copy GB/s",
    ]  # fmt: skip
    return _table(head, lines) if lines else ""


def _shape(row: dict[str, Any]) -> str:
    s = row["shape"]
    return f"{s['name']}: {s['N']}, {s['H_s']}, {s['H_t']}, {s['V']}"


def _memory(row: dict[str, Any]) -> float | None:
    return row.get("memory", {}).get("over_inputs_and_gradients")


def _over(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def _median(values: list[float] | None) -> float | None:
    return statistics.median(values) if values else None


def _judged(value: float | None, limit: float | None, strict: bool = False) -> str:
    if value is None:
        return "not measured"
    if limit is None:
        return f"{value:.2f}"
    met = value < limit if strict else value <= limit
    return f"{value:.2f} {'met' if met else 'not met'}"


def _spread(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.2f}"
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{statistics.median(values):.2f} ({low:.2f}-{high:.2f})"


def _size(value: float | None) -> str:
    return "" if value is None else f"{value / 1e9:.3f}"


def _giga(value: float | None) -> str:
    return "" if value is None else f"{value / 1e9:.4g}"


def _table(head: list[str], lines: Iterable[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def write_report(path: Path) -> str:
    """Write the Markdown and the chart beside the results and return the Markdown."""
    data = load(path)
    text = markdown(data)
    path.with_suffix(".md").write_text(text)
    if importlib.util.find_spec("matplotlib") is None:
        print("no chart: matplotlib is not installed", file=sys.stderr)
    else:
        draw(data, path.with_suffix(".png"))
    return text


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit("usage: python -m bench.report RESULTS.json ...")
    for name in sys.argv[1:]:
        print(write_report(Path(name)))


if __name__ == "__main__":
    main()
