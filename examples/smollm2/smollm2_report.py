"""Table, samples and figure of the study, from its results.json alone.

python examples/smollm2/smollm2_report.py RESULTS_JSON FOLDER
"""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from fused_kd.training.script import run_script
from fused_kd.training.stage import read_json, write_bytes, write_text

COLUMNS = {
    "ce": ("CE", 1, ".3f"),
    "perplexity": ("perplexity", 1, ".1f"),
    "kl": ("KL", 1, ".3f"),
    "top_1": ("top-1 as the teacher's, %", 100, ".1f"),
    "difficulty": ("difficulty", 1, ".2f"),
    "hard": ("hard, %", 100, ".1f"),
}
PLOTTED = {"ce": "cross-entropy, validation", "kl": "KL to the teacher, validation"}
COLOURS = matplotlib.colormaps["tab10"].colors


def line(name: str, rate: str, scores: list[Mapping[str, float]]) -> dict[str, str]:
    """A row of the table: means, and of several seeds the sample standard deviation."""
    found = pd.DataFrame(scores)
    shown = {"student": name, "rate": rate}
    for key, (title, scale, form) in COLUMNS.items():
        spread = f" ± {scale * found[key].std():{form}}" if len(found) > 1 else ""
        shown[title] = f"{scale * found[key].mean():{form}}{spread}"
    return shown


def table(results: Mapping[str, Any], condition: str) -> str:
    runs = [run for run in results["runs"] if run["condition"] == condition and run["chosen"]]
    student = results["students"][condition]
    lines = [line("teacher", "", [results["teacher"]["test"]])]
    lines += [line(name, "", [student[name]["test"]]) for name in ("start", "healed")]
    for arm in dict.fromkeys(run["arm"] for run in runs):
        of = [run for run in runs if run["arm"] == arm]
        lines.append(line(arm, f"{of[0]['rate']:g}", [run["test"] for run in of]))
    return str(pd.DataFrame(lines).to_markdown(index=False, disable_numparse=True))


def tables(results: Mapping[str, Any]) -> str:
    parts = []
    for name, about in results["conditions"].items():
        if not any(run["condition"] == name for run in results["runs"]):
            continue
        seeds = sorted({run["seed"] for run in results["runs"] if run["condition"] == name})
        student = results["students"][name]
        tokens = results["teacher"]["test"]["tokens"]
        told = f"{about['layers']} layers ({about['keep'].replace('_', ' and ')})"
        told += f", {student['parameters'] / 1e6:.1f}M parameters"
        told += f", {about['garbled']:.0%} of the rows garbled" if about["garbled"] else ""
        told += f"; {results['settings']['steps']} steps; seeds {', '.join(map(str, seeds))}; {tokens} test tokens"
        late = [trial for trial in results.get("unfinished", ()) if trial.startswith(f"{name}.")]
        more = f"\n\nNot finished in time: {', '.join(late)}." if late else ""
        parts.append(f"## {name}: {told}\n\n{table(results, name)}{more}")
    return "\n\n".join(parts)


def samples(results: Mapping[str, Any]) -> str:
    """What each model makes of each prompt."""
    parts = ["## Samples"]
    first = results["settings"]["seeds"][0]
    for name, student in results["students"].items():
        made = {"teacher": results["teacher"]["samples"]}
        made |= {key: student[key]["samples"] for key in ("start", "healed")}
        runs = [run for run in results["runs"] if run["condition"] == name and run["chosen"] and run["seed"] == first]
        made |= {run["arm"]: run["samples"] for run in runs}
        for number, prompt in enumerate(results["settings"]["prompts"] if runs else ()):
            rows = [{"student": key, "continuation": texts[number].replace("|", "\\|")} for key, texts in made.items()]
            parts.append(f"{name}: *{prompt.strip()}*\n\n{pd.DataFrame(rows).to_markdown(index=False)}")
    return "\n\n".join(parts) if len(parts) > 1 else ""


def write_plot(results: Mapping[str, Any], file: Path) -> None:
    runs = pd.DataFrame(results["runs"])
    names = list(dict.fromkeys(runs.condition))
    figure = Figure(figsize=(12, 3.4 * len(names)), layout="constrained")
    grid = figure.subplots(len(names), 3, squeeze=False)
    for axes, condition in zip(grid, names, strict=True):
        healed = results["students"][condition]["healed"]["valid"]
        for number, arm in enumerate(dict.fromkeys(runs.arm)):
            of = runs[(runs.condition == condition) & (runs.arm == arm)]
            if of.empty:
                continue
            colour = COLOURS[number % len(COLOURS)]
            points = pd.DataFrame([point for curve in of[of.chosen].curve for point in curve])
            mean = points.groupby("step").mean(numeric_only=True)
            for axis, key in zip(axes, PLOTTED, strict=False):
                axis.plot([0, *mean.index], [healed[key], *mean[key]], ".-", color=colour, label=arm)
            grid_seed = of[of.seed == results["settings"]["seeds"][0]].sort_values("rate")
            axes[2].plot(grid_seed.rate, [curve[-1]["ce"] for curve in grid_seed.curve], ".-", color=colour)
        for axis, label in zip(axes, PLOTTED.values(), strict=False):
            axis.set(xlabel="step", ylabel=label, title=condition)
        axes[2].set(xlabel="learning rate", ylabel="cross-entropy, validation, first seed", xscale="log")
        axes[0].legend(frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png", metadata={"Software": None})
    write_bytes(file, buffer.getvalue())


def write(results: Mapping[str, Any], folder: Path) -> None:
    """results.md and curves.png."""
    write_text(folder / "results.md", f"{tables(results)}\n\n{samples(results)}\n".replace("\n\n\n", "\n"))
    write_plot(results, folder / "curves.png")


def main() -> None:
    if len(sys.argv) != 3:
        raise ValueError("expected two arguments: RESULTS_JSON FOLDER")
    results = read_json(Path(sys.argv[1]))
    if results is None:
        raise ValueError(f"{sys.argv[1]}: no such file")
    write(results, Path(sys.argv[2]))


if __name__ == "__main__":
    run_script(main)
