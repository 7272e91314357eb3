"""Tables and figures of the plane of regimes, from runs.jsonl and the translations, or from results.json alone.

    python examples/self_evolution/regimes_report.py FOLDER             # results.json, results.md and the figures

In a folder with runs.jsonl, results.json is made from it first, with a paired bootstrap of every run against SFT and
ForwardKD of its cell and seed where the translations are there.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from kd_methods import REGIME_METHODS
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from paper_table import ALPHA, COLOURS, STYLE, averaged

from fused_kd.training.score import paired_bootstrap
from fused_kd.training.script import run_script
from fused_kd.training.stage import read_json, write_bytes, write_json, write_lines, write_text

CELL = ["strength", "noise"]
METRICS = {"bleu": "BLEU", "chrf": "chrF"}
BASELINES = ("sft", "forward_kd")
LABELS = {name: method.label for name, method in REGIME_METHODS.items()}
READING = """\
- *By the prompt* is how every student translates after distillation too; a language model has not seen it before.
  *As a document* is the form in which it has seen translations, a part of them of another sentence.
- The rate of each cell (strength, share of wrong references, method) is the one of the grid with the highest chrF on
  validation text with the first seed; all methods have the same grid. The test set played no part in it. The first
  seed's student at that rate is also the first of the table; the other seeds did not choose.
- ± is the sample standard deviation over seeds, of the average over directions.
- A cell of the plane stands on the seeds that all of its methods have. Its best method is *clear* where it is ahead of
  the second in every seed, of at least three.
"""
BOOTSTRAPS = """\
- Bootstraps are over the test sentences of each seed and direction (p < 0.05, two-sided, 1,000 samples), without a
  correction for their number.
"""


def collect(folder: str | Path, tests: bool = True) -> dict[str, Any]:
    """results.json of a folder, made from its runs.jsonl where that is there."""
    folder = Path(folder)
    if not (folder / "runs.jsonl").is_file():
        found: dict[str, Any] = read_json(folder / "results.json")
        return found
    # the last line of a piece of work counts, which was killed before its end was noted
    lines = {tuple(r.get(k) for k in ("kind", *CELL, "method", "seed")): r for r in records(folder / "runs.jsonl")}
    kinds = {kind: [r for r in lines.values() if r["kind"] == kind] for kind in ("start", "run")}
    found = {"about": read_json(folder / "about.json"), "starts": kinds["start"], "runs": kinds["run"]}
    found["significance"] = compare(folder, found["runs"]) if tests else []
    write_json(folder / "results.json", found)
    return found


def records(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a JSON-lines file, plain or gzip."""
    content = path.read_bytes()
    text = gzip.decompress(content) if path.suffix == ".gz" else content
    for line in text.decode().split("\n")[:-1]:
        yield json.loads(line)


def compare(folder: Path, runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Paired bootstraps within each cell and seed; those that tests.jsonl has are not made again."""
    done, path = {}, folder / "tests.jsonl"
    if path.is_file():
        done = {(r["key"], r["baseline"]): r["tests"] for r in records(path)}
    files = sorted(folder.glob("hypotheses.*.jsonl.gz"))
    made = {record["trial"]: record["made"] for file in files for record in records(file)}
    if "references" in made:
        for key, systems in cells(runs, made).items():
            for baseline in BASELINES:
                if baseline in systems and len(systems) > 1 and not finished(done.get((key, baseline)), systems):
                    done[key, baseline] = bootstraps(systems, made["references"], baseline)
                    write_lines(path, (json.dumps({"key": k, "baseline": b, "tests": t}) for (k, b), t in done.items()))
    return [
        dict(zip((*CELL, "seed"), json.loads(key), strict=True)) | {"baseline": baseline} | test
        for (key, baseline), tests in done.items()
        for test in tests
    ]


def cells(runs: Sequence[Mapping[str, Any]], made: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """(strength, noise, seed) as JSON -> method -> its translations."""
    found: dict[str, dict[str, Any]] = {}
    for run in runs:
        name = f"{run['strength']}.noise{run['noise']:g}.{run['method']}.seed{run['seed']}"
        if name in made:
            found.setdefault(json.dumps([run[k] for k in (*CELL, "seed")]), {})[run["method"]] = made[name]
    return found


def finished(tests: Sequence[Mapping[str, Any]] | None, systems: Mapping[str, Any]) -> bool:
    return tests is not None and len({test["method"] for test in tests}) == len(systems) - 1


def bootstraps(systems: Mapping[str, Any], references: Mapping[str, Any], baseline: str) -> list[dict[str, Any]]:
    return [
        {"method": t.system, "direction": d, "metric": t.metric, "delta": round(t.delta, 3), "p": round(t.p_value, 4)}
        for d, wanted in references.items()
        for t in paired_bootstrap({name: made[d] for name, made in systems.items()}, wanted, baseline)
    ]


class Plane:
    """What results.json holds, as data frames of one metric, averages over directions where none is named.

    Attributes:
        starts, documents: of the students before: by the prompt, in the form of the documents.
        runs: (strength, noise, method, seed) x directions and their average.
        common: (strength, noise) -> the averages of the plane's methods, of the seeds that all of the cell's have.
    """

    def __init__(self, found: Mapping[str, Any], metric: str = "bleu") -> None:
        self.found, self.metric = found, metric
        settings = found["about"]["settings"]
        self.strengths = list(settings["strengths"])
        self.paper, self.directions = settings["paper"], settings["directions"]
        self.methods = [m for m in LABELS if m in {run["method"] for run in found["runs"]}]
        plane = {run["method"] for run in found["runs"]} & set(settings["methods"])
        self.plane_methods = [m for m in LABELS if m in plane]
        rows = {tuple(r[k] for k in (*CELL, "method", "seed")): self.scores(r["scores"]) for r in found["runs"]}
        index = pd.MultiIndex.from_tuples(rows, names=[*CELL, "method", "seed"])
        self.runs = averaged(pd.DataFrame(list(rows.values()), index=index)).sort_index()
        self.starts = {r["strength"]: self.average(r["scores"]) for r in found["starts"]}
        self.documents = {r["strength"]: self.average(r["document_scores"]) for r in found["starts"]}
        wide = self.runs.iloc[:, -1].unstack("method").reindex(columns=self.plane_methods)
        common = {cell: rows.dropna(axis=1, how="all").dropna() for cell, rows in wide.groupby(CELL)}
        self.common = {cell: rows for cell, rows in common.items() if len(rows)}

    def scores(self, by_direction: Mapping[str, Any]) -> dict[str, float]:
        return {d: by_direction[d][self.metric] for d in self.directions}

    def average(self, by_direction: Mapping[str, Any]) -> float:
        return float(np.mean(list(self.scores(by_direction).values())))

    def cells(self) -> list[tuple[str, float]]:
        """Those with at least two of the plane's methods, weakest students first."""
        whole = [cell for cell, rows in self.common.items() if rows.shape[1] > 1]
        return sorted(whole, key=lambda cell: (self.strengths.index(cell[0]), cell[1]))

    def ranking(self, cell: tuple[str, float]) -> pd.Series:
        """Means over seeds, best first."""
        return self.common[cell].mean().sort_values(ascending=False)

    def is_clear(self, cell: tuple[str, float]) -> bool:
        """Whether the best method is ahead of the second in every seed, of at least three."""
        first, second = self.ranking(cell).index[:2]
        ahead = self.common[cell][first] - self.common[cell][second]
        return len(ahead) > 2 and bool((ahead > 0).all())


def write_report(found: Mapping[str, Any], folder: str | Path) -> None:
    """results.md and the figures that have data."""
    folder = Path(folder)
    if not found["runs"]:
        write_text(folder / "results.md", "# Regimes\n\n" + starts_table(found) + "\n")
        return
    plane, chrf = Plane(found), Plane(found, "chrf")
    figures = {"plane": draw_plane, "gains": draw_gains} if plane.cells() else {}
    with rc_context(STYLE):
        for name, draw in figures.items():
            content = io.BytesIO()
            draw(plane).savefig(content, format="png", dpi=120, bbox_inches="tight")
            write_bytes(folder / f"{name}.png", content.getvalue())
    parts = ["# Regimes", f"{len(found['runs'])} runs that count.", "## Starts", starts_table(found)]
    parts += ["## The paper's regime", paper_table(plane), paper_table(chrf)]
    if figures:
        shown = [f"![{name}]({name}.png)" for name in figures]
        parts += ["## The plane", plane_table(plane), *shown, plane_table(chrf)]
    reading = READING + (BOOTSTRAPS if found["significance"] else "")
    parts += ["## Learning rates", rates_table(found), "## How to read it", reading.rstrip()]
    for key, value in found["about"].items():
        text = json.dumps(value, indent=1, ensure_ascii=False)
        parts.append(f"<details><summary>{key}</summary>\n\n```json\n{text}\n```\n\n</details>")
    write_text(folder / "results.md", "\n\n".join(parts) + "\n")


def markdown(frame: pd.DataFrame) -> str:
    align = ["left"] * frame.index.nlevels + ["right"] * frame.shape[1]
    return str(frame.reset_index().to_markdown(index=False, colalign=align, disable_numparse=True))


def starts_table(found: Mapping[str, Any]) -> str:
    """The students before distillation and the teacher, weakest first."""
    rows = {}
    for start in sorted(found["starts"], key=lambda s: np.mean([x["bleu"] for x in s["scores"].values()])):
        by = {"by the prompt": start["scores"], "as a document": start["document_scores"]}
        shown = {
            f"{label}, {how}": f"{np.mean([score[metric] for score in scores.values()]):.1f}"
            for how, scores in by.items()
            for metric, label in METRICS.items()
        }
        rows[start["strength"]] = {"parameters": f"{start['parameters'] / 1e6:.1f} M", **shown}
    return markdown(pd.DataFrame.from_dict(rows, orient="index").rename_axis("start"))


def paper_table(plane: Plane) -> str:
    """All methods on clean text, by direction, with the bootstraps against both baselines where they were made."""
    noise = min((n for s, n in plane.runs.index.droplevel(["method", "seed"]) if s == plane.paper), default=None)
    if noise is None:
        return "No run yet."
    own, rows = plane.runs.loc[(plane.paper, noise)], {}
    found = pd.DataFrame(plane.found["significance"])
    best = own.groupby("method").mean().round(1).max()
    for method in (m for m in LABELS if m in own.index.unique("method")):
        scores = own.loc[method]
        cells = {}
        for column in own.columns:
            value = f"{scores[column].mean():.1f}"
            bold = f"**{value}**" if float(value) == best[column] else value
            cells[column] = f"{bold} ± {scores[column].std():.1f}" if len(scores) > 1 else bold
        cells["seeds"] = str(len(scores))
        for baseline in BASELINES if len(found) else ():
            cells[f"against {LABELS[baseline]}"] = tests_of(found, plane, noise, method, baseline)
        rows[LABELS[method]] = cells
    shown = pd.DataFrame.from_dict(rows, orient="index")
    name = METRICS[plane.metric]
    against = "" if found.empty else "; *against*: higher / lower of the bootstraps"
    text = f"Students `{plane.paper}`, {noise:.0%} wrong references{against}."
    return f"{text}\n\n{markdown(shown.rename_axis(name))}"


def tests_of(found: pd.DataFrame, plane: Plane, noise: float, method: str, baseline: str) -> str:
    own = found[(found.strength == plane.paper) & (found.noise == noise) & (found.method == method)]
    own = own[(own.baseline == baseline) & (own.metric == plane.metric)]
    real = own[own.p < ALPHA]
    return f"{(real.delta > 0).sum()} / {(real.delta < 0).sum()} of {len(own)}" if len(own) else ""


def plane_table(plane: Plane) -> str:
    """Cells x methods; the best in bold, in italics where it is not clear."""
    rows = {}
    for cell in plane.cells():
        scores, best, clear = plane.common[cell], plane.ranking(cell).index[0], plane.is_clear(cell)
        row = {"start": f"{plane.starts.get(cell[0], np.nan):.1f}"}
        for method in plane.plane_methods:
            row[LABELS[method]] = ""
            if method in scores:
                spread = f" ± {scores[method].std():.1f}" if len(scores) > 1 else ""
                mark = ("**" if clear else "*") if method == best else ""
                row[LABELS[method]] = f"{mark}{scores[method].mean():.1f}{spread}{mark}"
        rows[cell] = row | {"seeds": str(len(scores))}
    index = pd.MultiIndex.from_tuples(rows, names=["student", "wrong references"])
    name = METRICS[plane.metric]
    shown = pd.DataFrame(list(rows.values()), index=index)
    return f"{name}, average over directions; bold is a clear best, italics one within seed noise.\n\n{markdown(shown)}"


def rates_table(found: Mapping[str, Any]) -> str:
    """The chosen rates, and how often a method's is an end of the grid."""
    rows = {tuple(run[k] for k in (*CELL, "method")): run for run in found["runs"]}
    marks = {key: end_of_grid(run) for key, run in rows.items()}
    table = pd.Series({key: f"{run['rate']:g}{marks[key]}" for key, run in rows.items()}).unstack().fillna("")
    table = table[[m for m in LABELS if m in table]].rename_axis(CELL)
    counts = [[bool(mark) for key, mark in marks.items() if key[-1] == method] for method in table]
    table.loc[("at an end", ""), :] = [f"{sum(ends)} of {len(ends)}" for ends in counts]
    ends = sum(map(bool, marks.values()))
    text = f"{ends} of {len(marks)} are an end of their grid: ↓ its lowest, ↑ its highest, so another might be better."
    return f"{text}\n\n{markdown(table.rename(columns=LABELS))}"


def end_of_grid(run: Mapping[str, Any]) -> str:
    """An arrow where a lower or a higher rate might have been chosen, had the cell's grid had one."""
    grid = [float(rate) for rate in run["valid_chrf"]]
    return "↓" if run["rate"] == min(grid) else "↑" if run["rate"] == max(grid) else ""


def draw_plane(plane: Plane) -> Figure:
    """The best method of each cell, and each method's difference to ForwardKD."""
    others = [m for m in plane.plane_methods if m != "forward_kd"]
    noises = sorted({noise for _, noise in plane.cells()})
    strengths = [s for s in plane.strengths if s in {strength for strength, _ in plane.cells()}]
    columns = 3
    rows = -(-(1 + len(others)) // columns)
    figure = Figure((columns * (0.95 * len(strengths) + 0.6), rows * (0.6 * len(noises) + 1.3)), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    names = [
        f"{s.replace('_', ' ')}\n{plane.starts.get(s, np.nan):.1f} ({plane.documents.get(s, np.nan):.1f})"
        for s in strengths
    ]
    for axis in axes[: 1 + len(others)]:
        axis.set_xticks(range(len(strengths)), names, fontsize=7)
        axis.set_yticks(range(len(noises)), [f"{noise:.0%}" for noise in noises], fontsize=8)
        axis.set_xlim(-0.5, len(strengths) - 0.5)
        axis.set_ylim(-0.5, len(noises) - 0.5)
    for axis in axes[1 + len(others) :]:
        axis.axis("off")
    draw_best(axes[0], plane, strengths, noises)
    for axis, method in zip(axes[1:], others, strict=False):
        draw_differences(axis, plane, method, strengths, noises)
    figure.supxlabel("student: its BLEU before, by the prompt (as a document)", fontsize=9)
    figure.supylabel("wrong references", fontsize=9)
    return figure


def draw_best(axis: Any, plane: Plane, strengths: list[str], noises: list[float]) -> None:
    """Colour: the best method; its BLEU and its gain over the start."""
    colours = dict(zip(plane.plane_methods, COLOURS, strict=False))
    axis.set_title("best (hatched: within seed noise)", fontsize=9)
    shown: dict[str, Patch] = {}
    for cell in plane.cells():
        x, y, best = strengths.index(cell[0]), noises.index(cell[1]), plane.ranking(cell)
        colour, hatch = colours[best.index[0]], "" if plane.is_clear(cell) else "////"
        axis.add_patch(
            Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, hatch=hatch, edgecolor="white", alpha=0.75)
        )
        gain = best.iloc[0] - plane.starts.get(cell[0], np.nan)
        axis.text(x, y, f"{best.iloc[0]:.1f}\n({gain:+.1f})", ha="center", va="center", fontsize=8)
        shown[LABELS[best.index[0]]] = Patch(color=colour, alpha=0.75)
    axis.figure.legend(list(shown.values()), list(shown), loc="outside upper center", ncols=5, fontsize=8)


def draw_differences(axis: Any, plane: Plane, method: str, strengths: list[str], noises: list[float]) -> None:
    """BLEU of a method less ForwardKD's, seed by seed: mean and deviation."""
    axis.set_title(f"{LABELS[method]}\nless ForwardKD, BLEU", fontsize=9)
    values = np.full((len(noises), len(strengths)), np.nan)
    for cell in plane.cells():
        own = plane.common[cell]
        if {method, "forward_kd"} <= set(own):
            gaps = own[method] - own["forward_kd"]
            x, y = strengths.index(cell[0]), noises.index(cell[1])
            values[y, x] = gaps.mean()
            spread = f"\n± {gaps.std():.1f}" if len(gaps) > 1 else ""
            axis.text(x, y, f"{gaps.mean():+.1f}{spread}", ha="center", va="center", fontsize=8)
    axis.imshow(values, cmap="RdBu", vmin=-4, vmax=4, origin="lower", aspect="auto", alpha=0.8)


def draw_gains(plane: Plane) -> Figure:
    """Gain over the start by strength, a panel a share of wrong references; dots are seeds."""
    noises = sorted({noise for _, noise in plane.cells()})
    strengths = [s for s in plane.strengths if s in {strength for strength, _ in plane.cells()}]
    figure = Figure((1.5 + 3.6 * len(noises), 3.4), layout="constrained")
    axes = figure.subplots(1, len(noises), sharey=True, squeeze=False)[0]
    width = 0.8 / max(len(plane.plane_methods), 1)
    for axis, noise in zip(axes, noises, strict=True):
        for number, method in enumerate(plane.plane_methods):
            for x, strength in enumerate(strengths):
                if (strength, noise, method) in plane.runs.index.droplevel("seed"):
                    seeds = plane.runs.loc[(strength, noise, method)].iloc[:, -1] - plane.starts.get(strength, np.nan)
                    place = x + (number + 0.5) * width - 0.4
                    label = LABELS[method] if axis is axes[0] and x == 0 else None
                    axis.bar(place, seeds.mean(), width, color=COLOURS[number], label=label)
                    axis.plot([place] * len(seeds), seeds, "k.", markersize=3)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xticks(range(len(strengths)), [s.replace("_", " ") for s in strengths], fontsize=8)
        axis.set_xlim(-0.5, len(strengths) - 0.5)
        axis.set_title(f"{noise:.0%} wrong references", fontsize=9)
    axes[0].set_ylabel("BLEU over the start")
    figure.legend(loc="outside lower center", ncols=len(plane.plane_methods))
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="with runs.jsonl or results.json")
    folder = parser.parse_args(argv).folder
    write_report(collect(folder), folder)


if __name__ == "__main__":
    run_script(main)
