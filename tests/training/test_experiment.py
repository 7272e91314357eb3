"""The grid of distillations: its jobs, what each trains on, resuming, and the results of it all."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from fused_kd.training.evaluation.difficulty import difficulties

import fused_kd as fk
from fused_kd.reference import reference_kd_loss
from fused_kd.training.config import build
from fused_kd.training.data.prompts import Collator
from fused_kd.training.grid.collect import collect_results
from fused_kd.training.grid.experiment import Experiment, Grid, Trial, load_methods

ROOT = Path(__file__).parents[2]
METHODS = load_methods(ROOT / "examples" / "configs" / "methods")
PLAN = {
    "data": "builtin",
    "directions": ["en-de", "de-en"],
    "train_limit": 60,
    "test_limit": 3,
    "valid_limit": 6,
    "vocab": 400,
    "max_length": 64,
    "teacher": {"model": "tiny-student", "epochs": 1, "learning_rate": 4e-3, "batch": 16},
    "student": {"model": "tiny-student", "epochs": 1, "learning_rate": 4e-3, "batch": 16},
    "seeds": [0, 1],
    "methods": ["sft", "forward_kd", "self_evolution"],
    "conditions": {
        "clean": {"sentences": 8, "epochs": 1, "learning_rate": 1e-3, "batch": 8},
        "noisy": {
            "sentences": 8, "epochs": 1, "learning_rate": 1e-3, "batch": 8, "noise": 0.5, "seeds": [0],
            "methods": ["forward_kd", "self_evolution_quantile", "self_evolution_cached"],
        },
        "fresh": {
            "sentences": 12, "epochs": 1, "learning_rate": 1e-3, "batch": 8, "start": "scratch", "seeds": [0],
            "methods": ["no_evo"],
        },
    },
    "sweeps": [{"condition": "clean", "method": "self_evolution", "parameter": "gamma", "values": [0.1, 0.4]}],
}  # fmt: skip


def experiment(**changes) -> Experiment:
    return build(Experiment, PLAN | changes)


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Grid:
    grid = Grid(experiment(), METHODS, tmp_path_factory.mktemp("grid"))
    torch.set_num_threads(1)
    assert len(list(grid.work())) == len(grid.jobs())
    return grid


def record(grid: Grid, name: str) -> dict:
    return json.loads((grid.run.stage(name) / "training.json").read_text())


def test_trials_and_their_order(tmp_path: Path) -> None:
    grid = Grid(experiment(), METHODS, tmp_path)
    names = [trial.name for trial in grid.trials]
    assert names[:3] == ["clean/sft/seed0", "clean/forward_kd/seed0", "clean/self_evolution/seed0"]
    assert names[-1] == "clean/self_evolution~gamma=0.1/seed0", "0.4 is the method's own run"
    assert len(names) == len(set(names)) == 2 * 3 + 3 + 1 + 1
    jobs = {job.name: job for job in grid.jobs()}
    assert list(jobs)[:3] == ["teacher", "student", "cache/noisy/seed0/k64"]
    assert jobs["noisy/self_evolution_cached/seed0"].needs == ("student", "teacher", "cache/noisy/seed0/k64")
    assert [jobs[name].needs for name in ("clean/sft/seed0", "fresh/no_evo/seed0")] == [("student",), ("teacher",)]


def test_another_content_behind_the_same_names(tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    def begin(word: str) -> None:
        rows = ({"en": f"A {word} {n}.", "de": f"Ein Hund {n}."} for n in range(600))
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        next(Grid(experiment(data=str(data)), METHODS, tmp_path / "run").work(tell=stop))

    for word in ("dog", "dog"):
        with pytest.raises(KeyboardInterrupt):
            begin(word)
    with pytest.raises(ValueError, match="was made with another train"):
        begin("cat")


@pytest.mark.parametrize("name", ["..", "../up", "a/b", "."])
def test_conditions_are_names(name: str) -> None:
    with pytest.raises(ValueError, match="conditions must have names of letters"):
        experiment(conditions={name: PLAN["conditions"]["clean"]}, sweeps=[])


def test_every_stage_starts_and_sees_what_it_should(grid: Grid) -> None:
    student, teacher = (grid.model(name).state_dict() for name in ("student", "teacher"))
    assert record(grid, "teacher")["sentences"] == 120 and record(grid, "student")["sentences"] == 2 * (60 - 8)
    assert any(not torch.equal(student[name], teacher[name]) for name in student)
    for trial in grid.trials:
        found = record(grid, trial.name)
        assert found["sentences"] == (24 if trial.condition == "fresh" else 16)
        assert found["steps"] == (3 if trial.condition == "fresh" else 2)
    assert record(grid, "clean/self_evolution~gamma=0.1/seed0")["objective"] == repr(fk.SelfEvolution(gamma=0.1))
    assert record(grid, "clean/sft/seed0")["validation"] and not record(grid, "clean/forward_kd/seed0")["validation"]
    # a step of size lr at most moves each weight from where the run began
    for name, start in (("clean/forward_kd/seed0", student), ("fresh/no_evo/seed0", None)):
        start = start or grid.model("tiny-student", seed=0).state_dict()
        moved = grid.model(name).state_dict()
        assert 0 < max(float((moved[key] - start[key]).abs().max()) for key in moved) < 5e-3


def test_held_back_and_noisy_sets(grid: Grid) -> None:
    clean, noisy = (grid.distillation_rows(name, 0) for name in ("clean", "noisy"))
    texts = [[grid.tokenizer.decode([t for t in row["labels"] if t >= 0]) for row in rows] for rows in (clean, noisy)]
    wrong = [a != b for a, b in zip(*texts, strict=True)]
    assert sum(wrong[:8]) == sum(wrong[8:]) == 4
    trained = {pair for pairs in grid.train.values() for pair in pairs[:-8]}
    assert not trained & {pair for pairs in grid.train.values() for pair in pairs[-8:]}


def test_gamma_by_quantile_of_true_difficulties(grid: Grid) -> None:
    rows, models = grid.distillation_rows("noisy", 0), [grid.model(name) for name in ("student", "teacher")]
    d = difficulties(*models, rows, grid.tokenizer, fk.SelfEvolution(), batch_size=5)
    batch = Collator(grid.tokenizer.pad_token_id)([rows[i] for i in range(len(rows))])
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = [model(**batch).logits for model in models]
    out = reference_kd_loss(*logits, labels, fk.SelfEvolution(), shift=True, ignore_index=-100)
    valid = labels[:, 1:] != -100
    truth = out.difficulty[:, : valid.shape[1]][valid]
    torch.testing.assert_close(d.double(), truth.double(), rtol=1e-4, atol=1e-6)
    gamma = build_objective(record(grid, "noisy/self_evolution_quantile/seed0")["objective"]).gamma
    assert gamma == pytest.approx(float(truth.quantile(0.75)), rel=1e-3)


def build_objective(text: str) -> fk.SelfEvolution:
    return eval(text, {"SelfEvolution": fk.SelfEvolution})


def test_results_hold_everything(grid: Grid) -> None:
    results = json.loads(json.dumps(collect_results(grid)))
    assert len(results["runs"]) == len(grid.trials) + 1, "the sweep's own point"
    assert {(r["sweep"]["value"], r["seed"]) for r in results["runs"] if r["sweep"]} == {(0.1, 0), (0.4, 0)}
    for run in results["runs"]:
        assert run["scores"].keys() == {"en-de", "de-en"} and run["history"][-1]["step"] == run["steps"]
        assert all(0 <= s["similarity"] <= 100 for s in run["scores"].values())
    found = {(r["condition"], r["method"], r["seed"], r["direction"], r["metric"]) for r in results["significance"]}
    assert ("clean", "self_evolution", 1, "de-en", "chrf") in found
    assert len(found) == len(results["significance"]) == 2 * (2 * 2 + 2) * 2, "two metrics, two directions"
    assert results == json.loads(json.dumps(collect_results(grid))), "again, from what is on disk"


def test_other_settings_are_refused(grid: Grid) -> None:
    with pytest.raises(ValueError, match=r"made with other arguments.*max_length: 64 -> 32"):
        Grid(experiment(max_length=32), METHODS, grid.run.folder)
    with pytest.raises(ValueError, match="missing nothing_like_it"):
        Grid(experiment(methods=["nothing_like_it"]), METHODS, grid.run.folder / "other")
    with pytest.raises(ValueError, match="sentences must be below the 60"):
        _ = Grid(
            experiment(conditions={"a": {"sentences": 60, "epochs": 1, "learning_rate": 1e-3}}, sweeps=[]),
            METHODS,
            grid.run.folder / "more",
        ).train
    with pytest.raises(ValueError, match="condition must be one of clean, noisy, fresh, got 'none'"):
        experiment(sweeps=[{"condition": "none", "method": "sft", "parameter": "lam", "values": []}])


def test_killed_and_resumed_with_two_workers(grid: Grid, tmp_path: Path) -> None:
    """kill -9 in the middle of a training; two processes then finish the grid with the same weights."""
    plan = PLAN | {"conditions": {"clean": PLAN["conditions"]["clean"]}, "sweeps": [], "seeds": [0]}
    config = tmp_path / "plan.yaml"
    config.write_text(yaml.safe_dump(plan))
    command = [sys.executable, str(ROOT / "examples" / "experiment.py"), str(config), "--output", str(tmp_path / "run")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoints = tmp_path / "run" / "student" / "checkpoints"
    try:
        for _ in range(1200):
            if any(checkpoints.glob("checkpoint-*/trainer_state.json")):
                break
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert any(checkpoints.glob("checkpoint-*")), "killed within the student's training"
    done = subprocess.run([*command, "--jobs", "2"], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("student", "clean/self_evolution/seed0"):
        ours, theirs = (_weights(folder, name) for folder in (tmp_path / "run", grid.run.folder))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name
    assert (tmp_path / "run" / "results.md").exists() and (tmp_path / "run" / "results.csv").exists()


def _weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / name / "model" / "model.safetensors")


def test_trial_names() -> None:
    assert Trial("a", "b", 3).name == "a/b/seed3"
    assert Trial("a", "b", 3, "gamma", 0.25).name == "a/b~gamma=0.25/seed3"


def test_script_prints_its_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "plan.yaml"
    config.write_text(yaml.safe_dump(PLAN))
    spec = importlib.util.spec_from_file_location("experiment_script", ROOT / "examples" / "experiment.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.main([str(config), "seeds=[0]", "--plan", "--output", str(tmp_path / "run")]) is None
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["to do   teacher", "to do   student"] and len(lines) == 3 + 3 + 3 + 1 + 1
