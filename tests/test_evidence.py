"""docs/evidence.md: its tables are those of committed results, its intervals numpy's, its verdicts follow."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "docs"))

import evidence
import evidence_claims as claims
import evidence_data as data
import evidence_figures as figures
import evidence_plane as plane
from evidence_data import ROOT, Effect

import fused_kd as fk
from fused_kd.training import advice


@pytest.fixture(scope="module")
def page() -> str:
    return evidence.PAGE.read_text(encoding="utf-8")


def test_the_page_is_current_and_has_every_table(page: str) -> None:
    assert evidence.written(page) == page, "run: make docs"
    assert {name for _, name, _ in evidence.MARKS.findall(page)} == evidence.TABLES.keys()


def test_every_figure_is_there_and_shown(page: str, tmp_path: Path) -> None:
    shown = set(re.findall(r"\(evidence/(\w+)\.png\)", page))
    assert shown == evidence.FIGURES.keys() == {path.stem for path in evidence.FOLDER.glob("*.png")}
    assert {path.stem for path in evidence.draw(tmp_path)} == shown
    assert all(path.stat().st_size > 5000 for path in tmp_path.iterdir())


def test_a_changed_number_and_an_unknown_table_are_found(page: str) -> None:
    number = re.search(r"\| [+-]\d+\.\d+ \[", page)
    assert number is not None
    changed = page.replace(number[0], "| +99.99 [")
    assert changed != page == evidence.written(changed)
    with pytest.raises(ValueError, match=r"marks must name one of .*, got nothing"):
        evidence.written("<!-- evidence: nothing -->\n<!-- /evidence -->")


def test_effects() -> None:
    effect = Effect.of({0: 3.0, 1: 2.0, 2: 4.0, 9: 0.0}, {0: 1.0, 1: 1.0, 2: 1.0})
    assert effect.each == (2.0, 1.0, 3.0) and effect.mean == 2.0
    half = 4.303 * np.std(effect.each, ddof=1) / np.sqrt(3)
    assert effect.interval == pytest.approx((2 - half, 2 + half))
    assert str(effect) == "+2.00 [-0.48, +4.48]" and effect.verdict == "open"
    assert Effect((1.0, 1.1, 1.2)).verdict == "yes" and Effect((-1.0, -1.1, -1.2)).verdict == "no"
    assert str(Effect((0.5, 0.25))) == "+0.38 (+0.50, +0.25)" and Effect((0.5, 0.25)).verdict == "(yes)"
    assert Effect((0.5, -0.25)).verdict == "(open)" and str(Effect((0.012,))) == "+0.012 (one seed)"
    with pytest.raises(ValueError, match="must share a seed"):
        Effect.of({0: 1.0}, {1: 1.0})


def test_a_claim_is_its_runs_difference() -> None:
    """One of them, from the JSON itself."""
    runs = data.read(ROOT / "examples/self_evolution/results/table1/results.json")["runs"]
    scores: dict[str, dict[int, float]] = {"self_evolution": {}, "forward_kd": {}}
    for run in runs:
        if run["condition"] == "wrong_references" and run["method"] in scores and not run["sweep"]:
            scores[run["method"]][run["seed"]] = np.mean([each["bleu"] for each in run["scores"].values()])
    expected = [scores["self_evolution"][seed] - scores["forward_kd"][seed] for seed in (0, 1, 2)]
    text, where = "Self-Evolution - ForwardKD", claims.WRONG
    found = next(c for c in claims.self_evolution() if (c.text, c.where) == (text, where))
    assert found.effect.each == pytest.approx(expected)


def plane_of(folder: Path) -> Path:
    """A results.json of regimes.py: two strengths, two noises, three methods, three seeds."""

    def scores(chrf: float) -> dict[str, dict[str, float]]:
        return {"de-en": {"bleu": 0.0, "chrf": chrf + 1}, "en-de": {"bleu": 0.0, "chrf": chrf - 1}}

    starts = {"weak": 2.0, "tuned": 20.0, "teacher": 30.0}
    gains = {"sft": 1.0, "forward_kd": 3.0, "floor_0.3": 3.1}
    found = folder / "regimes-toy"
    found.mkdir()
    runs = [
        {
            "strength": strength, "noise": noise, "method": method, "seed": seed, "kind": "run",
            "scores": scores(starts[strength] + gain + [0.5, 0.0, -0.4][seed] * (method == "floor_0.3")),
            "history": [{"step": 1, "hard_fraction": 0.6, **({"hard_fraction_t": 0.2} if method != "sft" else {})}],
        }
        for strength in ("weak", "tuned") for noise in (0.0, 0.3) for method, gain in gains.items() for seed in range(3)
    ]  # fmt: skip
    content = {"starts": [{"strength": name, "scores": scores(chrf)} for name, chrf in starts.items()], "runs": runs}
    (found / "results.json").write_text(json.dumps(content))
    return found


def test_the_plane(tmp_path: Path) -> None:
    frame = plane.regimes(plane_of(tmp_path))
    lines = plane.table(frame).splitlines()
    assert len(lines) == 2 + 4
    assert lines[2] == "| regimes-toy, chrF | weak | 2.0 | 30.0 | 0% | 0.50 | 3 | 3.0 | **5.0** | **5.1** |", "even"
    assert lines[5].startswith("| regimes-toy, chrF | tuned | 20.0 | 30.0 | 30% |")
    drawn = figures.plane(frame)
    assert [axis.get_title() for axis in drawn.axes] == ["regimes-toy, chrF, clean", "regimes-toy, chrF, 30% wrong"]
    gained = {line.get_color(): list(line.get_ydata()) for line in drawn.axes[0].lines if line.get_linewidth() == 1.4}
    assert gained[figures.METHODS["sft"][1]] == pytest.approx([1.0, 1.0])
    rule = figures.rule(frame).axes[0]
    points = [line for line in rule.lines if line.get_color() == figures.METHODS["floor_0.3"][1]]
    assert sorted(np.concatenate([line.get_ydata() for line in points])) == pytest.approx(sorted([0.6, 0.1, -0.3] * 4))
    assert np.concatenate([line.get_xdata() for line in points]) == pytest.approx(0.5)


METHOD = {advice.KL: "forward_kd", advice.FLOOR: "floor_0.3"}


def test_the_rule_is_right_of_the_students_that_it_was_made_of() -> None:
    """Of two objectives it names the better one, and it warns of the paper's where that is clearly worse than both."""
    frame = plane.strengths()
    assert len(set(frame.student)) == 4
    for _, own in frame.groupby("student"):
        scores = dict(zip(own.method, own.score, strict=True))
        first = own[own.method == "self_evolution"].iloc[0]
        advised = METHOD[advice.advised_objective(first.hard, first.hard_t)]
        assert scores[advised] == max(scores["forward_kd"], scores["floor_0.3"])
        entry = {"hard_fraction": first.hard, "hard_fraction_t": first.hard_t}
        told = advice.warning(fk.SelfEvolution(), [{"step": step, **entry} for step in (10, 20)], 20, 100)
        assert (told is not None) == (scores["self_evolution"] < min(scores["forward_kd"], scores["floor_0.3"]) - 2)


def test_the_rule_is_not_wrong_of_other_students() -> None:
    """Of the planes: at most a point behind the better of the two, and right to warn."""
    frame = pd.concat([plane.regimes(folder) for folder in plane.regime_folders()])
    frame = frame[frame.hard_t.notna()]
    assert len(set(frame.student)) >= 4
    for _, own in frame.groupby(["study", "student", "noise"]):
        means = own.groupby("method").score.mean()
        first = own[own.method == "self_evolution"][["hard", "hard_t"]].mean()
        advised = METHOD[advice.advised_objective(first.hard, first.hard_t)]
        assert means[advised] > means[["forward_kd", "floor_0.3"]].max() - 1
        if advice.still_hard(first.hard, first.hard_t) > advice.STARVED:
            assert means["self_evolution"] < means[["forward_kd", "floor_0.3"]].min(), "it is rightly warned of"
