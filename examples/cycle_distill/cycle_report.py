"""What a run of CycleDistill found: ``metrics.json``, the table on screen and chrF by iteration as a figure."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from fused_kd.info import devices, versions
from fused_kd.training.data import Pair
from fused_kd.training.score import paired_bootstrap
from fused_kd.training.stage import read_json, read_lines

RAW, TRUNCATED = "base, raw", "base, truncated"
COLORS = {
    "hard": "#c05a2e", "soft": "#2f6f9f", "soft_self_evolution": "#7a4f9a", "control": "#8a8a8a", "ceiling": "#3d8b53",
}  # fmt: skip


class Round(NamedTuple):
    """One iteration of an arm, as folders: what it is trained on, the model, its scores."""

    iteration: int
    rows: Path
    model: Path
    scores: Path


def valid_chrf(scores: Path) -> float:
    """Of a folder of scores, on the valid split, truncated."""
    return float(read_json(scores / "scores.json")["valid"]["chrf"])


def samples(scores: Path, valid: Sequence[Pair], most: int) -> list[dict[str, str]]:
    """The first few translations of the valid split."""
    found = zip(valid[:most], read_lines(scores / "valid.txt"), strict=False)
    return [{"source": pair.source, "reference": pair.target, "translation": text} for pair, text in found]


def of_round(each: Round, valid: Sequence[Pair], most: int) -> dict[str, Any]:
    """Scores, counts, training log and samples of a finished round."""
    training = read_json(each.model / "training.json")
    return {
        "iteration": each.iteration,
        **read_json(each.scores / "scores.json"),
        "counts": read_json(each.rows / "counts.json") or {},
        "rows": len(read_lines(each.rows / "rows.jsonl")),
        **{name: training[name] for name in ("steps", "seconds", "validation", "log_history")},
        "samples": samples(each.scores, valid, most),
    }


def of_seed(
    base: Path, arms: Mapping[str, Sequence[Round]], config: Any, valid: Sequence[Pair], test: Sequence[Pair]
) -> dict[str, Any]:
    """One seed: the base, every round of every arm, which iteration valid chrF chooses, tests on the test set."""
    found: dict[str, Any] = {
        "base": {**read_json(base / "scores.json"), "samples": samples(base, valid, config.samples)},
        "arms": {
            arm: [{"objective": config.objective(arm), **of_round(each, valid, config.samples)} for each in rounds]
            for arm, rounds in arms.items()
        },
        "chosen": {},
    }
    for arm in config.variants:
        chrfs = [valid_chrf(base), *(valid_chrf(each.scores) for each in arms[arm])]
        found["chosen"][arm] = chrfs.index(max(chrfs))
    if config.bootstrap:  # each arm's last round, as truncated text
        systems = {"base": read_lines(base / "test.txt")}
        systems |= {arm: read_lines(rounds[-1].scores / "test.txt") for arm, rounds in arms.items()}
        references = [pair.target for pair in test]
        found["tests"] = [
            dataclasses.asdict(each)
            for baseline in ("base", "control")
            if baseline in systems
            for each in paired_bootstrap(systems, references, baseline, samples=config.bootstrap)
        ]
    return found


def metrics(config: Any, filters: Any, seeds: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """Configuration, versions, every seed's numbers, and their means over the seeds by arm and iteration."""
    return {
        "arguments": dataclasses.asdict(config) | {"filters": dataclasses.asdict(filters)},
        "versions": versions(),
        "devices": devices(),
        "seeds": {str(seed): found for seed, found in seeds.items()},
        "mean": json.loads(means(seeds.values()).to_json(orient="records", double_precision=15)),
    }


def means(seeds: Any) -> pd.DataFrame:
    """A row an arm and iteration: means over the ``seeds`` that got there, and each seed's test scores."""
    entries = []
    for found in seeds:
        base = found["base"]
        raw = {"iteration": 0, **{split: base[split]["raw"] for split in ("valid", "test")}}
        arms = {RAW: [raw], TRUNCATED: [{"iteration": 0, **base}], **found["arms"]}
        entries += [{"rows": None, "steps": None, "arm": arm, **each} for arm in arms for each in arms[arm]]
    groups = pd.json_normalize(entries).groupby(["arm", "iteration"], sort=False)
    columns = {"valid_chrf": "valid.chrf", "chrf": "test.chrf", "bleu": "test.bleu", "rows": "rows", "steps": "steps"}
    made = groups.agg(seeds=("arm", "size"), **{name: (column, "mean") for name, column in columns.items()})
    for name in ("chrf", "bleu"):
        made[f"each_{name}"] = groups[columns[name]].agg(list)
    return made.reset_index()


def table(found: Mapping[str, Any]) -> str:
    """The means over seeds on the test set, and each seed's chrF, as text."""
    shown = pd.DataFrame(found["mean"]).drop(columns="each_bleu")
    for name in ("rows", "steps"):
        shown[name] = [f"{value:.0f}" if value == value else "-" for value in shown[name].astype(float)]
    shown["each_chrf"] = [" ".join(f"{value:.2f}" for value in values) for values in shown["each_chrf"]]
    signature = next(iter(found["seeds"].values()))["base"]["test"]["chrf_signature"]
    numbers = shown.to_string(index=False, float_format="{:.2f}".format)
    return f"{found['arguments']['direction']}, test set, {len(found['seeds'])} seeds\n{numbers}\n{signature}"


def write_plot(found: Mapping[str, Any], path: Path) -> None:
    """chrF on the test set by iteration: lines are means over seeds, points single seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="tight")
    mean = pd.DataFrame(found["mean"]).set_index("arm")
    for arm, color in COLORS.items():
        if arm not in mean.index:
            continue
        rows = pd.concat([mean.loc[[TRUNCATED]], mean.loc[[arm]]])
        style = "--" if arm in ("control", "ceiling") else "-"
        label = arm.replace("_", " ")
        axis.plot(rows["iteration"], rows["chrf"], style, color=color, label=label, linewidth=1.6)
        points = mean.loc[[arm]].explode("each_chrf")
        axis.plot(points["iteration"], points["each_chrf"], "o", color=color, markersize=4, alpha=0.6)
    for arm, style, size in ((TRUNCATED, "ko", 4), (RAW, "kx", 6)):
        each = mean.loc[arm, "each_chrf"]
        axis.plot([0] * len(each), each, style, markersize=size, label=arm)
    ticks = range(int(mean["iteration"].max()) + 1)
    axis.set(xlabel="iteration", ylabel=f"chrF, {found['arguments']['direction']} test set", xticks=ticks)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, format="png", dpi=130)
    plt.close(figure)
