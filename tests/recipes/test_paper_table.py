"""Tables and figures of the recipe: every number against numpy on the runs themselves, whole tables and parts."""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "examples" / "self_evolution"))

import paper_table

RECIPE = Path(paper_table.__file__).parent

DIRECTIONS = ["de-en", "en-de"]
LABELS = {"sft": "SFT", "forward_kd": "ForwardKD", "no_evo": "NoEvo", "self_evolution": "SelfEvolution"}
LEVELS = {"sft": -3.9, "forward_kd": -1.6, "no_evo": -1.6, "self_evolution": -0.6}


def fake_results() -> dict[str, Any]:
    """Four methods, three seeds, two conditions, a sweep; random scores of a likely size."""
    rng = np.random.default_rng(7)

    def run(condition: str, method: str, seed: int, sweep: dict | None = None) -> dict:
        level = 25 + LEVELS[method] - (0 if sweep is None else abs(np.log(sweep["value"] / 0.4)))
        scores = {}
        for direction in DIRECTIONS:
            bleu = level + rng.normal(0, 0.25)
            scores[direction] = {"bleu": bleu, "chrf": bleu + 25, "similarity": 1.4 * bleu}
        history = [{"step": s, "difficulty": np.exp(-s / 50), "hard_fraction": 0.5 + 0.1 * seed} for s in (10, 20, 40)]
        objective = f"{method}({sweep or ''})" if sweep is None or sweep["value"] != 0.4 else f"{method}()"
        return {"condition": condition, "method": method, "seed": seed, "sweep": sweep, "objective": objective,
                "scores": scores, "history": history, "seconds": 240.0, "steps": 40}  # fmt: skip

    runs = [run(c, m, s) for c in ("clean", "30 % wrong") for m in LEVELS for s in range(3)]
    runs += [run("clean", "self_evolution", 0, {"parameter": "gamma", "value": v}) for v in (0.1, 1.6)]
    own = next(r for r in runs if (r["condition"], r["method"], r["seed"]) == ("clean", "self_evolution", 0))
    runs.append({**own, "sweep": {"parameter": "gamma", "value": 0.4}})
    base = {(r["condition"], r["seed"]): r["scores"] for r in runs if r["method"] == "forward_kd"}
    tests = []
    for r in runs:
        for direction in DIRECTIONS if not r["sweep"] and r["method"] != "forward_kd" else ():
            delta = r["scores"][direction]["bleu"] - base[r["condition"], r["seed"]][direction]["bleu"]
            about = {name: r[name] for name in ("condition", "method", "seed")}
            p = float(np.exp(-4 * abs(delta)))
            tests.append(about | {"direction": direction, "metric": "bleu", "delta": delta, "p": p})
    start = {d: {"bleu": 25.0, "chrf": 50.0, "similarity": 33.0} for d in DIRECTIONS}
    return {
        "settings": {"conditions": {"30 % wrong": {"start": "scratch"}, "clean": {}}}, "directions": DIRECTIONS,
        "signatures": {"bleu": "tok:13a", "chrf": "nc:6"}, "versions": {}, "machine": {}, "baseline": "forward_kd",
        "teacher": {d: {"bleu": 29.0} for d in DIRECTIONS}, "student": start, "labels": LABELS,
        "runs": runs, "significance": tests,
    }  # fmt: skip


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    return json.loads(json.dumps(fake_results()))


def scores(found: dict, condition: str, method: str, metric: str = "bleu") -> np.ndarray:
    """(seeds, directions)"""
    runs = [r for r in found["runs"] if (r["condition"], r["method"], r["sweep"]) == (condition, method, None)]
    return np.array([[r["scores"][d][metric] for d in DIRECTIONS] for r in sorted(runs, key=lambda r: r["seed"])])


@pytest.mark.parametrize("metric", ["bleu", "chrf", "similarity"])
def test_means_and_deviations(whole: dict, metric: str) -> None:
    shown = paper_table.Table(paper_table.Results(whole), "clean", metric)
    assert list(shown.mean.index) == list(LABELS.values()) and list(shown.mean) == [*DIRECTIONS, "average"]
    for method in LEVELS:
        found = scores(whole, "clean", method, metric)
        for column, values in {**dict(zip(DIRECTIONS, found.T, strict=True)), "average": found.mean(1)}.items():
            cell = tuple(frame.loc[LABELS[method], column] for frame in (shown.mean, shown.std))
            assert cell == pytest.approx((values.mean(), values.std(ddof=1)))


def test_references(whole: dict) -> None:
    results = paper_table.Results(whole)
    rows = [paper_table.Table(results, c, "bleu").references.average.to_dict() for c in results.conditions]
    assert rows == [{"teacher": 29.0, "student before": 25.0}, {"teacher": 29.0}], "from scratch: no student before"


@pytest.mark.parametrize(
    "tests, mark",
    [
        ([(0, 1.0, 0.01), (1, 0.5, 0.049)], "†"),
        ([(0, -1.0, 0.01), (1, -0.5, 0.001)], "‡"),
        ([(0, 1.0, 0.01), (1, -0.5, 0.001)], ""),
        ([(0, 1.0, 0.01), (1, 0.5, 0.05)], ""),
        ([], ""),
    ],
)
def test_daggers_and_bold(tests: list[tuple[int, float, float]], mark: str) -> None:
    """Two methods, two seeds, one direction; ``tests`` of no_evo as (seed, delta, p)."""
    about: dict[str, Any] = {"condition": "c", "sweep": None, "objective": "", "history": [], "seconds": 1, "steps": 1}
    runs = [
        about | {"method": method, "seed": seed, "scores": {"de-en": {"bleu": bleu + seed}}}
        for seed in range(2)
        for method, bleu in (("forward_kd", 20.96), ("no_evo", 21.04))
    ]
    place = {"condition": "c", "method": "no_evo", "direction": "de-en", "metric": "bleu"}
    tested = [place | {"seed": seed, "delta": delta, "p": p} for seed, delta, p in tests]
    settings = {"conditions": {"c": {}}}
    labels = {"no_evo": "NoEvo", "forward_kd": "ForwardKD"}
    found = {"directions": ["de-en"], "labels": labels, "baseline": "forward_kd", "teacher": {}, "student": {}}
    found |= {"runs": runs, "significance": tested, "settings": settings}
    shown = paper_table.Table(paper_table.Results(found), "c", "bleu")
    assert list(shown.mean) == ["de-en"], "an average of one direction is no column"
    assert shown.text("NoEvo", "de-en") == " ".join(["21.5 ± 0.7", *([mark] if mark else [])])
    higher, lower = (sum(p < 0.05 and sign * delta > 0 for _, delta, p in tests) for sign in (1, -1))
    lines = shown.markdown().splitlines()
    assert lines[2].startswith("| NoEvo") and all("**21.5** ± 0.7" in line for line in lines[2:]), "ties are all bold"
    if tests:
        assert f" {higher} / {lower} of {len(tests)} |" in lines[2] and f"of the {len(tests)} tests" in shown.caption()


def test_report(whole: dict, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(whole))
    written = paper_table.main([str(tmp_path / "results.json"), str(tmp_path / "report")])
    assert set(written) == set((tmp_path / "report").iterdir()), "no partial files stay"
    text = written[0].read_text(encoding="utf-8")
    for path in written[2:]:
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 8000
        assert f"]({path.name})" in text
    assert {p.stem for p in written if p.stem.startswith("methods")} == {"methods_clean", "methods_30-wrong"}
    assert "26 runs, 2 of them in sweeps, 1.7 hours" in text
    gaps = np.abs(scores(whole, "clean", "forward_kd") - scores(whole, "clean", "no_evo"))
    assert f"differ by {gaps.mean():.2f} BLEU on average and {gaps.max():.2f} at most over 6 pairs" in text
    assert re.search(r"\| SelfEvolution +\| +40 \| +4\.0 \| +6000 \|", text), "steps, minutes, ms a step"
    with open(written[1], newline="", encoding="utf-8") as file:
        rows = {(r["condition"], r["method"], r["direction"], r["metric"]): r for r in csv.DictReader(file)}
    assert len(rows) == 2 * 4 * 3 * 3
    row, values = rows["clean", "sft", "en-de", "bleu"], scores(whole, "clean", "sft")[:, 1]
    assert float(row["mean"]) == pytest.approx(values.mean()) and float(row["std"]) == pytest.approx(values.std(ddof=1))
    assert (row["seeds"], row["dagger"]) == ("3", "‡")
    with pytest.raises(ValueError, match="no such file"):
        paper_table.main([str(tmp_path / "none.json"), str(tmp_path)])


def test_figures_show_the_means(whole: dict) -> None:
    results = paper_table.Results(whole)
    (axis,) = paper_table.draw_sweep(results, "gamma").axes
    x, y = axis.containers[0].lines[0].get_data()
    assert list(x) == [0.1, 0.4, 1.6] and y[1] == pytest.approx(scores(whole, "clean", "self_evolution")[0].mean())
    panels = paper_table.draw_curves(results, "hard_fraction", "share").axes
    assert [panel.get_title() for panel in panels[:3]] == ["clean", "30 % wrong", "clean"]
    x, y = panels[0].lines[0].get_data()
    assert list(x) == [25, 50, 100] and list(y) == pytest.approx([0.6] * 3), "the mean over seeds"


@pytest.mark.parametrize("name", ["table1", "alma"])
def test_the_committed_tables_are_made_of_their_results(name: str) -> None:
    def plain(text: str) -> list[str]:
        rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith("|")]
        return ["|".join(cells) for cells in rows if not set("".join(cells)) <= set(":-")]

    folder = RECIPE / "results" / name
    results = paper_table.Results(json.loads((folder / "results.json").read_text()))
    tables = [paper_table.Table(results, c, m) for c in results.conditions for m in ("bleu", "chrf")]
    committed = (folder / "results.md").read_text()
    assert [row for table in tables for row in plain(table.markdown())] == plain(committed)
    assert all(table.caption() in committed for table in tables)
