"""What runs of MT-LLM with several translators have found: MT-LLM against translate-test by the translator.

    python examples/mt_llm/mt_llm_report.py NAME=RESULTS [NAME=RESULTS ...] --output FOLDER

RESULTS is the folder of a run's results, finished or not; of one NAME there may be several, of other seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fused_kd.training.score import bootstrap_by_class
from fused_kd.training.script import run_script
from fused_kd.training.stage import read_json, told, write_json

FIRST, SECOND = "MT-LLM, mse", "translate-test"


def gather(results: str | Path) -> dict[str, Any]:
    """A run's numbers: ``{"scores": {seed: {system: {language: accuracies}}}, "bleu", "retrieval", "config"}``."""
    folder = Path(results)
    scores: dict[str, dict[str, Any]] = {}
    pieces = told(folder / "pieces.jsonl")
    for title, value in pieces.items():
        if title.startswith("test "):
            scores.setdefault(title.split()[1], {}).update(value)
    seeds = {title.split()[1]: value for title, value in pieces.items() if title.startswith("seed ")}
    whole = read_json(folder / "metrics.json") or {}
    if not pieces:  # of an earlier version
        seeds = whole.get("seeds", {})
        scores = {seed: made["accuracy"] for seed, made in seeds.items()}
    return {
        "scores": scores,
        "bleu": pieces.get("bleu", whole.get("bleu")),
        "retrieval": {seed: made["retrieval"] for seed, made in seeds.items()},
        "adaptation": {seed: made["adaptation"] for seed, made in seeds.items()},
        "config": whole.get("config"),
    }


def paired(scores: Mapping[str, Mapping[str, Any]], first: str, second: str, seed: int = 0) -> dict[str, Any] | None:
    """How much better balanced accuracy one system has than another on the same items, in points.

    Returns:
        ``difference``, the mean over languages and the seeds that have both; ``low`` and ``high``, 95 % of it over
        captions drawn again within their classes, 10,000 times, the same ones for every seed and language (the
        languages' captions are parallel); ``by_seed``. None where no seed has both.
    """
    seeds = [key for key, made in scores.items() if first in made and second in made]
    if not seeds or not all("hits" in values for values in scores[seeds[0]][first].values()):
        return None
    languages = [name for name in scores[seeds[0]][second] if name in scores[seeds[0]][first]]
    apart = {}
    for label in scores[seeds[0]][first][languages[0]]["hits"]:
        hits = [
            [[list(map(int, scores[key][system][name]["hits"][label])) for name in languages] for key in seeds]
            for system in (first, second)
        ]
        apart[label] = (np.array(hits[0]) - np.array(hits[1])).mean(1)  # (seeds, items): over the languages
    return bootstrap_by_class(apart, seeds, seed=seed)


def summary(runs: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each run and system: mean balanced accuracy in percent, English and the mean of other languages.

    The other languages are those that all runs have.
    """
    spoken = [
        set(by_language) for run in runs.values() for made in run["scores"].values() for by_language in made.values()
    ]
    languages = set.intersection(*spoken) - {"en"} if spoken else set()
    rows = []
    for name, run in runs.items():
        for system in dict.fromkeys(system for made in run["scores"].values() for system in made):
            made = {seed: found[system] for seed, found in run["scores"].items() if system in found}
            other = {
                seed: 100 * np.mean([values["balanced"] for key, values in by_language.items() if key in languages])
                for seed, by_language in made.items()
            }
            english = [100 * by_language["en"]["balanced"] for by_language in made.values() if "en" in by_language]
            row = {"translator": name, "system": system, "en": float(np.mean(english)) if english else None}
            row |= {"others": float(np.mean([*other.values()])), "by_seed": {k: float(v) for k, v in other.items()}}
            rows.append(row | {"languages": sorted(languages)})
    return rows


def tables(metrics: Mapping[str, Any]) -> str:
    """As Markdown: accuracies, and the paired difference of each run."""
    lines = ["| translator | system | en | mean of others | its seeds |", "|---|---|---|---|---|"]
    for row in metrics["summary"]:
        english = "" if row["en"] is None else f"{row['en']:.1f}"
        seeds = " ".join(f"{value:.1f}" for value in row["by_seed"].values())
        lines.append(f"| {row['translator']} | {row['system']} | {english} | {row['others']:.1f} | {seeds} |")
    lines += ["", f"| translator | BLEU | {FIRST} above {SECOND} | 95 % | seeds |", "|---|---|---|---|---|"]
    for name, value in metrics["paired"].items():
        bleu = ", ".join(f"{key} {score:.1f}" for key, score in (metrics["runs"][name]["bleu"] or {}).items())
        seeds = " ".join(f"{points:+.1f}" for points in value["by_seed"].values())
        between = f"{value['low']:+.1f} to {value['high']:+.1f}"
        lines.append(f"| {name} | {bleu} | {value['difference']:+.1f} | {between} | {seeds} |")
    return "\n".join(lines)


def plot(metrics: Mapping[str, Any], file: Path) -> None:
    """Accuracy in the other languages by translator, each system a group of bars, seeds as points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(metrics["runs"])
    told = [[row["system"] for row in metrics["summary"] if row["translator"] == name] for name in names]
    systems = [system for system in told[0] if all(system in others for others in told)]
    figure, axis = plt.subplots(figsize=(4 + 1.7 * len(names), 4.2), layout="tight")
    width = 0.8 / len(systems)
    for place, system in enumerate(systems):
        rows = {row["translator"]: row for row in metrics["summary"] if row["system"] == system}
        x = [number + (place - (len(systems) - 1) / 2) * width for number, name in enumerate(names) if name in rows]
        axis.bar(x, [rows[name]["others"] for name in names if name in rows], width, label=system)
        for at, name in zip(x, (name for name in names if name in rows), strict=True):
            values = list(rows[name]["by_seed"].values())
            axis.plot([at] * len(values), values, ".", color="black", markersize=3)
    labels = [
        name + "".join(f"\n{key} {score:.1f}" for key, score in (metrics["runs"][name]["bleu"] or {}).items())
        for name in names
    ]
    axis.set_xticks(range(len(names)), labels, fontsize=8)
    axis.axhline(25, color="grey", linestyle="--", linewidth=1, label="chance")
    axis.set(ylabel="balanced accuracy, other languages, %", xlabel="translator, and its BLEU", ylim=(0, 100))
    axis.legend(fontsize=7, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.savefig(file, dpi=130)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=RESULTS")
    parser.add_argument("--output", required=True, help="folder of translators.json and translators.png")
    given = parser.parse_args(argv)
    runs: dict[str, dict[str, Any]] = {}
    for text in given.runs:
        name, mark, folder = text.partition("=")
        if not mark or not Path(folder).is_dir():
            raise ValueError(f"runs={text!r}: expected NAME=RESULTS, a folder")
        made, known = gather(folder), runs.get(name)
        if known is None:
            runs[name] = made
            continue
        for key in ("scores", "retrieval", "adaptation"):
            known[key] = {**known[key], **made[key]}
    metrics: dict[str, Any] = {"runs": runs, "summary": summary(runs), "paired": {}}
    for name, run in runs.items():
        if (found := paired(run["scores"], FIRST, SECOND)) is not None:
            metrics["paired"][name] = found
    folder = Path(given.output)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "translators.json", metrics)
    plot(metrics, folder / "translators.png")
    print(tables(metrics))
    return metrics


if __name__ == "__main__":
    run_script(main)
