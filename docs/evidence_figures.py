"""The figures of docs/evidence.md: one colour a method, a dot a seed; 700 pixels wide on the page."""

from __future__ import annotations

import evidence_claims as claims
import matplotlib
import pandas as pd
from evidence_data import NO, YES
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fused_kd.training.advice import BEGINNER, STARVED, still_hard

METHODS = {
    "sft": ("SFT", "#7f7f7f"),
    "forward_kd": ("ForwardKD", "#1f77b4"),
    "reverse_kd": ("ReverseKD", "#17becf"),
    "jsd": ("JSD", "#2ca02c"),
    "skew": ("Skew", "#9467bd"),
    "skew_teacher": ("SkewTeacher", "#c5b0d5"),
    "self_evolution": ("Self-Evolution", "#d62728"),
    "floor_0.1": ("floor 0.1", "#ffbb78"),
    "floor_0.3": ("floor 0.3", "#ff7f0e"),
    "floor_0.5": ("floor 0.5", "#8c564b"),
}
LIMITS = {"a floor, at least": STARVED, "ForwardKD": BEGINNER}  # each from there on
MAIN = ("sft", "forward_kd", "self_evolution", "floor_0.3")
TICKS = (-20, -10, -5, -2, -1, 0, 1, 2)
VERDICTS = {YES: "#2ca02c", NO: "#d62728"}
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "font.size": 9,
}
WIDTH = 7.0  # inches, at 200 dots: twice the page's pixels


def plane(cells: pd.DataFrame) -> Figure:
    """A panel a study and noise: gain over the start against the student's start, a line a method, dots seeds.

    Of studies with students of several strengths.
    """
    cells = cells[(cells.groupby("study").student.transform("nunique") > 1) & cells.method.isin(MAIN)]
    panels = list(cells.groupby(["study", "noise"], sort=False))
    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(WIDTH, 2.7 * lines + 0.5), layout="constrained")
    axes = figure.subplots(
        lines,
        columns,
        squeeze=False,
    ).flat
    for axis, ((study, noise), own) in zip(axes, panels, strict=False):
        _gains(axis, own)
        axis.set_title(f"{study}, {noise:.0%} wrong" if noise else f"{study}, clean", fontsize=9)
        axis.set_xlabel("the student's score before")
    for axis in axes[len(panels) :]:
        axis.axis("off")
    axes[0].set_ylabel("gain")
    _legend(figure, cells)
    return figure


def _gains(axis: Axes, own: pd.DataFrame) -> None:
    axis.axhline(0.0, color="#222222", linewidth=0.8)
    present = [name for name in METHODS if name in set(own.method)]
    span = max(own.start.max() - own.start.min(), 4.0)
    width = 0.008 * span
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.set_xlim(own.start.min() - 0.15 * span, own.start.max() + 0.15 * span)
    for place, name in enumerate(present):
        runs = own[own.method == name]
        gained, colour = runs.score - runs.start, METHODS[name][1]
        shift = (place - (len(present) - 1) / 2) * width
        by_student = (
            runs.assign(gain=gained).groupby("student", sort=False)[["start", "gain"]].mean().sort_values("start")
        )
        axis.plot(by_student.start + shift, by_student.gain, color=colour, linewidth=1.4)
        axis.plot(runs.student.map(by_student.start) + shift, gained, "o", color=colour, markersize=3.2)


def rule(cells: pd.DataFrame) -> Figure:
    """What each method is worth beside ForwardKD, by the share of teacher-easy tokens that are hard at first."""
    known = cells.dropna(subset=["hard", "hard_t"])
    keys = ["study", "student", "noise", "seed"]
    base = known[known.method == "forward_kd"].set_index(keys).score
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    axis = figure.subplots()
    axis.axhline(0.0, color=METHODS["forward_kd"][1], linewidth=1.2)
    for name in MAIN[2:]:
        runs = known[known.method == name].set_index(keys)
        runs = runs[runs.index.isin(base.index)]
        share = pd.Series(list(map(still_hard, runs.hard, runs.hard_t)), runs.index)
        noisy = runs.index.get_level_values("noise") > 0
        for part, marker in ((~noisy, "o"), (noisy, "^")):
            axis.plot(
                share[part], (runs.score - base.loc[runs.index])[part], marker, color=METHODS[name][1], markersize=4.5
            )
    for text, limit in LIMITS.items():
        axis.axvline(limit, color="#222222", linestyle=":", linewidth=1)
        axis.annotate(text, (limit, 0.02), xycoords=("data", "axes fraction"), rotation=90, fontsize=8, ha="right")
    axis.set_xlim(-0.1, 1.05)
    axis.set_yscale("symlog", linthresh=2)
    axis.set_yticks(TICKS, [f"{tick:+d}" if tick else "0" for tick in TICKS])
    axis.set_xlabel("of the tokens that are easy for the teacher: hard for the student in the first steps")
    axis.set_ylabel("score above ForwardKD's")
    _legend(figure, known[known.method.isin(MAIN[1:])])
    return figure


def forest(section: str) -> Figure:
    """Every difference of a section with its interval, or its seeds: a row a claim, a panel a place."""
    found = claims.SECTIONS[section]()
    texts, places = (list(dict.fromkeys(getattr(claim, name) for claim in found)) for name in ("text", "where"))
    figure = Figure(figsize=(WIDTH, 0.8 + 0.25 * len(texts)), layout="constrained")
    axes = dict(zip(places, figure.subplots(1, len(places), squeeze=False, sharey=True).flat, strict=True))
    for place, axis in axes.items():
        axis.axvline(0.0, color="#222222", linewidth=0.8)
        axis.set_xlabel(place.replace(", ", ",\n"), fontsize=8)
        axis.margins(y=0.1)
    for claim in found:
        axis, row, effect = axes[claim.where], texts.index(claim.text), claim.effect
        colour = VERDICTS.get(effect.verdict.strip("()"), "#7f7f7f")
        axis.plot(effect.interval or (min(effect.each), max(effect.each)), [row, row], color=colour, linewidth=1.6)
        axis.plot(effect.each, [row] * len(effect.each), "o", color=colour, markersize=3)
    axes[places[0]].set_yticks(range(len(texts)), texts, fontsize=7.5)
    axes[places[0]].invert_yaxis()
    return figure


def _legend(figure: Figure, cells: pd.DataFrame) -> None:
    present = [METHODS[name] for name in METHODS if name in set(cells.method)]
    handles = [matplotlib.lines.Line2D([], [], color=colour, marker="o", markersize=4) for _, colour in present]
    figure.legend(handles, [label for label, _ in present], loc="outside lower center", ncols=min(len(present), 5))
