"""Teachers of another vocabulary, and chosen lists, under KDTrainer, the mixin and TRL's trainers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fused_kd as fk
from fused_kd.inputs import TAILS
from fused_kd.integrations.mixin import KDLossMixin
from fused_kd.integrations.vocabulary import TeacherMap
from fused_kd.reference import reference_kd_loss
from fused_kd.training.collate import Collator
from fused_kd.training.trainer import KDTrainer
from tests.training.tiny import VOCAB, rows, tiny

V_T = 90


class MixedIn(KDLossMixin, transformers.Trainer):
    """A Trainer with the mixin alone."""


def columns(unmapped: int = 0) -> torch.Tensor:
    """Of a student with VOCAB tokens of its own; those that its teacher lacks are at the end."""
    found = torch.randperm(V_T, generator=torch.Generator().manual_seed(3))[:VOCAB]
    found[VOCAB - unmapped :] = -1
    return found


def draft(size: int = 20) -> transformers.PreTrainedModel:
    """Reads its teacher's V_T tokens, and has columns for a few."""
    model = tiny(16, 1, vocab=V_T)
    model.lm_head = torch.nn.Linear(16, size, bias=False)
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    return model


def arguments(folder: Path, **options: Any) -> transformers.TrainingArguments:
    given = {
        "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "max_steps": 2, "learning_rate": 0.1,
        "optim": "sgd", "lr_scheduler_type": "constant", "logging_steps": 1, "report_to": [], "disable_tqdm": True,
        "use_cpu": True, "save_strategy": "no", "train_sampling_strategy": "sequential", **options,
    }  # fmt: skip
    return transformers.TrainingArguments(output_dir=str(folder), **given)


def trainer(cls: Any, folder: Path, student: Any, objective: Any, data: Any = None, **given: Any) -> Any:
    options = given.pop("args", {})
    args = arguments(folder, **options)
    made = cls(
        model=student, args=args, teacher=tiny(24, 2, vocab=V_T), objective=objective, data_collator=Collator(0),
        train_dataset=data, **given,
    )  # fmt: skip
    made.remove_callback(transformers.trainer_callback.PrinterCallback)
    return made


@torch.no_grad()
def expected(
    student: Any, teacher: Any, batch: Any, ids_t: torch.Tensor, found: Any, tail: str, objective: Any
) -> float:
    """From both models' logits in float64."""
    z = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    z_t = teacher(input_ids=ids_t, attention_mask=batch["attention_mask"]).logits
    side = fk.LMHead(z_t, torch.eye(V_T), columns=found, tail=tail)
    return reference_kd_loss(z, side, batch["labels"], objective, shift=True).loss.item()


@pytest.mark.parametrize("cls", [KDTrainer, MixedIn])
@pytest.mark.parametrize("tail", TAILS)
def test_a_student_with_ids_of_its_own(cls: Any, tail: str, tmp_path: Path) -> None:
    """The teacher reads the same tokens under its own ids; two steps of training lower the loss."""
    student, data, found = tiny(16, 1), rows(8), columns(unmapped=1)
    data = [{key: [min(x, VOCAB - 2) for x in ids] for key, ids in row.items()} for row in data]
    objective = fk.SkewForward(0.2)
    run = trainer(cls, tmp_path, student, objective, data, vocab_map=found, tail=tail)
    batch = Collator(0)(data)
    want = [
        expected(student, run.teacher, part, found[part["input_ids"]].clamp(min=0), found, tail, objective)
        for part in [batch]
    ]
    assert run.evaluate(data)["eval_loss"] == pytest.approx(want[0], rel=1e-5)
    run.train()
    assert run.evaluate(data)["eval_loss"] < want[0]


@pytest.mark.parametrize("cls", [KDTrainer, MixedIn])
@pytest.mark.parametrize("objective", [fk.Acceptance(), fk.NoEvo()], ids=lambda x: x.name)
def test_a_draft_reads_its_teachers_ids(cls: Any, objective: Any, tmp_path: Path) -> None:
    """Labels without a column are left out of an objective that reads them, and count for others."""
    student, reads = draft(), objective.spec.reads_label
    found = torch.arange(3, 23)
    data = [{key: [x if x < 0 else x % 40 for x in ids] for key, ids in row.items()} for row in rows(8)]
    tail = "renormalize" if reads else "bucket"
    run = trainer(cls, tmp_path, student, objective, data, vocab_map=found, tail=tail)
    batch = Collator(0)(data)
    own = torch.full_like(batch["labels"], -100)
    for j, column in enumerate(found.tolist()):
        own[batch["labels"] == column] = j
    if not reads:
        own[(own == -100) & (batch["labels"] != -100)] = 0
    assert 0 < int((own != -100).sum()) < int((batch["labels"] != -100).sum()) or not reads
    want = expected(student, run.teacher, {**batch, "labels": own}, batch["input_ids"], found, tail, objective)
    assert run.evaluate(data)["eval_loss"] == pytest.approx(want, rel=1e-5)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(map(math.isfinite, losses))


def test_a_step_of_several_batches_is_one_mean(tmp_path: Path) -> None:
    """The denominator counts the tokens that have a column."""
    moved = []
    data = [{key: [x if x < 0 else x % 40 for x in ids] for key, ids in row.items()} for row in rows(8)]
    for size, steps in ((8, 1), (2, 4)):
        student = draft()
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 1}
        run = trainer(KDTrainer, tmp_path, student, fk.NoEvo(), data, vocab_map=torch.arange(3, 23), args=options)
        start = student.lm_head.weight.detach().clone()
        run.train()
        moved.append(student.lm_head.weight.detach() - start)
    assert float((moved[0] - moved[1]).norm()) < 1e-4 * float(moved[0].norm())  # another order of sums


@pytest.mark.parametrize("lists", [fk.Lists(5), fk.Lists(7, "student", "listed", 0.9)], ids=["teacher", "student"])
@pytest.mark.parametrize("cls", [KDTrainer, MixedIn])
def test_lists(cls: Any, lists: fk.Lists, tmp_path: Path) -> None:
    data, objective = rows(8), fk.GeneralizedJSD(0.3)
    student = tiny(16, 1, vocab=V_T)
    given: dict[str, Any] = {"objective": objective, "lists": lists}
    if cls is MixedIn:
        given = {"objective": None, "criterion": fk.KDLoss(objective, lists=lists)}
    run = trainer(cls, tmp_path, student, given.pop("objective"), data, **given)
    batch = Collator(0)(data)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        z, z_t = (model(**inputs).logits.double() for model in (student, run.teacher))
    by = z if lists.chosen_by == "student" else z_t
    values, ids = by.log_softmax(-1).topk(lists.k)
    kept = values.exp().cumsum(-1) - values.exp() < (lists.top_p or 2.0)
    log_probs = z_t.log_softmax(-1).gather(-1, ids).masked_fill(~kept, -math.inf)
    listed = fk.TopK(log_probs.float(), ids, lists.tail)
    want = reference_kd_loss(z, listed, batch["labels"], objective, shift=True).loss.item()
    assert run.evaluate(data)["eval_loss"] == pytest.approx(want, rel=1e-5)
    run.train()


@pytest.mark.parametrize("given", ["vocab_map", "lists"])
def test_trl(given: str, tmp_path: Path) -> None:
    """A step of GKD on data and on the student's own samples, none of them a token that the teacher lacks."""
    pytest.importorskip("trl")
    from trl.experimental import gkd

    from fused_kd.integrations import trl as ours
    from tests.integrations.test_trl import VOCAB as WORDS
    from tests.integrations.test_trl import arguments as of_trl
    from tests.integrations.test_trl import dialogues, losses, train

    student, teacher = tiny(16, 1, vocab=WORDS + 2), tiny(24, 2, vocab=WORDS)
    extra: dict[str, Any] = {"vocab_map": torch.cat([torch.arange(WORDS), torch.tensor([-1, -1])]), "tail": "listed"}
    if given == "lists":
        student, extra = tiny(16, 1, vocab=WORDS), {"lists": fk.Lists(8, "student")}
    for model in (student, teacher):
        model.generation_config.eos_token_id = 2
    args = of_trl(gkd.GKDConfig, tmp_path, lmbda=0.5, max_new_tokens=8, max_length=24)
    run = train(ours.GKDTrainer, args, dialogues(), models=(student, teacher), **extra)
    assert len(losses(run)) == 3 and all(math.isfinite(x) and x > 0 for x in losses(run))
    assert {name for name, _ in run.written} == {"student"}
    assert all(int(tokens.max()) < WORDS for _, tokens in run.written)
    if given == "lists":
        assert run.loss_options["lists"] == fk.Lists(8, "student")


def test_a_pad_token_that_the_teacher_lacks(tmp_path: Path) -> None:
    """Nobody reads it, so the teacher gets another id in its place."""
    student, found = tiny(16, 1, vocab=V_T + 1), torch.cat([torch.arange(V_T), torch.tensor([-1])])
    data = rows(6)
    run = trainer(KDTrainer, tmp_path, student, fk.NoEvo(), data, vocab_map=found)
    run.data_collator = Collator(V_T)
    batch = Collator(V_T)(data)
    assert int(batch["input_ids"].max()) == V_T
    want = expected(
        student, run.teacher, batch, batch["input_ids"].clamp(max=V_T - 1), found, "renormalize", fk.NoEvo()
    )
    assert run.evaluate(data)["eval_loss"] == pytest.approx(want, rel=1e-5)


def test_an_infinite_difficulty_is_not_logged(tmp_path: Path) -> None:
    """A draft lacks what its teacher wants, which the bucket sees."""
    data = [{key: [x if x < 0 else x % 40 for x in ids] for key, ids in row.items()} for row in rows(8)]
    run = trainer(KDTrainer, tmp_path, draft(), fk.Acceptance(), data, vocab_map=torch.arange(3, 23), tail="bucket")
    run.train()
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert logged and not any({"difficulty", "hard_fraction"} & entry.keys() for entry in logged)


def test_trl_refuses_tokens_that_the_teacher_lacks(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from trl.experimental import gkd

    from fused_kd.integrations import trl as ours
    from tests.integrations.test_trl import VOCAB as WORDS
    from tests.integrations.test_trl import arguments as of_trl
    from tests.integrations.test_trl import dialogues, train

    student, teacher = tiny(16, 1, vocab=WORDS), tiny(24, 2, vocab=WORDS)
    found = torch.arange(WORDS)
    found[7] = -1
    args = of_trl(gkd.GKDConfig, tmp_path, lmbda=0.0, max_length=24)
    with pytest.raises(ValueError, match="batch has token 7 in row"):
        train(ours.GKDTrainer, args, dialogues(), models=(student, teacher), vocab_map=found)
    with pytest.raises(ValueError, match="tail must be None without vocab_map, got 'bucket'"):
        train(ours.GKDTrainer, args, dialogues(), models=(student, teacher), tail="bucket")


BAD = [
    (torch.arange(60), {}, "vocab_map must be of the student's 61 columns and of at most the teacher's 90, got 60"),
    (torch.arange(61) + 40, {}, "columns must be in [0, 90) or -1, got 90 at 50"),
    (torch.zeros(61, dtype=torch.int64), {}, "columns must hold each teacher column once, got 0 at 0 and at 1"),
    (torch.arange(61) + 0.7, {}, "columns must be integers, int64 or int32, got torch.float32"),
    ("identity", {}, "vocab_map must be a VocabMap or a tensor of columns, got 'identity'"),
    (fk.VocabMap.of_columns(range(61), 91), {}, "of at most the teacher's 90, got 61 and 91"),
    (columns(), {"tail": "bukket"}, "tail must be one of"),
    (None, {"tail": "bucket"}, "tail must be None without vocab_map, got 'bucket'"),
    (columns(), {"tail": "bucket"}, "tail must be 'renormalize' or 'listed' for an objective with KL(p||q)"),
    (columns(), {"lists": fk.Lists(3)}, "lists must be None with columns"),
    (columns(), {"statistics": ("kl",)}, "statistics must be empty with columns"),
]


@pytest.mark.parametrize("found, given, message", BAD, ids=[message for *_, message in BAD])
def test_bad_maps_are_refused_before_the_training(found: Any, given: Any, message: str, tmp_path: Path) -> None:
    student = tiny(16, 1, vocab=V_T if found is None else VOCAB)
    with pytest.raises((TypeError, ValueError)) as error:
        trainer(KDTrainer, tmp_path, student, fk.NoEvo(), rows(4), vocab_map=found, **given)
    assert message in str(error.value)


def test_what_takes_no_map(tmp_path: Path) -> None:
    unknown = columns(unmapped=2)
    with pytest.raises(ValueError, match=r"batch has token \d+ in row 0, which vocab_map says the teacher lacks"):
        data = [{"input_ids": [3, VOCAB - 1, 4], "labels": [3, VOCAB - 1, 4]}]
        trainer(KDTrainer, tmp_path, tiny(16, 1), fk.NoEvo(), data, vocab_map=unknown).train()
    with pytest.raises(ValueError, match=r"vocab_map must be None for SFT\(\), which has no teacher"):
        KDTrainer(tiny(16, 1), None, fk.SFT(), args=arguments(tmp_path), vocab_map=unknown)
    with pytest.raises(ValueError, match=r"statistics must be empty with lists"):
        trainer(KDTrainer, tmp_path, tiny(16, 1, vocab=V_T), fk.NoEvo(), lists=fk.Lists(3), statistics=("kl",))
    with pytest.raises(ValueError, match="which is infinite where the teacher is 0"):
        renormalised = fk.Lists(3, tail="renormalize")
        trainer(KDTrainer, tmp_path, tiny(16, 1, vocab=V_T), fk.ReverseKD(), lists=renormalised)


def test_the_same_columns_each_time() -> None:
    """A loss looks at them once."""
    models = {"student": tiny(16, 1), "teacher": tiny(24, 2, vocab=V_T)}
    made = TeacherMap(columns(), "renormalize", fk.NoEvo(), {}, **models)
    head = fk.LMHead(torch.randn(2, 24), torch.randn(V_T, 24))
    assert made.head(head).columns is made.head(head).columns
    assert made.head(head).tail == "renormalize"
