"""Tables and figures of a grid of runs: every number against numpy on the runs themselves, whole grids and parts."""

from __future__ import annotations

import copy
import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from rich.console import Console

from fused_kd.training.grid import figures
from fused_kd.training.grid.aggregate import (
    comparisons,
    load_results,
    sweeps,
    swept_parameters,
    trained_runs,
)
from fused_kd.training.grid.results import main, print_tables, results_table, write_report

DIRECTIONS = ["de-en", "en-de", "cs-en", "en-cs"]
LABELS = {
    "sft": "SFT",
    "forward_kd": "ForwardKD",
    "reverse_kd": "ReverseKD",
    "no_evo": "NoEvo",
    "skew": "Skew",
    "skew_teacher": "SkewTeacher",
    "self_evolution": "SelfEvolution",
    "self_evolution_top_k": "SelfEvolutionTopK",
    "progressive": "SelfEvolution, progressive β",
}
LEVELS = dict(zip(LABELS, (-3.9, -1.6, -1.9, -1.6, -0.7, -1.8, -0.6, -0.8, -0.9), strict=True))
OBJECTIVES = {
    "self_evolution": "SelfEvolution(lam=0.5, beta=0.5, gamma=0.4)",
    "self_evolution_top_k": "SelfEvolutionTopK(lam=0.5, beta=0.5, fraction=0.5)",
}
SWEEPS = {
    "gamma": ("self_evolution", (0.1, 0.2, 0.8, 1.6)),
    "beta": ("self_evolution", (0.1, 0.3, 0.7, 0.9)),
    "k": ("self_evolution_top_k", (0.1, 0.3, 0.7, 0.9)),
}
START = dict(zip(DIRECTIONS, (29.4, 24.9, 26.2, 19.8), strict=True))


def fake_results() -> dict:
    """Nine methods, three seeds, two conditions, four directions, three sweeps; random scores of a likely size."""
    rng = np.random.default_rng(7)

    def run(condition: str, method: str, seed: int, sweep: dict | None) -> dict:
        noise = -1.2 * (method in ("sft", "forward_kd", "no_evo")) if condition != "clean" else 0.0
        bend = 0.0 if sweep is None else -0.8 * abs(np.log(sweep["value"] / 0.45))
        scores = {}
        for direction in DIRECTIONS:
            bleu = START[direction] + LEVELS[method] + noise + bend + rng.normal(0, 0.25)
            scores[direction] = {"bleu": bleu, "chrf": bleu + 25 + rng.normal(0, 0.2), "similarity": 1.4 * bleu}
        gamma = sweep["value"] if sweep and sweep["parameter"] == "gamma" else 0.4
        start = float(np.exp(-gamma))
        history = [
            {
                "step": step,
                "loss": 1.0,
                "difficulty": (2 + (method == "sft")) * np.exp(-step / 150) + rng.normal(0, 0.01),
                "hard_fraction": start * np.exp(-step / 300) + 0.02 * LEVELS[method] + 0.1 + rng.normal(0, 0.003),
            }
            for step in range(8, 377, 8)
        ]
        return {
            "condition": condition,
            "method": method,
            "seed": seed,
            "objective": OBJECTIVES.get(method, LABELS[method] + "()"),
            "sweep": sweep,
            "scores": scores,
            "history": history,
            "seconds": 240.0,
            "steps": 376,
        }

    conditions = ("clean", "30 % wrong references")
    runs = [run(c, method, seed, None) for c in conditions for method in LABELS for seed in range(3)]
    for parameter, (method, values) in SWEEPS.items():
        runs += [run("clean", method, 0, {"parameter": parameter, "value": value}) for value in values]
    baselines = {(r["condition"], r["seed"]): r["scores"] for r in runs if r["method"] == "forward_kd"}
    significance = []
    for r in runs:
        if r["sweep"] or r["method"] == "forward_kd":
            continue
        for direction in DIRECTIONS:
            for metric in ("bleu", "chrf"):
                base = baselines[r["condition"], r["seed"]][direction][metric]
                delta = r["scores"][direction][metric] - base
                key = {name: r[name] for name in ("condition", "method", "seed")}
                p = float(np.exp(-4 * abs(delta)))
                significance.append({**key, "direction": direction, "metric": metric, "delta": delta, "p": p})
    return {
        "settings": {"epochs": 8, "learning_rate": 1e-3},
        "versions": {"python": "3.11"},
        "machine": {"device": "x86_64"},
        "directions": DIRECTIONS,
        "signatures": {"bleu": "nrefs:1|case:mixed|tok:13a", "chrf": "nrefs:1|nc:6"},
        "teacher": {d: {"bleu": START[d] + 4, "chrf": START[d] + 29} for d in DIRECTIONS},
        "student": {d: {"bleu": START[d], "chrf": START[d] + 25, "similarity": 1.3 * START[d]} for d in DIRECTIONS},
        "labels": LABELS,
        "runs": runs,
        "significance": significance,
    }


@pytest.fixture(scope="module")
def whole() -> dict:
    return json.loads(json.dumps(fake_results()))


@pytest.fixture(scope="module")
def report(whole, tmp_path_factory) -> tuple[Path, list[Path]]:
    folder = tmp_path_factory.mktemp("report")
    return folder, write_report(whole, folder)


def scores(results: dict, condition: str, method: str, metric: str) -> np.ndarray:
    """(seeds, directions)"""
    runs = [r for r in results["runs"] if (r["condition"], r["method"], r["sweep"]) == (condition, method, None)]
    return np.array([[r["scores"][d][metric] for d in DIRECTIONS] for r in sorted(runs, key=lambda r: r["seed"])])


@pytest.mark.parametrize("metric", ["bleu", "chrf", "similarity"])
def test_means_and_deviations(whole: dict, metric: str) -> None:
    for condition in ("clean", "30 % wrong references"):
        table = results_table(whole, condition, metric)
        assert table.directions == [*DIRECTIONS, "average"] and list(table.labels) == list(LABELS)
        assert table.seeds == [0, 1, 2]
        for method in LABELS:
            found = scores(whole, condition, method, metric)
            assert found.shape == (3, 4)
            columns = dict(zip(DIRECTIONS, found.T, strict=True)) | {"average": found.mean(1)}
            for direction, values in columns.items():
                cell = table.cells[method][direction]
                assert cell.mean == pytest.approx(values.mean(), rel=1e-12)
                assert cell.std == pytest.approx(values.std(ddof=1), rel=1e-9)
                assert cell.seeds == 3


def test_references(whole: dict) -> None:
    table = results_table(whole, "clean", "bleu")
    assert table.references["student before"] == pytest.approx({**START, "average": sum(START.values()) / 4})
    assert table.references["teacher"]["de-en"] == pytest.approx(33.4)
    assert list(results_table(whole, "clean", "similarity").references) == ["student before"]


def small(tests: list[tuple[int, float, float]], seeds: int = 2) -> dict:
    """Two methods, one direction; ``tests`` of no_evo as (seed, delta, p)."""
    runs = []
    for seed in range(seeds):
        for method, bleu in (("forward_kd", 20.0), ("no_evo", 21.0)):
            runs.append(
                {"condition": "c", "method": method, "seed": seed, "sweep": None,
                 "scores": {"de-en": {"bleu": bleu + seed}}}
            )  # fmt: skip
    significance = [
        {"condition": "c", "method": "no_evo", "seed": seed, "direction": "de-en", "metric": "bleu",
         "delta": delta, "p": p}
        for seed, delta, p in tests
    ]  # fmt: skip
    return {
        "directions": ["de-en", "en-de"], "labels": {"no_evo": "NoEvo", "forward_kd": "ForwardKD"}, "runs": runs,
        "significance": significance,
    }  # fmt: skip


@pytest.mark.parametrize(
    "tests,mark",
    [
        ([(0, 1.0, 0.01), (1, 0.5, 0.049)], "†"),
        ([(0, -1.0, 0.01), (1, -0.5, 0.001)], "‡"),
        ([(0, 1.0, 0.01), (1, -0.5, 0.001)], ""),
        ([(0, 1.0, 0.01), (1, 0.5, 0.05)], ""),
        ([(0, 1.0, 0.01)], ""),  # the other seed is not tested yet
        ([], ""),
    ],
)
def test_daggers(tests: list, mark: str) -> None:
    table = results_table(small(tests), "c")
    assert table.cells["no_evo"]["de-en"].dagger == mark and table.cells["forward_kd"]["de-en"].dagger == ""
    assert table.directions == ["de-en"], "a direction without scores is no column"
    text = table.text("no_evo", "de-en")
    assert text == "21.5 ± 0.7" + (f" {mark}" if mark else "")
    lines = table.markdown().splitlines()
    assert lines[2].startswith(f"| NoEvo | **21.5** ± 0.7{mark and ' ' + mark} |") and "**" not in lines[3]


def test_comparisons_count_every_test() -> None:
    results = small([(0, 1.0, 0.01), (1, -0.5, 0.001), (2, 0.1, 0.5)], seeds=3)
    assert comparisons(results, "c") == {"no_evo": (1, 1, 3)}
    assert comparisons(results, "c", "chrf") == {} == comparisons(results, "d")
    table = results_table(results, "c")
    assert "1 / 1 of 3" in table.markdown()
    assert (
        "3 seeds (0, 1, 2)" in table.caption() and "of the 3 tests (method, direction, seed) 1 (33%)" in table.caption()
    )


def test_ties_are_all_bold() -> None:
    results = small([])
    for run in results["runs"]:
        run["scores"]["de-en"]["bleu"] = 21.04 if run["method"] == "no_evo" else 20.96
    table = results_table(results, "c").markdown()
    assert table.count("**21.0** ± 0.0") == 2


def test_incomplete_grid(whole: dict, tmp_path: Path) -> None:
    """Two methods, one with a seed less, another seed without a direction, no references, no tests."""
    part = {key: whole[key] for key in ("directions", "labels")}
    wanted = [("sft", 0), ("no_evo", 0), ("no_evo", 1), ("no_evo", 2)]
    part["runs"] = [
        copy.deepcopy(run)
        for run in whole["runs"]
        if run["condition"] == "clean" and not run["sweep"] and (run["method"], run["seed"]) in wanted
    ]
    part["runs"][-1]["scores"].pop("en-cs")
    table = results_table(part, "clean")
    assert list(table.cells) == ["sft", "no_evo"]
    values = scores(whole, "clean", "no_evo", "bleu")
    assert table.cells["no_evo"]["en-cs"][:3] == pytest.approx((values[:2, 3].mean(), values[:2, 3].std(ddof=1), 2))
    assert table.cells["no_evo"]["average"][:3] == pytest.approx(
        (values[:2].mean(), values[:2].mean(1).std(ddof=1), 2)
    ), "a seed that lacks a direction has no average"
    assert table.cells["sft"]["de-en"].std is None and table.text("sft", "de-en").endswith(" (1)")
    assert table.text("no_evo", "en-cs").endswith(" (2)") and table.text("no_evo", "de-en").count("(") == 0
    assert "(n) where only n of the seeds are there yet" in table.caption() and table.references == {}

    names = {path.name for path in write_report(part, tmp_path)}
    assert names == {
        "results.md", "results.csv", "methods_clean.png", "similarity.png", "hard_fraction.png", "difficulty.png",
        "table_clean_bleu.png", "table_clean_chrf.png",
    }  # fmt: skip
    text = (tmp_path / "results.md").read_text()
    assert "clean: 2 methods with 1 to 3 seeds" in text and "Signature" not in text and "same gradient" not in text


@pytest.mark.parametrize("empty", ["scores", "runs"])
def test_nothing_yet(whole: dict, tmp_path: Path, empty: str) -> None:
    part = {key: whole[key] for key in ("directions", "labels")}
    part["runs"] = []
    if empty == "scores":
        part["runs"] = [{"condition": "clean", "method": "sft", "seed": 0, "sweep": None, "scores": {}, "history": []}]
    assert [path.name for path in write_report(part, tmp_path)] == ["results.md", "results.csv"]
    assert (tmp_path / "results.csv").read_text() == "condition,method,direction,metric,mean,std,seeds,dagger\n"


def test_csv(whole: dict, report: tuple) -> None:
    folder, _ = report
    with open(folder / "results.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 9 * 5 * 3
    row = next(
        row
        for row in rows
        if [row[key] for key in ("condition", "method", "direction", "metric")] == ["clean", "sft", "en-de", "chrf"]
    )
    values = scores(whole, "clean", "sft", "chrf")[:, 1]
    assert float(row["mean"]) == pytest.approx(values.mean()) and float(row["std"]) == pytest.approx(values.std(ddof=1))
    assert row["seeds"] == "3" and row["dagger"] == "‡"


def test_report(whole: dict, report: tuple) -> None:
    folder, written = report
    assert {path.name for path in written} == {path.name for path in folder.iterdir()}, "no partial files stay"
    text = written[0].read_text(encoding="utf-8")
    for path in written[2:]:
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 8000
        assert path.name.startswith("table_") or f"]({path.name})" in text
    assert {path.stem for path in written if path.stem.startswith(("sweep", "methods"))} == {
        "sweep_gamma", "sweep_beta", "sweep_fraction", "methods_clean", "methods_30-wrong-references",
    }  # fmt: skip
    assert "66 runs, 12 of them in sweeps, 4.4 hours" in text and "clean: 9 methods with 3 seeds" in text
    assert "nrefs:1|case:mixed|tok:13a" in text and '"learning_rate": 0.001' in text
    gaps = np.abs(scores(whole, "clean", "forward_kd", "bleu") - scores(whole, "clean", "no_evo", "bleu"))
    assert f"differ by {gaps.mean():.2f} BLEU on average and {gaps.max():.2f} at most over 12 pairs" in text


def test_sweep_has_the_table_run_as_a_point(whole: dict) -> None:
    assert swept_parameters(whole) == ["gamma", "beta", "fraction"]
    (line,) = sweeps(whole, "clean", "gamma")
    assert list(line.points) == [0.1, 0.2, 0.4, 0.8, 1.6] and line.seeds == [0]
    assert line.points[0.4].mean == pytest.approx(scores(whole, "clean", "self_evolution", "bleu")[0].mean())
    run = next(r for r in whole["runs"] if r["sweep"] == {"parameter": "gamma", "value": 0.8})
    assert line.points[0.8].mean == pytest.approx(np.mean([run["scores"][d]["bleu"] for d in DIRECTIONS]))
    (ranked,) = sweeps(whole, "clean", "fraction")
    assert list(ranked.points) == [0.1, 0.3, 0.5, 0.7, 0.9] and ranked.method == "self_evolution_top_k"
    assert sweeps(whole, "30 % wrong references", "gamma") == []


def test_curves_are_means_over_seeds() -> None:
    runs = [
        {"steps": 4, "history": [{"step": 2, "difficulty": 1.0}, {"step": 4, "difficulty": 3.0}]},
        {"steps": 8, "history": [{"step": 4, "difficulty": 3.0}, {"step": 6, "difficulty": 3.5},
                                 {"step": 8, "difficulty": 5.0}, {"step": 8, "loss": 1.0}]},
        {"steps": 8, "history": []},
    ]  # fmt: skip
    curves = figures._mean_curves({"a": runs, "b": [runs[2]]}, "difficulty")
    assert list(curves) == ["a"]
    assert curves["a"][0].tolist() == [50, 75, 100] and curves["a"][1].tolist() == [2.0, 2.75, 4.0]


@pytest.mark.parametrize(
    "change,message",
    [
        ({"runs": None}, "results has no runs"),
        ({"double": True}, r"results\['runs'\]\[4\] is there twice"),
        ({"condition": "noisy"}, "condition='noisy': the runs have c"),
        ({"metric": "comet"}, "metric='comet': expected one of bleu, chrf, similarity"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    results = small([])
    if "runs" in change:
        del results["runs"]
    if "double" in change:
        results["runs"].append(results["runs"][0])
    with pytest.raises(ValueError, match=message):
        results_table(results, change.get("condition", "c"), change.get("metric", "bleu"))


def test_scratch_conditions_have_no_start(whole: dict) -> None:
    results = {**whole, "settings": {"conditions": {"clean": {"start": "scratch"}}}}
    assert list(results_table(results, "clean").references) == ["teacher"]
    assert list(results_table(results, "30 % wrong references").references) == ["teacher", "student before"]


def test_another_baseline() -> None:
    results = small([(0, -1.0, 0.01), (1, -0.5, 0.001)]) | {"baseline": "sft"}
    results["labels"]["sft"] = "SFT student"
    assert "lower than sft with" in results_table(results, "c").caption(), "no run of it yet"
    results["runs"].append({"condition": "c", "method": "sft", "seed": 0, "sweep": None, "scores": {}})
    assert "lower than SFT student with" in results_table(results, "c").caption()


def test_a_run_that_is_also_a_point_of_a_sweep_counts_once(whole: dict) -> None:
    (run,) = (
        r for r in whole["runs"] if (r["condition"], r["method"], r["seed"]) == ("clean", "self_evolution", 0)
        and r["sweep"] is None
    )  # fmt: skip
    twice = {**whole, "runs": [*whole["runs"], {**run, "sweep": {"parameter": "gamma", "value": 0.4}}]}
    assert len(trained_runs(twice)) == len(whole["runs"]) == 66
    assert sweeps(twice, "clean", "gamma") == sweeps(whole, "clean", "gamma")
    assert results_table(twice, "clean") == results_table(whole, "clean")


def test_print_tables(whole: dict) -> None:
    console = Console(file=io.StringIO(), width=140)
    print_tables(whole, console)
    shown = console.file.getvalue()
    assert "BLEU, clean" in shown and "BLEU, 30 % wrong references" in shown and "Progressive β" not in shown
    mean = scores(whole, "clean", "skew", "bleu")[:, 0].mean()
    assert f"{mean:.1f} ± " in next(line for line in shown.splitlines() if line.startswith("│ Skew "))
    assert "3 seeds (0, 1, 2)" in shown


def test_command_line(tmp_path: Path, capsys) -> None:
    results = small([(0, 1.0, 0.01), (1, 0.5, 0.01)])
    (tmp_path / "results.json").write_text(json.dumps(results), encoding="utf-8")
    assert load_results(tmp_path / "results.json") == results
    command = [
        sys.executable,
        "-m",
        "fused_kd.training.grid.results",
        str(tmp_path / "results.json"),
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONWARNINGS": "error"})
    assert done.returncode == 0, done.stderr
    written = write_report(results, tmp_path / "again")
    assert [Path(line).name for line in done.stdout.splitlines()] == [path.name for path in written]
    for path in written[:2]:
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    with pytest.raises(SystemExit):
        main([str(tmp_path / "nowhere.json"), str(tmp_path)])
    assert "no such file" in capsys.readouterr().err
