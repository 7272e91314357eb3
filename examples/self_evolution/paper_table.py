"""Tables and figures of the recipe, from its results.json alone.

    python examples/self_evolution/paper_table.py RESULTS_JSON FOLDER

writes results.md, results.csv and the figures into FOLDER.
"""

from __future__ import annotations

import argparse
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fused_kd.training.script import run_script
from fused_kd.training.stage import read_json, write_bytes, write_text

METRICS = {"bleu": "BLEU", "chrf": "chrF", "similarity": "similarity to the teacher"}
KEYS = ["condition", "method", "seed", "parameter", "value"]
CSV = ["condition", "method", "direction", "metric", "mean", "std", "seeds", "dagger"]
AVERAGE = "average"
ALPHA = 0.05
HIGHER, LOWER = "†", "‡"
TEACHER, STUDENT = "teacher", "student before"
NAMES = {"gamma": "Γ", "beta": "β", "fraction": "the share of hard tokens (K)", "lam": "λ"}
CURVES = {"hard_fraction": "share of hard tokens", "difficulty": "mean difficulty, nats"}
COLOURS = [*matplotlib.colormaps["tab10"].colors, *matplotlib.colormaps["tab20"].colors[1::2]]
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}
CAPTIONS = {
    "methods": "Average over directions, with the standard deviation over seeds; dots are seeds. Bars start at the "
    "student before distillation, where the methods have one.",
    "similarity": "Similarity of each student's output to the teacher's own output, average over directions, with the "
    "standard deviation over seeds.",
    "sweep": "BLEU against {name}, average over directions, with the standard deviation over seeds; the baseline, with "
    "the same seeds, as a line.",
    "hard_fraction": "Share of hard tokens while training, mean over seeds: by method (difficulty above its Γ, or 0.4 "
    "where it has none) and by the Γ of the sweep. The difficulty of a method without a teacher is its cross-entropy.",
    "difficulty": "Mean difficulty KL(ỹ‖q) of the training tokens, in nats, mean over seeds; the cross-entropy for a "
    "method without a teacher.",
}
READING = f"""\
- ± is the sample standard deviation over seeds: what another training order would change. It says nothing about the
  choice of test sentences.
- {HIGHER} and {LOWER} come from a paired bootstrap over the test sentences of each seed. They say nothing about the
  choice of seeds, and no correction is made for the number of tests.
- Bold is the best mean of a column at the shown precision; several cells may share it.
- The average is taken over directions within a seed first; its deviation is that of these averages.
- The student before distillation, where it is shown, is where every method starts. On a small set that is seen several
  times, methods may differ in how much they lose.
"""


class Results:
    """What results.json holds, as data frames; methods are categories, by the names shown and in the tables' order.

    Attributes:
        runs: a row a trained student and direction: condition, method, seed, parameter and value (of a sweep, else
            NaN), objective, steps, seconds, direction, bleu, chrf, similarity.
        tests: a row a paired test against the baseline: condition, method, seed, direction, metric, delta, p.
        logs: a row an entry of a training's log: condition, method, parameter, value, progress (%), what was logged.
    """

    def __init__(self, found: Mapping[str, Any]) -> None:
        rows, logs = [], []
        for run in found["runs"]:
            flat = {"parameter": None, **run, **(run["sweep"] or {})}
            rows += [flat | {"direction": direction} | scores for direction, scores in run["scores"].items()]
            logs += [flat | e | {"progress": round(100 * e["step"] / run["steps"], 3)} for e in run["history"]]
        self.found, self.slugs = found, {label: slug for slug, label in found["labels"].items()}
        self.runs = self._frame(rows, [*KEYS, "objective", "steps", "seconds", "direction", *METRICS])
        self.logs = self._frame(logs, [*KEYS, "progress", *CURVES])
        columns = ["condition", "method", "seed", "direction", "metric", "delta", "p"]
        self.tests = self._frame(found["significance"], columns)
        self.baseline = found["labels"].get(found["baseline"])
        self.conditions = list(dict.fromkeys(self.runs[self.runs.parameter.isna()].condition))
        # a sweep's point that is a run of the table too was trained once
        self.trained = self.runs.drop_duplicates(["condition", "method", "seed", "objective"])

    def _frame(self, rows: Sequence[Mapping[str, Any]], columns: list[str]) -> pd.DataFrame:
        frame, labels = pd.DataFrame(rows, columns=columns), self.found["labels"]
        return frame.assign(method=pd.Categorical(frame.method.map(labels), list(labels.values()), ordered=True))

    def of(self, condition: str) -> pd.DataFrame:
        """The runs of a condition's table, which belong to no sweep."""
        return self.runs[(self.runs.condition == condition) & self.runs.parameter.isna()]

    def scores(self, runs: pd.DataFrame, metric: str, by: Sequence[str] = ("method", "seed")) -> pd.DataFrame:
        """(by) x the directions and their average."""
        wide = runs.pivot_table(metric, list(by), "direction", observed=True)
        return averaged(wide[self.found["directions"]])

    def references(self, condition: str, metric: str) -> pd.DataFrame:
        """Scores of the teacher and, unless the condition starts from random weights, of the student before."""
        rows = {TEACHER: self.found["teacher"], STUDENT: self.found["student"]}
        if self.found["settings"]["conditions"][condition].get("start") == "scratch":
            rows.pop(STUDENT)
        cells = {name: {d: s.get(metric) for d, s in found.items()} for name, found in rows.items()}
        frame = pd.DataFrame.from_dict(cells, orient="index", columns=self.found["directions"], dtype=float)
        return averaged(frame.dropna())  # the teacher has no similarity to itself


def averaged(scores: pd.DataFrame) -> pd.DataFrame:
    """With a column for the average over several directions."""
    return scores.assign(**{AVERAGE: scores.mean(axis=1)}) if scores.shape[1] > 1 else scores


class Table:
    """Methods x directions for one condition and metric: ``mean`` and ``std`` over seeds, and as texts."""

    def __init__(self, results: Results, condition: str, metric: str) -> None:
        self.results, self.condition, self.metric = results, condition, metric
        self.scores = results.scores(results.of(condition), metric)
        groups = self.scores.groupby("method", observed=True)
        self.mean, self.std = groups.mean(), groups.std()
        self.references = results.references(condition, metric)
        self.seeds = sorted(results.of(condition).seed.unique())
        tests = results.tests[(results.tests.condition == condition) & (results.tests.metric == metric)]
        tests = tests.assign(higher=(tests.p < ALPHA) & (tests.delta > 0), lower=(tests.p < ALPHA) & (tests.delta < 0))
        self.tests = tests.groupby("method", observed=True).agg({"higher": "sum", "lower": "sum", "p": "size"})
        self.marks = {}  # where it is the same with every seed
        for key, own in tests.groupby(["method", "direction"], observed=True):
            if own.higher.all() or own.lower.all():
                self.marks[key] = HIGHER if own.higher.all() else LOWER

    def text(self, method: str, column: str) -> str:
        """Mean, ± deviation, mark."""
        mean, std = (frame.loc[method, column] for frame in (self.mean, self.std))
        spread = "" if np.isnan(std) else f"± {std:.1f}"
        return " ".join(filter(None, [f"{mean:.1f}", spread, self.marks.get((method, column))]))

    def markdown(self) -> str:
        """A Markdown table; the best mean of each column, as shown, in bold."""
        best = self.mean.round(1).eq(self.mean.round(1).max())
        rows = {f"*{name}*": {c: f"{v:.1f}" for c, v in row.items()} for name, row in self.references.iterrows()}
        for method in self.mean.index:
            rows[method] = {column: self.text(method, column) for column in self.mean}
            for column in self.mean.columns[best.loc[method]]:
                rows[method][column] = re.sub(r"^\S+", lambda match: f"**{match[0]}**", rows[method][column])
            if len(self.tests):
                counts = tuple(self.tests.loc[method]) if method in self.tests.index else None
                rows[method]["higher / lower of tests"] = "{} / {} of {}".format(*counts) if counts else "-"
        shown = pd.DataFrame.from_dict(rows, orient="index").rename_axis(METRICS[self.metric]).fillna("")
        return shown.to_markdown(colalign=["left"] + ["right"] * shown.shape[1], disable_numparse=True)

    def caption(self) -> str:
        """What the numbers are, and how many seeds they stand on."""
        seeds = f"{len(self.seeds)} seed{'s' * (len(self.seeds) != 1)} ({', '.join(map(str, self.seeds))})"
        spread = " ± sample standard deviation" if len(self.seeds) > 1 else ""
        parts = [f"{METRICS[self.metric]}, condition {self.condition}: mean over {seeds}{spread}"]
        if len(self.tests):
            higher, lower, total = self.tests.sum()
            parts.append(
                f"{HIGHER} / {LOWER}: higher / lower than {self.results.baseline} with p < {ALPHA:g} in every seed "
                f"(paired bootstrap over the test sentences); of the {total} tests (method, direction, seed) {higher} "
                f"({higher / total:.0%}) found a higher and {lower} ({lower / total:.0%}) a lower score; chance alone "
                f"would give about {ALPHA:.0%}"
            )
        return "; ".join(parts) + "."

    def records(self) -> pd.DataFrame:
        """Rows of the CSV, unrounded."""
        long = pd.concat({name: getattr(self, name).stack(future_stack=True) for name in ("mean", "std")}, axis=1)
        long = long.rename_axis(["label", "direction"]).reset_index()
        marks = [self.marks.get(key, "") for key in zip(long.label, long.direction, strict=True)]
        slugs = [self.results.slugs[label] for label in long.label]
        about = {"condition": self.condition, "metric": self.metric, "method": slugs, "dagger": marks}
        return long.assign(**about, seeds=len(self.seeds))[CSV]


def write_report(found: Mapping[str, Any], folder: str | Path) -> list[Path]:
    """Write results.md, results.csv and the figures that have data; returns the paths, the report first."""
    results, folder = Results(found), Path(folder)
    tables = {(c, m): Table(results, c, m) for c in results.conditions for m in METRICS}
    figures, paths = draw(results, tables), []
    for name, figure in figures.items():
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=130)
        paths.append(folder / f"{name}.png")
        write_bytes(paths[-1], content.getvalue())
    rows = pd.concat([pd.DataFrame(columns=CSV), *(table.records() for table in tables.values())])
    write_text(folder / "results.csv", rows.to_csv(index=False))
    write_text(folder / "results.md", markdown(results, tables, list(figures)) + "\n")
    return [folder / "results.md", folder / "results.csv", *paths]


def markdown(results: Results, tables: Mapping[tuple[str, str], Table], figures: Sequence[str]) -> str:
    """The whole report; ``figures`` are the names of the files beside it."""

    def show(name: str) -> str:
        kind, _, rest = name.partition("_")
        caption = CAPTIONS.get(name) or CAPTIONS[kind].format(name=NAMES.get(rest, rest))
        return f"{caption}\n\n![{name}]({name}.png)"

    trained = results.trained
    count, swept, hours = len(trained), trained.parameter.notna().sum(), trained.seconds.sum() / 3600
    parts = ["# Results", f"{count} runs, {swept} of them in sweeps, {hours:.1f} hours of training in all."]
    for condition in results.conditions:
        parts.append(f"## Condition: {condition}")
        for metric in ("bleu", "chrf"):
            table = tables[condition, metric]
            parts += [table.markdown(), table.caption(), f"Signature: `{results.found['signatures'][metric]}`"]
        parts += [same_gradient(tables[condition, "bleu"]), show(f"methods_{file_name(condition)}")]
    parts += ["## Figures", *(show(name) for name in figures if not name.startswith("methods_"))]
    parts += ["## Speed", speed(trained), "## How to read it", READING.rstrip()]
    for key in ("settings", "versions", "machine"):
        text = json.dumps(results.found[key], indent=1, ensure_ascii=False)
        parts.append(f"<details><summary>{key}</summary>\n\n```json\n{text}\n```\n\n</details>")
    return "\n\n".join(filter(None, parts))


def speed(trained: pd.DataFrame) -> str:
    """Steps, minutes and milliseconds a step of each method, means over its runs."""
    trained = trained.assign(minutes=trained.seconds / 60, ms=1000 * trained.seconds / trained.steps)
    found = trained.groupby("method", observed=True)[["steps", "minutes", "ms"]].mean()
    found = found.rename(columns={"minutes": "minutes a run", "ms": "ms a step"}).rename_axis("means over runs")
    return found.to_markdown(floatfmt=("", ".0f", ".1f", ".0f"))


def same_gradient(table: Table) -> str:
    """What ForwardKD and NoEvo differ by, seed by seed: the size of a difference that means nothing."""
    if not {"ForwardKD", "NoEvo"} <= set(table.mean.index):
        return ""
    gaps = table.scores.loc["ForwardKD"] - table.scores.loc["NoEvo"]
    gaps = gaps.drop(columns=AVERAGE, errors="ignore").abs().stack()
    return (
        "ForwardKD and NoEvo have the same gradient at temperature 1 and one λ. Here they differ by "
        f"{gaps.mean():.2f} BLEU on average and {gaps.max():.2f} at most over {len(gaps)} pairs of runs (seed, "
        "direction): a difference of that size between other methods, in one run, may be rounding that training has "
        "amplified."
    )


def draw(results: Results, tables: Mapping[tuple[str, str], Table]) -> dict[str, Figure]:
    """File name without suffix -> figure."""
    figures: dict[str, Figure] = {}
    with matplotlib.rc_context(STYLE):
        for condition in results.conditions:
            figures[f"methods_{file_name(condition)}"] = draw_bars([tables[condition, m] for m in ("bleu", "chrf")])
        similarities = [table for (_, metric), table in tables.items() if metric == "similarity"]
        if similarities:
            figures["similarity"] = draw_bars(similarities)
        for parameter in results.runs.parameter.dropna().unique():
            figures[f"sweep_{file_name(parameter)}"] = draw_sweep(results, parameter)
        logged = [key for key in CURVES if results.logs[key].notna().any()]
        return figures | {key: draw_curves(results, key, CURVES[key]) for key in logged}


def draw_bars(tables: Sequence[Table]) -> Figure:
    """A panel a table: a bar a method from the student before distillation to its average, seeds as dots."""
    width = max(5.6, 1.0 + 0.62 * max(len(table.mean) for table in tables))
    figure = Figure(figsize=(width, 4.0 * len(tables)), layout="constrained")
    for axis, table in zip(figure.subplots(len(tables), squeeze=False).flat, tables, strict=True):
        column, base = table.mean.columns[-1], 0.0
        for (name, level), line in zip(table.references[column].items(), ("--", "-"), strict=False):
            axis.axhline(level, color="#222222", linestyle=line, label=f"{name} {level:.1f}")
            base = level if name == STUDENT and table.metric != "similarity" else base
        mean = table.mean[column]
        colours = [COLOURS[code % len(COLOURS)] for code in mean.index.codes]
        spread = table.std[column].fillna(0)
        bars = axis.bar(list(mean.index), mean - base, bottom=base, yerr=spread, color=colours, capsize=4, alpha=0.85)
        axis.bar_label(bars, [f"{level:.1f}" for level in mean], fontsize=9, padding=4)
        dots = table.scores[column].reset_index()
        axis.plot(dots.method.astype(str), dots[column], "o", markersize=3.2, color="white", markeredgecolor="#222222")
        axis.set_xticks(range(len(mean)), list(mean.index), rotation=30, ha="right", rotation_mode="anchor")
        axis.set_title(table.condition, loc="right")
        axis.set_ylabel(f"{METRICS[table.metric]}, {'average over directions' if column == AVERAGE else column}")
        axis.grid(axis="y", alpha=0.3)
        axis.margins(y=0.14)
        if len(table.references):
            axis.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2)
    return figure


def draw_sweep(results: Results, parameter: str) -> Figure:
    """BLEU against a parameter, a panel a condition; the baseline, with the same seeds, as a line."""
    panels = list(results.runs[results.runs.parameter == parameter].groupby("condition", sort=False))
    figure = Figure(figsize=(5.6 * len(panels), 3.8), layout="constrained")
    for axis, (condition, own) in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels, strict=True):
        scores = results.scores(own, "bleu", ("method", "seed", "value")).iloc[:, -1]
        for method, line in scores.groupby("method", observed=True):
            points = line.groupby("value").agg(["mean", "std"])
            axis.errorbar(points.index, points["mean"], points["std"].fillna(0), marker="o", capsize=3, label=method)
        table = results.of(condition)
        base = table[(table.method == results.baseline) & table.seed.isin(own.seed)]
        if len(base):
            level = results.scores(base, "bleu").iloc[:, -1].mean()
            axis.axhline(level, color="#222222", linestyle="--", label=results.baseline)
        axis.set(xlabel=NAMES.get(parameter, parameter), ylabel="BLEU, average over directions", title=condition)
        axis.set_xscale("log" if own.value.min() > 0 and own.value.max() >= 10 * own.value.min() else "linear")
        axis.set_xticks([], minor=True)
        axis.set_xticks(sorted(own.value.unique()), [f"{tick:g}" for tick in sorted(own.value.unique())])
        axis.grid(alpha=0.3)
        axis.legend()
    return figure


def draw_curves(results: Results, key: str, label: str) -> Figure:
    """``key`` of the log over the progress of training, mean over seeds: a panel a condition, and one a sweep of Γ."""
    logs = results.logs.dropna(subset=[key])
    parts = {("method",): logs[logs.parameter.isna()], ("method", "value"): logs[logs.parameter == "gamma"]}
    panels = [(c, by, own) for by, part in parts.items() for c, own in part.groupby("condition", sort=False)]
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(12.4, 4.2 * rows), layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False).flat
    for axis in axes[len(panels) :]:
        axis.axis("off")
    for axis, (condition, by, own) in zip(axes, panels, strict=False):
        for number, (name, curve) in enumerate(own.groupby(list(by), observed=True)):
            mean = curve.groupby("progress")[key].mean()
            shown = name[0] if len(name) == 1 else f"{name[0]}, Γ = {name[1]:g}"
            style = {"color": COLOURS[number % len(COLOURS)], "linestyle": ("-", "--", "-.")[number % 3]}
            axis.plot(mean.index, mean, label=shown, **style)
        axis.set(title=condition, xlabel="training progress, %", ylabel=label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3)
    return figure


def file_name(text: str) -> str:
    """Text as a part of a file name."""
    return re.sub(r"[^\w.=-]+", "-", text)


def main(argv: Sequence[str] | None = None) -> list[Path]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", metavar="RESULTS_JSON")
    parser.add_argument("folder", metavar="FOLDER")
    args = parser.parse_args(argv)
    if (found := read_json(Path(args.results))) is None:
        raise ValueError(f"results={args.results!r}: no such file, or no JSON")
    if not isinstance(found, dict) or "runs" not in found:
        raise ValueError(f"results={args.results!r}: no results.json of the recipe")
    written = write_report(found, args.folder)
    print(*written, sep="\n")
    return written


if __name__ == "__main__":
    run_script(main)
