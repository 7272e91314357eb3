"""The plane: student strength x wrong references x method, of every study that distilled a translator."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

import pandas as pd
from evidence_data import EXAMPLES, Effect, by_seed, markdown, over_directions, read, table1

from fused_kd.training.advice import still_hard

COLUMNS = {
    "sft": "SFT",
    "forward_kd": "ForwardKD",
    "skew": "Skew",
    "self_evolution": "Self-Evolution",
    "floor_0.3": "floor 0.3",
}
STUDIES = {"regimes_gpu": "Multi30k, one H200", "regimes_toy": "toy corpus", "regimes_cpu": "Multi30k, two cores"}
CELL = ["study", "student", "noise"]


def cells() -> pd.DataFrame:
    """A row a distilled student: study, student, noise, method, seed, score, start, teacher, hard, hard_t, in BLEU."""
    planes = (regimes(folder) for folder in regime_folders())
    return pd.concat([small_set(), *planes, demo(), demo("unseen"), strengths()], ignore_index=True)


def regime_folders() -> list[Path]:
    """Committed planes of regimes.py."""
    return [path.parent for path in sorted((EXAMPLES / "self_evolution/results").glob("regimes*/results.json"))]


def small_set() -> pd.DataFrame:
    """The table in miniature, without what starts from nothing."""
    frame = table1()
    frame = frame[frame.study.isin(["clean", "wrong_references"])]
    return frame.assign(study="few new pairs", hard_t=float("nan"))


def regimes(folder: Path) -> pd.DataFrame:
    """examples/self_evolution/regimes.py: means over directions, in chrF, as BLEU is near 0 of its weak students."""
    found = read(folder / "results.json")
    starts = {each["strength"]: over_directions(each["scores"], "chrf") for each in found["starts"]}
    frame = pd.DataFrame(
        {
            "study": f"{STUDIES.get(folder.name, folder.name)}, chrF",
            "student": run["strength"].replace("_", " "), "noise": run["noise"],
            "method": run["method"], "seed": run["seed"], "score": over_directions(run["scores"], "chrf"),
            "start": starts[run["strength"]], "teacher": starts["teacher"],
            "hard": run["history"][0].get("hard_fraction"), "hard_t": run["history"][0].get("hard_fraction_t"),
        }
        for run in found["runs"]
    )  # fmt: skip
    return frame.sort_values(["noise", "start"], kind="stable")


def demo(folder: str = "") -> pd.DataFrame:
    """`make demo` with three seeds, each with a teacher and a student of its own; "unseen": the control."""
    runs = read(EXAMPLES / "results/demo" / folder / "results.json")["runs"]
    study = "demo, teacher has not seen the pairs" if folder else "demo"
    return distilled(runs).assign(study=study, student="works")


def strengths() -> pd.DataFrame:
    """Students of several strengths on the demo's corpus, one seed."""
    paths = sorted((EXAMPLES / "results/strengths").glob("*.json"))
    found = distilled([read(path) for path in paths]).assign(study="demo's corpus")
    return found.sort_values("start", kind="stable")


def distilled(runs: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """What examples/distill.py tells of its runs; scores are those of its ``test_split``."""
    rows = []
    for found in runs:
        about, stages = found["arguments"], found["stages"]
        before, teacher = (stages[name]["scores"]["bleu"] for name in ("student", "teacher"))
        for name in [name for name in stages if name not in ("student", "teacher")]:
            first = next((entry for entry in stages[name].get("log_history", ()) if "loss" in entry), {})
            rows.append(
                {
                    "student": f"{about['student_epochs']:g} epoch{'s' * (about['student_epochs'] != 1)}",
                    "noise": about["kd_noise"], "method": name.replace("self_evolution-floor=", "floor_"),
                    "seed": found["seed"], "score": stages[name]["scores"]["bleu"], "start": before, "teacher": teacher,
                    "hard": first.get("hard_fraction"), "hard_t": first.get("hard_fraction_t"),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def table(frame: pd.DataFrame) -> str:
    """A row a cell of the plane: means over seeds; bold: the best, and what is within the seeds' noise of it."""
    shown = [name for name in COLUMNS if name in set(frame.method)]
    rows = []
    for (study, student, noise), own in frame.groupby(CELL, sort=False):
        found = {name: by_seed(own, method=name) for name in shown if name in set(own.method)}
        means = {name: mean(scores.values()) for name, scores in found.items()}
        best = max(means, key=lambda name: means[name])
        even = {best} | {name for name in found if _even(found[best], found[name])}
        texts = [_cell(means, name, name in even) for name in shown]
        shares = own.dropna(subset=["hard", "hard_t"])
        share = f"{mean(map(still_hard, shares.hard, shares.hard_t)):.2f}" if len(shares) else ""
        seeds = len(set(own.seed))
        about = [study, student, f"{own.start.mean():.1f}", f"{own.teacher.mean():.1f}", f"{noise:.0%}", share, seeds]
        rows.append([*about, *texts])
    about = ["study", "student", "before", "teacher", "wrong", "still hard", "seeds"]
    return markdown([*about, *(COLUMNS[name] for name in shown)], rows)


def _cell(means: dict[str, float], name: str, best: bool) -> str:
    return "" if name not in means else f"**{means[name]:.1f}**" if best else f"{means[name]:.1f}"


def _even(best: dict[int, float], other: dict[int, float]) -> bool:
    """Whether the seeds do not tell them apart: by the interval, of fewer than three by their signs."""
    if not set(best) & set(other):
        return False
    effect = Effect.of(best, other)
    return (effect.interval or (min(effect.each),))[0] <= 0
