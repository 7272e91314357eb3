"""The plane of regimes: what models see, how rates are chosen, what a killed run leaves, and its report."""

from __future__ import annotations

import dataclasses
import gzip
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "examples" / "self_evolution"))

import regimes as recipe
import regimes_report
from regimes_data import documents, pretraining_rows, read_rows

from fused_kd.training.data import Pair
from fused_kd.training.stage import Stages
from fused_kd.training.trainer import KDTrainer

TRAIN = {"max_steps": 2, "per_device_train_batch_size": 8}
PLAN: dict[str, Any] = {
    "data": "builtin", "directions": ["en-de", "de-en"], "test": "test", "train_limit": 60, "test_limit": 3,
    "valid_limit": 3, "prompt": "tiny", "max_length": 96, "max_new_tokens": 6, "vocab": 400, "held": 16,
    "documents": {"sentences": 2, "parallel": 10}, "teacher": "tiny-student", "student": "tiny-student",
    "train": {"save_strategy": "no", "learning_rate": 4e-3}, "distil": TRAIN, "rates": [1e-3, 1e-2],
    "start_teacher": {"pretrain": TRAIN, "tune": TRAIN},
    "strengths": {"language_model": {"pretrain": TRAIN}, "tuned": {"pretrain": TRAIN, "tune": TRAIN, "pairs": 10}},
    "noises": [0.5], "seeds": [0, 1], "paper_methods": ["sft", "forward_kd"], "methods": ["sft", "self_evolution"],
}  # fmt: skip


def arguments(folder: Path, **changes: Any) -> list[str]:
    words = ["--output", str(folder)]
    for key, value in {**PLAN, **changes}.items():
        listed = value if isinstance(value, list) else [value]
        words += [f"--{key}", *(json.dumps(item) if isinstance(item, dict) else str(item) for item in listed)]
    return words


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("regimes")
    assert recipe.main(arguments(folder)) is not None
    return folder


@pytest.fixture(scope="module")
def plane(folder: Path) -> recipe.Regimes:
    return recipe.Regimes(recipe.parse_arguments(arguments(folder))[0], Stages(folder))


def test_runs_and_their_order(folder: Path) -> None:
    config = recipe.parse_arguments(arguments(folder, noises=[0.0, 0.5], paper_methods=["sft", "jsd"]))[0]
    paper, rest, *later = recipe.groups_of(config)
    assert [str(trial) for trial in paper] == ["language_model.noise0.sft.seed0", "language_model.noise0.jsd.seed0"]
    assert len(rest) == 2 * 2 * 2 - 1 and len(later) == 2
    assert {trial.seed for part in later for trial in part} == {1}
    assert len({trial for part in (paper, rest, *later) for trial in part}) == 2 * 9


def test_no_document_has_a_sentence_and_its_translation() -> None:
    corpus = {d: [Pair(f"{d[:2]}{i}", f"{d[3:]}{i}") for i in range(30)] for d in ("en-de", "de-en", "en-cs")}
    found = [text.split("\n") for texts in documents([corpus], list(corpus), 4) for text in texts]
    assert max(map(len, found)) == 4 and all(len({s[:2] for s in text}) == 1 for text in found)
    rows = [sentence[2:] for text in found for sentence in text]
    assert sorted(rows, key=int) == [str(i) for i in range(30)], "each row in one language, once"


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_so_many_documents_have_the_translation_of_another_sentence(plane: recipe.Regimes, share: float) -> None:
    how = dataclasses.replace(plane.config.pretraining, wrong=share, parallel=10)
    made = pretraining_rows(plane.tokenizer, plane.corpora, how, plane.config.max_length)
    texts = [plane.tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in made][-2 * 10 :]
    right = [pair for pairs in plane.seen.values() for pair in pairs]
    kept = [any(pair.source in text and text.endswith(f": {pair.target}") for pair in right) for text in texts]
    assert len(kept) - sum(kept) == pytest.approx(20 * share, abs=1)


def test_who_has_seen_what(plane: recipe.Regimes, monkeypatch: pytest.MonkeyPatch) -> None:
    new = {pair for pairs in plane.new.values() for pair in pairs}
    assert len(new) == 2 * 16 and not new & {pair for pairs in plane.seen.values() for pair in pairs}
    assert len(read_rows(plane.clean_pairs("teacher") / "rows.npz")) == 2 * 60
    assert len(read_rows(plane.clean_pairs("tuned") / "rows.npz")) == 2 * 10
    stored = read_rows(plane.documents() / "rows.npz")
    made = pretraining_rows(plane.tokenizer, plane.corpora, plane.config.pretraining, plane.config.max_length)
    assert stored.rows == made.rows and all(row["labels"] == row["input_ids"] for row in made)
    tuned = read_rows(plane.clean_pairs("tuned") / "rows.npz")
    assert tuned.rows == plane.rows({d: pairs[:10] for d, pairs in plane.seen.items()}).rows
    monkeypatch.setitem(plane.config.starts, "tuned", dataclasses.replace(plane.config.starts["tuned"], pairs=None))
    assert read_rows(plane.clean_pairs("tuned") / "rows.npz").rows == plane.rows(plane.seen).rows
    text = " ".join(plane.tokenizer.decode(row["input_ids"]) for row in made)
    assert not any(pair.source in text for pairs in plane.new.values() for pair in pairs)


def test_strengths_share_their_pretraining(plane: recipe.Regimes) -> None:
    assert len(list(plane.stages.folder.glob("student.pretrained-*"))) == 1
    start, tuned = (plane.model(plane.start(name) / "model").state_dict() for name in ("language_model", "tuned"))
    assert any(not torch.equal(start[key], tuned[key]) for key in start)


def test_the_rate_is_chosen_on_validation_text_alone(
    plane: recipe.Regimes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(trial: recipe.Trial) -> Path:
        assert trial.seed == 0
        folder = tmp_path / f"{trial.rate:g}"
        folder.mkdir(exist_ok=True)
        chrf = {1e-3: [10.0, 40.0], 1e-2: [30.0, 30.0]}[trial.rate or 0.0]
        valid = {direction: {"chrf": value} for direction, value in zip("ab", chrf, strict=True)}
        (folder / "trained.json").write_text(json.dumps({"valid": valid}))
        return folder

    monkeypatch.setattr(plane, "trained", trained)
    rate, found = plane.chosen(recipe.Trial("tuned", 0.5, "sft", 1))
    assert rate == 1e-2 and found == {1e-3: 25.0, 1e-2: 30.0}


def test_every_run_is_a_line(folder: Path, plane: recipe.Regimes) -> None:
    lines = list(regimes_report.records(folder / "runs.jsonl"))
    assert [line["strength"] for line in lines if line["kind"] == "start"] == ["teacher", "language_model", "tuned"]
    runs = [line for line in lines if line["kind"] == "run"]
    assert len(runs) == 2 * (2 + 3)
    for run in runs:
        best = max(run["valid_chrf"], key=lambda rate: run["valid_chrf"][rate])
        assert float(best) == run["rate"] and run["steps"] == 2 and run["scores"].keys() == {"en-de", "de-en"}
    kept = [line for file in folder.glob("hypotheses.*.jsonl.gz") for line in regimes_report.records(file)]
    made = {line["trial"]: line["made"] for line in kept}
    assert len(made) == 1 + len(runs) and made["references"]["en-de"] == [p.target for p in plane.tests["en-de"]]
    results = json.loads((folder / "results.json").read_text())
    assert {test["baseline"] for test in results["significance"]} == {"sft", "forward_kd"}
    assert (folder / "plane.png").is_file() and "The plane" in (folder / "results.md").read_text()


def test_students_start_where_they_should(plane: recipe.Regimes) -> None:
    for method, rate in (("sft", 1e-3), ("self_evolution", 1e-2)):
        trained = plane.trained(recipe.Trial("tuned", 0.5, method, 0, rate))
        weights = torch.load(trained / "weights.pt", weights_only=True)
        start = plane.model(plane.start("tuned") / "model").state_dict()
        moved = max(float((weights[key] - start[key]).abs().max()) for key in start)
        assert 0 < moved < 2.5 * rate, "a step of size lr at most"


def test_again_does_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("finished work was done again")

    before = (folder / "runs.jsonl").read_bytes()
    for target, name in ((KDTrainer, "train"), (recipe, "generate"), (regimes_report, "paired_bootstrap")):
        monkeypatch.setattr(target, name, refuse)
    assert recipe.main([*arguments(folder), "--worker"]) is None
    recipe.main(arguments(folder))
    assert (folder / "runs.jsonl").read_bytes() == before


def test_no_time_left(tmp_path: Path) -> None:
    """An error says so, and what a report needs is there: for a run that is killed before its end too."""
    command = [*arguments(tmp_path / "work", paper_methods=["sft"], methods=["sft"]), "--minutes", "0"]
    with pytest.raises(ValueError, match="no run"):
        recipe.main(command)


def test_a_killed_run_has_its_report(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "work_until", killed)
    with pytest.raises(KeyboardInterrupt):
        recipe.main(arguments(tmp_path))
    (tmp_path / "runs.jsonl").write_bytes((folder / "runs.jsonl").read_bytes()[:-10])
    regimes_report.main([str(tmp_path)])
    assert "9 runs that count" in (tmp_path / "results.md").read_text()


def test_each_seed_has_wrong_references_of_its_own(
    plane: recipe.Regimes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    class Seen(Exception):
        pass

    def trainer(*_: object, train_dataset: Any, **__: object) -> None:
        given.append(train_dataset.rows)
        raise Seen

    monkeypatch.setattr(plane, "trainer", trainer)
    monkeypatch.setattr(plane, "kept", {})
    for noise, seed in ((0.0, 0), (0.5, 0), (0.5, 1)):
        with pytest.raises(Seen):
            plane.distil(recipe.Trial("tuned", noise, "sft", seed, 1e-3), tmp_path)
    clean, *noisy = given
    wrong = [{i for i, row in enumerate(rows) if row != clean[i]} for rows in noisy]
    assert clean == plane.rows(plane.new).rows and all(12 <= len(found) <= 16 for found in wrong), "8 of 16, two ways"
    assert wrong[0] != wrong[1]


def test_each_seed_translates_its_own_student(
    plane: recipe.Regimes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials, stages = [recipe.Trial("tuned", 0.5, "sft", seed) for seed in (0, 1)], plane.stages
    loaded: list[dict[str, torch.Tensor]] = []

    def again(title: str, work: Any, settings: Any, needs: Any = ()) -> object:
        return work(tmp_path) if title in map(str, trials) else stages(title, work, settings, needs=needs)

    monkeypatch.setattr(plane, "stages", again)
    monkeypatch.setattr(plane, "decoder", loaded.append)
    monkeypatch.setattr(plane, "translate", lambda *_: ({}, {}))
    for name in ("keep", "tell"):
        monkeypatch.setattr(plane, name, lambda *_: None)
    for trial in trials:
        plane.translated(trial)
        own = plane.trained(dataclasses.replace(trial, rate=plane.chosen(trial)[0])) / "weights.pt"
        wanted = torch.load(own, weights_only=True)
        assert all(torch.equal(loaded[-1][key], value) for key, value in wanted.items())
    assert any(not torch.equal(value, loaded[1][key]) for key, value in loaded[0].items())


def test_a_failure_is_tried_again_while_there_is_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "PAUSE", 0.0)
    calls: list[str] = []

    def piece(name: str) -> None:
        calls.append(name)
        if calls == ["bad"]:
            raise RuntimeError("out of memory")

    pieces = {name: partial(piece, name) for name in ("bad", "good")}
    recipe.work_until(Stages(tmp_path), pieces, time.time() + 60)
    assert calls[:2] == ["bad", "good"] and calls.count("bad") > 1
    calls.clear()
    with pytest.raises(RuntimeError, match="memory"):
        recipe.work_until(Stages(tmp_path), pieces, None)
    recipe.work_until(Stages(tmp_path), pieces, time.time() - 1)
    assert calls == ["bad"], "nothing is begun after that time"


def test_rehearsal_is_small() -> None:
    config, _ = recipe.parse_arguments(["--preset", "gpu", "--rehearse"])
    assert config.teacher == config.student == "tiny-student" and config.train["use_cpu"]
    starts = list(config.starts.values())
    assert all(part["max_steps"] == 2 for start in starts for part in (start.pretrain, start.tune) if part)
    whole, _ = recipe.parse_arguments(["--preset", "gpu"])
    assert whole.teacher == "base-teacher" and whole.paper_methods == config.paper_methods


@pytest.mark.parametrize("name", ["tiny", "toy", "cpu", "gpu"])
def test_presets(name: str) -> None:
    config, _ = recipe.parse_arguments(["--preset", name])
    assert config.paper in config.strengths and config.methods and len(config.rates) > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ["sft", "kd"]}, "methods must be of"),
        ({"paper": "strong"}, "paper must be one of language_model, tuned"),
        ({"strengths": {"language_model": {"steps": 3}}}, "strengths.language_model"),
        ({"held": 60}, "held must be below the 60 training pairs"),
        ({"rates": []}, "rates must have"),
    ],
)
def test_mistakes(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        recipe.main(arguments(tmp_path, **change))


def fake(strength: str, noise: float, method: str, seed: int, bleu: float) -> dict[str, Any]:
    scores = {d: {"bleu": bleu + shift, "chrf": bleu + 30} for d, shift in (("en-de", -1.0), ("de-en", 1.0))}
    return {"kind": "run", "strength": strength, "noise": noise, "method": method, "seed": seed, "rate": 1e-3,
            "valid_chrf": {"0.0003": 9.0, "0.001": 10.0, "0.003": 9.5}, "scores": scores}  # fmt: skip


@pytest.fixture
def found(folder: Path) -> dict[str, Any]:
    """Clear for the floor at half wrong references, for nothing on clean ones."""
    settings = dataclasses.asdict(recipe.parse_arguments(arguments(folder, noises=[0.0, 0.5]))[0])
    settings |= {"methods": ["sft", "forward_kd", "floor_0.3"]}
    levels = {
        ("sft", 0.0): [20, 20, 20],
        ("forward_kd", 0.0): [21, 19, 22],
        ("floor_0.3", 0.0): [20.5, 21, 21],
        ("sft", 0.5): [15, 15, 16],
        ("forward_kd", 0.5): [18, 19, 18],
        ("floor_0.3", 0.5): [19, 20, 19],
    }
    runs = [fake("tuned", n, m, seed, bleu) for (m, n), seeds in levels.items() for seed, bleu in enumerate(seeds)]
    runs += [fake("language_model", 0.0, m, 0, 10.0 + len(m)) for m in ("sft", "forward_kd")]
    start = {d: {"bleu": 12.0, "chrf": 40.0} for d in ("en-de", "de-en")}
    starts = [{"strength": name, "scores": start, "document_scores": start, "parameters": 10**6}
              for name in ("teacher", "language_model", "tuned")]  # fmt: skip
    return {"about": {"settings": settings}, "starts": starts, "runs": runs, "significance": []}


def test_best_methods_and_whether_they_are_clear(found: dict[str, Any], tmp_path: Path) -> None:
    plane = regimes_report.Plane(found)
    assert plane.cells() == [("language_model", 0.0), ("tuned", 0.0), ("tuned", 0.5)]
    assert plane.ranking(("tuned", 0.0)).index[0] == "floor_0.3" and not plane.is_clear(("tuned", 0.0))
    assert plane.ranking(("tuned", 0.5)).index[0] == "floor_0.3" and plane.is_clear(("tuned", 0.5))
    assert not plane.is_clear(("language_model", 0.0)), "one seed"
    assert plane.ranking(("tuned", 0.5))["floor_0.3"] == pytest.approx(58 / 3)
    table = regimes_report.plane_table(plane)
    assert "**19.3 ± 0.6**" in table and "*20.8 ± 0.3*" in table
    found["runs"] = [run for run in found["runs"] if (run["method"], run["seed"]) != ("floor_0.3", 2)]
    less = regimes_report.Plane(found)
    assert list(less.common["tuned", 0.5].loc[:, "forward_kd"]) == [18, 19], "seeds that all methods have"
    assert not less.is_clear(("tuned", 0.5)), "two seeds"
    regimes_report.write_report(found, tmp_path)
    assert {"plane.png", "gains.png", "results.md"} == {path.name for path in tmp_path.iterdir()}


def test_the_last_line_of_a_run_counts_and_a_torn_one_does_not(tmp_path: Path, found: dict[str, Any]) -> None:
    runs = [fake("tuned", 0.0, "sft", 0, 5.0), fake("tuned", 0.0, "sft", 0, 6.0)]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs) + '{"kind": "ru')
    (tmp_path / "about.json").write_text(json.dumps(found["about"]))
    made = regimes_report.collect(tmp_path)
    assert [run["scores"]["de-en"]["bleu"] for run in made["runs"]] == [7.0]


def test_bootstraps_within_a_cell_and_seed(tmp_path: Path, found: dict[str, Any]) -> None:
    references = [f"the {name} sits on a mat today" for name in ("cat", "dog", "cow", "hen", "fox", "owl")]
    wrong = [text.replace("sits on", "is") for text in references]
    made = {"references": references, "tuned.noise0.sft.seed0": wrong, "tuned.noise0.forward_kd.seed0": references,
            "tuned.noise0.forward_kd.seed1": wrong}  # fmt: skip
    lines = [json.dumps({"trial": name, "made": {"en-de": texts}}) + "\n" for name, texts in made.items()]
    (tmp_path / "hypotheses.tuned.noise0.jsonl.gz").write_bytes(
        b"".join(gzip.compress(text.encode()) for text in lines)
    )
    runs = [fake("tuned", 0.0, "sft", 0, 5.0), *(fake("tuned", 0.0, "forward_kd", seed, 5.0) for seed in (0, 1))]
    tests = regimes_report.compare(tmp_path, runs)
    assert {(t["seed"], t["baseline"], t["method"]) for t in tests} == {
        (0, "sft", "forward_kd"),
        (0, "forward_kd", "sft"),
    }
    better = next(t for t in tests if t["baseline"] == "sft" and t["metric"] == "bleu")
    assert better["delta"] > 20 and better["p"] < 0.05


def test_rates_at_an_end_of_the_grid_are_marked(found: dict[str, Any]) -> None:
    for run in found["runs"]:
        if (run["method"], run["noise"]) == ("sft", 0.5):
            run["rate"] = 3e-4
        if run["strength"] == "language_model" and run["method"] == "forward_kd":
            run |= {"rate": 9e-3, "valid_chrf": {"0.003": 1.0, "0.009": 2.0}}  # a grid of its own
    table = regimes_report.rates_table(found)
    rows = {tuple(cell.strip() for cell in row.split("|")[1:-1]) for row in table.splitlines() if "|" in row}
    assert table.startswith("2 of 8 are an end")
    assert {("tuned", "0.5", "0.0003↓", "0.001", "0.001"), ("language_model", "0.0", "0.001", "0.009↑", "")} <= rows
    assert ("at an end", "", "1 of 3", "1 of 3", "0 of 2") in rows


def test_no_word_of_bootstraps_where_none_was_made(found: dict[str, Any], tmp_path: Path) -> None:
    regimes_report.write_report(found, tmp_path)
    without = (tmp_path / "results.md").read_text()
    assert "against" not in without and "ootstrap" not in without
    test = {"baseline": "sft", "direction": "en-de", "metric": "bleu", "delta": 1.0, "p": 0.01}
    cell = {"strength": "language_model", "noise": 0.0, "seed": 0, "method": "forward_kd"}
    regimes_report.write_report(found | {"significance": [cell | test]}, tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert "against SFT" in text and "1 / 0 of 1" in text and "Bootstraps are over" in text
