"""What a run of CycleDistill found: ``metrics.json``, the table on screen and chrF by iteration as a figure."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from fused_kd.info import devices, versions
from fused_kd.training.data import Pair
from fused_kd.training.score import paired_bootstrap
from fused_kd.training.script import run_script
from fused_kd.training.stage import read_json, read_lines, write_json

RAW, TRUNCATED = "base, raw", "base, truncated"
COLORS = {
    "hard": "#c05a2e", "greedy": "#d9a441", "soft": "#2f6f9f", "soft_self_evolution": "#7a4f9a", "control": "#8a8a8a",
    "continued": "#b59a3c", "ceiling": "#3d8b53",
}  # fmt: skip
LOGGED = 4  # about so many entries of a training's log
GAINS = {"gain": "chrf", "bleu_gain": "bleu"}
FIXED = ("control", "continued", "ceiling")  # arms on the same rows in every iteration


class Round(NamedTuple):
    """One iteration of an arm, as folders: what it is trained on, the model, its scores; of the base no rows."""

    iteration: int
    rows: Path | None
    model: Path
    scores: Path


def valid_chrf(scores: Path) -> float:
    """Of a folder of scores, on the valid split, truncated."""
    return float(read_json(scores / "scores.json")["valid"]["chrf"])


def samples(scores: Path, valid: Sequence[Pair], most: int) -> list[dict[str, str]]:
    """The first few translations of the valid split."""
    found = zip(valid[:most], read_lines(scores / "valid.txt"), strict=False)
    return [{"source": pair.source, "reference": pair.target, "translation": text} for pair, text in found]


def record(arm: str, seed: int, each: Round, objective: str, valid: Sequence[Pair], most: int) -> dict[str, Any]:
    """A finished round, with its translations of the test set: scores, counts, training log and samples."""
    training, counts = {}, {}
    if each.rows is not None:
        logged = read_json(each.model / "training.json")
        training = {name: logged[name] for name in ("steps", "seconds", "validation", "log_history")}
        training |= {"objective": objective, "rows": len(read_lines(each.rows / "rows.jsonl"))}
        counts = {"counts": read_json(each.rows / "counts.json") or {}}
    return {
        "arm": arm,
        "seed": seed,
        "stage": each.scores.name,
        "iteration": each.iteration,
        **read_json(each.scores / "scores.json"),
        **counts,
        **training,
        "samples": samples(each.scores, valid, most),
        "translations": read_lines(each.scores / "test.txt"),
    }


def others(translations: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """What chrF, by which ``mbr`` chooses, does not say: ``chrf1``, in which recall counts once and not twice, and
    ``length``, the characters over those of the references."""
    from sacrebleu.metrics import CHRF

    length = sum(map(len, translations)) / sum(map(len, references))
    return {"chrf1": CHRF(beta=1).corpus_score(translations, [references]).score, "length": length}


def of_seed(
    records: Sequence[Mapping[str, Any]],
    arms: Sequence[str],
    variants: Sequence[str],
    references: Sequence[str],
    times: int,
) -> dict[str, Any]:
    """One seed: the base, every round of every arm, which iteration valid chrF chooses, tests on the test set.

    Args:
        records: as :func:`record`; arms that have none yet are left out.
        times: samples of the bootstrap, whose systems are each arm's last round, as truncated text; 0 leaves it out.
    """
    rounds: dict[str, list[dict[str, Any]]] = {}
    systems: dict[str, list[str]] = {}
    for arm in ("base", *arms):
        for each in sorted((each for each in records if each["arm"] == arm), key=lambda each: each["iteration"]):
            about = ("arm", "seed", "stage", "translations", "log_history")
            kept = {name: value for name, value in each.items() if name not in about}
            kept["test"] = kept["test"] | others(each["translations"], references)
            if log := each.get("log_history"):
                kept["log_history"] = log[:: max(1, len(log) // LOGGED)]
            rounds.setdefault(arm, []).append(kept)
            systems[arm] = each["translations"]
    (base,) = rounds.pop("base")
    base.pop("iteration")
    found: dict[str, Any] = {"base": base, "arms": rounds, "chosen": {}}
    for arm in variants:
        chrfs = [each["valid"]["chrf"] for each in (base, *rounds.get(arm, []))]
        found["chosen"][arm] = chrfs.index(max(chrfs))
    if times:
        found["tests"] = [
            dataclasses.asdict(each)
            for baseline in ("base", "control", "continued")
            if baseline in systems and len(systems) > 1
            for each in paired_bootstrap(systems, references, baseline, samples=times)
        ]
    return found


def metrics(about: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Configuration, versions, every seed's numbers, and their means over the seeds by arm and iteration.

    ``about`` has ``arguments``, ``arms``, ``versions``, ``devices`` and the test set's ``references``.
    """
    arguments, seeds = about["arguments"], sorted({each["seed"] for each in records if each["arm"] == "base"})
    given = about["arms"], arguments["variants"], about["references"], arguments["bootstrap"]
    found = {seed: of_seed([each for each in records if each["seed"] == seed], *given) for seed in seeds}
    return {
        **{name: about[name] for name in ("arguments", "versions", "devices")},
        "seeds": {str(seed): each for seed, each in found.items()},
        "mean": json.loads(means(found.values()).to_json(orient="records", double_precision=15)),
    }


def of_run(arguments: Mapping[str, Any], arms: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """What :func:`metrics` needs beside the rounds."""
    about = {"arguments": dict(arguments), "arms": list(arms), "versions": versions(), "devices": devices()}
    return {**about, "references": list(references)}


def write_report(about: Mapping[str, Any], records: Sequence[Mapping[str, Any]], folder: Path) -> dict[str, Any]:
    """``metrics.json`` and ``chrf.png`` of the rounds, into the folder; the metrics."""
    found = metrics(about, records)
    write_json(folder / "metrics.json", found)
    write_plot(found, folder / "chrf.png")
    return found


def means(seeds: Any) -> pd.DataFrame:
    """A row an arm and iteration: means over the ``seeds`` that got there, and each seed's test scores.

    ``gain`` and ``bleu_gain`` are against the truncated base of the same seeds.
    """
    entries = []
    for found in seeds:
        base = found["base"]
        raw = {"iteration": 0, **{split: base[split]["raw"] for split in ("valid", "test")}}
        arms = {RAW: [raw], TRUNCATED: [{"iteration": 0, **base}], **found["arms"]}
        for arm, each in ((name, each) for name, rounds in arms.items() for each in rounds):
            gains = {name: each["test"][key] - base["test"][key] for name, key in GAINS.items()}
            entries.append({"rows": None, "steps": None, "arm": arm, **gains, **each})
    groups = pd.json_normalize(entries).groupby(["arm", "iteration"], sort=False)
    columns = {
        "valid_chrf": "valid.chrf",
        "chrf": "test.chrf",
        "bleu": "test.bleu",
        "chrf1": "test.chrf1",
        "length": "test.length",
        "rows": "rows",
        "steps": "steps",
    }
    columns |= {name: name for name in GAINS}
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
        rows = mean.loc[[arm]]
        start = rows["chrf"].iloc[0] - rows["gain"].iloc[0]  # of its own seeds
        style = "--" if arm in FIXED else "-"
        label = arm.replace("_", " ")
        if arm not in (*FIXED, "greedy") and found["arguments"].get("candidates", 1) > 1:
            label += f", best of {found['arguments']['candidates']}"
        line = [0, *rows["iteration"]], [start, *rows["chrf"]]
        axis.plot(*line, style, color=color, label=label, linewidth=1.6)
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


def main(argv: Sequence[str] | None = None) -> None:
    """One report of several runs of the same settings, such as a seed each; also of runs that were killed."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of cycle_distill.py")
    parser.add_argument("--output", required=True, type=Path)
    given = parser.parse_args(argv)
    runs = [read_json(run / "run.json") for run in given.runs]
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for file in (file for run in given.runs for file in sorted(run.glob("rounds/*.json"))):
        each = read_json(file)
        other = found.setdefault((each["arm"], each["seed"], each["iteration"]), each)
        if other["stage"] != each["stage"]:
            raise ValueError(f"{file} is of other settings than another run's: {each['stage']}, not {other['stage']}")
    about, records = runs[0], list(found.values())
    about["arms"] = _all(run["arms"] for run in runs)
    about["arguments"]["variants"] = _all(run["arguments"]["variants"] for run in runs)
    about["arguments"] |= {arm: arm in about["arms"] for arm in FIXED}
    about["arguments"]["seeds"] = sorted({each["seed"] for each in records})
    print(table(write_report(about, records, given.output)))


def _all(lists: Iterable[Sequence[str]]) -> list[str]:
    """What is in some of the lists, each once, in the order of the arms' colours."""
    found = {each for some in lists for each in some}
    return [arm for arm in COLORS if arm in found]


if __name__ == "__main__":
    run_script(main)
