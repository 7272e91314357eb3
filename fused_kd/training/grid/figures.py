"""Figures of a grid of runs, from its ``results.json`` alone."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from fused_kd.training.drawing import pyplot, save_figure
from fused_kd.training.grid.aggregate import (
    METRICS,
    average,
    average_cell,
    check_results,
    conditions,
    methods_of,
    runs_of,
    scored_directions,
    start_scores,
    sweep_runs,
    sweeps,
    swept_parameters,
)

CAPTIONS = {
    "similarity": "Similarity of each student's output to the teacher's own output, average over directions, with the "
    "standard deviation over seeds.",
    "hard_fraction": "Share of hard tokens while training, mean over seeds: by method (difficulty above its Γ, or 0.4 "
    "where it has none) and by the Γ of the sweep. The difficulty of a method without a teacher is its cross-entropy.",
    "difficulty": "Mean difficulty KL(ỹ‖q) of the training tokens, in nats, mean over seeds; the cross-entropy for a "
    "method without a teacher.",
    "sweep": "BLEU against {name}, average over directions, with the standard deviation over seeds; the other methods, "
    "with the same seeds, as lines.",
    "methods": "Average over directions, with the standard deviation over seeds; dots are seeds. Bars start at the "
    "student before distillation, where the methods have one.",
}
_NAMES = {"gamma": "Γ", "beta": "β", "fraction": "the share of hard tokens (K)", "lam": "λ"}
_LINES = ("forward_kd", "no_evo", "skew")
_STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.dpi": 130,
    "figure.constrained_layout.use": True,
}


class TableRow(NamedTuple):
    """A row of `draw_table`: texts of its cells, a shade for each (None: no shade), and which are bold."""

    label: str
    texts: list[str]
    shades: list[float | None]
    bold: list[bool]


def write_figures(results: dict[str, Any], folder: str | Path) -> list[Path]:
    """Draw every figure that has data; returns the paths.

    ``methods_<condition>.png``, ``similarity.png``, ``sweep_<parameter>.png``, ``hard_fraction.png`` and
    ``difficulty.png``. Incomplete grids are drawn as far as they go; each file is written whole or not at all.

    Raises:
        ValueError: results that lack a part or hold a run twice. ImportError: no matplotlib.
    """
    check_results(results)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Callable[[dict[str, Any]], Any]] = {
        **{f"methods_{file_name(condition)}": partial(_methods, condition) for condition in conditions(results)},
        "similarity": _similarity,
        **{f"sweep_{file_name(name)}": partial(_sweep, name) for name in swept_parameters(results)},
        "hard_fraction": partial(_curves, "hard_fraction", "share of hard tokens"),
        "difficulty": partial(_curves, "difficulty", "mean difficulty, nats"),
    }
    written = []
    with _style():
        for stem, draw in figures.items():
            if (figure := draw(results)) is not None:
                written.append(save_figure(figure, folder / f"{stem}.png"))
    return written


def caption(stem: str) -> str:
    """What a figure of `write_figures` shows, by its file name without the suffix."""
    if stem in CAPTIONS:
        return CAPTIONS[stem]
    kind, _, name = stem.partition("_")
    return CAPTIONS[kind].format(name=_NAMES.get(name, name))


def file_name(text: str) -> str:
    """Text as a part of a file name."""
    return re.sub(r"[^\w.=-]+", "-", text)


def draw_table(path: Path, title: str, columns: Sequence[str], rows: Sequence[TableRow], legend: str) -> Path:
    """A table as a heat map: shades go from red (negative) over white to blue; ``legend`` says what they are."""
    with _style():
        plt = pyplot()
        from matplotlib.colors import Normalize

        limit = max((abs(shade) for row in rows for shade in row.shades if shade is not None), default=0.0) or 1.0
        colours, norm = plt.get_cmap("RdBu"), Normalize(-1.7 * limit, 1.7 * limit)  # pale, for black text
        left = 0.35 + 0.072 * max(len(row.label) for row in rows)
        widths = [0.35 + 0.078 * max(len(text) for text in column) for column in _columns(columns, rows)]
        edges = [left]
        for width in widths:
            edges.append(edges[-1] + width)
        size = (edges[-1] + 0.12, 0.34 * (len(rows) + 1) + 0.85)
        figure = plt.figure(figsize=size, layout="none")
        axis = figure.add_axes((0, 0, 1, 1))
        axis.set(xlim=(0, size[0]), ylim=(size[1], 0))
        axis.axis("off")
        axis.text(0.12, 0.25, title, va="center", fontsize=11, fontweight="bold")
        for number, column in enumerate(columns):
            axis.text(sum(edges[number : number + 2]) / 2, 0.62, column, ha="center", va="center", fontweight="bold")
        for line, row in enumerate(rows):
            y = 0.79 + 0.34 * line
            axis.text(0.12, y + 0.17, row.label, va="center")
            for number, (text, shade, bold) in enumerate(zip(row.texts, row.shades, row.bold, strict=True)):
                x, width = edges[number], edges[number + 1] - edges[number]
                colour = "white" if shade is None else colours(norm(shade))
                axis.add_patch(plt.Rectangle((x, y), width, 0.34, facecolor=colour, edgecolor="white", linewidth=1.5))
                weight = "bold" if bold else "normal"
                axis.text(x + width / 2, y + 0.17, text, ha="center", va="center", fontweight=weight)
        axis.axhline(0.78, xmin=0.12 / size[0], xmax=1 - 0.12 / size[0], color="#444444", linewidth=1)
        axis.text(0.12, size[1] - 0.2, legend, va="center", fontsize=8, color="#555555")
        return save_figure(figure, path)


def _columns(columns: Sequence[str], rows: Sequence[TableRow]) -> Iterable[tuple[str, ...]]:
    return zip(columns, *(row.texts for row in rows), strict=True)


def _methods(condition: str, results: dict[str, Any]) -> Any:
    runs = runs_of(results, condition)
    metrics = [metric for metric in ("bleu", "chrf") if _scored(results, runs, metric)]
    if not metrics:
        return None
    figure, axes = _bar_panels(len(metrics), len(methods_of(results, runs)), sharey=False)
    for axis, metric in zip(axes, metrics, strict=True):
        directions = scored_directions(results, runs, metric)
        start = average(start_scores(results, condition), directions, metric)
        _bars(axis, results, runs, metric, 0.0 if start is None else start)
        _levels(axis, results, condition, directions, metric)
        axis.set_ylabel(f"{METRICS[metric]}, average over {_count(directions)}")
    figure.suptitle(f"condition: {condition}", fontsize=12)
    return figure


def _similarity(results: dict[str, Any]) -> Any:
    named = {condition: runs_of(results, condition) for condition in conditions(results)}
    named = {condition: runs for condition, runs in named.items() if _scored(results, runs, "similarity")}
    if not named:
        return None
    most = max(len(methods_of(results, runs)) for runs in named.values())
    figure, axes = _bar_panels(len(named), most, sharey=True)
    for axis, (condition, runs) in zip(axes, named.items(), strict=True):
        directions = scored_directions(results, runs, "similarity")
        _bars(axis, results, runs, "similarity", 0.0)
        _levels(axis, results, condition, directions, "similarity")
        axis.set_title(condition, loc="right")
        axis.set_ylabel(f"similarity to the teacher,\naverage over {_count(directions)}")
    return figure


def _levels(axis: Any, results: dict[str, Any], condition: str, directions: Sequence[str], metric: str) -> None:
    """Lines at the scores that do not depend on the method."""
    levels = (
        (results.get("teacher"), "teacher", "--"),
        (start_scores(results, condition), "student before distillation", "-"),
    )
    for scores, name, style in levels:
        if (level := average(scores, directions, metric)) is not None:
            axis.axhline(level, color="#222222", linestyle=style, linewidth=1.2, label=f"{name} {level:.1f}")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, fontsize=9, borderaxespad=0.2)


def _bar_panels(count: int, bars: int, *, sharey: bool) -> tuple[Any, Any]:
    """Panels for up to so many bars, wide enough for their labels; in one row, or below each other where that is too
    wide to read."""
    width = max(5.6, 1.0 + 0.62 * bars)
    shape = (1, count) if width * count < 13 else (count, 1)
    figure, axes = _panels(*shape, width=width, height=4.0, sharey=sharey)
    for axis in axes.flat:
        axis.set_xlim(-0.7, max(bars, 6) - 0.3)
    return figure, axes.flat


def _bars(axis: Any, results: dict[str, Any], runs: list[dict[str, Any]], metric: str, base: float) -> None:
    """A bar a method from ``base`` to its average over directions, its deviation, its seeds as dots."""
    directions = scored_directions(results, runs, metric)
    colours = _method_colours(results)
    labels: list[str] = []
    for method, label in methods_of(results, runs).items():
        own = [run for run in runs if run["method"] == method]
        cell = average_cell(own, directions, metric)
        if cell is None:
            continue
        x = len(labels)
        labels.append(label)
        axis.bar(x, cell.mean - base, bottom=base, width=0.72, color=colours[method], alpha=0.85)
        axis.errorbar(x, cell.mean, yerr=cell.std, color="#222222", capsize=4, linewidth=1.2)
        dots = [score for run in own if (score := average(run.get("scores"), directions, metric)) is not None]
        shifts = [x + 0.16 * (number - (len(dots) - 1) / 2) for number in range(len(dots))]
        axis.plot(shifts, dots, "o", markersize=3.2, color="white", markeredgecolor="#222222", markeredgewidth=0.8)
        outer = [*dots, cell.mean - (cell.std or 0), cell.mean + (cell.std or 0)]
        down = cell.mean < base
        offset = (0, -4) if down else (0, 4)
        place = {"xytext": offset, "textcoords": "offset points", "va": "top" if down else "bottom", "zorder": 3}
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.6}
        tip = (x, min(outer) if down else max(outer))
        axis.annotate(f"{cell.mean:.1f}", tip, ha="center", fontsize=9, bbox=box, **place)
    wrapped = [textwrap.fill(label, 20) for label in labels]
    style = {"rotation": 35, "ha": "right", "rotation_mode": "anchor", "linespacing": 1.1, "fontsize": 9}
    axis.set_xticks(range(len(labels)), wrapped, **style)
    axis.grid(axis="y", alpha=0.3)
    axis.margins(y=0.14)


def _sweep(parameter: str, results: dict[str, Any]) -> Any:
    found = {condition: sweeps(results, condition, parameter) for condition in conditions(results)}
    found = {condition: lines for condition, lines in found.items() if lines}
    if not found:
        return None
    figure, axes = _panels(1, len(found), width=5.6, height=3.8, sharey=True)
    colours = _method_colours(results)
    for axis, (condition, lines) in zip(axes[0], found.items(), strict=True):
        swept = {line.method for line in lines}
        names = methods_of(results, _named([*swept, *_LINES]))
        for line in lines:
            x, cells = zip(*line.points.items(), strict=True)
            seeds = "seed " + ", ".join(map(str, line.seeds))
            axis.errorbar(
                x,
                [cell.mean for cell in cells],
                yerr=[cell.std or 0.0 for cell in cells],
                marker="o",
                capsize=3,
                color=colours[line.method],
                linewidth=1.8,
                label=f"{names[line.method]} ({seeds})",
            )
        for style, method in zip(("--", "-.", ":"), _LINES, strict=True):
            own = [run for run in runs_of(results, condition) if run["method"] == method]
            own = [run for run in own if run["seed"] in lines[0].seeds]
            if method not in swept and (cell := average_cell(own, lines[0].directions, "bleu")) is not None:
                colour = colours[method]
                axis.axhline(cell.mean, color=colour, linestyle=style, linewidth=1.4, label=names[method])
        ticks = sorted({x for line in lines for x in line.points})
        if ticks[0] > 0 and ticks[-1] >= 10 * ticks[0]:
            axis.set_xscale("log")
        axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axis.set_xticks([], minor=True)
        axis.set(xlabel=_NAMES.get(parameter, parameter), title=condition)
        axis.grid(alpha=0.3)
        handles, shown = axis.get_legend_handles_labels()
        first = len(shown) - len(lines)  # matplotlib puts error bars last
        handles, shown = handles[first:] + handles[:first], shown[first:] + shown[:first]
        axis.legend(handles, shown, fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)
    axes[0][0].set_ylabel("BLEU, average over directions")
    return figure


def _curves(key: str, label: str, results: dict[str, Any]) -> Any:
    """``key`` of the history over the progress of training: a panel a condition, and one a sweep of Γ."""
    panels: list[tuple[str, dict[str, tuple[Any, Any]], dict[str, Any]]] = []
    methods = _method_colours(results)
    for condition in conditions(results):
        curves = _mean_curves(_grouped((run["method"], run) for run in runs_of(results, condition)), key)
        panels.append((f"{condition}, by method", curves, methods))
    for condition in conditions(results):
        swept = sweep_runs(results, condition, "gamma")
        names = {method: f"{results['labels'].get(method, method)}, " * (len(swept) > 1) for method in swept}
        groups = {f"{names[m]}Γ = {held:g}": runs for m, values in swept.items() for held, runs in values.items()}
        curves = _mean_curves(groups, key)
        shades = pyplot().get_cmap("viridis")
        colours = {name: shades(0.9 * number / max(len(curves) - 1, 1)) for number, name in enumerate(curves)}
        panels.append((f"{condition}, by the sweep's Γ", curves, colours))
    panels = [panel for panel in panels if panel[1]]
    if not panels:
        return None
    columns = min(len(panels), 2)
    figure, axes = _panels(-(-len(panels) // columns), columns, width=6.2, height=4.2)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (title, curves, colours) in zip(axes.flat, panels, strict=False):
        for number, (name, (x, y)) in enumerate(curves.items()):
            style = ("-", "--", "-.")[number % 3] if colours is methods else "-"
            shown = results["labels"].get(name, name)
            axis.plot(x, y, color=colours[name], linestyle=style, label=shown, linewidth=1.5)
        axis.set(title=title, xlabel="training progress, %", ylabel=label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3, fontsize=8.5)
    return figure


def _grouped(pairs: Iterable[tuple[str, dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, run in pairs:
        groups.setdefault(name, []).append(run)
    return groups


def _mean_curves(groups: Mapping[str, list[dict[str, Any]]], key: str) -> dict[str, tuple[Any, Any]]:
    """Name -> progress in % and the mean over runs there, on the progress points of the longest history."""
    import numpy as np

    curves = {}
    for name, runs in groups.items():
        histories = []
        for run in runs:
            points = [(entry["step"], entry[key]) for entry in run.get("history") or [] if entry.get(key) is not None]
            if points:
                steps, values = np.array(points, dtype=float).T
                histories.append((100 * steps / (run.get("steps") or steps[-1]), values))
        if histories:
            x = max((history[0] for history in histories), key=len)
            curves[name] = (x, np.mean([np.interp(x, *history) for history in histories], axis=0))
    return curves


def _scored(results: dict[str, Any], runs: list[dict[str, Any]], metric: str) -> bool:
    """Whether some run has every direction that any has."""
    return average_cell(runs, scored_directions(results, runs, metric), metric) is not None


def _method_colours(results: dict[str, Any]) -> dict[str, Any]:
    """One colour a method, the same in every figure."""
    colours = [*pyplot().get_cmap("tab10").colors, *pyplot().get_cmap("tab20").colors[1::2]]
    names = methods_of(results, [*_named(results["labels"]), *results["runs"]])
    return {name: colours[number % len(colours)] for number, name in enumerate(names)}


def _named(methods: Iterable[str]) -> list[dict[str, Any]]:
    """Methods as `methods_of` takes them."""
    return [{"method": method} for method in methods]


def _count(directions: Sequence[str]) -> str:
    return directions[0] if len(directions) == 1 else f"{len(directions)} directions"


def _panels(rows: int, columns: int, *, width: float, height: float, **options: Any) -> tuple[Any, Any]:
    size = (width * columns, height * rows)
    made: tuple[Any, Any] = pyplot().subplots(rows, columns, figsize=size, squeeze=False, **options)
    return made


def _style() -> AbstractContextManager[Any]:
    context: AbstractContextManager[Any] = pyplot().rc_context(_STYLE)
    return context
