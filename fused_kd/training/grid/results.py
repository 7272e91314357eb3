"""The tables and the report of a grid of runs, from its ``results.json`` alone.

    python -m fused_kd.training.grid.results RESULTS_JSON FOLDER

writes ``results.md``, ``results.csv`` and every figure of `fused_kd.training.grid.figures` again.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fused_kd.training.evaluation.significance import ALPHA
from fused_kd.training.grid import figures
from fused_kd.training.grid.aggregate import (
    AVERAGE,
    DEFAULT_BASELINE,
    HIGHER,
    LOWER,
    METRICS,
    Cell,
    Comparisons,
    average,
    baseline_of,
    check_results,
    comparisons,
    conditions,
    load_results,
    methods_of,
    runs_of,
    scored_directions,
    start_scores,
    table_cells,
    trained_runs,
    value,
)
from fused_kd.training.runs import write_text

if TYPE_CHECKING:
    from rich.console import Console

CSV_COLUMNS = ("condition", "method", "direction", "metric", "mean", "std", "seeds", "dagger")
TEACHER, STUDENT = "teacher", "student before"


@dataclass(frozen=True)
class ResultsTable:
    """Methods x directions for one condition and metric.

    ``directions`` ends with "average" where there are several. ``cells`` maps method -> direction -> `Cell`,
    ``labels`` method -> shown name, ``references`` the teacher's and the starting student's scores by direction, and
    ``tests`` method -> its comparisons with the method ``baseline``. ``seeds`` are those of any run.
    """

    condition: str
    metric: str
    directions: list[str]
    labels: dict[str, str]
    cells: dict[str, dict[str, Cell]]
    references: dict[str, dict[str, float]]
    tests: dict[str, Comparisons]
    seeds: list[int]
    baseline: str = DEFAULT_BASELINE

    def is_best(self, method: str, direction: str) -> bool:
        """Whether the mean is the highest of its column, as shown (one decimal)."""
        means = {name: round(row[direction].mean, 1) for name, row in self.cells.items() if direction in row}
        return method in means and means[method] == max(means.values())

    def reference_texts(self, scores: dict[str, float]) -> list[str]:
        """A reference's cells as shown."""
        return [f"{scores[direction]:.1f}" if direction in scores else "-" for direction in self.directions]

    def text(self, method: str, direction: str) -> str:
        """A cell as shown: mean, ± deviation, mark, and the number of seeds where it is not that of the table."""
        cell = self.cells[method].get(direction)
        if cell is None:
            return "-"
        spread = "" if cell.std is None else f" ± {cell.std:.1f}"
        return f"{cell.mean:.1f}{spread}{cell.dagger and ' ' + cell.dagger}" + self._fewer(cell)

    def markdown(self) -> str:
        """A Markdown table; the best mean of each direction in bold."""
        tested = bool(self.tests)
        header = [METRICS[self.metric], *self.directions] + ["higher / lower of tests"] * tested
        lines = [header, ["---"] + ["---:"] * (len(header) - 1)]
        for name, scores in self.references.items():
            lines.append([f"*{name}*", *self.reference_texts(scores)] + [""] * tested)
        for method, label in self.labels.items():
            row = [label]
            for direction in self.directions:
                text = self.text(method, direction)
                if self.is_best(method, direction):
                    number = text.split(" ")[0]
                    text = f"**{number}**{text.removeprefix(number)}"
                row.append(text)
            counts = self.tests.get(method)
            row += ([f"{counts.higher} / {counts.lower} of {counts.total}"] if counts else ["-"]) * tested
            lines.append(row)
        return "".join("| " + " | ".join(line) + " |\n" for line in lines)

    def caption(self) -> str:
        """What the numbers are, and how many seeds they stand on."""
        baseline = self.labels.get(self.baseline, self.baseline)
        count = len(self.seeds)
        which = ", ".join(map(str, self.seeds))
        parts = [
            f"{METRICS[self.metric]}, condition {self.condition}: mean over {count} seed{'s' * (count != 1)} ({which})"
        ]
        if any(cell.std is not None for row in self.cells.values() for cell in row.values()):
            parts[0] += " ± sample standard deviation"
        if any(self._fewer(cell) for row in self.cells.values() for cell in row.values()):
            parts.append("(n) where only n of the seeds are there yet")
        if self.tests:
            parts.append(
                f"{HIGHER} / {LOWER}: higher / lower than {baseline} with p < {ALPHA:g} in every seed "
                "(paired bootstrap over the test sentences)"
            )
            total = [sum(column) for column in zip(*self.tests.values(), strict=True)]
            parts.append(
                f"of the {total[2]} tests (method, direction, seed) {total[0]} ({total[0] / total[2]:.0%}) found a "
                f"higher and {total[1]} ({total[1] / total[2]:.0%}) a lower score; chance alone would give "
                f"about {ALPHA:.0%}"
            )
        return "; ".join(parts) + "."

    def draw(self, path: Path) -> Path:
        """The table as a PNG; cells are shaded by their distance from the baseline's mean."""
        rows = []
        for name, scores in self.references.items():
            texts = self.reference_texts(scores)
            rows.append(figures.TableRow(name, texts, [None] * len(texts), [False] * len(texts)))
        against = self.cells.get(self.baseline, {})
        for method, label in self.labels.items():
            row = self.cells[method]
            shades = [
                row[key].mean - against[key].mean if {key} <= row.keys() & against.keys() else None
                for key in self.directions
            ]
            bold = [self.is_best(method, key) for key in self.directions]
            rows.append(figures.TableRow(label, [self.text(method, key) for key in self.directions], shades, bold))
        baseline = self.labels.get(self.baseline)
        legend = f"mean ± standard deviation over {len(self.seeds)} seeds" if len(self.seeds) > 1 else "one seed"
        if baseline:
            legend += f"; shade: distance from {baseline}"
        if self.tests:
            legend += f"\n{HIGHER} / {LOWER}: higher / lower than {baseline} with p < {ALPHA:g} in every seed"
        return figures.draw_table(path, f"{METRICS[self.metric]}, {self.condition}", self.directions, rows, legend)

    def records(self) -> list[dict[str, Any]]:
        """Rows of the CSV, unrounded; an unknown deviation is empty."""
        return [
            dict(
                zip(
                    CSV_COLUMNS,
                    (self.condition, method, direction, self.metric, cell.mean, cell.std, cell.seeds, cell.dagger),
                    strict=True,
                )
            )
            for method, row in self.cells.items()
            for direction, cell in row.items()
        ]

    def _fewer(self, cell: Cell) -> str:
        return f" ({cell.seeds})" if cell.seeds < len(self.seeds) else ""


def results_table(results: dict[str, Any], condition: str, metric: str = "bleu") -> ResultsTable:
    """The table of one condition, without the runs of sweeps.

    Args:
        results: the dictionary of ``results.json``; the grid may be incomplete.
        condition: one of the runs'.
        metric: "bleu" (default), "chrf" or "similarity".

    Raises:
        ValueError: an unknown condition or metric; results that lack a part or hold a run twice.
    """
    check_results(results)
    cells = table_cells(results, condition, metric)
    runs = runs_of(results, condition)
    directions = scored_directions(results, runs, metric)
    references = {}
    for name, scores in ((TEACHER, results.get("teacher")), (STUDENT, start_scores(results, condition))):
        known = {direction: value(scores, direction, metric) for direction in directions}
        known[AVERAGE] = average(scores, directions, metric)
        row = {direction: score for direction, score in known.items() if score is not None}
        if row:
            references[name] = row
    return ResultsTable(
        condition,
        metric,
        directions + [AVERAGE] * (len(directions) > 1),
        methods_of(results, runs),
        cells,
        references,
        comparisons(results, condition, metric),
        sorted({run["seed"] for run in runs}),
        baseline_of(results),
    )


def write_report(results: dict[str, Any], folder: str | Path) -> list[Path]:
    """Write ``results.md``, ``results.csv`` and the figures; returns the paths, the report first.

    Figures and tables without data are left out; each file is written whole or not at all.

    Raises:
        ValueError: as `results_table`. ImportError: no matplotlib.
    """
    check_results(results)
    folder = Path(folder)
    tables = {
        (condition, metric): results_table(results, condition, metric)
        for condition in conditions(results)
        for metric in METRICS
    }
    tables = {key: table for key, table in tables.items() if table.directions}
    pictures = figures.write_figures(results, folder)
    for (condition, metric), table in tables.items():
        if metric != "similarity":
            path = folder / f"table_{figures.file_name(condition)}_{metric}.png"
            pictures.append(table.draw(path))
    write_text(folder / "results.csv", _csv(list(tables.values())))
    write_text(folder / "results.md", _report(results, tables, pictures))
    return [folder / "results.md", folder / "results.csv", *pictures]


def print_tables(results: dict[str, Any], console: Console, metric: str = "bleu") -> None:
    """Print a table a condition to a ``rich`` console. Raises as `results_table`."""
    from rich.table import Table
    from rich.text import Text

    check_results(results)
    for condition in conditions(results):
        table = results_table(results, condition, metric)
        shown = Table(title=f"{METRICS[metric]}, {condition}", caption=Text(table.caption()), caption_justify="left")
        for number, name in enumerate(("", *table.directions)):
            shown.add_column(name, justify="right" if number else "left")
        for name, scores in table.references.items():
            shown.add_row(name, *table.reference_texts(scores), style="dim")
        for method, label in table.labels.items():
            shown.add_row(
                Text(label),
                *(Text(table.text(method, d), "bold" if table.is_best(method, d) else "") for d in table.directions),
            )
        console.print(shown)


def _csv(tables: list[ResultsTable]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for table in tables:
        writer.writerows(table.records())
    return text.getvalue()


def _report(results: dict[str, Any], tables: dict[tuple[str, str], ResultsTable], pictures: list[Path]) -> str:
    lines = ["# Results", "", _progress(results), ""]
    for condition in conditions(results):
        lines += [f"## Condition: {condition}", ""]
        for metric in ("bleu", "chrf"):
            if (table := tables.get((condition, metric))) is not None:
                lines += [table.markdown(), table.caption(), ""]
                if signature := (results.get("signatures") or {}).get(metric):
                    lines += [f"Signature: `{signature}`", ""]
        if (note := _same_gradient(tables.get((condition, "bleu")), results)) is not None:
            lines += [note, ""]
        name = figures.file_name(condition)
        for path in (path for path in pictures if path.stem == f"methods_{name}"):
            lines += [figures.caption(path.stem), "", f"![{path.stem}]({path.name})", ""]
    others = [path for path in pictures if not path.stem.startswith(("methods_", "table_"))]
    if others:
        lines += ["## Figures", ""]
        for path in others:
            lines += [figures.caption(path.stem), "", f"![{path.stem}]({path.name})", ""]
    lines += ["## How to read it", "", *(f"- {line}" for line in _READING), ""]
    for key in ("settings", "versions", "machine"):
        if results.get(key):
            text = json.dumps(results[key], indent=1, ensure_ascii=False)
            lines += [f"<details><summary>{key}</summary>", "", "```json", text, "```", "", "</details>", ""]
    return "\n".join(lines).rstrip() + "\n"


def _progress(results: dict[str, Any]) -> str:
    runs = trained_runs(results)
    parts = []
    for condition in conditions(results):
        own = runs_of(results, condition)
        counts = [sum(run["method"] == method for run in own) for method in methods_of(results, own)]
        if counts:
            spread = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
            parts.append(f"{condition}: {len(counts)} methods with {spread} seed{'s' * (max(counts) != 1)}")
    swept = sum(bool(run.get("sweep")) for run in runs)
    hours = sum(run.get("seconds") or 0 for run in runs) / 3600
    return (
        f"{len(runs)} runs, {swept} of them in sweeps, {hours:.1f} hours of training in all. " + "; ".join(parts) + "."
    )


def _same_gradient(table: ResultsTable | None, results: dict[str, Any]) -> str | None:
    """What ForwardKD and NoEvo differ by, seed by seed: the size of a difference that means nothing."""
    same = ("forward_kd", "no_evo")
    if table is None or not set(same) <= table.cells.keys():
        return None
    runs = {(run["method"], run["seed"]): run for run in runs_of(results, table.condition)}
    gaps = []
    for seed in table.seeds:
        for direction in table.directions:
            pair = [value(runs.get((name, seed), {}).get("scores"), direction, "bleu") for name in same]
            if None not in pair:
                gaps.append(abs(pair[0] - pair[1]))  # type: ignore[operator]
    if not gaps:
        return None
    return (
        f"{table.labels[same[0]]} and {table.labels[same[1]]} have the same gradient at temperature 1 and one λ. "
        f"Here they differ by {sum(gaps) / len(gaps):.2f} BLEU on average and {max(gaps):.2f} at most over "
        f"{len(gaps)} pairs of runs (seed, direction): a difference of that size between other methods, in one run, "
        "may be rounding that training has amplified."
    )


_READING = (
    "± is the sample standard deviation over seeds: what another training order would change. It says nothing about "
    "the choice of test sentences.",
    f"{HIGHER} and {LOWER} come from a paired bootstrap over the test sentences of each seed. They say nothing about "
    "the choice of seeds, and no correction is made for the number of tests.",
    "Bold is the best mean of a column at the shown precision; several cells may share it.",
    "The average is taken over directions within a seed first; its deviation is that of these averages.",
    "The student before distillation, where it is shown, is where every method starts. On a small set that is seen "
    "several times, methods may differ in how much they lose.",
)


def main(argv: Sequence[str] | None = None) -> list[Path]:
    parser = argparse.ArgumentParser(
        prog="python -m fused_kd.training.grid.results", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("results", metavar="RESULTS_JSON")
    parser.add_argument("folder", metavar="FOLDER", help="gets results.md, results.csv and the figures")
    args = parser.parse_args(argv)
    try:
        written = write_report(load_results(args.results), args.folder)
    except ValueError as error:
        parser.error(str(error))
    for path in written:
        print(path)
    return written


if __name__ == "__main__":
    main()
