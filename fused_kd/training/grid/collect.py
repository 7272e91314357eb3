"""Everything that a grid found, as one JSON-safe dict: the only input of its tables and figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from fused_kd.training.evaluation.evaluate import similarity
from fused_kd.training.evaluation.significance import paired_bootstrap
from fused_kd.training.grid.experiment import Grid, Trial
from fused_kd.training.report import environment
from fused_kd.training.runs import read_json, read_lines, write_json

HISTORY = ("step", "loss", "difficulty", "hard_fraction", "beta")


def collect_results(grid: Grid) -> dict[str, Any]:
    """``settings``, ``versions``, ``machine``, ``directions``, ``signatures``, scores of ``teacher`` and ``student``
    by direction, ``labels`` of the methods, ``runs`` (of each finished trial: what it was, scores by direction with
    the similarity to the teacher's own output, history) and ``significance`` (paired bootstrap against the baseline
    of the same condition and seed).
    """
    finished = [trial for trial in grid.trials if grid.done(trial.name)]
    pretrained = {name: _scores(grid, name) for name in ("teacher", "student") if grid.done(name)}
    first = next((score for scores in pretrained.values() for score in scores.values()), {})
    e = grid.experiment
    names = dict.fromkeys(trial.method for trial in grid.trials)
    return {
        "settings": dataclasses.asdict(e),
        **environment(),
        "directions": list(e.directions),
        "signatures": {metric: first.get(f"{metric}_signature") for metric in ("bleu", "chrf")},
        "baseline": e.baseline,
        "teacher": pretrained.get("teacher", {}),
        "student": pretrained.get("student", {}),
        "pretraining": {name: _training(grid, name) for name in pretrained},
        "labels": {name: grid.methods[name].method for name in names},
        "runs": [_run(grid, trial) for trial in finished] + _sweep_ends(grid, finished),
        "significance": [row for group in _groups(grid, finished) for row in _significance(grid, group)],
    }


def _run(grid: Grid, trial: Trial, parameter: str | None = None) -> dict[str, Any]:
    """``parameter``: the trial as a point of that parameter's sweep."""
    training = _training(grid, trial.name)
    objective = grid.methods[trial.method].spec.objective
    swept = parameter or trial.parameter
    value = trial.value if trial.parameter is not None else getattr(objective, parameter or "", None)
    return {
        "condition": trial.condition,
        "method": trial.method,
        "seed": trial.seed,
        "sweep": None if swept is None else {"parameter": swept, "value": value},
        "scores": _scores(grid, trial.name),
        **training,
    }


def _sweep_ends(grid: Grid, finished: Sequence[Trial]) -> list[dict[str, Any]]:
    """The points of the sweeps that are the methods' own runs."""
    return [
        _run(grid, trial, sweep.parameter)
        for sweep in grid.experiment.sweeps
        for trial in finished
        if trial.parameter is None
        and (trial.condition, trial.method) == (sweep.condition, sweep.method)
        and trial.seed in sweep.seeds
        and getattr(grid.methods[trial.method].spec.objective, sweep.parameter) in sweep.values
    ]


def _training(grid: Grid, name: str) -> dict[str, Any]:
    record = read_json(grid.run.stage(name) / "training.json")
    history = [
        {key: entry[key] if key == "step" else round(entry[key], 5) for key in HISTORY if key in entry}
        for entry in record["log_history"]
    ]
    kept = ("objective", "beta_schedule", "parameters", "sentences", "steps", "seconds", "validation")
    return {key: record[key] for key in kept if key in record} | {"history": history}


def _scores(grid: Grid, name: str) -> dict[str, dict[str, Any]]:
    """Scores by direction; with the similarity to the teacher, in BLEU, once that has been translated."""
    scores: dict[str, dict[str, Any]] = read_json(grid.run.stage(name) / "scores.json")
    if name == "teacher" or not grid.done("teacher"):
        return scores
    path = grid.run.stage(name) / "similarity.json"
    close = read_json(path)
    if close is None:
        close = {
            direction: dataclasses.asdict(
                similarity(_hypotheses(grid, name, direction), _hypotheses(grid, "teacher", direction))
            )
            for direction in scores
        }
        write_json(path, close)
    return {d: score | {"similarity": close[d]["bleu"], "equal": close[d]["equal"]} for d, score in scores.items()}


def _hypotheses(grid: Grid, name: str, direction: str) -> list[str]:
    return read_lines(grid.run.stage(name) / f"hypotheses.{direction}.txt")


def _groups(grid: Grid, finished: Sequence[Trial]) -> list[list[Trial]]:
    """Trials that are compared with each other, the baseline's first; without a baseline, none."""
    found: dict[tuple[str, int], list[Trial]] = {}
    for trial in finished:
        if trial.parameter is None:
            found.setdefault((trial.condition, trial.seed), []).append(trial)
    groups = []
    for trials in found.values():
        base = [trial for trial in trials if trial.method == grid.experiment.baseline]
        groups.append(base + [trial for trial in trials if trial.method != grid.experiment.baseline] if base else [])
    return [group for group in groups if len(group) > 1]


def _significance(grid: Grid, group: Sequence[Trial]) -> list[dict[str, Any]]:
    """Kept beside each trial, as a thousand resamples of each metric take a while."""
    base, *others = group
    rows = []
    for direction in tqdm(grid.experiment.directions, desc=f"bootstrap, {base.condition}, seed {base.seed}"):
        files = {t: grid.run.stage(t.name) / f"bootstrap.{direction}.json" for t in others}
        missing = [trial for trial, file in files.items() if not file.exists()]
        if missing:
            systems = {t.method: _hypotheses(grid, t.name, direction) for t in (base, *missing)}
            references = [pair.target for pair in grid.tests[direction]]
            comparisons = paired_bootstrap(systems, references, base.method)
            for trial in missing:
                found = {c.metric: {"delta": c.delta, "p": c.p_value} for c in comparisons if c.system == trial.method}
                write_json(files[trial], found)
        for trial, file in files.items():
            where = {"condition": trial.condition, "method": trial.method, "seed": trial.seed, "direction": direction}
            rows += [where | {"metric": metric, **found} for metric, found in read_json(file).items()]
    return rows
