"""Markdown, plots and the README's table from a results file alone: ``python -m bench report FILE``."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from . import end_to_end, measurements, model, scaling, standing, summary
from .chart import draw, draw_peers

METHOD = """\
- **Time**: forward + backward, by pytest-benchmark, each case in a process of its own. Floor and implementation take
  turns, after warm-up; each sample is divided by the floor's of the same round; median and, in brackets, quartiles.
  Gradients are dropped before each step, so allocating them is part of it. "Forward alone" is the loss without
  gradients, over the GEMMs of the logits.
- **Floor**: the bare GEMMs of the valid tokens (student logits, teacher logits, dH, dW), `{gemm}`, into outputs
  allocated beforehand. Without a teacher, or with a top-k teacher, the three of the student: its lists are cut
  beforehand, untimed.
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
- **Inputs**: the same for all. Logits of standard deviation 4, a teacher near the student ("far teacher": independent
  of it), labels drawn from the teacher. Tokens: none hard, all hard, or about half of them (the threshold lies near
  the median difficulty); implementations without a gate compute the same for all of them."""


def load(path: str | Path) -> dict[str, Any]:
    return json.loads(Path(path).read_text())


def markdown(data: dict[str, Any]) -> str:
    """The whole report of one results file."""
    sections = {
        "Where fused_kd stands": standing.verdict(data),
        "Targets": measurements.targets(data),
        "Forward + backward": measurements.steps(data),
        "Scaling": scaling.markdown(data),
        "A training step, end to end": end_to_end.markdown(data["end_to_end"]) if data.get("end_to_end") else "",
        "Work, counted beside measured": measurements.work(data),
        "The performance model, beside what was measured": model.markdown(data),
        "Expected on GPUs": model.markdown_expected(),
        "How it was measured": _method(data),
    }
    parts = [f"# fused_kd, {data['suite']} suite: {_machine(data['hardware'])}", _about(data)]
    for title, text in sections.items():
        if text:
            parts += [f"## {title}", text]
    return "\n\n".join(parts) + "\n"


def _method(data: dict[str, Any]) -> str:
    errors = [row["error"]["tokens"] for row in data["rows"] if "error" in row]
    return METHOD.format(
        gemm="torch.mm" if data["settings"]["dtype"] == "float32" else "aten.mm.dtype_out with fp32 outputs",
        memory="torch's allocator" if data["settings"]["device"] == "cuda" else "resident memory (Linux: VmHWM, reset)",
        tokens=max(errors, default=0),
    )


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


def write_report(path: Path) -> str:
    """Write the Markdown and the plots beside the results, and the README's table; return the Markdown."""
    data = load(path)
    text = markdown(data)
    path.with_suffix(".md").write_text(text)
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed", file=sys.stderr)
    else:
        draw(data, path.with_suffix(".png"))
        draw_peers(data, path.with_name(f"{path.stem}-peers.png"))
        scaling.draw(data, path.with_name(f"{path.stem}-scaling.png"))
    summary.write_readme(path, data)
    return text
