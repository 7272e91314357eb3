"""The share of tokens that are hard for the teacher itself, against the sums written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fused_kd as fk
from fused_kd.training.collate import Collator
from tests.training.distributed_worker import Cache
from tests.training.test_trainer import logged, told_by, trainer
from tests.training.tiny import VOCAB, rows, tiny


def own_shares(teacher: Any, data: list, lam: float, gamma: float, *, k: int = VOCAB) -> float:
    """Of the valid tokens, those with ``KL(yt||p) > gamma``; beyond its k largest p is level."""
    batch = Collator(0)(data)
    labels = batch.pop("labels")[:, 1:]
    valid = labels != -100
    with torch.no_grad():
        p = teacher.eval()(**batch).logits[:, :-1][valid].double().softmax(-1)
    listed = p >= p.topk(k).values[:, -1:]
    rest = 1.0 - p.where(listed, 0.0).sum(-1, keepdim=True)
    p = p.where(listed, rest / max(VOCAB - k, 1))
    mixed = (1 - lam) * torch.nn.functional.one_hot(labels[valid], VOCAB) + lam * p
    d = torch.where(mixed > 0, mixed * (mixed / p).log(), 0.0).sum(-1)
    return float((d > gamma).double().mean())


def some_known() -> tuple[list, Any]:
    """Rows of which the teacher knows some, and it."""
    teacher, data = tiny(24, seed=2), rows(8)
    with torch.no_grad():
        teacher.lm_head.weight.mul_(3)
    return [*told_by(teacher, data[:5]), *data[5:]], teacher


@pytest.mark.parametrize(
    "objective, lam, gamma",
    [
        (fk.SelfEvolution(gamma=1.0, lam=0.3), 0.3, 1.0),
        (fk.ForwardKD(lam=0.7), 0.7, 0.4),
        (fk.SelfEvolutionTopK(fraction=0.2), 0.5, 0.4),
        (0.5 * fk.GeneralizedJSD() + 0.5 * fk.Skew(lam=0.6), 0.6, 0.4),
    ],
    ids=str,
)
def test_of_the_whole_teacher(tmp_path: Path, objective: Any, lam: float, gamma: float) -> None:
    data, teacher = some_known()
    run = trainer(
        tmp_path, tiny(16, seed=1), objective, data, teacher=teacher, max_steps=1, logging_steps=1,
        per_device_train_batch_size=4, gradient_accumulation_steps=2, statistics=("entropy_t",),
    )  # fmt: skip
    run.train()
    expected = own_shares(teacher, data, lam, gamma)
    assert logged(run)[0]["hard_fraction_t"] == pytest.approx(expected, abs=1e-6)
    assert 0.1 < expected < 0.9, "the sample must have both"


@pytest.mark.parametrize("tail", ["uniform", "bucket", "renormalize"])
def test_of_lists(tmp_path: Path, tail: str) -> None:
    class Lists(Cache):
        pass

    Lists.tail = tail
    (data, teacher), k = some_known(), 8
    for row in data:
        targets = torch.tensor(row["labels"])[1:] != -100
        with torch.no_grad():
            logits = teacher(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1][targets]
        row["teacher_log_probs"], row["teacher_indices"] = logits.log_softmax(-1).topk(k)
        if tail == "renormalize":
            row["teacher_log_probs"] = row["teacher_log_probs"].log_softmax(-1)
    objective = fk.NoEvo(lam=0.5)
    run = trainer(tmp_path, tiny(16, seed=1), objective, data, teacher=Lists(), max_steps=1, logging_steps=1,
                  per_device_train_batch_size=8)  # fmt: skip
    run.train()
    expected = own_shares(teacher, data, 0.5, 0.4, k=k)
    assert logged(run)[0]["hard_fraction_t"] == pytest.approx(expected, abs=0.06 if tail == "renormalize" else 1e-6)


@pytest.mark.parametrize(
    "objective, options",
    [
        (fk.GeneralizedJSD(), {}),  # no label in the difficulty
        (fk.SelfEvolution(gate="excess"), {}),  # of the teacher 0
        (fk.SFT(), {}),
        (fk.NoEvo(), {"memory_budget": 2**22}),
    ],
    ids=["jsd", "excess", "sft", "budget"],
)
def test_where_there_is_none(tmp_path: Path, objective: Any, options: dict) -> None:
    from fused_kd.training.trainer import KDTrainer

    made = trainer(tmp_path, tiny(16, seed=1), objective, rows(8), teacher=tiny(24, seed=2))
    run = KDTrainer(tiny(16, seed=1), tiny(24, seed=2), objective, args=made.args, train_dataset=rows(8), **options)
    run.args.max_steps = 2
    run.train()
    assert "hard_fraction" in logged(run)[0] and "hard_fraction_t" not in logged(run)[0]
