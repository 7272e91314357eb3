"""examples/distill.py from text to table on a tiny budget: results, resuming, refusing, plots."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

for library in ("transformers", "accelerate", "sacrebleu", "tokenizers", "rich", "matplotlib"):
    pytest.importorskip(library)

import torch  # noqa: E402

from fused_kd.training import presets, stages  # noqa: E402
from fused_kd.training.plots import write_plots  # noqa: E402
from fused_kd.training.trainer import KDTrainer  # noqa: E402

SCRIPT = Path(__file__).parents[2] / "examples" / "distill.py"
SPEC = "self_evolution:gamma=0.3,beta_warmup=0.5"
SLUG = "self_evolution-gamma=0.3-beta_warmup=0.5"
STAGES = ["teacher", "student", "sft", "forward_kd", SLUG]
SMALL = (
    "--train-limit 260 --kd-size 60 --test-limit 6 --vocab 400 --batch 20 --accumulation 2 "
    "--teacher tiny-student --teacher-epochs 1 --student-epochs 1 --kd-epochs 2 "
    f"--objective forward_kd {SPEC}"
).split()


@pytest.fixture(scope="module")
def distill():
    spec = importlib.util.spec_from_file_location("distill", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    threads = torch.get_num_threads()
    spec.loader.exec_module(module)
    yield module
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(distill, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("distill") / "run"
    distill.main([*SMALL, "--output", str(output)])
    return output


def test_everything_is_written(finished: Path) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    assert list(metrics["stages"]) == STAGES
    assert metrics["seed"] == 0 and metrics["arguments"]["train_limit"] == 260
    assert metrics["versions"]["torch"] == torch.__version__ and "fused_kd" in metrics["versions"]
    for name, stage in metrics["stages"].items():
        assert 0 <= stage["scores"]["bleu"] <= 100 and "tok:13a" in stage["scores"]["bleu_signature"]
        assert "version:" in stage["scores"]["chrf_signature"]
        assert len((finished / name / "hypotheses.en-de.txt").read_text().splitlines()) == 6
        assert (finished / name / "model" / "model.safetensors").is_file()
        assert not (finished / name / "checkpoints").exists()
        assert len(stage["log_history"]) >= 5
        assert {"loss", "difficulty", "hard_fraction", "tokens_per_second", "peak_memory_mb"} <= set(
            stage["log_history"][0]
        )
    sizes = {name: (stage["sentences"], stage["steps"]) for name, stage in metrics["stages"].items()}
    assert sizes == {"teacher": (260, 13), "student": (200, 10), **dict.fromkeys(STAGES[2:], (60, 6))}
    assert metrics["stages"][SLUG]["objective"] == "SelfEvolution(lam=0.5, beta=0.5, gamma=0.3)"
    losses = [entry["loss"] for entry in metrics["stages"]["teacher"]["log_history"]]
    assert losses[-1] < losses[0] - 0.5


def test_students_start_from_the_pretrained_one(finished: Path, distill) -> None:
    tokenizer = presets.load_tokenizer(finished / "tokenizer")
    start = presets.load_model(finished / "student" / "model", tokenizer, 0).lm_head.weight
    for name in STAGES[2:]:
        moved = presets.load_model(finished / name / "model", tokenizer, 0).lm_head.weight - start
        assert 0 < moved.norm() < 0.5 * start.norm()


def test_again_skips_what_is_done(finished: Path, distill, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a finished stage ran again")

    monkeypatch.setattr(KDTrainer, "train", refuse)
    monkeypatch.setattr(stages, "translate", refuse)
    before = json.loads((finished / "metrics.json").read_text())
    assert distill.main([*SMALL, "--output", str(finished)])["stages"] == before["stages"]


def test_other_arguments_are_refused(finished: Path, distill) -> None:
    with pytest.raises(ValueError, match=r"made with other arguments \(kd_lr: 0.001 -> 0.01\)"):
        distill.main([*SMALL, "--output", str(finished), "--kd-lr", "0.01"])


def test_killed_run_goes_on(finished: Path, distill, tmp_path: Path, monkeypatch) -> None:
    steps: list[int] = []
    step = KDTrainer.training_step

    def counted(self: KDTrainer, *args: object, **kwargs: object) -> torch.Tensor:
        steps.append(self.state.global_step)
        if len(steps) == 16:  # two micro-batches a step: dies in the eighth step of the teacher
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(KDTrainer, "training_step", counted)
    command = [*SMALL, "--output", str(tmp_path), "--only", "teacher"]
    with pytest.raises(KeyboardInterrupt):
        distill.main(command)
    metrics = distill.main(command)
    assert steps[16] == 7 and len(steps) == 15 + 1 + 12, "the second run must start at the eighth step"
    assert list(metrics["stages"]) == ["teacher"]
    whole = json.loads((finished / "metrics.json").read_text())["stages"]["teacher"]
    for ours, theirs in zip(metrics["stages"]["teacher"]["log_history"], whole["log_history"], strict=True):
        assert ours["loss"] == theirs["loss"] and ours["step"] == theirs["step"]
    assert metrics["stages"]["teacher"]["scores"] == whole["scores"]


def test_models_from_a_folder(finished: Path, distill, tmp_path: Path) -> None:
    """A ready teacher and student by path: their own tokenizer, no pre-training."""
    data = tmp_path / "pairs.jsonl"
    data.write_text(
        "".join(
            json.dumps({"en": f"A man sees {i} dogs.", "de": f"Ein Mann sieht {i} Hunde."}) + "\n" for i in range(300)
        )
    )
    models = {role: str(finished / role / "model") for role in ("teacher", "student")}
    metrics = distill.main(
        f"--data {data} --teacher {models['teacher']} --student {models['student']} --teacher-epochs 0 "
        f"--student-epochs 0 --train-limit 100 --kd-size 40 --kd-epochs 1 --test-limit 3 --objective no_evo "
        f"--output {tmp_path / 'run'}".split()
    )
    assert metrics["stages"]["teacher"]["steps"] == 0 and metrics["stages"]["no_evo"]["steps"] == 2
    kept = presets.load_model(tmp_path / "run" / "teacher" / "model", presets.load_tokenizer(models["teacher"]), 0)
    given = presets.load_model(models["teacher"], presets.load_tokenizer(models["teacher"]), 0)
    assert torch.equal(kept.lm_head.weight, given.lm_head.weight)


@pytest.mark.parametrize(
    "arguments,message",
    [
        ("--objective nonsense", "objective must be one of sft"),
        ("--kd-size 260", r"--kd-size must be in \[1, 259\]"),
        ("--direction en-en", "direction='en-en'"),
        ("--data ./nowhere.jsonl", "no such file"),
        ("--student ./nowhere", "neither a preset"),
        ("--only nonsense", "objective must be one of"),
        ("--only reverse_kd", "--only must name stages of teacher, student, sft, forward_kd"),
        ("--only sft", "--only sft: run student first"),
        ("--kd-noise 2", "share must be in"),
    ],
)
def test_bad_arguments(distill, tmp_path: Path, arguments: str, message: str) -> None:
    with pytest.raises((ValueError, SystemExit), match=message):
        distill.main([*SMALL, "--output", str(tmp_path / "run"), *arguments.split()])


def test_bad_accumulation(distill, capsys) -> None:
    with pytest.raises(SystemExit):
        distill.main(["--batch", "32", "--accumulation", "5"])
    assert "--batch 32 must be a multiple of --accumulation 5" in capsys.readouterr().err


def test_plots_need_only_metrics(finished: Path, tmp_path: Path) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    for folder in (finished, tmp_path / "again"):
        if folder != finished:
            write_plots(metrics, folder)
        for name in ("loss", "hard_fraction", "difficulty", "bleu"):
            content = (folder / f"{name}.png").read_bytes()
            assert content.startswith(b"\x89PNG") and len(content) > 5000
    for stage in metrics["stages"].values():
        stage.update(log_history=[], scores=None)
    assert write_plots(metrics, tmp_path / "none") == []


def test_help_is_an_overview(distill, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["distill.py", "--help"])
    with pytest.raises(SystemExit):
        distill.main()
    shown = capsys.readouterr().out
    assert "--objective" in shown and "beta_warmup" in shown
