"""Tables and figures of the recipe, from its results.json alone.

    python examples/self_evolution/paper_table.py RESULTS_JSON FOLDER

writes results.md, results.csv and every figure that has data into FOLDER. What is not trained yet is left out.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import textwrap
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
AVERAGE = "average"
ALPHA = 0.05
HIGHER, LOWER = "†", "‡"
TEACHER, STUDENT = "teacher", "student before"
NAMES = {"gamma": "Γ", "beta": "β", "fraction": "the share of hard tokens (K)", "lam": "λ"}
COMPARED = ("forward_kd", "no_evo", "skew")  # lines beside a sweep
CURVES = {"hard_fraction": "share of hard tokens", "difficulty": "mean difficulty, nats"}
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
    "sweep": "BLEU against {name}, average over directions, with the standard deviation over seeds; the other methods, "
    "with the same seeds, as lines.",
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
    """What results.json holds, as data frames.

    Attributes:
        runs: a row a trained student and direction: condition, method, seed, parameter and value (of a sweep, else
            NaN), objective, steps, seconds, direction, bleu, chrf, similarity.
        tests: a row a paired test against the baseline: condition, method, seed, direction, metric, delta, p.
        logs: a row an entry of a training's log: condition, parameter, curve (its name), progress (%), values.
        labels: method -> the name shown, in the order of the tables.

    Raises:
        ValueError: a part is missing, or a run is there twice.
    """

    def __init__(self, found: Any) -> None:
        if not isinstance(found, dict):
            raise ValueError(f"results must be a JSON object, got {type(found).__name__}")
        if missing := [key for key in ("directions", "labels", "runs") if key not in found]:
            raise ValueError(f"results has no {', '.join(missing)} (there: {', '.join(found) or 'nothing'})")
        self.found, self.labels, self.baseline = found, found["labels"], found.get("baseline", "forward_kd")
        keys = ["condition", "method", "seed", "parameter", "value"]
        rows, logs = [], []
        for number, run in enumerate(found["runs"]):
            if missing := [key for key in keys[:3] if key not in run]:
                raise ValueError(f"results['runs'][{number}] has no {', '.join(missing)}")
            flat = {"parameter": None, **run, **(run.get("sweep") or {})}
            rows += [flat | {"direction": d} | scores for d, scores in (run.get("scores") or {None: {}}).items()]
            curve = self.labels.get(run["method"], run["method"])
            curve += f", Γ = {flat['value']:g}" if flat["parameter"] == "gamma" else ""
            about = {key: flat[key] for key in ("condition", "parameter")} | {"curve": curve}
            for entry in run.get("history") or []:
                logs.append(about | entry | {"progress": round(100 * entry["step"] / run["steps"], 3)})
        kept = ["objective", "steps", "seconds", "direction", *METRICS]
        self.logs = pd.DataFrame(logs, columns=["condition", "parameter", "curve", "progress", *CURVES])
        self.runs = pd.DataFrame(rows, columns=[*keys, *kept])
        twice = self.runs[self.runs.duplicated([*keys, "direction"])]
        if len(twice):
            raise ValueError(f"results['runs'] has a run twice: {twice.iloc[0][keys].to_dict()}")
        columns = ["condition", "method", "seed", "direction", "metric", "delta", "p"]
        self.tests = pd.DataFrame(found.get("significance") or [], columns=columns)
        self.conditions = list(dict.fromkeys(self.runs.condition))

    def of(self, condition: str) -> pd.DataFrame:
        """The runs of a condition's table, which belong to no sweep."""
        return self.runs[(self.runs.condition == condition) & self.runs.parameter.isna()]

    def trained(self) -> pd.DataFrame:
        """A row a training; a sweep's point that is a run of the table too counts once."""
        return self.runs.drop_duplicates(["condition", "method", "seed", "objective"])

    def scores(self, runs: pd.DataFrame, metric: str, by: Sequence[str] = ("method", "seed")) -> pd.DataFrame:
        """(by) x the directions that have a score, and the average of the rows that have all of them."""
        wide = runs.dropna(subset=[metric]).pivot(index=list(by), columns="direction", values=metric)
        wide = wide[[direction for direction in self.found["directions"] if direction in wide]]
        order = {name: place for place, name in enumerate(self.labels)}
        wide = wide.sort_index(level="method", key=lambda names: names.map(order), sort_remaining=False, kind="stable")
        return wide.assign(**{AVERAGE: wide.mean(axis=1, skipna=False)}) if len(wide.columns) > 1 else wide

    def references(self, condition: str, metric: str, columns: Sequence[str]) -> pd.DataFrame:
        """Scores of the teacher and, unless the condition starts from random weights, of the student before."""
        conditions = self.found.get("settings", {}).get("conditions", {})
        scratch = conditions.get(condition, {}).get("start") == "scratch"
        rows = {}
        for name, scores in ((TEACHER, self.found.get("teacher")), (STUDENT, self.found.get("student"))):
            if scores and not (scratch and name == STUDENT):
                rows[name] = {direction: found.get(metric) for direction, found in scores.items()}
        frame = (
            pd.DataFrame(rows, dtype=float).T.reindex(columns=[c for c in columns if c != AVERAGE]).dropna(how="all")
        )
        return frame.assign(**{AVERAGE: frame.mean(axis=1, skipna=False)}) if AVERAGE in columns else frame

    def marks(self, scores: pd.DataFrame, condition: str, metric: str) -> dict[tuple[str, str], str]:
        """(method, direction) -> † or ‡, where p < 0.05 and the sign is the same with every seed that has a score."""
        tests = self.tests[(self.tests.condition == condition) & (self.tests.metric == metric)]
        seeds = scores.groupby("method").count()
        found = {}
        for (method, direction), own in tests.groupby(["method", "direction"]):
            whole = own.seed.nunique() >= seeds.get(direction, {}).get(method, np.inf)
            if whole and (own.p < ALPHA).all() and own.delta.ne(0).all() and np.sign(own.delta).nunique() == 1:
                found[method, direction] = HIGHER if own.delta.iloc[0] > 0 else LOWER
        return found


class Table:
    """Methods x directions for one condition and metric: ``mean``, ``std`` and ``count`` over seeds, and as texts."""

    def __init__(self, results: Results, condition: str, metric: str) -> None:
        self.results, self.condition, self.metric = results, condition, metric
        self.scores = results.scores(results.of(condition), metric)
        groups = self.scores.groupby("method", sort=False)
        self.mean, self.std, self.count = groups.mean(), groups.std(), groups.count()
        self.references = results.references(condition, metric, list(self.mean))
        self.marks = results.marks(self.scores, condition, metric)
        self.seeds = sorted(results.of(condition).seed.unique())
        tests = results.tests[(results.tests.condition == condition) & (results.tests.metric == metric)]
        tests = tests.assign(higher=(tests.p < ALPHA) & (tests.delta > 0), lower=(tests.p < ALPHA) & (tests.delta < 0))
        self.tests = tests.groupby("method").agg(higher=("higher", "sum"), lower=("lower", "sum"), total=("p", "size"))

    @property
    def best(self) -> pd.DataFrame:
        """Which means are the highest of their column, as shown."""
        shown = self.mean.round(1)
        return shown.eq(shown.max())

    def text(self, method: str, column: str) -> str:
        """Mean, ± deviation, mark, and the number of seeds where it is not that of the table."""
        mean, std, count = (frame.loc[method, column] for frame in (self.mean, self.std, self.count))
        if np.isnan(mean):
            return "-"
        parts = [f"{mean:.1f}", "" if np.isnan(std) else f"± {std:.1f}", self.marks.get((method, column), "")]
        return " ".join([*filter(None, parts), *([f"({count})"] if count < len(self.seeds) else [])])

    def texts(self) -> pd.DataFrame:
        """Every cell as shown, by method."""
        cells = {m: {column: self.text(m, column) for column in self.mean} for m in self.mean.index}
        return pd.DataFrame.from_dict(cells, orient="index", columns=list(self.mean))

    def markdown(self) -> str:
        """A Markdown table; the best mean of each column in bold."""
        texts = self.texts()
        bold = texts.map(lambda text: re.sub(r"^\S+", lambda m: f"**{m[0]}**", text))
        shown = texts.where(~self.best, bold).rename(index=self.results.labels)
        references = self.references.map(lambda value: "-" if np.isnan(value) else f"{value:.1f}")
        if len(self.tests):
            counts = self.tests.reindex(self.mean.index)
            column = "higher / lower of tests"
            shown[column] = ["-" if np.isnan(t) else f"{h:.0f} / {w:.0f} of {t:.0f}" for h, w, t in counts.to_numpy()]
            references[column] = ""
        shown = pd.concat([references.rename(index="*{}*".format), shown]).rename_axis(METRICS[self.metric])
        return shown.to_markdown(colalign=["left"] + ["right"] * shown.shape[1], disable_numparse=True)

    def caption(self) -> str:
        """What the numbers are, and how many seeds they stand on."""
        count, seeds = len(self.seeds), ", ".join(map(str, self.seeds))
        parts = [
            f"{METRICS[self.metric]}, condition {self.condition}: mean over {count} seed{'s' * (count != 1)} ({seeds})"
        ]
        if self.std.notna().any(axis=None):
            parts[0] += " ± sample standard deviation"
        if (self.count < count).any(axis=None):
            parts.append("(n) where only n of the seeds are there yet")
        if len(self.tests):
            name = self.results.labels.get(self.results.baseline, self.results.baseline)
            higher, lower, total = self.tests.sum()
            parts.append(
                f"{HIGHER} / {LOWER}: higher / lower than {name} with p < {ALPHA:g} in every seed (paired bootstrap "
                f"over the test sentences); of the {total} tests (method, direction, seed) {higher} "
                f"({higher / total:.0%}) found a higher and {lower} ({lower / total:.0%}) a lower score; chance alone "
                f"would give about {ALPHA:.0%}"
            )
        return "; ".join(parts) + "."

    def records(self) -> pd.DataFrame:
        """Rows of the CSV, unrounded."""
        frames = {"mean": self.mean, "std": self.std, "seeds": self.count}
        long = pd.DataFrame({name: frame.stack(future_stack=True) for name, frame in frames.items()}).dropna(
            subset="mean"
        )
        long.index.names = ["method", "direction"]
        long = long.reset_index().assign(condition=self.condition, metric=self.metric)
        long["dagger"] = [self.marks.get(key, "") for key in zip(long.method, long.direction, strict=True)]
        return long[["condition", "method", "direction", "metric", "mean", "std", "seeds", "dagger"]]


def write_report(found: Mapping[str, Any], folder: str | Path) -> list[Path]:
    """Write results.md, results.csv and the figures that have data; returns the paths, the report first.

    Raises:
        ValueError: as :class:`Results`.
    """
    results, folder = Results(found), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tables = {(c, m): Table(results, c, m) for c in results.conditions for m in METRICS}
    tables = {key: table for key, table in tables.items() if len(table.mean)}
    figures = draw(results, tables)
    paths = []
    for name, figure in figures.items():
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=130)
        paths.append(folder / f"{name}.png")
        write_bytes(paths[-1], content.getvalue())
    rows = [table.records() for table in tables.values()]
    columns = ["condition", "method", "direction", "metric", "mean", "std", "seeds", "dagger"]
    write_text(folder / "results.csv", pd.concat([pd.DataFrame(columns=columns), *rows]).to_csv(index=False))
    write_text(folder / "results.md", markdown(results, tables, list(figures)) + "\n")
    return [folder / "results.md", folder / "results.csv", *paths]


def print_tables(found: Mapping[str, Any]) -> None:
    """The BLEU table of each condition, on the terminal."""
    results = Results(found)
    for condition in results.conditions:
        table = Table(results, condition, "bleu")
        if len(table.mean):
            print(f"\n{condition}\n\n{table.markdown()}\n\n{table.caption()}")


def markdown(results: Results, tables: Mapping[tuple[str, str], Table], figures: Sequence[str]) -> str:
    """The whole report; ``figures`` are the names of the files beside it."""

    def show(name: str) -> str:
        kind, _, rest = name.partition("_")
        caption = CAPTIONS.get(name) or CAPTIONS[kind].format(name=NAMES.get(rest, rest))
        return f"{caption}\n\n![{name}]({name}.png)"

    trained = results.trained()
    parts = ["# Results", progress(results)]
    for condition in results.conditions:
        parts.append(f"## Condition: {condition}")
        for metric in ("bleu", "chrf"):
            if table := tables.get((condition, metric)):
                parts += [table.markdown(), table.caption()]
                if signature := results.found.get("signatures", {}).get(metric):
                    parts.append(f"Signature: `{signature}`")
        parts += filter(None, [same_gradient(tables.get((condition, "bleu")))])
        parts += [show(name) for name in figures if name == f"methods_{file_name(condition)}"]
    if others := [name for name in figures if not name.startswith(("methods_", "table_"))]:
        parts += ["## Figures", *map(show, others)]
    if trained.seconds.notna().any():
        parts += ["## Speed", speed(results).to_markdown(floatfmt=("", ".0f", ".1f", ".0f"))]
    parts += ["## How to read it", READING.rstrip()]
    for key in ("settings", "versions", "machine"):
        if results.found.get(key):
            text = json.dumps(results.found[key], indent=1, ensure_ascii=False)
            parts.append(f"<details><summary>{key}</summary>\n\n```json\n{text}\n```\n\n</details>")
    return "\n\n".join(parts)


def progress(results: Results) -> str:
    """How many runs are there, and their hours."""
    trained, parts = results.trained(), []
    for condition in results.conditions:
        seeds = results.of(condition).groupby("method").seed.nunique()
        if len(seeds):
            spread = f"{seeds.min()}" if seeds.min() == seeds.max() else f"{seeds.min()} to {seeds.max()}"
            parts.append(f"{condition}: {len(seeds)} methods with {spread} seed{'s' * bool(seeds.max() != 1)}")
    swept = trained.parameter.notna().sum()
    hours = trained.seconds.sum() / 3600
    return f"{len(trained)} runs, {swept} of them in sweeps, {hours:.1f} hours of training in all. {'; '.join(parts)}."


def speed(results: Results) -> pd.DataFrame:
    """Steps, minutes and milliseconds a step of each method, means over its runs."""
    trained = results.trained()
    trained = trained.assign(minutes=trained.seconds / 60, ms=1000 * trained.seconds / trained.steps)
    found = trained.groupby("method", sort=False)[["steps", "minutes", "ms"]].mean()
    found = found.rename(index=results.labels, columns={"minutes": "minutes a run", "ms": "ms a step"})
    return found.rename_axis("means over runs")


def same_gradient(table: Table | None) -> str | None:
    """What ForwardKD and NoEvo differ by, seed by seed: the size of a difference that means nothing."""
    same = ("forward_kd", "no_evo")
    if table is None or not set(same) <= set(table.mean.index):
        return None
    first, second = (table.scores.loc[name].drop(columns=AVERAGE, errors="ignore") for name in same)
    gaps = (first - second).abs().stack()
    if not len(gaps):
        return None
    names = [table.results.labels[name] for name in same]
    return (
        f"{names[0]} and {names[1]} have the same gradient at temperature 1 and one λ. Here they differ by "
        f"{gaps.mean():.2f} BLEU on average and {gaps.max():.2f} at most over {len(gaps)} pairs of runs (seed, "
        "direction): a difference of that size between other methods, in one run, may be rounding that training has "
        "amplified."
    )


def draw(results: Results, tables: Mapping[tuple[str, str], Table]) -> dict[str, Figure]:
    """File name without suffix -> every figure that has data."""
    figures: dict[str, Figure | None] = {}
    with matplotlib.rc_context(STYLE):
        for condition in results.conditions:
            own = [tables[condition, metric] for metric in ("bleu", "chrf") if (condition, metric) in tables]
            figures[f"methods_{file_name(condition)}"] = draw_bars(results, own)
        figures["similarity"] = draw_bars(results, [t for (_, metric), t in tables.items() if metric == "similarity"])
        for parameter in results.runs.parameter.dropna().unique():
            figures[f"sweep_{file_name(parameter)}"] = draw_sweep(results, parameter)
        figures |= {key: draw_curves(results, key, label) for key, label in CURVES.items()}
        for (condition, metric), table in tables.items():
            if metric != "similarity":
                figures[f"table_{file_name(condition)}_{metric}"] = draw_table(table)
    return {name: figure for name, figure in figures.items() if figure is not None}


def draw_bars(results: Results, tables: Sequence[Table]) -> Figure | None:
    """A panel a table: a bar a method from the student before distillation to its average, seeds as dots."""
    if not tables:
        return None
    most = max(len(table.mean) for table in tables)
    wide = max(5.6, 1.0 + 0.62 * most)
    rows, columns = (1, len(tables)) if wide * len(tables) < 13 else (len(tables), 1)
    figure = Figure(figsize=(wide * columns, 4.0 * rows), layout="constrained")
    colours = method_colours(results)
    for axis, table in zip(figure.subplots(rows, columns, squeeze=False).flat, tables, strict=True):
        column = list(table.mean)[-1]
        base = 0.0
        for (name, level), line in zip(table.references[column].dropna().items(), ("--", "-"), strict=False):
            axis.axhline(level, color="#222222", linestyle=line, linewidth=1.2, label=f"{name} {level:.1f}")
            base = level if name == STUDENT and table.metric != "similarity" else base
        mean = table.mean[column].dropna()
        for place, (method, level) in enumerate(mean.items()):
            dots = table.scores.loc[method, column].dropna()
            axis.bar(place, level - base, bottom=base, width=0.72, color=colours[method], alpha=0.85)
            axis.errorbar(place, level, yerr=table.std.loc[method, column], color="#222222", capsize=4, linewidth=1.2)
            shifts = place + 0.16 * (np.arange(len(dots)) - (len(dots) - 1) / 2)
            axis.plot(shifts, dots, "o", markersize=3.2, color="white", markeredgecolor="#222222", markeredgewidth=0.8)
            down = level < base
            style = {"textcoords": "offset points", "ha": "center", "va": "top" if down else "bottom", "fontsize": 9}
            axis.annotate(f"{level:.1f}", (place, min(dots) if down else max(dots)), (0, -6 if down else 6), **style)
        names = [textwrap.fill(results.labels.get(method, method), 20) for method in mean.index]
        axis.set_xticks(range(len(mean)), names, rotation=35, ha="right", rotation_mode="anchor", fontsize=9)
        axis.set_xlim(-0.7, max(most, 6) - 0.3)
        axis.set_title(table.condition, loc="right", fontsize=10)
        axis.set_ylabel(f"{METRICS[table.metric]}, {'average over directions' if column == AVERAGE else column}")
        axis.grid(axis="y", alpha=0.3)
        axis.margins(y=0.14)
        if len(table.references):
            axis.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2)
    return figure


def draw_sweep(results: Results, parameter: str) -> Figure | None:
    """BLEU against a parameter, a panel a condition; other methods, with the same seeds, as lines."""
    swept = results.runs[(results.runs.parameter == parameter) & results.runs.bleu.notna()]
    if swept.empty:
        return None
    conditions = list(swept.condition.unique())
    figure = Figure(figsize=(5.6 * len(conditions), 3.8), layout="constrained")
    colours = method_colours(results)
    for axis, condition in zip(figure.subplots(1, len(conditions), squeeze=False).flat, conditions, strict=True):
        own = swept[swept.condition == condition]
        scores = results.scores(own, "bleu", ("method", "seed", "value")).iloc[:, -1]
        points = scores.groupby(["method", "value"]).agg(["mean", "std"])
        for method in scores.index.unique("method"):
            line = points.loc[method]
            seeds = ", ".join(map(str, sorted(own[own.method == method].seed.unique())))
            label = f"{results.labels.get(method, method)} (seed {seeds})"
            axis.errorbar(
                line.index, line["mean"], yerr=line["std"], marker="o", capsize=3, color=colours[method], label=label
            )
        table = results.of(condition)
        beside = table[table.method.isin(COMPARED) & table.seed.isin(own.seed) & ~table.method.isin(own.method)]
        levels = results.scores(beside, "bleu").iloc[:, -1].groupby("method", sort=False).mean() if len(beside) else {}
        for (method, level), style in zip(dict(levels).items(), ("--", "-.", ":"), strict=False):
            axis.axhline(level, color=colours[method], linestyle=style, label=results.labels.get(method, method))
        ticks = sorted(own.value.unique())
        if ticks[0] > 0 and ticks[-1] >= 10 * ticks[0]:
            axis.set_xscale("log")
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_xticks([], minor=True)
        axis.set(xlabel=NAMES.get(parameter, parameter), ylabel="BLEU, average over directions", title=condition)
        axis.grid(alpha=0.3)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)
    return figure


def draw_curves(results: Results, key: str, label: str) -> Figure | None:
    """``key`` of the log over the progress of training, mean over seeds: a panel a condition, and one a sweep of Γ."""
    logs = results.logs.dropna(subset=[key])
    by = {"by method": logs[logs.parameter.isna()], "by the sweep's Γ": logs[logs.parameter == "gamma"]}
    panels = [(f"{c}, {how}", own) for how, part in by.items() for c, own in part.groupby("condition", sort=False)]
    if not panels:
        return None
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(6.2 * columns, 4.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    colours = {results.labels.get(method, method): colour for method, colour in method_colours(results).items()}
    for axis in axes[len(panels) :]:
        axis.axis("off")
    for axis, (title, own) in zip(axes, panels, strict=False):
        for number, (name, curve) in enumerate(own.groupby("curve", sort=False)):
            mean = curve.groupby("progress")[key].mean()
            style = {"color": colours.get(name), "linestyle": ("-", "--", "-.")[number % 3], "label": name}
            axis.plot(mean.index, mean, **style)
        axis.set(title=title, xlabel="training progress, %", ylabel=label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3)
    return figure


def draw_table(table: Table) -> Figure:
    """The table as a heat map: the distance of each mean from the baseline's, red below it and blue above."""
    results, texts = table.results, table.texts()
    against = table.mean.loc[results.baseline] if results.baseline in table.mean.index else table.mean.mean()
    distance = (table.mean - against).astype(float)
    limit = 1.7 * np.nanmax(distance.abs(), initial=0.1)  # pale, for black text
    figure = Figure(figsize=(3.0 + 1.35 * texts.shape[1], 0.9 + 0.34 * len(texts)), layout="constrained")
    axis = figure.subplots()
    axis.imshow(distance, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
    best = table.best
    for (row, column), text in np.ndenumerate(texts.to_numpy()):
        weight = "bold" if best.iloc[row, column] else "normal"
        axis.text(column, row, text, ha="center", va="center", fontweight=weight, fontsize=9)
    axis.set_xticks(range(texts.shape[1]), texts.columns)
    axis.set_yticks(range(len(texts)), [results.labels.get(method, method) for method in texts.index])
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    shade = f"shade: distance from {results.labels.get(results.baseline, results.baseline)}"
    axis.set_title(f"{METRICS[table.metric]}, {table.condition}; {shade}", fontsize=10, loc="left")
    return figure


def method_colours(results: Results) -> dict[str, Any]:
    """One colour a method, the same in every figure."""
    colours = [*matplotlib.colormaps["tab10"].colors, *matplotlib.colormaps["tab20"].colors[1::2]]
    names = dict.fromkeys([*results.labels, *results.runs.method])
    return {name: colours[number % len(colours)] for number, name in enumerate(names)}


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
    written = write_report(found, args.folder)
    print(*written, sep="\n")
    return written


if __name__ == "__main__":
    run_script(main)
