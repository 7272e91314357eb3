"""What an evaluation tells beside its loss, against both models' logits in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch.profiler import ProfilerActivity, profile

import fused_kd as fk
from fused_kd.integrations.mixin import KDLossMixin
from fused_kd.training.collate import Collator
from fused_kd.training.trainer import KDTrainer
from tests.training.test_trainer import trainer
from tests.training.tiny import VOCAB, rows, tiny

HELD_OUT = rows(7, seed=9)  # a ragged last batch
EVALUATED = {"per_device_eval_batch_size": 2, "eval_data": HELD_OUT}


def double_logits(model: Any, data: list) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Of each row's valid tokens, and their labels."""
    for row in data:
        batch = Collator(0)([row])
        labels = batch.pop("labels")[0, 1:]
        valid = labels != -100
        with torch.no_grad():
            yield model.eval()(**batch).logits[0, :-1][valid].double(), labels[valid]


def expected(student: Any, *teachers: tuple[float, Any]) -> dict[str, float]:
    """By the definitions; ``teachers``: weights and models."""
    z, labels = (torch.cat(parts) for parts in zip(*double_logits(student, HELD_OUT), strict=True))
    lq = z.log_softmax(-1)
    found = {"eval_ce": float(torch.nn.functional.nll_loss(lq, labels))}
    found["eval_perplexity"] = math.exp(found["eval_ce"])
    if teachers:
        p = sum(w * torch.cat([t for t, _ in double_logits(each, HELD_OUT)]).softmax(-1) for w, each in teachers)
        found["eval_kl"] = float((torch.xlogy(p, p) - p * lq).sum(-1).mean())
        found["eval_top_1"] = float((p.argmax(-1) == z.argmax(-1)).double().mean())
    return found


def check(result: dict[str, float], wanted: dict[str, float]) -> None:
    for name, value in wanted.items():
        assert result[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name


def near(teacher: Any) -> Any:
    """A student that agrees with it in some tokens."""
    student = tiny(24, seed=2)
    torch.manual_seed(0)
    with torch.no_grad():
        student.lm_head.weight.add_(torch.randn_like(student.lm_head.weight) * 0.1)
    return student


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "self-evolution": (fk.SelfEvolution(gamma=2.0), {}),
    "by rank": (fk.SelfEvolutionTopK(fraction=0.3), {}),
    "temperature": (fk.ForwardKD(), {"temperature": 2.0}),
    "sum": ("0.5*sft+0.5*generalized_jsd", {}),
    "adaptive": (fk.AdaptiveKL(), {}),
    "sft with a teacher": (fk.SFT(), {}),
    "sequences": (fk.NoEvo(), {"average": "sequences"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_of_a_model(tmp_path: Path, case: str) -> None:
    objective, options = CASES[case]
    teacher = tiny(24, seed=2)
    student = near(teacher)
    run = trainer(tmp_path, student, objective, rows(8), teacher=teacher, **EVALUATED, **options)
    result = run.evaluate()
    wanted = expected(student, (1.0, teacher))
    assert 0.2 < wanted["eval_top_1"] < 0.98 and wanted["eval_kl"] > 0.01
    check(result, wanted)
    assert {name for name in run.state.log_history[-1] if name in wanted} == set(wanted), "for TensorBoard"
    if isinstance(objective, fk.SFT):
        assert result["eval_loss"] == pytest.approx(wanted["eval_ce"], rel=1e-5)
        run.train()  # the teacher takes no part
        assert not any(name.startswith("teacher") for name in run.state.log_history[-1])


def test_without_a_teacher_and_without_all(tmp_path: Path) -> None:
    student = tiny(16, seed=1)
    result = trainer(tmp_path, student, fk.SFT(), rows(8), **EVALUATED).evaluate()
    check(result, expected(student))
    assert not {"eval_kl", "eval_top_1"} & result.keys()
    made = trainer(tmp_path, student, fk.NoEvo(), rows(8), teacher=tiny(24, seed=2))
    off = KDTrainer(
        student, tiny(24, seed=2), fk.NoEvo(), args=made.args, eval_dataset=HELD_OUT, data_collator=Collator(0),
        eval_metrics=False,
    )  # fmt: skip
    assert not {"eval_ce", "eval_perplexity", "eval_kl", "eval_top_1"} & off.evaluate().keys()
    with pytest.raises(TypeError, match="eval_metrics must be True or False, got 'kl'"):
        KDTrainer(student, tiny(24, seed=2), fk.NoEvo(), args=made.args, eval_metrics="kl")


@pytest.mark.parametrize(
    "options", [{"memory_budget": 30_000}, {"backend": "triton"}, {"lists": fk.Lists(k=4)}], ids=lambda o: next(iter(o))
)
def test_where_the_loss_cannot_tell(tmp_path: Path, options: dict[str, Any]) -> None:
    """Then another pass does."""
    teacher = tiny(24, seed=2)
    student, args = near(teacher), trainer(tmp_path, tiny(16, seed=1), fk.SFT(), rows(4)).args
    run = KDTrainer(
        student, teacher, fk.ForwardKD(), args=args, eval_dataset=HELD_OUT, data_collator=Collator(0), **options
    )
    check(run.evaluate(), expected(student, (1.0, teacher)))


def test_of_several(tmp_path: Path) -> None:
    first, second, student = tiny(24, seed=2), tiny(16, seed=3), near(None)
    run = trainer(tmp_path, student, "forward_kd", rows(8), teacher=[(0.7, first), (0.3, second)], **EVALUATED)
    check(run.evaluate(), expected(student, (0.7, first), (0.3, second)))
    data = [{**row, "teacher_id": number % 2} for number, row in enumerate(HELD_OUT)]
    options = {**EVALUATED, "eval_data": data}
    run = trainer(tmp_path, student, "forward_kd", data, teacher=[first, second], **options)
    result, parts = run.evaluate(), []
    for number, each in enumerate((first, second)):
        own = [row for row in data if row["teacher_id"] == number]
        z, t = (torch.cat([x for x, _ in double_logits(model, own)]) for model in (student, each))
        p = t.softmax(-1)
        parts.append((torch.xlogy(p, p) - p * z.log_softmax(-1)).sum(-1))
    assert result["eval_kl"] == pytest.approx(float(torch.cat(parts).mean()), rel=1e-5)


def test_of_lists_and_states(tmp_path: Path) -> None:
    """A list says its first token and no whole distribution; hidden states are the teacher."""
    teacher, student = tiny(24, seed=2), near(None)
    wanted = expected(student, (1.0, teacher))

    def evaluated(given: Any, columns: Any) -> dict[str, float]:
        data = []
        for row in HELD_OUT:
            targets = torch.tensor(row["labels"])[1:] != -100
            with torch.no_grad():
                out = teacher(input_ids=torch.tensor([row["input_ids"]]), output_hidden_states=True)
            data.append({**row, **columns(out.logits[0, :-1][targets], out.hidden_states[-1][0, :-1][targets])})
        return trainer(
            tmp_path, student, "forward_kd", data, teacher=given, **{**EVALUATED, "eval_data": data}
        ).evaluate()

    def lists(logits: torch.Tensor, _: torch.Tensor) -> dict[str, torch.Tensor]:
        values, ids = logits.log_softmax(-1).topk(4)
        order = torch.tensor([2, 0, 3, 1])  # any
        return {"teacher_log_probs": values[:, order], "teacher_indices": ids[:, order]}

    result = evaluated(SimpleNamespace(tail="bucket"), lists)
    assert "eval_kl" not in result
    check(result, {name: value for name, value in wanted.items() if name != "eval_kl"})
    drawn = evaluated(SimpleNamespace(tail="renormalize", keep="sampled"), lists)
    assert not {"eval_kl", "eval_top_1"} & drawn.keys() and drawn["eval_ce"] == pytest.approx(wanted["eval_ce"])

    class States:
        columns, vocab_size = ("teacher_hidden",), VOCAB

        def head(self, batch: Any, targets: Any, device: Any) -> fk.LMHead:
            return fk.LMHead(batch["teacher_hidden"].to(device), teacher.lm_head.weight.detach())

    check(evaluated(States(), lambda _, hidden: {"teacher_hidden": hidden}), wanted)


def test_of_the_mixin(tmp_path: Path) -> None:
    class MyTrainer(KDLossMixin, transformers.Trainer):
        pass

    teacher = tiny(24, seed=2)
    student, args = near(teacher), trainer(tmp_path, tiny(16, seed=1), fk.SFT(), rows(4)).args
    given = {"teacher": teacher, "objective": "sft", "eval_dataset": HELD_OUT, "data_collator": Collator(0)}
    assert "eval_ce" not in MyTrainer(student, args, **given).evaluate()
    check(MyTrainer(student, args, **given, eval_metrics=True).evaluate(), expected(student, (1.0, teacher)))


@pytest.mark.parametrize("objective", ["sft", "forward_kd", "lists"])
def test_no_more_memory_than_a_chunk(tmp_path: Path, objective: str) -> None:
    V, length, count = 20_001, 250, 8
    data = [{"input_ids": [i % 50 + 3 for i in range(length)], "labels": [5] * length}] * count
    student, teacher = tiny(16, seed=1, vocab=V), tiny(16, seed=2, vocab=V)
    if objective == "lists":
        objective, teacher = "forward_kd", SimpleNamespace(tail="bucket")
        lists = {
            "teacher_log_probs": torch.full((length - 1, 4), -2.0),
            "teacher_indices": torch.arange(4).repeat(length - 1, 1),
        }
        data = [{**row, **lists} for row in data]
    options = {"eval_data": data, "per_device_eval_batch_size": count}
    run = trainer(tmp_path, student, objective, data[:1], teacher=teacher, **options)
    run.evaluate()
    live = peak = 0
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        assert 0 <= run.evaluate()["eval_top_1"] <= 1
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert 2**20 < peak < 4 * V * count * (length - 1) / 2, "half of one side's logits"
