"""A teacher that reads another prompt: rows, batches, and a training whose targets are those of the longer rows."""

from __future__ import annotations

import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import pad

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import fused_kd as fk  # noqa: E402
from fused_kd.integrations.forms import BATCH_COLUMNS, Step, aligned, on_device, targets_of  # noqa: E402
from fused_kd.integrations.labels import without_first_targets  # noqa: E402
from fused_kd.integrations.own import OwnTeacher  # noqa: E402
from fused_kd.integrations.prompted import checked_prompts  # noqa: E402
from fused_kd.integrations.sampling import MaskedTail, lengths_of  # noqa: E402
from fused_kd.integrations.transformers import hidden_states, lm_head_of  # noqa: E402
from fused_kd.reference import reference_kd_loss  # noqa: E402
from fused_kd.training import with_context  # noqa: E402
from fused_kd.training.cached_rows import CachedRows  # noqa: E402
from fused_kd.training.collate import Collator, PackingCollator  # noqa: E402
from fused_kd.training.shards import target_positions  # noqa: E402
from tests.small_tokenizers import byte_level  # noqa: E402
from tests.training.test_trainer import SGD, assert_same_weights, trainer, weights  # noqa: E402
from tests.training.tiny import rows, tiny  # noqa: E402

BOS = 1
ROW = {"input_ids": [BOS, 5, 6, 7], "labels": [-100, -100, 6, 7]}


class Words:
    """A tokenizer with a BOS token: a word is its number."""

    bos_token_id = BOS

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [int(word) for word in text.split()]}


def of(row: dict[str, Any]) -> tuple[list[int], list[int]]:
    return row["teacher_input_ids"], row["teacher_labels"]


def test_the_context_comes_before_the_prompt() -> None:
    """After BOS where the row has one, in text, ids, or a function of the row; loss is where it was."""
    bare = {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}
    tensors = {name: torch.tensor(values) for name, values in ROW.items()}
    for row in (ROW, tensors):
        for context in ("20 21", [20, 21], torch.tensor([20, 21]), lambda row: [int(row["input_ids"][1]) + 15, 21]):
            made = with_context([row], Words(), context)[0]
            assert of(made) == ([BOS, 20, 21, 5, 6, 7], [-100, -100, -100, -100, 6, 7])
            assert made["input_ids"] is row["input_ids"]
    # what nothing predicts in the student's row is no target of the teacher
    assert of(with_context([bare], Words(), "20")[0]) == ([20, 5, 6, 7], [-100, -100, 6, 7])
    assert of(with_context([ROW], None, [20])[0])[0] == [20, BOS, 5, 6, 7]
    assert of(with_context([ROW], Words(), "")[0]) == (ROW["input_ids"], ROW["labels"])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level())
    assert of(with_context([bare], tokenizer, "Hi")[0])[0] == tokenizer("Hi")["input_ids"] + [5, 6, 7]


def test_long_rows() -> None:
    data = [{"input_ids": [3] * n, "labels": [3] * n} for n in (5, 9, 6)]
    made = with_context(data, None, [20] * 4, max_length=10)
    assert (len(made), made.skipped) == (2, 1) and [len(row["input_ids"]) for row in made] == [5, 6]
    assert "2 rows, skipped=1" in repr(made)
    with pytest.raises(ValueError, match=r"rows\[1\] has 13 tokens with its context, max_length=10"):
        with_context(data, None, [20] * 4, max_length=10, skip_long=False)
    with pytest.raises(ValueError, match="no row is left: 3 given, max_length=8"):
        with_context(data, None, [20] * 4, max_length=8)
    with pytest.raises(ValueError, match="max_length=1: expected at least 2"):
        with_context(data, None, [20], max_length=1)


def test_contexts_are_small_and_no_cache_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four bytes a token; lengths come from the rows alone."""
    data = rows(40)
    tracemalloc.start()
    made = with_context(data, None, lambda row: list(range(1000, 3000)))
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < 40 * 2000 * 5
    assert made[1]["teacher_input_ids"] == [*range(1000, 3000), *data[1]["input_ids"]]
    assert pickle.loads(pickle.dumps(made))[3] == made[3]

    class Cache:
        name = None

        def __len__(self) -> int:
            return len(data)

        def row(self, index: int) -> dict:
            return {"hidden": torch.zeros(len(target_positions(data[index]["labels"])), 2)}

    cached = CachedRows(Cache(), data)
    assert with_context(cached, None, [20])[1]["teacher_hidden"].shape[1] == 2
    monkeypatch.setattr(Cache, "row", lambda *_: pytest.fail("read"))
    some_ = with_context(cached, None, lambda row: [20] * len(row["input_ids"]), max_length=12)
    assert 0 < some_.skipped < 40
    assert lengths_of(some_) == [len(row["input_ids"]) for row in data if len(row["input_ids"]) <= 6]


def test_wrong_contexts() -> None:
    for wrong in ([-1], [1, 1 << 31]):
        with pytest.raises(ValueError, match=r"context must have token ids in \[0, 2147483647\], got "):
            with_context([ROW], None, wrong)
    for context in (7, ["a"], [True], None, lambda row: 3.0):
        with pytest.raises(TypeError, match="context must be text or token ids, or a function of a row"):
            with_context([ROW], Words(), context)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="tokenizer must be given for a context that is text, got 'Hi'"):
        with_context([ROW], None, "Hi")
    with pytest.raises(ValueError, match=r"rows\[0\] must have as many labels as input_ids, got 1 and 2"):
        with_context([{"input_ids": [3, 4], "labels": [3]}], None, [20])


# Batches.


def some(count: int = 6) -> Any:
    return with_context(rows(count), None, lambda row: [9 + len(row["input_ids"])] * (len(row["input_ids"]) % 4))


def batch_of(collator: Any, data: Any) -> dict[str, Any]:
    return checked_prompts(without_first_targets(collator([data[index] for index in range(len(data))])))


COLLATORS = {
    "right": Collator(0),
    "left": Collator(0, side="left", pad_to_multiple_of=8),
    "packed": PackingCollator(),
    "flash": PackingCollator(return_flash_attn_kwargs=True, return_seq_idx=True),
}


@pytest.mark.parametrize("kind", COLLATORS)
def test_batches(kind: str) -> None:
    data = some()
    batch = COLLATORS[kind]([data[index] for index in range(len(data))])
    theirs = [{"input_ids": row["teacher_input_ids"], "labels": row["teacher_labels"]} for row in data]
    expected = COLLATORS[kind](theirs)
    for name, value in expected.items():
        found = batch[f"teacher_{name}"]
        assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value, name
    plain = COLLATORS[kind](rows(6))
    assert batch.keys() == plain.keys() | {f"teacher_{name}" for name in expected}
    for name, value in plain.items():
        assert torch.equal(batch[name], value) if isinstance(value, torch.Tensor) else batch[name] == value, name
    assert checked_prompts(plain) is plain


@pytest.mark.parametrize("kind", COLLATORS)
def test_what_the_teacher_reads(kind: str) -> None:
    """Its own rows and their limits, and nothing of the student's."""
    data = some()
    batch = batch_of(COLLATORS[kind], data)
    columns = {name: batch.pop(name) for name in BATCH_COLUMNS if name in batch}
    labels = batch.pop("labels")
    read = Step(tiny(8, 1), batch, on_device(columns, torch.device("cpu")), targets_of(labels, shift=True)).read
    expected = COLLATORS[kind](
        [{"input_ids": row["teacher_input_ids"], "labels": row["teacher_labels"]} for row in data]
    )
    assert read.keys() == expected.keys() - {"labels"} == batch.keys()
    for name, value in read.items():
        assert torch.equal(value, expected[name]) if isinstance(value, torch.Tensor) else value == expected[name], name


@pytest.mark.parametrize("kind", ["right", "left", "packed"])
def test_states_of_the_longer_rows(kind: str) -> None:
    """The aligned head's log-probabilities are those of each row by hand."""
    data, model = some(), tiny(16, 1, layers=2).eval()
    batch = batch_of(COLLATORS[kind], data)
    read = {name: batch[f"teacher_{name}"] for name in ("input_ids", "attention_mask", "position_ids")
            if f"teacher_{name}" in batch}  # fmt: skip
    with torch.no_grad():
        hidden = hidden_states(model, **read)
        ours, theirs = (targets_of(batch[name], shift=True) for name in ("labels", "teacher_labels"))
        states = aligned(hidden, theirs, ours)
        head = lm_head_of(model, states[ours])
        found = (head.hidden @ head.weight.T).log_softmax(-1)
        expected = []
        for row in data:
            wanted = torch.tensor(row["teacher_labels"])[1:] != -100
            logits = model(torch.tensor([row["teacher_input_ids"]])).logits[0, :-1]
            expected.append(logits[wanted].log_softmax(-1))
    assert states.shape == (*batch["labels"].shape, 16) and not states[~ours].any()
    assert torch.allclose(found, torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_wrong_batches() -> None:
    data = [dict(row) for row in some(3)]
    right = COLLATORS["right"]
    with pytest.raises(
        ValueError, match=r"must be in every row of a batch or in none, rows\[1\] has input_ids, labels"
    ):
        right([data[0], rows(2)[1]])
    with pytest.raises(
        ValueError, match=r"rows\[0\] must have as many teacher_labels as teacher_input_ids, got 1 and "
    ):
        right([{**data[0], "teacher_labels": [3]}])
    changed = [data[0], {**data[1], "teacher_labels": [*data[1]["teacher_labels"][:-1], -100]}, data[2]]
    other = [data[0], data[1], {**data[2], "teacher_labels": [*data[2]["teacher_labels"][:-1], 60]}]
    for kind in ("right", "left", "packed"):
        with pytest.raises(ValueError, match=r"the same targets as labels in each row, row 1 has \d+ of them in teach"):
            batch_of(COLLATORS[kind], changed)
        with pytest.raises(ValueError, match=r"in each row, row 2 has token 60 in place of \d+ as number \d+"):
            batch_of(COLLATORS[kind], other)
        checked_prompts(without_first_targets(COLLATORS[kind](other)), same_ids=False)
    many = [dict(row) for row in some(4)]
    many[3]["teacher_labels"] = [*many[3]["teacher_labels"][:-1], -100]
    twice = [COLLATORS["packed"](many[:2]), COLLATORS["packed"](many[2:])]
    width = {name: max(each[name].shape[1] for each in twice) for name in twice[0]}
    fills = {name: -100 if "labels" in name else 1 for name in width}
    lines = {
        n: torch.cat([pad(each[n], (0, width[n] - each[n].shape[1]), value=fills[n]) for each in twice]) for n in width
    }
    with pytest.raises(ValueError, match=r"the same targets as labels in each row, row 3 has \d+ of them in teacher_l"):
        checked_prompts(without_first_targets(lines))
    batch = right(data)
    with pytest.raises(ValueError, match="batch must have teacher_labels beside teacher_input_ids"):
        checked_prompts({name: value for name, value in batch.items() if name != "teacher_labels"})
    with pytest.raises(ValueError, match="as many rows as labels, got"):
        checked_prompts({**batch, "labels": batch["labels"][:2]})
    with pytest.raises(ValueError, match="for an encoder-decoder: another prompt is for causal LMs"):
        checked_prompts(batch, shift=False)


def test_first_targets_that_nothing_predicts_are_left_out() -> None:
    """Of other collators too: padding before a row predicts nothing."""
    batch = Collator(0, side="left")(list(some()))
    first = batch["teacher_attention_mask"].int().argmax(1)
    labels = batch["teacher_labels"].clone()
    labels[torch.arange(len(labels)), first] = batch["teacher_input_ids"][torch.arange(len(labels)), first]
    made = checked_prompts({**batch, "teacher_labels": labels})
    assert torch.equal(made["teacher_labels"], batch["teacher_labels"])
    assert not torch.equal(labels, batch["teacher_labels"])


def test_a_repeated_row_has_no_targets() -> None:
    tail = MaskedTail(some(3))
    row = tail[3 + 1]
    assert set(row["teacher_labels"]) == set(row["labels"]) == {-100}
    batch_of(Collator(0), [tail[0], row])


# Trainings.


class ByHand(transformers.Trainer):
    """Both models' logits of each row alone, the teacher's on its own row."""

    teacher: Any
    objective: Any

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        def logits(model: Any, ids: list, labels: list) -> tuple[torch.Tensor, torch.Tensor]:
            wanted = torch.tensor(labels)[1:] != -100
            return model(torch.tensor([ids])).logits[0, :-1][wanted], torch.tensor(labels)[1:][wanted]

        found = [logits(model, row["input_ids"], row["labels"]) for row in inputs["rows"]]
        with torch.no_grad():
            theirs = [logits(self.teacher, *of(row))[0] for row in inputs["rows"]]
        z, labels = (torch.cat(each) for each in zip(*found, strict=True))
        return reference_kd_loss(z, torch.cat(theirs), labels, self.objective).loss


@pytest.mark.parametrize("kind", ["right", "left", "packed"])
@pytest.mark.parametrize("teacher", ["model", "average"])
def test_trained_as_by_hand(tmp_path: Path, kind: str, teacher: str) -> None:
    """Losses, gradients and evaluation; of another model, and of an average that stays."""
    data, objective, other = some(8), fk.ForwardKD(lam=0.8), tiny(24, seed=2)
    form = OwnTeacher(decay=1) if teacher == "average" else other
    options = {**SGD, "max_steps": 2, "max_grad_norm": 0.0, "logging_steps": 1}
    run = trainer(
        tmp_path, tiny(16, seed=1), objective, data, teacher=form, eval_data=data,
        collator=COLLATORS[kind], **options,
    )  # fmt: skip
    args = transformers.TrainingArguments(**{**run.args.to_dict(), "remove_unused_columns": False})
    hand = ByHand(tiny(16, seed=1), args, train_dataset=list(data), data_collator=lambda rows: {"rows": rows})
    hand.teacher, hand.objective = (tiny(16, seed=1) if teacher == "average" else other).eval(), objective
    hand.train()
    before = run.evaluate()["eval_loss"]
    run.train()
    losses = [[entry["loss"] for entry in each.state.log_history if "loss" in entry] for each in (run, hand)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert_same_weights(weights(run.model), weights(hand.model), 1e-5)
    with torch.no_grad():
        hand.model.load_state_dict(tiny(16, seed=1).state_dict())
        assert before == pytest.approx(float(hand.compute_loss(hand.model, {"rows": list(data)})), rel=1e-5)


def test_the_context_counts(tmp_path: Path) -> None:
    """Another context, another target."""
    losses = []
    for context in ([9, 8, 7], [30, 31, 32]):
        data = with_context(rows(4), None, context)
        run = trainer(tmp_path, tiny(16, seed=1), fk.ForwardKD(lam=1.0), data, teacher=OwnTeacher(), eval_data=data)
        losses.append(run.evaluate()["eval_loss"])
    assert min(losses) > 0.01 and abs(losses[0] - losses[1]) > 1e-3
