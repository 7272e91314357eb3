"""Training from a cache of hidden states is training with the teacher: KDTrainer, the mixin, TRL's SFTTrainer."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fused_kd as fk
from fused_kd.integrations.transformers import KDLossMixin
from fused_kd.training import with_context
from fused_kd.training.cache import write_cache
from fused_kd.training.collate import Collator, PackingCollator
from fused_kd.training.teacher_cache import TeacherCache
from tests.training.caching import Words
from tests.training.test_trainer import SGD, assert_same_weights, trainer, weights
from tests.training.tiny import VOCAB, rows, tiny

DATA, HELD_OUT = rows(18), rows(7, seed=9)
OBJECTIVE = fk.SelfEvolution(gamma=2.0) + 0.5 * fk.ReverseKD()


def cached(
    folder: Path, data: list = DATA, teacher: Any = None, name: str | None = None, **options: Any
) -> TeacherCache:
    teacher = tiny(24, seed=2) if teacher is None else teacher
    options = {"keep": "hidden", "dtype": "fp32", "template": "tiny", "progress": False, **options}
    write_cache(folder, teacher, Words(VOCAB), data, shard_rows=5, batch_size=3, **options)  # type: ignore[arg-type]
    return TeacherCache(folder, name=name)


def trained(folder: Path, teacher: Any, data: Any, held_out: Any, **options: Any) -> tuple[dict, float, float]:
    """Weights, their distance from the start, and the loss on held-out rows, which have caches of their own."""
    options = {**SGD, "gradient_accumulation_steps": 2, "max_steps": 4, "learning_rate": 0.1, **options}
    student = tiny(16, seed=1)
    start = weights(student)
    run = trainer(folder, student, options.pop("objective", OBJECTIVE), data, teacher=teacher, **options)
    run.train()
    after = weights(student)
    moved = sum(float((after[name] - start[name]).norm() ** 2) for name in after) ** 0.5
    return after, moved, run.evaluate(held_out)["eval_loss"]


def apart(one: dict, other: dict) -> float:
    return sum(float((one[name] - other[name]).norm() ** 2) for name in one) ** 0.5


COLLATORS = {"right": Collator(0), "left": Collator(0, side="left"), "packed": PackingCollator()}


@pytest.mark.parametrize("collator", COLLATORS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_exact_states_are_the_teacher(tmp_path: Path, collator: str, temperature: float) -> None:
    """Several steps, each of two micro-batches, and evaluation, to float32's rounding; bf16 within its own."""
    options = {"collator": COLLATORS[collator], "temperature": temperature}
    expected, moved, loss = trained(tmp_path, tiny(24, seed=2), DATA, HELD_OUT, **options)
    for dtype, limit in (("fp32", 1e-5), ("bf16", 3e-3), ("fp8", 0.1)):
        cache, other = (cached(tmp_path / f"{dtype}{len(data)}", data, dtype=dtype) for data in (DATA, HELD_OUT))
        ours, _, our_loss = trained(tmp_path, cache, cache.rows(DATA), other.rows(HELD_OUT), **options)
        assert apart(ours, expected) <= limit * moved, dtype
        assert our_loss == pytest.approx(loss, rel=limit)
    assert apart(ours, expected) > 1e-4 * moved, "fp8 is no fp32"


def test_two_caches_are_two_teachers(tmp_path: Path) -> None:
    """A mixture, by names of the columns, one of lists; and each row's own."""
    first, second = tiny(24, seed=2), tiny(20, seed=3)
    one = cached(tmp_path / "one", teacher=first)
    two = cached(tmp_path / "two", teacher=second, name="math")
    both = two.rows(one.rows(DATA))
    options = {"objective": fk.ForwardKD(lam=0.7), "gradient_accumulation_steps": 1, "learning_rate": 0.5}
    each_row = [index % 2 for index in range(len(DATA))]
    for of_caches, of_models, ids in (
        ([(0.3, one), (0.7, two)], [(0.3, first), (0.7, second)], {}),
        ([one, two], [first, second], {"teacher_id": each_row}),
    ):
        data, plain = (
            [{**rows[i], **{k: v[i] for k, v in ids.items()}} for i in range(len(DATA))] for rows in (both, DATA)
        )
        expected, moved, loss = trained(tmp_path, of_models, plain, plain, **options)
        ours, _, our_loss = trained(tmp_path, of_caches, data, data, **options)
        assert apart(ours, expected) <= 1e-5 * moved and our_loss == pytest.approx(loss, rel=1e-5)


class MixedTrainer(KDLossMixin, transformers.Trainer):
    pass


def arguments(folder: Path, kind: Any = transformers.TrainingArguments, **options: Any) -> Any:
    return kind(
        output_dir=str(folder), per_device_train_batch_size=3, max_steps=4, optim="sgd", learning_rate=0.1,
        lr_scheduler_type="constant", gradient_accumulation_steps=2, report_to=[], disable_tqdm=True, use_cpu=True,
        save_strategy="no", dataloader_pin_memory=False, train_sampling_strategy="sequential", **options,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["mixin", "SFTTrainer"])
def test_other_trainers(tmp_path: Path, name: str) -> None:
    made: Any = MixedTrainer
    options: dict[str, Any] = {}
    if name == "SFTTrainer":
        trl = pytest.importorskip("trl")
        tokenizers = pytest.importorskip("tokenizers")
        made = type("KDSFTTrainer", (KDLossMixin, trl.SFTTrainer), {})
        kept = {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False}
        options = {"kind": trl.SFTConfig, "bf16": False, "gradient_checkpointing": False, **kept}
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t0"))
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", eos_token="t2")
    runs = []
    cache = cached(tmp_path / "cache")
    for teacher, data in ((tiny(24, seed=2), DATA), (cache, cache.rows(DATA))):
        student = tiny(16, seed=1)
        start = weights(student)
        more = {"processing_class": tokenizer} if name == "SFTTrainer" else {}
        if name == "SFTTrainer":
            given = data.for_trl() if teacher is cache else pytest.importorskip("datasets").Dataset.from_list(data)
            data = given
        run = made(
            student, arguments(tmp_path, **options), teacher=teacher, objective=OBJECTIVE, train_dataset=data,
            eval_dataset=data, data_collator=Collator(0), **more,
        )  # fmt: skip
        run.train()
        runs.append((weights(student), run.evaluate()["eval_loss"]))
    moved = apart(runs[0][0], start)
    assert apart(runs[1][0], runs[0][0]) <= 1e-5 * moved and moved > 1e-2
    assert runs[1][1] == pytest.approx(runs[0][1], rel=1e-5)


def test_a_head_of_another_vocabulary(tmp_path: Path) -> None:
    """Before the training: sizes that differ need the columns that both have, as of models."""
    cache = cached(tmp_path / "cache")
    options: dict[str, Any] = {"max_steps": 1, "teacher": cache}
    with pytest.raises(ValueError, match=rf"have vocabularies of {VOCAB + 3} and {VOCAB}: give vocab_size"):
        trainer(tmp_path, tiny(16, 1, vocab=VOCAB + 3), OBJECTIVE, cache.rows(DATA), **options)
    run = trainer(tmp_path, tiny(16, 1, vocab=VOCAB + 3), OBJECTIVE, cache.rows(DATA), vocab_size=VOCAB, **options)
    run.train()
    with pytest.raises(ValueError, match="batch must have teacher_hidden for the cached teacher TeacherCache"):
        trainer(tmp_path, tiny(16, 1), OBJECTIVE, DATA, **options).train()


def context(row: Any) -> list[int]:
    return [9 + len(row["input_ids"]), 10, 11][: len(row["input_ids"]) % 4]


@pytest.mark.parametrize("collator", COLLATORS)
@pytest.mark.parametrize("keep", ["hidden", "lists"])
def test_a_context_is_cached(tmp_path: Path, collator: str, keep: str) -> None:
    """What the teacher says of the longer rows; as when it runs."""
    data, held_out = (with_context(each, None, context) for each in (DATA, HELD_OUT))
    own = {"keep": keep, "dtype": "fp32"} | ({"k": VOCAB} if keep == "lists" else {})
    options = {"collator": COLLATORS[collator], "objective": fk.ForwardKD(lam=0.7)}
    expected, moved, loss = trained(tmp_path, tiny(24, seed=2), data, held_out, **options)
    cache, other = (cached(tmp_path / str(len(each)), each, **own) for each in (data, held_out))
    ours, _, our_loss = trained(tmp_path, cache, cache.rows(data), other.rows(held_out), **options)
    assert apart(ours, expected) <= 1e-5 * moved and our_loss == pytest.approx(loss, rel=1e-5)
    plain = trained(tmp_path, tiny(24, seed=2), DATA, HELD_OUT, **options)[0]
    assert apart(plain, expected) > 1e-2 * moved
    another = with_context(DATA, None, [10, 11])
    for wrong in (DATA, another):
        with pytest.raises(ValueError, match=r"something else: data .*of their teacher's prompts"):
            cache.rows(wrong)
    with pytest.raises(ValueError, match="something else: data"):
        cached(tmp_path / "plain", **own).rows(data)


@pytest.mark.parametrize(
    "keep, change, message",
    [
        ("hidden", lambda ids, labels: (ids, [*labels[:-1], -100]), r"targets in .* got \d+ and \d+ of them"),
        ("lists", lambda ids, labels: (ids, [*labels[:-1], 60]), "targets in teacher_labels as in labels, got other"),
        ("sampled", lambda ids, labels: (ids, labels[:-1]), r"as many teacher_labels as teacher_input_ids, got \d+"),
        ("lists", lambda ids, labels: (ids, None), "teacher_input_ids and teacher_labels or neither, got teacher_inp"),
    ],
)
def test_a_context_of_other_targets(tmp_path: Path, keep: str, change: Any, message: str) -> None:
    data = [dict(row) for row in with_context(DATA, None, context)]
    made = change(data[7]["teacher_input_ids"], data[7]["teacher_labels"])
    data[7] |= dict(zip(("teacher_input_ids", "teacher_labels"), made, strict=True))
    data[7] = {name: value for name, value in data[7].items() if value is not None}
    with pytest.raises(ValueError, match=rf"rows\[7\] must have .*{message}"):
        cached(tmp_path, data, keep=keep, dtype=None, **({"k": 3} if keep == "lists" else {}))


class Timed(torch.utils.data.Dataset):
    """Rows that note when, and in which process, they are read."""

    def __init__(self, data: Any, log: Path) -> None:
        self.data, self.log = data, log

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = self.data[index]
        with open(self.log, "a") as file:
            file.write(f"{index} {os.getpid()} {time.monotonic()}\n")
        return row


def test_states_are_read_ahead(tmp_path: Path) -> None:
    """By the data loader's worker, which maps the files: batch t + 1 is there before step t has ended."""
    cache = cached(tmp_path / "cache")
    log, ends = tmp_path / "reads", []

    class Slow(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            time.sleep(0.3)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.monotonic())

    options = {"dataloader_num_workers": 1, "per_device_train_batch_size": 3, "max_steps": 4, **SGD}
    run = trainer(tmp_path, tiny(16, seed=1), OBJECTIVE, Timed(cache.rows(DATA), log), teacher=cache, **options)
    run.add_callback(Slow())
    run.train()
    reads = [line.split() for line in log.read_text().splitlines()]
    assert {int(pid) for _, pid, _ in reads}.isdisjoint({os.getpid()})
    at = {int(index): float(moment) for index, _, moment in reads}
    for step in range(3):
        assert max(at[3 * (step + 1) + row] for row in range(3)) < ends[step]
    assert_same_weights(
        weights(run.model),
        trained(
            tmp_path, cache, cache.rows(DATA), cache.rows(DATA), gradient_accumulation_steps=1,
            per_device_train_batch_size=3, learning_rate=SGD["learning_rate"],
        )[0],
        0.0,
    )  # fmt: skip
