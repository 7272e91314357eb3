"""What docs/evidence.md reads: committed results as rows of one form, and effects with their intervals."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
# two-sided 95 % quantiles of Student's t by degrees of freedom; beyond them the normal one is within 10 %
T95 = {2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228, 11: 2.201}
YES, NO, OPEN = "yes", "no", "open"


@dataclass(frozen=True)
class Effect:
    """Paired differences, one a seed."""

    each: tuple[float, ...]

    @classmethod
    def of(cls, left: dict[Any, float], right: dict[Any, float]) -> Effect:
        """``left - right`` of the seeds that both have."""
        seeds = [seed for seed in left if seed in right]
        if not seeds:
            raise ValueError(f"left and right must share a seed, got {sorted(left)} and {sorted(right)}")
        return cls(tuple(left[seed] - right[seed] for seed in seeds))

    @property
    def mean(self) -> float:
        return mean(self.each)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % of Student's t over seeds; None below three of them."""
        n = len(self.each)
        if n < 3:
            return None
        half = T95.get(n - 1, 1.96) * stdev(self.each) / math.sqrt(n)
        return self.mean - half, self.mean + half

    def __str__(self) -> str:
        largest = max(map(abs, self.each))
        form = f"+.{1 if largest >= 10 else 2 if largest >= 0.1 else 3}f"
        if self.interval is None:
            each = ", ".join(format(value, form) for value in self.each)
            return f"{self.mean:{form}} ({each})" if len(self.each) > 1 else f"{each} (one seed)"
        return f"{self.mean:{form}} [{self.interval[0]:{form}}, {self.interval[1]:{form}}]"

    @property
    def verdict(self) -> str:
        """Of a claim that the difference is above 0; in brackets where the seeds are too few for an interval."""
        low, high = self.interval or (min(self.each), max(self.each))
        found = YES if low > 0 else NO if high < 0 else OPEN
        return found if self.interval else f"({found})"


@cache
def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


# Self-Evolution KD: a row a trained student


def table1() -> pd.DataFrame:
    """examples/self_evolution/results/table1: scores are means over four directions, in BLEU."""
    found = read(EXAMPLES / "self_evolution/results/table1/results.json")
    rows = []
    for run in found["runs"]:
        if run["sweep"]:
            continue
        about = found["settings"]["conditions"][run["condition"]]
        scratch = about["start"] == "scratch"
        rows.append(
            {
                "study": run["condition"], "student": "untrained" if scratch else "converged",
                "noise": about["noise"], "method": run["method"], "seed": run["seed"],
                "score": over_directions(run["scores"], "bleu"),
                "similarity": over_directions(run["scores"], "similarity"),
                "start": 0.0 if scratch else over_directions(found["student"], "bleu"),
                "teacher": over_directions(found["teacher"], "bleu"),
                "hard": run["history"][0].get("hard_fraction"),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def over_directions(scores: dict[str, dict[str, float]], metric: str) -> float:
    return mean(each[metric] for each in scores.values())


def sweep(parameter: str) -> dict[float, float]:
    """Value -> BLEU of table1's sweep, one seed."""
    runs = read(EXAMPLES / "self_evolution/results/table1/results.json")["runs"]
    own = [run for run in runs if run["sweep"] and run["sweep"]["parameter"] == parameter]
    return {run["sweep"]["value"]: over_directions(run["scores"], "bleu") for run in sorted(own, key=_value)}


def _value(run: dict[str, Any]) -> float:
    return float(run["sweep"]["value"])


def by_seed(frame: pd.DataFrame, column: str = "score", **where: Any) -> dict[int, float]:
    """Seed -> value of the rows where each column has the given value."""
    for key, value in where.items():
        frame = frame[frame[key] == value]
    return dict(zip(frame.seed, frame[column], strict=True))


def compare(frame: pd.DataFrame, left: str, right: str, column: str = "score") -> Effect:
    """Method ``left`` minus method ``right``, seed by seed."""
    return Effect.of(*(by_seed(frame, column, method=name) for name in (left, right)))


def gain(frame: pd.DataFrame, method: str) -> Effect:
    """A method minus its start, seed by seed."""
    return Effect.of(*(by_seed(frame, column, method=method) for column in ("score", "start")))


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    def line(cells: Iterable[Any]) -> str:
        return "| " + " | ".join(str(cell) for cell in cells) + " |"

    return "\n".join([line(header), "|" + "---|" * len(header), *map(line, rows)])
