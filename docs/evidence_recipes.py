"""Scores of the other recipes by seed, from the metrics.json that each of them commits."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import pandas as pd
from evidence_data import EXAMPLES, read

Scores = dict[Any, float]  # by seed


def results(recipe: str) -> dict[str, Path]:
    """The metrics.json of a recipe: of its results, as "", and of folders in them, by name."""
    folder = EXAMPLES / recipe / "results"
    return {"" if path.parent == folder else path.parent.name: path for path in sorted(folder.rglob("metrics.json"))}


def cycle(path: Path, arm: str, iteration: int = 1, metric: str = "chrf") -> Scores:
    """Of the test set; arms "base" (cut at its first line break) and "raw" have no iteration."""
    found = {}
    for seed, own in read(path)["seeds"].items():
        base = own["base"]["test"]
        if arm in ("base", "raw"):
            found[seed] = (base["raw"] if arm == "raw" else base)[metric]
        else:
            rounds = own["arms"].get(arm, ())
            found |= {seed: each["test"][metric] for each in rounds if each["iteration"] == iteration}  # noqa: B035
    return found


def last_iteration(path: Path) -> int:
    """That every seed's arm of hard labels has."""
    return min(max(each["iteration"] for each in own["arms"]["hard"]) for own in read(path)["seeds"].values())


def sdrrl(path: Path, arm: str, language: str, metric: str = "accuracy") -> Scores:
    """Of the test questions, of the setting that the development questions chose for the arm."""
    found = read(path)
    if "arms" in found:
        seeds = found["arms"].get(arm, {"seeds": {}})["seeds"]
        return {seed: own["scores"][language][metric] for seed, own in seeds.items()}
    name = found.get("chosen", {}).get(arm, arm)
    rows = [row for row in found["scores"] if row.get("tasks", "test") == "test" and row["language"] == language]
    return {row["seed"]: row[metric] for row in rows if row["arm"] == name and row[metric] is not None}


def mt_llm(path: Path, system: str) -> Scores:
    """Balanced accuracy in percent, mean of the languages that are not English."""
    found = {}
    for seed, own in read(path)["seeds"].items():
        scores = own["accuracy"][system]
        found[seed] = 100 * mean(value["balanced"] for language, value in scores.items() if language != "en")
    return found


def translators() -> dict[str, Scores]:
    """MT-LLM minus translate-test by the translator, in points; none where no such results are committed."""
    path = next((EXAMPLES / "mt_llm/results").rglob("translators.json"), None)
    return {} if path is None else {name: value["by_seed"] for name, value in read(path)["paired"].items()}


def smollm2(path: Path) -> pd.DataFrame:
    """Chosen rates' numbers on the test text: a row an arm and seed, with those before the arms as "healed"."""
    found = read(path)
    own = found["teacher"]["test"]["hard"]
    rows = [{"method": run["arm"], "seed": run["seed"], **run["test"]} for run in found["runs"] if run["chosen"]]
    healed = next(iter(found["students"].values()))["healed"]["test"]
    rows += [{"method": "healed", "seed": seed, **healed} for seed in sorted({row["seed"] for row in rows})]
    return pd.DataFrame(rows).assign(hard_t=own)
