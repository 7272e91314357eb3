"""What a run found: everything for ``metrics.json``, and the table on screen."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import torch
from rich.table import Table

from fused_kd.training.runs import Run, read_json

COLUMNS = ("stage", "objective", "parameters", "steps", "minutes", "BLEU", "chrF")


def environment() -> dict[str, Any]:
    """``versions`` and ``machine``."""
    import sacrebleu
    import transformers

    import fused_kd

    modules = (fused_kd, torch, transformers, sacrebleu)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        "versions": {"python": platform.python_version()} | {m.__name__: m.__version__ for m in modules},
        "machine": {"device": device, "cpu_threads": torch.get_num_threads()},
    }


def collect(run: Run, phases: Mapping[str, str], arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments, versions, machine, and each trained stage's record with its scores (None before
    translation).

    ``phases`` maps stages, in the table's order, to "pretraining" or "distillation".
    """
    stages = {}
    for name, phase in phases.items():
        training = read_json(run.stage(name) / "training.json")
        if training is not None:
            scores = (read_json(run.stage(name) / "scores.json") or {}).get(arguments["direction"])
            stages[name] = {"phase": phase, **training, "scores": scores}
    return {
        "arguments": arguments,
        "seed": arguments["seed"],
        **environment(),
        "stages": stages,
    }


def results_table(metrics: dict[str, Any]) -> Table:
    """The scores of every trained stage, and its training time."""
    signature = ""
    table = Table(title=f"{metrics['arguments']['direction']}, seed {metrics['seed']}")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in COLUMNS[:2] else "right", overflow="fold")
    for name, stage in metrics["stages"].items():
        scores = stage["scores"]
        if scores:
            signature = scores["bleu_signature"]
        table.add_row(
            name,
            stage["objective"],
            f"{stage['parameters'] / 1e6:.2f} M",
            str(stage["steps"]),
            f"{stage['seconds'] / 60:.1f}",
            f"{scores['bleu']:.1f}" if scores else "-",
            f"{scores['chrf']:.1f}" if scores else "-",
        )
    table.caption = signature
    return table
