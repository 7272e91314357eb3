"""Means over seeds, averages over directions and significance of a grid of runs, complete or not.

What is read is the dictionary of ``results.json``: ``directions``, ``labels`` (method -> shown name, in order),
``runs`` (each with ``condition``, ``method``, ``seed``, ``objective``, ``sweep``, ``scores`` and ``history``),
``significance`` (paired tests against the method ``baseline``), ``teacher`` and ``student`` (scores before
distillation).
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from fused_kd.training.evaluation.significance import ALPHA, significant_over_seeds
from fused_kd.training.runs import read_json

DEFAULT_BASELINE = "forward_kd"
AVERAGE = "average"
METRICS = {"bleu": "BLEU", "chrf": "chrF", "similarity": "similarity to the teacher"}
HIGHER, LOWER = "†", "‡"
# a sweep's parameter -> the objective's own name of it
_FIELDS = {"k": "fraction", "K": "fraction", "Γ": "gamma", "β": "beta"}


class Cell(NamedTuple):
    """Scores of one method: mean over ``seeds`` seeds, sample standard deviation (None for one seed), and a mark.

    ``dagger`` is † or ‡ where the score is higher or lower than the baseline's with p < 0.05 in every seed.
    """

    mean: float
    std: float | None
    seeds: int
    dagger: str = ""


class Comparisons(NamedTuple):
    """Paired tests against the baseline, one a seed and direction: significantly higher, lower, and all."""

    higher: int
    lower: int
    total: int


def load_results(path: str | Path) -> dict[str, Any]:
    """Read and check a ``results.json``.

    Raises:
        ValueError: no such file, or as `check_results`.
    """
    results = read_json(Path(path))
    if results is None:
        raise ValueError(f"results={str(path)!r}: no such file")
    check_results(results)
    return cast(dict[str, Any], results)


def check_results(results: Any) -> None:
    """Raise ``ValueError`` unless the parts that tables and figures stand on are there, each run once."""
    if not isinstance(results, dict):
        raise ValueError(f"results must be a JSON object, got {type(results).__name__}")
    if missing := [key for key in ("directions", "labels", "runs") if key not in results]:
        raise ValueError(f"results has no {', '.join(missing)} (there: {', '.join(results) or 'nothing'})")
    seen = set()
    for number, run in enumerate(results["runs"]):
        if missing := [key for key in ("condition", "method", "seed") if key not in run]:
            raise ValueError(f"results['runs'][{number}] has no {', '.join(missing)}")
        sweep = run.get("sweep") or {}
        key = (run["condition"], run["method"], run["seed"], sweep.get("parameter"), sweep.get("value"))
        if key in seen:
            raise ValueError(f"results['runs'][{number}] is there twice: condition, method, seed, sweep {key}")
        seen.add(key)


def baseline_of(results: dict[str, Any]) -> str:
    """The method that the others are compared with."""
    return results.get("baseline") or DEFAULT_BASELINE


def start_scores(results: dict[str, Any], condition: str) -> dict[str, Any] | None:
    """Scores of the student that a condition's methods start from; None where they start from random weights."""
    settings = ((results.get("settings") or {}).get("conditions") or {}).get(condition)
    scratch = isinstance(settings, dict) and settings.get("start") == "scratch"
    return None if scratch else results.get("student")


def trained_runs(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs without the points of sweeps that are runs of the table once more."""
    plain = [{**run, "sweep": None} for run in results["runs"] if not run.get("sweep")]
    return [run for run in results["runs"] if not run.get("sweep") or {**run, "sweep": None} not in plain]


def conditions(results: dict[str, Any]) -> list[str]:
    """The conditions that have a run, in the order of their first one."""
    return list(dict.fromkeys(run["condition"] for run in results["runs"]))


def runs_of(results: dict[str, Any], condition: str) -> list[dict[str, Any]]:
    """The runs of the table: those of a condition that belong to no sweep.

    Raises:
        ValueError: an unknown condition.
    """
    if condition not in conditions(results):
        known = ", ".join(conditions(results)) or "none"
        raise ValueError(f"condition={condition!r}: the runs have {known}")
    return [run for run in results["runs"] if run["condition"] == condition and not run.get("sweep")]


def methods_of(results: dict[str, Any], runs: Iterable[dict[str, Any]]) -> dict[str, str]:
    """Slug -> label of the methods that have a run; in the order of the labels, others (under their slug) last."""
    present = dict.fromkeys(run["method"] for run in runs)
    ordered = [method for method in results["labels"] if method in present]
    ordered += [method for method in present if method not in results["labels"]]
    return {method: results["labels"].get(method, method) for method in ordered}


def check_metric(metric: str) -> None:
    """Raise ``ValueError`` unless it is one of `METRICS`."""
    if metric not in METRICS:
        raise ValueError(f"metric={metric!r}: expected one of {', '.join(METRICS)}")


def value(scores: dict[str, Any] | None, direction: str, metric: str) -> float | None:
    """A score, or None where there is none yet."""
    return ((scores or {}).get(direction) or {}).get(metric)


def scored_directions(results: dict[str, Any], runs: Iterable[dict[str, Any]], metric: str) -> list[str]:
    """The directions in which some run has a score, in the order of ``results["directions"]``."""
    runs = list(runs)
    return [
        direction
        for direction in results["directions"]
        if any(value(run.get("scores"), direction, metric) is not None for run in runs)
    ]


def average(scores: dict[str, Any] | None, directions: Sequence[str], metric: str) -> float | None:
    """Mean over the directions; None unless each has a score."""
    found = [value(scores, direction, metric) for direction in directions]
    kept = [score for score in found if score is not None]
    return statistics.fmean(kept) if kept and len(kept) == len(found) else None


def cell_of(scores: Iterable[float | None], dagger: str = "") -> Cell | None:
    """Mean and sample standard deviation of the scores that are there, or None."""
    kept = [score for score in scores if score is not None]
    if not kept:
        return None
    return Cell(statistics.fmean(kept), statistics.stdev(kept) if len(kept) > 1 else None, len(kept), dagger)


def average_cell(runs: Iterable[dict[str, Any]], directions: Sequence[str], metric: str) -> Cell | None:
    """Over seeds, of each seed's average over directions; seeds that lack a direction do not count."""
    return cell_of(average(run.get("scores"), directions, metric) for run in runs)


def table_cells(results: dict[str, Any], condition: str, metric: str = "bleu") -> dict[str, dict[str, Cell]]:
    """Method -> direction (and `AVERAGE`) -> `Cell`; cells without a score are left out.

    Directions are those in which the condition has any score. The average has no mark: tests are per direction.

    Raises:
        ValueError: an unknown condition or metric.
    """
    check_metric(metric)
    runs = runs_of(results, condition)
    directions = scored_directions(results, runs, metric)
    table = {}
    for method in methods_of(results, runs):
        own = [run for run in runs if run["method"] == method]
        cells = {}
        for direction in directions:
            scores = {run["seed"]: value(run.get("scores"), direction, metric) for run in own}
            seeds = [seed for seed, score in scores.items() if score is not None]
            dagger = _dagger(results, condition, metric, method, direction, seeds)
            if (cell := cell_of(scores.values(), dagger)) is not None:
                cells[direction] = cell
        if (cell := average_cell(own, directions, metric)) is not None:
            cells[AVERAGE] = cell
        table[method] = cells
    return table


def comparisons(results: dict[str, Any], condition: str, metric: str = "bleu") -> dict[str, Comparisons]:
    """Method -> its tests against the baseline; methods without a test are left out."""
    counts: dict[str, Comparisons] = {}
    for entry in results.get("significance") or []:
        if entry["condition"] != condition or entry["metric"] != metric:
            continue
        old = counts.get(entry["method"], Comparisons(0, 0, 0))
        significant = entry["p"] < ALPHA
        counts[entry["method"]] = Comparisons(
            old.higher + (significant and entry["delta"] > 0),
            old.lower + (significant and entry["delta"] < 0),
            old.total + 1,
        )
    return counts


def _dagger(results: dict[str, Any], condition: str, metric: str, method: str, direction: str, seeds: list[int]) -> str:
    key = (condition, metric, method, direction)
    tests = {
        entry["seed"]: entry
        for entry in results.get("significance") or []
        if (entry["condition"], entry["metric"], entry["method"], entry["direction"]) == key
    }
    found = [tests[seed] for seed in seeds if seed in tests]
    deltas = [entry["delta"] for entry in found]
    if not seeds or len(found) < len(seeds) or not significant_over_seeds([entry["p"] for entry in found], deltas):
        return ""
    return HIGHER if deltas[0] > 0 else LOWER


class Sweep(NamedTuple):
    """One parameter of one method: ``points`` (value -> average over ``directions``), over ``seeds`` alone."""

    method: str
    points: dict[float, Cell]
    directions: list[str]
    seeds: list[int]


def sweeps(results: dict[str, Any], condition: str, parameter: str, metric: str = "bleu") -> list[Sweep]:
    """The condition's sweeps of a parameter, a method each; averages are over the directions that they have scores in.

    Raises:
        ValueError: an unknown metric.
    """
    check_metric(metric)
    found = []
    for method, by_value in sweep_runs(results, condition, parameter).items():
        swept = [run for runs in by_value.values() for run in runs]
        directions = scored_directions(results, swept, metric)
        cells = {held: average_cell(runs, directions, metric) for held, runs in by_value.items()}
        points = {held: cell for held, cell in cells.items() if cell is not None}
        if points:
            found.append(Sweep(method, points, directions, sorted({run["seed"] for run in swept})))
    return found


def sweep_runs(results: dict[str, Any], condition: str, parameter: str) -> dict[str, dict[float, list[dict[str, Any]]]]:
    """Method -> value, ascending -> the runs there.

    The table's own runs of a swept method belong to it too, at the value in their ``objective``, for the sweep's
    seeds alone: points of different seeds would not compare.
    """
    own = [run for run in results["runs"] if run["condition"] == condition]
    swept = [run for run in own if parameter_of(run) == parameter]
    found = {}
    for method in methods_of(results, swept):
        seeds = {run["seed"] for run in swept if run["method"] == method}
        by_value: dict[float, dict[int, dict[str, Any]]] = {}
        for run in own:
            if run["method"] != method or run["seed"] not in seeds:
                continue
            if parameter_of(run) == parameter:
                by_value.setdefault(float(run["sweep"]["value"]), {})[run["seed"]] = run
            elif not run.get("sweep") and (held := _held(run, parameter)) is not None:
                by_value.setdefault(held, {}).setdefault(run["seed"], run)
        found[method] = {held: list(runs.values()) for held, runs in sorted(by_value.items())}
    return found


def swept_parameters(results: dict[str, Any]) -> list[str]:
    """Names of the parameters that have a sweep, as the objectives call them."""
    return list(dict.fromkeys(name for run in results["runs"] if (name := parameter_of(run)) is not None))


def parameter_of(run: dict[str, Any]) -> str | None:
    """The parameter that the run is a sweep of, as its objective calls it, or None."""
    name = (run.get("sweep") or {}).get("parameter")
    return None if name is None else _FIELDS.get(name, name)


def _held(run: dict[str, Any], parameter: str) -> float | None:
    """The parameter's value in the run's objective, as in ``SelfEvolution(lam=0.5, beta=0.5, gamma=0.4)``."""
    match = re.search(rf"\b{re.escape(parameter)}=([-+.\deE]+)", run.get("objective") or "")
    return None if match is None else float(match[1])
