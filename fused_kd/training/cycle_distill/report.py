"""What a run found: ``metrics.json``, the table on screen and chrF by iteration as a figure."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from fused_kd.training.cycle_distill.iterations import Cycle, Round
from fused_kd.training.cycle_distill.synthetic import read_counts
from fused_kd.training.drawing import pyplot, save_figure
from fused_kd.training.evaluation.significance import paired_bootstrap
from fused_kd.training.report import environment
from fused_kd.training.runs import read_json, read_lines

COLORS = {
    "hard": "#c05a2e", "soft": "#2f6f9f", "soft_self_evolution": "#7a4f9a", "control": "#8a8a8a", "ceiling": "#3d8b53",
}  # fmt: skip


def metrics(cycle: Cycle) -> dict[str, Any]:
    """Of a finished run: configuration, versions, each seed's scores and tests against base and control.

    ``mean`` has for each arm and iteration the scores' mean over the seeds that got there, and each seed's number.
    """
    seeds = {seed: _of_seed(cycle, seed, cycle.rounds(seed)) for seed in cycle.config.seeds}
    return {
        "arguments": dataclasses.asdict(cycle.config),
        **environment(),
        "seeds": {str(seed): found for seed, found in seeds.items()},
        "mean": _means(list(seeds.values())),
    }


def describe(cycle: Cycle, each: Round) -> str:
    """A round in a few lines: what was kept and dropped, scores, samples."""
    found = _of_round(cycle, each)
    lines = [f"{each.arm}, iteration {each.iteration}: {found['rows']} rows, {found['steps']} steps"]
    if counts := found["counts"]:
        dropped = ", ".join(f"{rule} {count}" for rule, count in counts["rejected"].items() if count) or "none"
        lines.append(
            f"  kept {counts['kept']} of {counts['generated']} ({counts['cut']} of them cut at a marker); "
            f"dropped: {dropped}"
        )
    lines.append(
        "  " + ", ".join(f"{s} chrF {found[s]['chrf']:.2f} BLEU {found[s]['bleu']:.2f}" for s in ("valid", "test"))
    )
    lines += [f"  {sample['source']}\n  > {sample['translation']}" for sample in found["samples"]]
    return "\n".join(lines)


def results_table(found: dict[str, Any]) -> Table:
    """Means over seeds on the test set; each seed's chrF in brackets."""
    arguments = found["arguments"]
    seeds = list(found["seeds"].values())
    signature = seeds[0]["base"]["test"]["chrf_signature"]
    table = Table(
        title=f"{arguments['direction']}, test set, {len(seeds)} seeds", caption=f"{signature}; * ended by valid chrF"
    )
    for column in ("arm", "iteration", "rows", "steps", "valid chrF", "chrF", "BLEU", "chrF of each seed"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for name, entry in found["mean"].items():
        for row in entry:
            stopped = "*" if row["stopped"] else ""
            table.add_row(
                name, f"{row['iteration']}{stopped}", str(row["rows"] or "-"), str(row["steps"] or "-"),
                f"{row['valid_chrf']:.2f}", f"{row['chrf']:.2f}", f"{row['bleu']:.2f}",
                " ".join(f"{value:.2f}" for value in row["each_chrf"]),
            )  # fmt: skip
    return table


def write_plot(found: dict[str, Any], path: str | Path) -> Path:
    """chrF on the test set by iteration: lines are means over seeds, points single seeds."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="tight")
    base = found["mean"]["base, truncated"][0]
    last = 0
    for arm, color in COLORS.items():
        rows = found["mean"].get(arm, [])
        if not rows:
            continue
        x = [0, *(row["iteration"] for row in rows)]
        last = max(last, *x)
        style = "-" if arm not in ("control", "ceiling") else "--"
        label = arm.replace("_", " ")
        axis.plot(x, [base["chrf"], *(row["chrf"] for row in rows)], style, color=color, label=label, linewidth=1.6)
        points = [(row["iteration"], value) for row in rows for value in row["each_chrf"]]
        axis.plot(*zip(*points, strict=True), "o", color=color, markersize=4, alpha=0.6)
    axis.plot([0] * len(base["each_chrf"]), base["each_chrf"], "ko", markersize=4, label="base, truncated")
    raw = found["mean"]["base, raw"][0]
    axis.plot([0] * len(raw["each_chrf"]), raw["each_chrf"], "kx", markersize=6, label="base, raw")
    axis.set(xlabel="iteration", ylabel=f"chrF, {found['arguments']['direction']} test set", xticks=range(last + 1))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return save_figure(figure, Path(path))


def _of_seed(cycle: Cycle, seed: int, arms: dict[str, list[Round]]) -> dict[str, Any]:
    base = cycle.bases[seed][1].folder
    found: dict[str, Any] = {
        "base": {**(read_json(base / "scores.json") or {}), "samples": _samples(cycle, base)},
        "arms": {arm: [_of_round(cycle, each) for each in rounds] for arm, rounds in arms.items()},
        "chosen": {},
    }
    start = found["base"]["valid"]["chrf"]
    for arm in (arm for arm in arms if arm in cycle.config.variants):
        chrfs = [start, *(entry["valid"]["chrf"] for entry in found["arms"][arm])]
        found["chosen"][arm] = chrfs.index(max(chrfs))
    if cycle.config.bootstrap:
        found["tests"] = _tests(cycle, seed, arms)
    return found


def _of_round(cycle: Cycle, each: Round) -> dict[str, Any]:
    training = read_json(each.model.folder / "training.json") or {}
    return {
        "iteration": each.iteration,
        **(read_json(each.scores.folder / "scores.json") or {}),
        "counts": read_counts(each.rows.folder),
        "rows": len(read_lines(each.rows.folder / "rows.jsonl")),
        "steps": training.get("steps"),
        "seconds": training.get("seconds"),
        "objective": training.get("objective"),
        "validation": training.get("validation", []),
        "log_history": training.get("log_history", []),
        "samples": _samples(cycle, each.scores.folder),
        "rejected_samples": _rejected(each.rows.folder, cycle.config.samples),
    }


def _samples(cycle: Cycle, folder: Path) -> list[dict[str, str]]:
    valid = cycle.stages.texts.valid
    made = read_lines(folder / "valid.txt")
    return [
        {"source": pair.source, "reference": pair.target, "translation": text}
        for pair, text in islice(zip(valid, made, strict=True), cycle.config.samples)
    ]


def _rejected(folder: Path, most: int) -> list[dict[str, Any]]:
    """A few of each rule."""
    path = folder / "rejected.jsonl"
    seen: Counter[str] = Counter()
    kept = []
    for row in map(json.loads, read_lines(path) if path.is_file() else []):
        seen[row["rule"]] += 1
        if seen[row["rule"]] <= most:
            kept.append(row)
    return kept


def _tests(cycle: Cycle, seed: int, arms: dict[str, list[Round]]) -> list[dict[str, Any]]:
    """Each arm's last round against the base and against the control, as truncated text."""
    systems = {"base": read_lines(cycle.bases[seed][1].folder / "test.txt")}
    systems |= {arm: read_lines(rounds[-1].scores.folder / "test.txt") for arm, rounds in arms.items() if rounds}
    references = [pair.target for pair in cycle.stages.texts.test]
    compared = []
    for baseline in ("base", "control"):
        if baseline in systems and len(systems) > 1:
            made = paired_bootstrap(systems, references, baseline, samples=cycle.config.bootstrap)
            compared += [dataclasses.asdict(each) for each in made]
    return compared


def _means(seeds: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    bases = [found["base"] for found in seeds]
    means = {
        "base, raw": [_mean(0, [{"valid": b["valid"]["raw"], "test": b["test"]["raw"]} for b in bases], False)],
        "base, truncated": [_mean(0, bases, False)],
    }
    for arm in dict.fromkeys(arm for found in seeds for arm in found["arms"]):
        rounds = [found["arms"].get(arm, []) for found in seeds]
        longest = max(map(len, rounds))
        means[arm] = [
            _mean(i + 1, [r[i] for r in rounds if i < len(r)], any(len(r) == i + 1 < longest for r in rounds))
            for i in range(longest)
        ]
    return means


def _mean(iteration: int, entries: Sequence[dict[str, Any]], stopped: bool) -> dict[str, Any]:
    rows = [entry["rows"] for entry in entries if entry.get("rows")]
    return {
        "iteration": iteration,
        "valid_chrf": fmean(entry["valid"]["chrf"] for entry in entries),
        "chrf": fmean(entry["test"]["chrf"] for entry in entries),
        "bleu": fmean(entry["test"]["bleu"] for entry in entries),
        "each_chrf": [entry["test"]["chrf"] for entry in entries],
        "each_bleu": [entry["test"]["bleu"] for entry in entries],
        "rows": round(fmean(rows)) if rows else None,
        "steps": entries[0].get("steps"),
        "stopped": stopped,
    }
