"""examples/draft_model.py from text to table on a tiny budget, and the parts of it that its numbers rest on."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.profiler import ProfilerActivity, profile

import fused_kd as fk
from fused_kd.training.collate import Collator
from fused_kd.training.fit import training_arguments
from fused_kd.training.models import load_tokenizer
from fused_kd.training.prompts import Rows
from fused_kd.training.script import run_script
from fused_kd.training.trainer import KDTrainer

sys.path.append(str(Path(__file__).parents[2] / "examples"))

import draft_model
from drafting import Draft, Drafter, continuations, kept_share, new_draft, reachable_share

from ..training.tiny import VOCAB, rows, tiny

PROMPTS = 3
SMALL = (
    f"--train_limit 72 --held_out {PROMPTS} --vocab 400 --vocabulary 200 --target_epochs 1 --epochs 2 --batch 12 "
    "--max_new_tokens 6 --drafted 2 --objective acceptance forward_kd:lam=1"
).split()
DRAFTS = ["untrained", "acceptance", "forward_kd:lam=1"]
COLUMNS = torch.tensor([0, 1, 2, *range(30, 50)])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drafts")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        draft_model.main([*SMALL, "--output", str(folder)])
    told = " ".join(printed.getvalue().split())  # lines are broken at the width of a terminal
    assert "200 of 400 teacher columns" in told and "% of the held-out tokens" in told
    return folder


def metrics_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def test_everything_is_written(finished: Path) -> None:
    metrics = metrics_of(finished)
    assert metrics["arguments"]["vocabulary"] == 200 and 0.5 < metrics["coverage"] <= 1
    assert 0.3 < metrics["reachable"] <= 1
    assert [(run["draft"], run["tail"]) for run in metrics["drafts"]] == list(
        zip(DRAFTS, ("", "bucket", "renormalize"), strict=True)
    )
    before, *after = metrics["drafts"]
    for run in metrics["drafts"]:
        assert 1 <= run["length"] <= 3 and 0 <= run["matched"] <= 1 and run["as_target"] == run["prompts"] == PROMPTS
    assert all(run["kept"] > before["kept"] + 0.02 for run in after), "a draft nears its target"
    assert (finished / "drafts.png").read_bytes().startswith(b"\x89PNG")
    table = (finished / "results.md").read_text()
    assert len(table.splitlines()) == 2 + len(DRAFTS) and f"{100 * after[0]['kept']:.1f}" in table
    (model,) = finished.glob("acceptance.0-*/model")
    draft = Draft.from_pretrained(model)
    assert draft.lm_head.weight.shape[0] == len(draft.columns) == 200 and draft.config.vocab_size == 400
    assert set(load_tokenizer(model).all_special_ids) <= set(draft.columns.tolist())


def test_finished_work_is_kept_and_never_stale(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model is trained")

    monkeypatch.setattr(KDTrainer, "train", refuse)
    command, before = [*SMALL, "--output", str(finished)], metrics_of(finished)["drafts"]
    assert draft_model.main(command)["drafts"] == before
    for change in ("--epochs 1", "--vocabulary 150", "--tail renormalize"):
        with pytest.raises(AssertionError, match="a model is trained"):
            draft_model.main([*command, *change.split()])


def test_a_targets_folder_and_a_trained_start(finished: Path, tmp_path: Path) -> None:
    (target,) = finished.glob("target-*/model")
    more = [
        "--target",
        str(target),
        "--objective",
        "total_variation",
        "--warm_up",
        "2",
        "--epochs",
        "1",
        "--seeds",
        "2",
    ]
    metrics = draft_model.main([*SMALL, *more, "--output", str(tmp_path)])
    assert not list(tmp_path.glob("target-*")) and metrics["coverage"] == metrics_of(finished)["coverage"]
    runs = metrics["drafts"]
    assert [(run["draft"], run["seed"]) for run in runs] == [
        (draft, seed) for seed in (0, 1) for draft in ("untrained", "warm_up", "total_variation")
    ]
    assert runs[1]["kept"] == pytest.approx(metrics_of(finished)["drafts"][2]["kept"]), "the same two epochs of KL"
    assert runs[2]["kept"] > runs[0]["kept"] + 0.02, "it starts where the KL has led"
    assert (tmp_path / "results.md").read_text().count("±") == 3 * 3


def test_killed_run_goes_on(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    steps: list[int] = []
    step = KDTrainer.training_step

    def counted(self: KDTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        steps.append(self.state.global_step)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(KDTrainer, "training_step", counted)
    for stage in ("tokenizer-*", "target-*", "greedy-*"):
        (made,) = finished.glob(stage)
        shutil.copytree(made, tmp_path / made.name)
    command = [*SMALL, "--objective", "acceptance", "--output", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        draft_model.main(command)
    draft_model.main(command)
    assert steps == [*range(4), *range(3, 12)], "of the draft alone"
    told = capsys.readouterr().out
    assert re.search(r"acceptance\.0-\w+ goes on; finished before: 4\n", told), "tokenizer, target, greedy, start"
    assert re.search(r"acceptance\.0-\w+: resuming from checkpoint-3\n", told)
    ours, theirs = (
        json.loads(next(folder.glob("acceptance.0-*/training.json")).read_text())["log_history"]
        for folder in (tmp_path, finished)
    )
    assert [entry["loss"] for entry in ours] == [entry["loss"] for entry in theirs]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--objective nonsense", "objective must be one of"),
        ("--objective sft", "objective must be one that reads the target, got 'sft'"),
        ("--objective forward_kd:lam=1 --tail bucket", "tail must be 'renormalize' or 'listed' for an objective"),
        ("--tail none", "tail must be one of"),
        ("--vocabulary 0", "vocabulary must be an int of at least 1, got 0"),
        ("--target ./nowhere", "'./nowhere': no such folder"),
        ("--data ./nowhere.jsonl", "no such file"),
        ("--objective", "objective must name at least one, got none"),
        ("--vocabulary 3", "vocabulary must be above 3, the special tokens, and at most 400, .* got 3"),
        ("--vocabulary 401", "vocabulary must be above 3, .* at most 400, the tokenizer's, got 401"),
        ("--learning_rate -1", "learning_rate must be above 0 and finite, got -1"),
        ("--target_rate nan", "target_rate must be above 0 and finite, got nan"),
        ("--epochs 0", "epochs must be above 0 and finite, got 0"),
        ("--target_epochs inf", "target_epochs must be above 0 and finite, got inf"),
        ("--warm_up -1", "warm_up must be 0 or above and finite, got -1"),
        ("--hidden 33", "hidden must be an even number of at least 2, got 33"),
        ("--hidden 0", "hidden must be an even number of at least 2, got 0"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draft_model.main([*SMALL, "--output", str(tmp_path / "run"), *arguments.split()])
    assert not list(tmp_path.rglob("training.json")), "before any work"


@pytest.mark.parametrize("hidden, heads", [(2, 1), (66, 1), (64, 2), (100, 2), (288, 9)])
def test_every_even_width_is_a_draft(hidden: int, heads: int) -> None:
    draft = new_draft(tiny(32, 0), COLUMNS, hidden, layers=1, seed=0)
    assert draft.config.num_attention_heads == heads
    assert draft(torch.ones(1, 4, dtype=torch.int64)).logits.shape == (1, 4, len(COLUMNS))


def test_every_option_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    texts = {each.name: each.metadata.get("help") for each in dataclasses.fields(draft_model.Settings)}
    assert all(texts.values()), [name for name, text in texts.items() if not text]
    with pytest.raises(SystemExit) as ended:
        draft_model.main(["--help"])
    assert not ended.value.code and "(default: 0.004)" in capsys.readouterr().out


def test_a_users_error_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: draft_model.main([*SMALL, "--output", str(tmp_path), "--objective", "sft"]))
    told = capsys.readouterr().err.strip()
    assert ended.value.code == 2 and "\n" not in told and "error: objective must be" in told


def of_one_map(target: Any) -> tuple[Draft, Drafter]:
    narrow = new_draft(target, COLUMNS, hidden=16, layers=1, seed=3)
    wide = Drafter(narrow.config)
    wide.load_state_dict(narrow.state_dict())
    return narrow.eval(), wide.eval()


def test_wide_logits_are_the_drafts_and_nothing_else() -> None:
    narrow, wide = of_one_map(tiny(32, 0))
    ids = torch.arange(12).view(2, 6)
    small, large = narrow(ids).logits, wide(ids).logits
    assert small.shape == (2, 6, len(COLUMNS)) and large.shape == (2, 6, VOCAB)
    assert torch.equal(large[..., COLUMNS], small)
    others = [column for column in range(VOCAB) if column not in COLUMNS]
    assert bool((large[..., others] == -torch.inf).all())


def prompts(count: int) -> list[list[int]]:
    return [row["input_ids"][:5] for row in rows(count, seed=5)]


def test_assisted_text_is_the_targets_own() -> None:
    target = tiny(32, 0).eval()
    before = target.generation_config
    alone = continuations(target, prompts(6), 20)
    assisted = continuations(target, prompts(6), 20, of_one_map(target)[1], drafted=4)
    assert assisted["made"] == alone["made"] and target.generation_config is before
    assert alone["target"] == alone["tokens"] == sum(map(len, alone["made"])) and alone["draft"] == 0
    kept = assisted["tokens"] - assisted["target"]
    assert 0 < assisted["target"] <= alone["target"] and 0 <= kept <= assisted["draft"]
    assert assisted["draft"] > 2 * assisted["target"], "four drafted tokens a forward, however sure the draft is"


def test_the_target_itself_is_a_draft_of_which_all_is_kept() -> None:
    target = tiny(32, 0).eval()
    config = transformers.LlamaConfig(**{**target.config.to_dict(), "draft_vocab_size": VOCAB})
    same = Drafter(config)
    same.load_state_dict({**target.state_dict(), "columns": torch.arange(VOCAB)})
    found = continuations(target, prompts(6), 20, same.eval(), drafted=3)
    ended = sum(made[-1] == target.config.eos_token_id for made in found["made"])  # an end is never counted as drafted
    assert 0 <= found["draft"] - (found["tokens"] - found["target"]) <= ended
    assert kept_share(same, target, Rows(rows(4))) == pytest.approx(1, abs=1e-5)


def test_kept_share_is_the_mean_overlap_of_the_distributions() -> None:
    target = tiny(32, 0).eval()
    narrow, wide = of_one_map(target)
    total = most = count = 0.0
    for row in rows(40, seed=2):
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        with torch.no_grad():
            p = target(ids[None]).logits[0, :-1].double().softmax(-1)[:, COLUMNS]
            q = narrow(ids[None]).logits[0, :-1].double().softmax(-1)
        overlap = torch.minimum(p, q).sum(-1)[labels[1:] != -100]
        total, count = total + float(overlap.sum()), count + len(overlap)
        most += float(p.sum(-1)[labels[1:] != -100].sum())
    assert kept_share(wide, target, Rows(rows(40, seed=2))) == pytest.approx(total / count, rel=1e-5)
    mapped = fk.VocabMap.of_columns(COLUMNS, VOCAB)
    assert reachable_share(mapped, target, Rows(rows(40, seed=2))) == pytest.approx(most / count, rel=1e-5)


def test_training_holds_no_logits_of_the_whole_vocabulary(tmp_path: Path) -> None:
    """Of no tensor that an operation reads are the rows tokens and the columns the target's vocabulary."""
    vocab = 3000  # beyond a tile of columns
    target = tiny(8, 0, vocab=vocab)
    narrow, wide = of_one_map(target)
    args = training_arguments(tmp_path, max_steps=1, per_device_train_batch_size=16, save_strategy="no")
    mapped = fk.VocabMap.of_columns(COLUMNS, vocab)
    trainer = KDTrainer(
        narrow, target, fk.Acceptance(), vocab_map=mapped, tail="bucket",
        args=args, train_dataset=Rows(rows(16)), data_collator=Collator(0),
    )  # fmt: skip

    def wide_ones(work: Any) -> set[tuple[int, ...]]:
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
            work()
        shapes = {tuple(shape) for event in seen.events() for shape in event.input_shapes if shape}
        return {shape for shape in shapes if shape[-1] == vocab and torch.Size(shape[:-1]).numel() > 16}

    assert not wide_ones(trainer.train)
    with torch.no_grad():
        assert wide_ones(lambda: wide(torch.ones(4, 16, dtype=torch.int64)).logits.softmax(-1))
