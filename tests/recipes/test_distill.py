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

from fused_kd.training.data import load_pairs
from fused_kd.training.models import load_model, load_tokenizer
from fused_kd.training.trainer import KDTrainer

sys.path.append(str(Path(__file__).parents[2] / "examples"))

import distill
import distill_report

SPEC = "self_evolution:gamma=0.3,beta_warmup=0.5"
SLUG = "self_evolution-gamma=0.3-beta_warmup=0.5"
STAGES = ["teacher", "student", "sft", "forward_kd", SLUG]
SMALL = (
    "--train-limit 160 --kd-size 40 --test-limit 4 --vocab 400 --batch 20 --accumulation 2 "
    "--teacher tiny-student --teacher-epochs 1 --student tiny-student --student-epochs 1 --kd-epochs 2 "
    f"--objective forward_kd {SPEC} --kd-noise 0 --jobs 1"
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
    distill.main(command)  # its metrics are what the other tests read
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


def test_two_processes(finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The same models as of one process; what the second one prints is not on the screen."""
    command = [*SMALL, "--output", str(tmp_path), "--jobs", "2", "--only", "sft", "forward_kd"]
    ours, theirs, stages = distill.main(command), metrics_of(finished), STAGES[:-1]
    assert ours is not None and list(ours["stages"]) == stages
    losses = [
        {name: [entry["loss"] for entry in metrics["stages"][name]["log_history"]] for name in stages}
        for metrics in (ours, theirs)
    ]
    assert losses[0] == losses[1]
    made, screen = (tmp_path / "worker-1.log").read_text(), capfd.readouterr().out
    here = [name for name in stages if f" {name}-" in screen]
    there = [name for name in stages if f" {name}-" in made]
    assert sorted(here + there) == sorted(stages), "each stage is done by one of them"
    for text in ("share the stages", "Distilled on"):
        assert text in screen and text not in made


def test_wrong_references_are_shown(finished: Path) -> None:
    args = distill.parse_arguments([*SMALL, "--kd-noise", "0.3", "--output", str(finished)])
    run = distill.Distillation(args)
    first = run.wrong[0]
    assert len(run.wrong) == 12 and run.kd_pairs[first].target != run.pairs[120 + first].target
    text = run.sample()
    assert "40 pairs; 12 of them" in text and "WRONG" in text
    right, wrong = run.pairs[120 + first], run.kd_pairs[first]
    assert f"\nsource: {right.source}\nWRONG:  {wrong.target}\nright:  {right.target}\n" in text
    clean = distill.Distillation(distill.parse_arguments([*SMALL, "--output", str(finished)]))
    assert "WRONG" not in clean.sample() and clean.pairs[120].source in clean.sample()


def test_comparison() -> None:
    """Against the start and against SFT, paired by sentence; the same translations are no difference."""
    test = load_pairs("builtin", "test", "en-de", limit=60)
    right = [pair.target for pair in test]
    spoilt = [text if number % 3 else "nein" for number, text in enumerate(right)]
    made = {"teacher": right, "student": spoilt, "sft": spoilt, "forward_kd": spoilt, "kd": right}
    found = distill_report.compare(made, test)
    assert {name: list(against) for name, against in found.items()} == {
        "sft": ["student"], "forward_kd": ["student", "sft"], "kd": ["student", "sft", "forward_kd"]
    }  # fmt: skip
    assert found["sft"]["student"]["bleu"] == {"delta": 0.0, "p": 1.0}
    for baseline in ("student", "sft", "forward_kd"):
        assert found["kd"][baseline]["bleu"]["delta"] > 20 and found["kd"][baseline]["bleu"]["p"] < 0.01
    assert distill_report.compare({"teacher": right, "student": spoilt}, test) == {}


def metrics_with(
    start: float, sft: float, ours: float, p: float = 0.001, tested: int = 500, **others: float
) -> dict[str, Any]:
    """Metrics of a run with these scores, and the p-value of every difference."""

    def stage(score: float, *baselines: float) -> dict[str, Any]:
        names = zip(distill_report.BASELINES, baselines, strict=False)
        against = {name: {"bleu": {"delta": score - base, "p": p}} for name, base in names}
        about = {"scores": {"bleu": score, "chrf": score}, "parameters": 1000, "seconds": 1.0}
        return about | ({"against": against} if against else {})

    scores = {"ours": ours, **others}
    stages = {"teacher": stage(80.0), "student": stage(start), "sft": stage(sft, start)}
    stages |= {name: stage(score, start, sft) for name, score in scores.items()}
    data = {"train_pairs": 120, "kd_pairs": 40, "wrong": 12}
    arguments = {"test_split": "test", "teacher_epochs": 5}
    return {"stages": stages, "data": data | {"test_pairs": tested}, "arguments": arguments}


@pytest.mark.parametrize(
    "metrics, sentence",
    [
        (
            metrics_with(50.0, 45.0, 60.0),
            "The student got better: ours took it from 50.0 to 60.0 BLEU (+10.0, p 0.001); that is 15.0 above SFT on "
            "the same pairs, 45.0 (p 0.001); the teacher has 80.0.",
        ),
        (
            metrics_with(50.0, 49.0, 40.0, other=41.0),
            "The student got worse: ours took it from 50.0 to 40.0 BLEU (-10.0, p 0.001); that is 9.0 below SFT on "
            "the same pairs, 49.0 (p 0.001); other ends higher, at 41.0; the teacher has 80.0.",
        ),
        (
            metrics_with(50.0, 50.1, 50.2, p=0.4, other=50.0),
            "No clear gain: ours took it from 50.0 to 50.2 BLEU (+0.2, p 0.400); SFT on the same pairs gives 50.1, no "
            "clear difference (p 0.400); the teacher has 80.0.",
        ),
        (
            metrics_with(50.0, 60.02, 60.0, other=60.04),
            "The student got better: ours took it from 50.0 to 60.0 BLEU (+10.0, p 0.001); SFT on the same pairs gives "
            "60.0, no clear difference (p 0.001); the teacher has 80.0.",
        ),
        (
            metrics_with(60.0, 45.0, 60.04),
            "No clear gain: ours took it from 60.0 to 60.0 BLEU (+0.0, p 0.001); that is 15.0 above SFT on the same "
            "pairs, 45.0 (p 0.001); the teacher has 80.0.",
        ),
        (
            metrics_with(1.3, 0.4, 0.9, other=0.94),
            "The student does not translate yet (1.3 BLEU at most): train it longer before you compare.",
        ),
        (
            metrics_with(50.0, 45.0, 60.0, tested=50, other=61.0),
            "No claim from 50 test sentences, take 100 or more: ours took it from 50.0 to 60.0 BLEU; SFT on the same "
            "pairs gives 45.0; the teacher has 80.0.",
        ),
    ],
    ids=["gain", "loss", "nothing", "equal_as_shown", "equal_to_the_start", "no_translations", "few_sentences"],
)
def test_the_sentence_follows_the_numbers(metrics: dict[str, Any], sentence: str) -> None:
    assert distill_report.verdict(metrics) == sentence


def test_table() -> None:
    shown = distill_report.table(metrics_with(50.0, 45.0, 60.0))
    assert "**60.0**" in shown and "+10.0 (p 0.001)" in shown and "+15.0 (p 0.001)" in shown
    assert "40 pairs that are new to the student but not to the teacher, 12 of them (30%) with a wrong" in shown
    shown = distill_report.table(metrics_with(50.0, 62.0, 60.0, other=60.04))
    assert shown.count("**") == 4 and shown.count("**60.0**") == 2 and "62.0" in shown, "the best of those taught"


def test_report_of_several_runs(finished: Path, tmp_path: Path) -> None:
    """Seeds with the same arguments are one table, other arguments another."""
    metrics = metrics_of(finished)
    for number, (seed, noise) in enumerate([(0, 0.0), (1, 0.0), (0, 0.3)]):
        teacher = str(tmp_path / f"t{number}" / f"teacher-0123456{seed:03}" / "model")
        own = metrics["arguments"] | {"seed": seed, "kd_noise": noise, "teacher": teacher}
        distill.write_json(tmp_path / f"{number}" / "metrics.json", metrics | {"seed": seed, "arguments": own})
    distill_report.main([*(str(tmp_path / f"{number}") for number in range(3)), "--output", str(tmp_path / "out")])
    text = (tmp_path / "out" / "results.md").read_text()
    assert text.count("## ") == 2 and "`kd_noise 0.3`" in text and "seed 1" in text
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [run["seed"] for run in found["runs"]] == [0, 1, 0] and str(tmp_path) not in json.dumps(found)
    assert "(p at most" in text and "(p 1.000)" in text, "one seed has one p"
    assert not (tmp_path / "out" / "bleu.png").exists(), "two groups are no picture"
    distill_report.main([*(str(tmp_path / f"{number}") for number in range(2)), "--output", str(tmp_path / "seeds")])
    assert (tmp_path / "seeds" / "bleu.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"has no metrics.json"):
        distill_report.main([str(tmp_path / "nowhere"), "--output", str(tmp_path / "out")])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--objective nonsense", "objective must be one of sft"),
        ("--kd-size 160", r"--kd-size must be in \[1, 159\]"),
        ("--direction en-en", "direction='en-en'"),
        ("--data ./nowhere.jsonl", "no such file"),
        ("--student ./nowhere", "no such folder or file"),
        ("--only nonsense", "--only must name stages of teacher, student, sft, forward_kd"),
        ("--only reverse_kd", "--only must name stages of teacher, student, sft, forward_kd"),
        ("--kd-noise 2", r"--kd-noise must be in \[0, 1\], got 2"),
        ("--train-limit 0", "--train-limit must be at least 1, got 0"),
        ("--test-limit -1", "--test-limit must be at least 1, got -1"),
        ("--jobs 0", "jobs must be an int of at least 1"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distill.main([*SMALL, "--output", str(tmp_path / "run"), *arguments.split()])


def test_refused_by_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        distill.main(["--batch", "32", "--accumulation", "5"])
    assert "--batch 32 must be a multiple of --accumulation 5" in capsys.readouterr().err
