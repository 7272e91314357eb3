"""examples/distill.py from text to table on a tiny budget: results, resuming, stale work, wrong arguments."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_kd.training.models import load_model, load_tokenizer
from fused_kd.training.trainer import KDTrainer

sys.path.append(str(Path(__file__).parents[2] / "examples"))

import distill

SPEC = "self_evolution:gamma=0.3,beta_warmup=0.5"
SLUG = "self_evolution-gamma=0.3-beta_warmup=0.5"
STAGES = ["teacher", "student", "sft", "forward_kd", SLUG]
SMALL = (
    "--train-limit 160 --kd-size 40 --test-limit 4 --vocab 400 --batch 20 --accumulation 2 "
    "--teacher tiny-student --teacher-epochs 1 --student-epochs 1 --kd-epochs 2 "
    f"--objective forward_kd {SPEC}"
).split()


@pytest.fixture(scope="module", autouse=True)
def short_translations() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "translate", partial(distill.translate, max_new_tokens=12))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distill")
    distill.main([*SMALL, "--output", str(folder)])
    return folder


def metrics_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def test_everything_is_written(finished: Path) -> None:
    metrics = metrics_of(finished)
    assert list(metrics["stages"]) == STAGES
    assert metrics["seed"] == 0 and metrics["arguments"]["train_limit"] == 160
    assert metrics["versions"]["torch"] == torch.__version__ and "fused_kd" in metrics["versions"]
    for stage in metrics["stages"].values():
        folder, log = Path(stage["folder"]), stage["log_history"]
        assert 0 <= stage["scores"]["bleu"] <= 100 and "tok:13a" in stage["scores"]["bleu_signature"]
        assert len((folder / "hypotheses.en-de.txt").read_text().splitlines()) == 4
        assert (folder / "model" / "model.safetensors").is_file() and not (folder / "checkpoints").exists()
        keys = {"loss", "difficulty", "hard_fraction", "tokens_per_second", "peak_memory_mb"}
        assert len(log) >= 4 and keys <= log[0].keys()
    sizes = {name: (stage["rows"], stage["steps"]) for name, stage in metrics["stages"].items()}
    assert sizes == {"teacher": (160, 8), "student": (120, 6), **dict.fromkeys(STAGES[2:], (40, 4))}
    assert metrics["stages"][SLUG]["objective"] == "SelfEvolution(lam=0.5, beta=0.5, gamma=0.3)"
    losses = [entry["loss"] for entry in metrics["stages"]["teacher"]["log_history"]]
    assert losses[-1] < losses[0] - 0.5
    for name in ("loss", "hard_fraction", "difficulty", "bleu"):
        content = (finished / f"{name}.png").read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 5000
    stages = metrics["stages"]
    models = {name: Path(stages[name]["folder"]) / "model" for name in STAGES}
    tokenizer = load_tokenizer(models["student"])
    start = load_model(models["student"], tokenizer, 0).lm_head.weight
    for name in STAGES[2:]:
        moved = load_model(models[name], tokenizer, 0).lm_head.weight - start
        assert 0 < moved.norm() < 0.5 * start.norm(), "students start from the pretrained one"


def test_finished_work_is_kept_and_never_stale(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a stage is trained")

    monkeypatch.setattr(KDTrainer, "train", refuse)
    monkeypatch.setattr(distill, "write_plots", lambda *_: None)
    before = metrics_of(finished)["stages"]
    command = [*SMALL, "--output", str(finished)]
    assert distill.main(command)["stages"] == before
    assert list(distill.main([*command, "--only", "sft"])["stages"]) == STAGES[:3]
    for change in ("--kd-lr 0.01", "--test-limit 3", "--student tiny-teacher"):
        with pytest.raises(AssertionError, match="a stage is trained"):
            distill.main([*command, *change.split()])


def test_killed_run_goes_on(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    step, translate = KDTrainer.training_step, distill.translate

    def counted(self: KDTrainer, *args: object, **kwargs: object) -> torch.Tensor:
        steps.append(self.state.global_step)
        if len(steps) == 10:  # two micro-batches a step: dies in the fifth step of the teacher
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    def stopped(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(distill, "translate", translate)
        raise KeyboardInterrupt

    monkeypatch.setattr(distill, "write_plots", lambda *_: None)
    monkeypatch.setattr(KDTrainer, "training_step", counted)
    monkeypatch.setattr(distill, "translate", stopped)
    command = [*SMALL, "--output", str(tmp_path), "--only", "teacher"]
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            distill.main(command)
    metrics = distill.main(command)
    assert steps[10] == 4 and len(steps) == 9 + 1 + 8, "the second run must start at the fifth step"
    ours, theirs = metrics["stages"]["teacher"], metrics_of(finished)["stages"]["teacher"]
    losses = [[(entry["step"], entry["loss"]) for entry in stage["log_history"]] for stage in (ours, theirs)]
    assert losses[0] == losses[1] and ours["scores"] == theirs["scores"]


def test_models_from_a_folder(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ready teacher and student by path: their own tokenizer, no pre-training."""
    monkeypatch.setattr(distill, "write_plots", lambda *_: None)
    data = tmp_path / "pairs.jsonl"
    rows = ({"en": f"A man sees {i} dogs.", "de": f"Ein Mann sieht {i} Hunde."} for i in range(120))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stages = metrics_of(finished)["stages"]
    models = {role: str(Path(stages[role]["folder"]) / "model") for role in ("teacher", "student")}
    metrics = distill.main(
        f"--data {data} --teacher {models['teacher']} --student {models['student']} --teacher-epochs 0 "
        f"--student-epochs 0 --train-limit 80 --kd-size 40 --kd-epochs 1 --test-limit 3 --objective no_evo "
        f"--output {tmp_path / 'run'}".split()
    )
    assert metrics["stages"]["teacher"]["steps"] == 0 and metrics["stages"]["no_evo"]["steps"] == 2
    tokenizer = load_tokenizer(models["teacher"])
    kept, given = (
        load_model(path, tokenizer, 0)
        for path in (Path(metrics["stages"]["teacher"]["folder"]) / "model", models["teacher"])
    )
    assert torch.equal(kept.lm_head.weight, given.lm_head.weight)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--objective nonsense", "objective must be one of sft"),
        ("--kd-size 160", r"--kd-size must be in \[1, 159\]"),
        ("--direction en-en", "direction='en-en'"),
        ("--data ./nowhere.jsonl", "no such file"),
        ("--student ./nowhere", "no such folder or file"),
        ("--only nonsense", "objective must be one of"),
        ("--only reverse_kd", "--only must name stages of teacher, student, sft, forward_kd"),
        ("--kd-noise 2", "share must be in"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distill.main([*SMALL, "--output", str(tmp_path / "run"), *arguments.split()])


def test_refused_by_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        distill.main(["--batch", "32", "--accumulation", "5"])
    assert "--batch 32 must be a multiple of --accumulation 5" in capsys.readouterr().err
