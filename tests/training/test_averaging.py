"""The mean over sequences: weights, and the trainer's loss and step against plain autograd."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

import fused_kd as fk
from fused_kd.integrations.labels import denominator, row_numbers, sequence_weights, without_first_targets
from fused_kd.training.collate import Collator, PackingCollator
from tests.training.distributed_worker import Cache, with_top_k
from tests.training.test_trainer import logged, trainer
from tests.training.tiny import tiny

ROWS = [
    {"input_ids": [1, 5, 6, 7, 8, 9], "labels": [-100, -100, 6, 7, 8, 9]},
    {"input_ids": [1, 4, 2], "labels": [-100, -100, 2]},
    {"input_ids": [1, 3, 7, 2], "labels": [-100, -100, -100, -100]},
    {"input_ids": [1, 9, 2], "labels": [-100, 9, 2]},
]


def test_weights_sum_to_one_a_sequence() -> None:
    padded = Collator(0)(ROWS)
    expected = torch.zeros(4, 6)
    expected[0, 1:5], expected[1, 1], expected[3, :2] = 0.25, 1.0, 0.5
    assert torch.equal(sequence_weights(padded["labels"]), expected)
    packed = PackingCollator()(ROWS)
    rows = [row[: len(ROWS[i]["labels"])] for i, row in enumerate(expected)]
    assert torch.equal(sequence_weights(packed["labels"], packed["position_ids"])[0], torch.cat(rows))
    for batch in (padded, packed):
        assert (int(denominator(batch, "sequences")), int(denominator(batch, "tokens"))) == (3, 7)


STEP = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.5, "logging_steps": 1}


def model(seed: int) -> LlamaForCausalLM:
    return tiny(16, seed, vocab=32)


@pytest.mark.parametrize("collator", [Collator(0), PackingCollator()], ids=["padded", "packed"])
def test_a_step_is_that_of_the_mean_over_sequences(tmp_path: Path, collator) -> None:
    student, teacher, plain = model(0), model(1), model(0)
    run = trainer(
        tmp_path, student, fk.NoEvo(), ROWS, teacher=teacher, eval_data=ROWS, average="sequences", collator=collator,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, max_grad_norm=0.0, **STEP,
    )  # fmt: skip

    losses = []
    for row in ROWS:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        valid = labels >= 0
        if valid.any():
            log_q = plain(ids).logits[0, :-1][valid].log_softmax(-1)
            p = teacher(ids).logits[0, :-1][valid].softmax(-1).detach()
            target = 0.5 * p + 0.5 * torch.nn.functional.one_hot(labels[valid], 32)
            losses.append((target * (target.log() - log_q)).sum(-1).mean())
    loss = torch.stack(losses).mean()
    loss.backward()
    assert run.evaluate()["eval_loss"] == pytest.approx(float(loss), rel=1e-5)
    run.train()
    assert logged(run)[0]["loss"] == pytest.approx(float(loss), rel=1e-5)
    for (name, ours), theirs in zip(student.named_parameters(), plain.parameters(), strict=True):
        error = (ours - (theirs - 0.5 * theirs.grad)).norm() / (0.5 * theirs.grad).norm().clamp(min=1e-12)
        assert error < 1e-4, name


class Left:
    """As a collator of transformers pads: every label is kept."""

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = Collator(0, side="left")(rows)
        for labels, row in zip(batch["labels"], rows, strict=True):
            labels[-len(row["labels"]) :] = torch.tensor(row["labels"])
        return batch


@pytest.mark.parametrize(("average", "cached"), [("tokens", True), ("sequences", False)])
def test_padding_on_the_left_predicts_nothing(tmp_path: Path, average: str, cached: bool) -> None:
    """Rows whose whole text has loss: loss, evaluation and step are those of padding on the right."""
    data = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in ROWS]
    if cached:
        data = with_top_k(data, teacher=model(1))
    runs = []
    for collator in (Collator(0), Collator(0, side="left"), Left()):
        options = {"teacher": Cache() if cached else model(1), "average": average, "eval_data": data}
        run = trainer(tmp_path, model(0), fk.ForwardKD(), data, collator=collator, **options, **STEP)
        evaluated = run.evaluate()["eval_loss"]
        run.train()
        runs.append((evaluated, logged(run)[0]["loss"], run.model.lm_head.weight.detach()))
    for evaluated, trained, weight in runs[1:]:
        assert (evaluated, trained) == pytest.approx(runs[0][:2], rel=1e-6)
        torch.testing.assert_close(weight, runs[0][2])


def test_first_tokens_by_mask_or_position() -> None:
    labels = torch.arange(1, 9).reshape(2, 4)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    for given in (mask, mask.bool()):
        kept = given.clone()
        masked = without_first_targets({"labels": labels, "attention_mask": given})["labels"]
        assert masked.tolist() == [[1, 2, -100, 4], [-100, 6, 7, 8]] and torch.equal(given, kept)
    positions = torch.tensor([[0, 1, 0, 1], [0, 0, 1, 2]])
    masked = without_first_targets({"labels": labels, "position_ids": positions})["labels"]
    assert masked.tolist() == [[-100, 2, -100, 4], [-100, -100, 7, 8]]
    assert without_first_targets({"labels": labels})["labels"] is labels
    for limits, rows in (
        ({"attention_mask": mask, "position_ids": positions}, [[-1, -1, 0, 0], [1, 1, 1, -1]]),
        ({"position_ids": positions}, [[0, 0, 1, 1], [2, 3, 3, 3]]),
        ({"position_ids": positions + (positions == 0).int() * torch.tensor([[1], [0]])}, [[0] * 4, [1, 2, 2, 2]]),
        ({"attention_mask": mask[None], "position_ids": positions}, [[0] * 4, [1] * 4]),
        ({}, [[0] * 4, [1] * 4]),
    ):
        assert row_numbers({"labels": labels, **limits}).tolist() == rows


def test_unknown_averages(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="average must be 'tokens' or 'sequences', got 'rows'"):
        trainer(tmp_path, model(0), fk.NoEvo(), ROWS, teacher=model(1), average="rows")
