"""What a study found: ``metrics.json``, the tables on screen, and the plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from rich.table import Table

from fused_kd.training.drawing import pyplot, save_figure
from fused_kd.training.runs import read_json

if TYPE_CHECKING:
    from fused_kd.training.sdrrl.study import Study

BEFORE = "before"
METRICS = {"accuracy": "acc.", "chrf": "chrF", "bleu": "BLEU"}


def collect_metrics(study: Study) -> dict[str, Any]:
    """Counts of every step, each arm's training and scores by seed, and means over seeds."""
    tested = {name or BEFORE for name, _ in study.tested}
    order = [name for name in (BEFORE, *study.recipe.arms) if name in tested or name != BEFORE]
    found: dict[str, Any] = {"arms": {name: {"seeds": {}} for name in order}, "transfer": {}, "seconds": {}}
    for (name, seed), stage in study.trained.items():
        training = read_json(stage.folder / "training.json")
        found["seconds"][stage.title] = training["seconds"]
        if name:
            entry = found["arms"][name]["seeds"].setdefault(str(seed), {})
            entry["training"] = {key: training[key] for key in ("sentences", "steps", "seconds", "validation")}
            entry["training"]["loss"] = [[item["step"], item["loss"]] for item in training["log_history"]]
            entry["set"] = read_json(study.sets[name, seed].folder / "counts.json")
    for (name, seed), stage in study.tested.items():
        entry = found["arms"][name or BEFORE]["seeds"].setdefault(str(seed), {})
        entry["scores"] = read_json(stage.folder / "scores.json")
    for title, stage in study.transfer.collected.items():
        found["transfer"][title] = {"collected": read_json(stage.folder / "counts.json")}
    for title, stage in study.transfer.filtered.items():
        found["transfer"].setdefault(title, {})["filter"] = read_json(stage.folder / "counts.json")
    shop = study.shop
    if shop.translator_test is not None:
        found["translator"] = read_json(shop.translator_test.folder / "scores.json")
        found["seconds"][shop.translator.title] = read_json(shop.translator.folder / "training.json")["seconds"]
    found["tasks"] = read_json(shop.tasks.folder / "counts.json")
    for entry in found["arms"].values():
        scores = [seed["scores"] for seed in entry["seeds"].values() if "scores" in seed]
        entry["mean"] = {
            language: {key: _mean([s[language][key] for s in scores]) for key in ("accuracy", "elsewhere", *METRICS)}
            for language in (scores[0] if scores else ())
        }
    return found


def results_table(metrics: dict[str, Any]) -> Table:
    """Every arm's scores in target and source language, mean over seeds ± their deviation."""
    target, source = metrics["recipe"]["target"], metrics["recipe"]["source"]
    seeds = metrics["recipe"]["seeds"]
    table = Table(title=f"{source} to {target}, mean of {len(seeds)} seeds", caption=_caption(metrics))
    for column in ("arm", "rows", "steps"):
        table.add_column(column, justify="left" if column == "arm" else "right", overflow="fold")
    for language in (target, source):
        for label in METRICS.values():
            table.add_column(f"{language} {label}", justify="right")
    for name, entry in in_order(metrics):
        first = next(iter(entry["seeds"].values()))
        cells = [str(first["set"]["rows"]), str(first["training"]["steps"])] if "set" in first else ["-", "-"]
        for language in (target, source):
            values = entry["mean"].get(language, {})
            cells += [_shown(entry, language, key) if values.get(key) is not None else "-" for key in METRICS]
        table.add_row(name, *cells)
    return table


def transfer_table(metrics: dict[str, Any]) -> Table:
    """What became of the answers: asked, answered as the data would have it, kept by the filter."""
    table = Table(title=f"transfer set, tau {metrics['recipe']['quality']['tau']:g}")
    keys = {"collected": ("asked", "unanswered", "as_given"), "filter": ("untranslated", "below_tau", "kept")}
    table.add_column("answers")
    for column in (key for group in keys.values() for key in group):
        table.add_column(column.replace("_", " "), justify="right")
    for name, entry in metrics["transfer"].items():
        table.add_row(name, *(str(entry.get(g, {}).get(key, "-")) for g, group in keys.items() for key in group))
    return table


def write_plots(metrics: dict[str, Any], folder: str | Path) -> list[Path]:
    """``accuracy.png`` and ``chrf.png`` (each arm, both languages) and ``validation.png``, from the metrics alone."""
    plt = pyplot()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    target, source = metrics["recipe"]["target"], metrics["recipe"]["source"]
    written = []
    for key, label in (("accuracy", "accuracy of questions (%)"), ("chrf", "chrF of completions")):
        arms = [
            (name, entry) for name, entry in in_order(metrics) if entry["mean"].get(target, {}).get(key) is not None
        ]
        if not arms:
            continue
        figure, axis = plt.subplots(figsize=(7.5, 1.2 + 0.42 * len(arms)), layout="tight")
        for shift, language, colour in ((-0.2, target, "#c4572f"), (0.2, source, "#4878a8")):
            places = [number + shift for number in range(len(arms))]
            means = [entry["mean"].get(language, {}).get(key) or 0.0 for _, entry in arms]
            bars = axis.barh(places, means, 0.38, color=colour, label=language)
            axis.bar_label(bars, fmt="%.1f", fontsize=8, padding=6)
            for place, (_, entry) in zip(places, arms, strict=True):
                points = _values(entry, language, key)
                axis.plot(points, [place] * len(points), ".", color="black", markersize=4)
        if key == "accuracy":
            scores = next(iter(arms[0][1]["seeds"].values()))["scores"]
            axis.axvline(
                scores[target]["majority"], color="gray", linestyle="--", linewidth=1, label="commonest answer"
            )
        axis.set_yticks(range(len(arms)), [name for name, _ in arms], fontsize=9)
        axis.invert_yaxis()
        axis.set(xlabel=f"{label}; dots are seeds")
        axis.margins(x=0.12)
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=3, frameon=False)
        written.append(save_figure(figure, folder / f"{key}.png"))
    trained = [(name, entry) for name, entry in in_order(metrics) if any("set" in s for s in entry["seeds"].values())]
    if trained:
        figure, axis = plt.subplots(figsize=(6.4, 4.0), layout="tight")
        for name, entry in trained:
            points = next(iter(entry["seeds"].values()))["training"]["validation"]
            axis.plot([p["step"] for p in points], [p["loss"] for p in points], marker=".", label=name, linewidth=1.3)
        axis.set(xlabel="optimizer step", ylabel="validation loss (nats per token), each arm's own rows")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
        written.append(save_figure(figure, folder / "validation.png"))
    return written


def in_order(metrics: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The model before, then the arms as the recipe has them."""
    order = [BEFORE, *metrics["recipe"]["arms"]]
    return [(name, metrics["arms"][name]) for name in order if name in metrics["arms"]]


def _caption(metrics: dict[str, Any]) -> str:
    for _, entry in in_order(metrics):
        for seed in entry["seeds"].values():
            scores = seed.get("scores", {}).get(metrics["recipe"]["target"], {})
            if scores.get("majority") is not None:
                return f"commonest answer of each kind: {scores['majority']:.1f}"
    return ""


def _values(entry: dict[str, Any], language: str, key: str) -> list[float]:
    found = [seed["scores"][language][key] for seed in entry["seeds"].values() if language in seed.get("scores", {})]
    return [value for value in found if value is not None]


def _shown(entry: dict[str, Any], language: str, key: str) -> str:
    values = _values(entry, language, key)
    return f"{fmean(values):.1f}" + (f" ±{stdev(values):.1f}" if len(values) > 1 else "")


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
