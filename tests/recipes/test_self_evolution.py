"""The paper's table: what each student starts from and sees, resuming, and stale work."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_kd as fk
from fused_kd.reference import reference_kd_loss
from fused_kd.training.collate import Collator
from fused_kd.training.stage import Stages, fingerprint
from fused_kd.training.trainer import KDTrainer

sys.path.append(str(Path(__file__).parents[2] / "examples" / "self_evolution"))

import paper_table
import self_evolution as recipe

RECIPE = Path(recipe.__file__).parent
TRAIN = {"num_train_epochs": 1, "learning_rate": 4e-3, "per_device_train_batch_size": 16}
PLAN: dict[str, Any] = {
    "train_limit": 60, "test_limit": 3, "valid_limit": 6, "vocab": 400, "max_length": 64, "teacher": "tiny-student",
    "train_teacher": TRAIN, "train_student": TRAIN, "seeds": [0],
    "distil": {"num_train_epochs": 1, "learning_rate": 1e-3, "per_device_train_batch_size": 8},
    "methods": ["self_evolution", "self_evolution_quantile", "self_evolution_cached"],
    "conditions": {
        "clean": {"sentences": 8, "methods": ["sft", "forward_kd"]},
        "noisy": {"sentences": 8, "noise": 0.5},
        "fresh": {"sentences": 12, "start": "scratch", "methods": ["no_evo"]},
    },
    "sweeps": {"self_evolution.gamma": {"condition": "noisy", "values": [0.1, 0.4]}},
}  # fmt: skip


def arguments(**changes: Any) -> list[str]:
    """The command line of the plan and then of some changes."""
    words = []
    for key, value in (*PLAN.items(), *changes.items()):
        listed = value if isinstance(value, list) else [value]
        words += [f"--{key}", *(json.dumps(item) if isinstance(item, dict) else str(item) for item in listed)]
    return words


def config(**changes: Any) -> recipe.Config:
    return recipe.parse_arguments(arguments(**changes))[0]


WHOLE_REPORT = {name: getattr(paper_table, name) for name in ("draw", "markdown")}


@pytest.fixture(scope="module", autouse=True)
def cheap() -> Iterator[None]:
    """Short translations, and no figures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "translate", partial(recipe.translate, max_new_tokens=12))
        patch.setattr(paper_table, "draw", lambda *_: {})
        patch.setattr(paper_table, "markdown", lambda *_: "")
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("table")
    assert recipe.main([*arguments(), "--output", str(folder)]) is not None
    return folder


@pytest.fixture(scope="module")
def table(folder: Path) -> recipe.PaperTable:
    return recipe.PaperTable(config(), Stages(folder))


def trial(table: recipe.PaperTable, name: str) -> recipe.Trial:
    return next(trial for trial in table.trials if str(trial) == name)


def test_trials_and_their_order() -> None:
    names = [str(trial) for trial in recipe.trials_of(config(seeds=[0, 1]))]
    assert names[:2] == ["clean.sft.seed0", "clean.forward_kd.seed0"] and names[6] == "clean.sft.seed1"
    assert names[-1] == "noisy.self_evolution.gamma=0.1.seed0", "0.4 is the method's own run"
    assert len(names) == len(set(names)) == 2 * 6 + 1


def test_every_model_starts_and_sees_what_it_should(table: recipe.PaperTable) -> None:
    def weights(what: Any) -> dict[str, torch.Tensor]:
        return table.model(table.trained(what) / "model").state_dict()

    student, teacher = weights("student"), weights("teacher")
    assert any(not torch.equal(student[name], teacher[name]) for name in student)
    assert [table.record(name)["rows"] for name in ("teacher", "student")] == [120, 2 * (60 - 8)]
    for one in table.trials:
        rows, steps = (24, 3) if one.condition == "fresh" else (16, 2)
        assert (table.record(one)["rows"], table.record(one)["steps"]) == (rows, steps)
        start = table.model("tiny-student", seed=0).state_dict() if one.condition == "fresh" else student
        moved = weights(one)
        # a step of size lr at most moves each weight from where the run began
        assert 0 < max(float((moved[key] - start[key]).abs().max()) for key in moved) < 5e-3
    assert table.record(trial(table, "noisy.self_evolution.gamma=0.1.seed0"))["objective"] == repr(
        fk.SelfEvolution(gamma=0.1)
    )
    assert table.record(trial(table, "clean.sft.seed0"))["validation"]
    assert not table.record(trial(table, "clean.forward_kd.seed0"))["validation"]


def test_held_back_and_noisy_sets(table: recipe.PaperTable) -> None:
    sets = [table.distillation_rows(recipe.Trial(name, "sft", 0)) for name in ("clean", "noisy")]
    texts = [[table.tokenizer.decode([t for t in row["labels"] if t >= 0]) for row in rows] for rows in sets]
    wrong = [a != b for a, b in zip(*texts, strict=True)]
    assert sum(wrong[:8]) == sum(wrong[8:]) == 4, "half of each direction"
    trained = {pair for pairs in table.train.values() for pair in pairs[: -table.held]}
    assert table.held == 8 and not trained & {pair for pairs in table.train.values() for pair in pairs[-8:]}


def test_gamma_by_quantile_of_true_difficulties(table: recipe.PaperTable) -> None:
    one = trial(table, "noisy.self_evolution_quantile.seed0")
    models = [table.model(table.trained(name) / "model") for name in ("student", "teacher")]
    rows = table.distillation_rows(one)
    batch = Collator(table.tokenizer.pad_token_id)([rows[i] for i in range(len(rows))])
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = [model(**batch).logits for model in models]
    out = reference_kd_loss(*logits, labels, fk.SelfEvolution(), shift=True, ignore_index=-100)
    valid = labels[:, 1:] != -100
    truth = out.difficulty[:, : valid.shape[1]][valid]
    gamma = float(re.search(r"gamma=([\d.]+)", table.record(one)["objective"])[1])
    assert gamma == pytest.approx(float(truth.quantile(0.75)), rel=1e-3)


def test_results_hold_everything(folder: Path, table: recipe.PaperTable) -> None:
    results = json.loads((folder / "results.json").read_text())
    assert len(results["runs"]) == len(table.trials) + 1, "the sweep's own point"
    assert {(r["sweep"]["value"], r["seed"]) for r in results["runs"] if r["sweep"]} == {(0.1, 0), (0.4, 0)}
    for run in results["runs"]:
        assert run["scores"].keys() == {"en-de", "de-en"} and run["history"][-1]["step"] == run["steps"]
        assert all(0 <= scores["similarity"] <= 100 for scores in run["scores"].values())
    found = {(r["condition"], r["method"], r["direction"], r["metric"]) for r in results["significance"]}
    pairs = {(d, m) for d in ("en-de", "de-en") for m in ("bleu", "chrf")}
    assert found == {("clean", "sft", *pair) for pair in pairs}, "other conditions have no baseline"
    rows = (folder / "results.csv").read_text().splitlines()
    assert len(rows) == 1 + 6 * 3 * 3, "methods x metrics x directions and their average"


def test_report_from_the_results_alone(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, whole in WHOLE_REPORT.items():
        monkeypatch.setattr(paper_table, name, whole)
    paper_table.main([str(folder / "results.json"), str(tmp_path)])
    names = {path.name for path in tmp_path.iterdir()}
    assert {"methods_noisy.png", "similarity.png", "sweep_gamma.png", "hard_fraction.png", "difficulty.png"} < names
    assert (tmp_path / "results.csv").read_bytes() == (folder / "results.csv").read_bytes()
    assert "sweep_gamma.png" in (tmp_path / "results.md").read_text()


def test_again_does_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("finished work was done again")

    before = (folder / "results.json").read_bytes()
    for target, name in ((KDTrainer, "train"), (recipe, "translate"), (recipe, "paired_bootstrap")):
        monkeypatch.setattr(target, name, refuse)
    command = [*arguments(), "--output", str(folder)]
    assert recipe.main([*command, "--worker"]) is None
    recipe.main(command)
    assert (folder / "results.json").read_bytes() == before


def test_interrupted_in_every_stage(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the middle of each kind of work, the same command ends with the same numbers."""
    stops = [(recipe, "shared_tokenizer", 1), (KDTrainer, "training_step", 5), (recipe, "write_cache", 1),
             (recipe, "translate", 6), (recipe, "paired_bootstrap", 2)]  # fmt: skip
    stopped = []

    def stop_at(target: Any, name: str, number: int) -> None:
        calls, original = [], getattr(target, name)

        def stopping(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if len(calls) == number:
                stopped.append(name)
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        monkeypatch.setattr(target, name, stopping)

    for stop in stops:
        stop_at(*stop)
    some = {"noisy": {"methods": ["self_evolution_cached"]}, "fresh": {"methods": []}}
    command = arguments(conditions=some, sweeps={"self_evolution.gamma": {"values": []}})
    results = None
    while results is None:
        try:
            results = recipe.main([*command, "--output", str(tmp_path)])
        except KeyboardInterrupt:
            assert len(stopped) <= len(stops)
    assert sorted(stopped) == sorted(name for _, name, _ in stops)
    whole = json.loads((folder / "results.json").read_text())
    results = json.loads(json.dumps(results))
    done = [(run["condition"], run["method"]) for run in results["runs"]]
    assert done == [("clean", "sft"), ("clean", "forward_kd"), ("noisy", "self_evolution_cached")]
    whole["runs"] = [run for run in whole["runs"] if (run["condition"], run["method"]) in done]
    for found in (whole, results):
        for record in [*found["runs"], *found["pretraining"].values()]:
            assert record.pop("seconds") >= 0
    for part in ("runs", "pretraining", "teacher", "student", "significance"):
        assert results[part] == whole[part]


ALL = {"tokenizer", "teacher", "student", "cache", "sft", "forward_kd", "self_evolution", "self_evolution_cached"}
ALL |= {"self_evolution_quantile", "no_evo"}
ON_NOISY = {"cache", "self_evolution", "self_evolution_quantile", "self_evolution_cached"}


@pytest.mark.parametrize(
    "change, redone",
    [
        ({"train_limit": 50}, ALL),
        ({"vocab": 300}, ALL),
        ({"train_teacher": {"learning_rate": 1e-3}}, ALL - {"tokenizer", "student", "sft"}),
        ({"train_student": {"weight_decay": 0.1}}, ALL - {"tokenizer", "teacher", "cache", "no_evo"}),
        ({"distil": {"learning_rate": 2e-3}}, ALL - {"tokenizer", "teacher", "student", "cache"}),
        ({"conditions": {"noisy": {"noise": 0.25}}}, ON_NOISY),
        ({"conditions": {"fresh": {"train": {"learning_rate": 1e-2}}}}, {"no_evo"}),
        ({"cache_dtype": "8bit"}, {"cache", "self_evolution_cached"}),
        ({"cache_tail": "uniform"}, {"self_evolution_cached"}),
        ({"valid_limit": 5}, {"sft"}),
        ({"test_limit": 2}, set()),
        ({"seeds": [0, 1]}, set()),
        ({"baseline": "sft"}, set()),
    ],
)
def test_what_a_change_does_again(change: dict, redone: set[str]) -> None:
    """Stages that have another name, and so another folder, after a change; translations follow their models."""

    def folders(config: recipe.Config) -> dict[str, str]:
        names: dict[str, str] = {}

        def stages(title: str, work: Any, settings: Any, *, needs: Any = (), files: Any = ()) -> Path:
            names[title] = fingerprint([title, json.loads(json.dumps(settings)), [str(need) for need in needs]])
            return Path(names[title])

        table = recipe.PaperTable(config, stages)
        for what in ("teacher", "student", *table.trials):
            table.compared(what)
        return names

    before, after = folders(config()), folders(config(**change))
    moved = {title for title in before if before[title] != after[title]}
    kinds = {re.sub(r"^(clean|noisy|fresh)\.|64|(\.gamma=0\.1)?\.seed0$", "", title) for title in moved}
    kinds = {kind.removesuffix(".seed0") for kind in kinds}
    assert {kind for kind in kinds if not kind.endswith(("translations", "comparison"))} == redone
    translated = {title.removesuffix(".translations") for title in moved if title.endswith(".translations")}
    everything = {title.removesuffix(".translations") for title in before if title.endswith(".translations")}
    assert translated == (everything if "test_limit" in change else moved & everything)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"methods": ["nothing"]}, "methods must be of sft, .*, got nothing"),
        ({"baseline": "nothing"}, "baseline must be of"),
        ({"conditions": {"clean": {"sentences": 0}}}, r"conditions.clean: sentences must be .* at least 1, got 0"),
        ({"conditions": {"clean": {"sentence": 5}}}, "conditions.clean must be a mapping of .*'sentence'"),
        ({"distil": {"learning_rat": 1}}, "distil: learning_rat is no option"),
        ({"sweeps": {"sft.gamma": {"condition": "clean", "values": [1]}}}, "sft.gamma: expected METHOD.PARAMETER"),
        ({"sweeps": {"skew.beta": {"condition": "x", "values": [1]}}}, "condition must be one of clean, noisy, fresh"),
        ({"conditions": {"clean": {"sentences": 60}}}, "sentences must be below the 60 training pairs"),
    ],
)
def test_bad_settings(change: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        recipe.main([*arguments(**change), "--output", str(tmp_path)])
    assert not any(tmp_path.glob("*/stage.json")), "found before any work"


@pytest.mark.parametrize("preset", sorted(path.stem for path in RECIPE.glob("*.yaml")))
def test_presets(preset: str) -> None:
    settings, _ = recipe.parse_arguments(["--preset", preset])
    assert recipe.trials_of(settings) and settings.baseline in settings.methods
