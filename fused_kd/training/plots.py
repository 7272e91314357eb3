"""PNG curves and bars, made from an experiment's ``metrics.json`` alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fused_kd.training.drawing import pyplot, save_figure

CURVES = {
    "loss": "loss (nats per token; each objective's own)",
    "hard_fraction": "share of hard tokens",
    "difficulty": "mean difficulty (nats)",
}


def write_plots(metrics: dict[str, Any], folder: str | Path) -> list[Path]:
    """Write ``loss.png``, ``hard_fraction.png``, ``difficulty.png`` and ``bleu.png``; returns their paths.

    ``metrics["stages"]`` maps a stage's name to ``phase`` ("pretraining" or "distillation"), ``log_history``
    (entries with ``step`` and the curve's value) and ``scores`` (with ``bleu``). What is missing is left out.
    """
    plt = pyplot()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stages: dict[str, Any] = metrics["stages"]
    written = []
    for key, label in CURVES.items():
        phases = _phases(stages, key)
        if not phases:
            continue
        figure, axes = plt.subplots(1, len(phases), figsize=(5.2 * len(phases), 3.6), squeeze=False, layout="tight")
        for axis, (phase, curves) in zip(axes[0], phases.items(), strict=True):
            for name, points in curves.items():
                axis.plot(*zip(*points, strict=True), label=name, linewidth=1.4)
            axis.set(title=phase, xlabel="optimizer step", ylabel=label)
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
        written.append(save_figure(figure, folder / f"{key}.png"))
    scores = {name: stage["scores"]["bleu"] for name, stage in stages.items() if stage.get("scores")}
    if scores:
        figure, axis = plt.subplots(figsize=(1.6 + 1.1 * len(scores), 3.8), layout="tight")
        bars = axis.bar(range(len(scores)), list(scores.values()), color="#4878a8")
        axis.bar_label(bars, fmt="%.1f", fontsize=9)
        axis.set_xticks(range(len(scores)), list(scores), rotation=25, ha="right", fontsize=8)
        axis.set_ylabel("BLEU")
        axis.margins(y=0.12)
        written.append(save_figure(figure, folder / "bleu.png"))
    return written


def _phases(stages: dict[str, Any], key: str) -> dict[str, dict[str, list[tuple[float, float]]]]:
    phases: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for name, stage in stages.items():
        points = [(entry["step"], entry[key]) for entry in stage.get("log_history", []) if key in entry]
        if points:
            phases.setdefault(stage["phase"], {})[name] = points
    return phases
