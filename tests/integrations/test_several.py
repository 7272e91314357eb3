"""Several teachers, of any form, under KDTrainer, the mixin and TRL's trainers: against logits in float64."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fused_kd as fk
from fused_kd.integrations.mixin import KDLossMixin
from fused_kd.integrations.own import OwnTeacher
from fused_kd.reference import reference_kd_loss
from fused_kd.training.cache import write_cache
from fused_kd.training.collate import Collator, PackingCollator
from fused_kd.training.teacher_cache import TeacherCache
from fused_kd.training.trainer import KDTrainer
from tests.integrations.test_vocabulary import arguments
from tests.training.caching import Words
from tests.training.tiny import VOCAB, rows, tiny

LEARNING_RATE, STEPS = 0.05, 3


class MixedIn(KDLossMixin, transformers.Trainer):
    """A Trainer with the mixin alone."""


def probabilities(model: Any, batch: Any) -> torch.Tensor:
    """(rows, length, V) float64."""
    read = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return model(**read).logits.double().softmax(-1)


def by_hand(
    student: Any, target: Any, data: Any, objective: fk.Objective
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """SGD in float64 with full logits; ``target(batch)`` are the teachers' log-probabilities. Losses, and weights."""
    student, losses = copy.deepcopy(student).double(), []
    for step in range(STEPS):
        batch = Collator(0)(data[4 * step : 4 * step + 4])
        read = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            log_p = target(batch)
        loss = reference_kd_loss(student(**read).logits, log_p, batch["labels"], objective, shift=True).loss
        student.zero_grad()
        loss.backward()
        with torch.no_grad():
            for value in student.parameters():
                value -= LEARNING_RATE * value.grad
        losses.append(loss.item())
    return losses, dict(student.named_parameters())


def run(cls: Any, folder: Path, student: Any, teacher: Any, data: Any, objective: Any, **given: Any) -> Any:
    args = arguments(folder, max_steps=STEPS, learning_rate=LEARNING_RATE, max_grad_norm=0.0)
    options = {"data_collator": Collator(0), **given}
    made = cls(model=student, args=args, teacher=teacher, objective=objective, train_dataset=data, **options)
    made.remove_callback(transformers.trainer_callback.PrinterCallback)
    made.train()
    return made


def check(made: Any, expected: tuple[list[float], dict[str, torch.Tensor]], start: Any) -> None:
    """Each step's loss, and what the training has changed, relative to its norm."""
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert losses == pytest.approx(expected[0], rel=1e-4)
    for name, value in made.model.named_parameters():
        moved, wanted = value.detach().double() - start[name], expected[1][name].detach() - start[name]
        rounding = 1e-7 * float(start[name].norm())  # a step is small beside its weight
        assert float((moved - wanted).norm()) <= 2e-4 * float(wanted.norm()) + rounding, name
        assert float(wanted.norm()) > 20 * rounding, name


def start_of(student: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().double().clone() for name, value in student.named_parameters()}


@pytest.mark.parametrize("cls", [KDTrainer, MixedIn])
@pytest.mark.parametrize("objective", [fk.SelfEvolution(), fk.ReverseKD(lam=1.0)], ids=lambda x: x.name)
def test_a_mixture_of_models(cls: Any, objective: Any, tmp_path: Path) -> None:
    """Two of other sizes; the second's vocabulary is padded."""
    first, second, student, data = tiny(24, 2), tiny(32, 3, vocab=VOCAB + 3), tiny(16, 1), rows(4 * STEPS)
    start = start_of(student)

    def target(batch: Any) -> torch.Tensor:
        cut = second(batch["input_ids"], batch["attention_mask"]).logits.double()[..., :VOCAB].softmax(-1)
        return (0.3 * probabilities(first, batch) + 0.7 * cut).log()

    expected = by_hand(student, target, data, objective)
    made = run(cls, tmp_path, student, [(0.3, first), (0.7, second)], data, objective, vocab_size=VOCAB)
    check(made, expected, start)
    assert made.teacher is None and not any(value.requires_grad for value in second.parameters())
    assert made.evaluate(data[:4])["eval_loss"] > 0


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("cls", [KDTrainer, MixedIn])
def test_each_row_has_its_teacher(cls: Any, packed: bool, tmp_path: Path) -> None:
    teachers, student, objective = [tiny(24, 2), tiny(32, 3), tiny(16, 4)], tiny(16, 1), fk.GeneralizedJSD()
    data = [{**row, "teacher_id": (0, 2, 2, 0, 1, 1, 1, 1, 2, 1, 0, 0)[i]} for i, row in enumerate(rows(4 * STEPS))]
    start = start_of(student)

    def target(batch: Any) -> torch.Tensor:
        each = torch.stack([probabilities(teacher, batch) for teacher in teachers])
        return each[batch["teacher_id"], torch.arange(len(batch["input_ids"]))].log()

    expected = by_hand(student, target, data, objective)
    calls: list[int] = []
    for number, teacher in enumerate(teachers):
        teacher.model.register_forward_pre_hook(
            lambda _, args, kwargs, number=number: calls.append(number * 100 + len(kwargs["input_ids"])),
            with_kwargs=True,
        )
    collate = PackingCollator() if packed else Collator(0)
    made = run(cls, tmp_path, student, teachers, data, objective, data_collator=collate)
    check(made, expected, start)
    if not packed:  # its own rows alone
        assert calls[-6:] == [2, 202, 104, 2, 101, 201]


def hidden_cache(folder: Path, teacher: Any, data: Any, **options: Any) -> TeacherCache:
    write_cache(folder, teacher, Words(VOCAB), data, template="tiny", progress=False, **options)
    return TeacherCache(folder, name=folder.name)


@pytest.mark.parametrize("cls", [KDTrainer, MixedIn])
def test_a_model_a_cache_of_states_and_one_of_lists(cls: Any, tmp_path: Path) -> None:
    """Any mix of forms: with a bucket among them, the list's entries and one rest."""
    models, student, data, objective = (
        [tiny(24, s) for s in (2, 3, 4)],
        tiny(16, 1),
        rows(4 * STEPS),
        fk.SkewForward(0.2),
    )
    states = hidden_cache(tmp_path / "states", models[1], data, keep="hidden", dtype="fp32")
    lists = hidden_cache(tmp_path / "lists", models[2], data, k=6, dtype="fp32")
    start, weights = start_of(student), (0.5, 0.2, 0.3)
    expected: list[float] = []
    batch = Collator(0)(data[:4])
    valid = batch["labels"][:, 1:] != -100
    with torch.no_grad():
        p = [probabilities(model, batch)[:, :-1][valid] for model in models]
        q = probabilities(copy.deepcopy(student), batch)[:, :-1][valid]
        mixed = sum(w * each for w, each in zip(weights, p, strict=True))
        ids = p[2].topk(6).indices
        t, s = (torch.cat([x.gather(1, ids), 1 - x.gather(1, ids).sum(1, keepdim=True)], 1) for x in (mixed, q))
        m = 0.2 * t + 0.8 * s
        expected = [float((t * (t / m).log()).sum(1).mean())]
    teacher = [(weights[0], models[0]), (weights[1], states), (weights[2], lists)]
    made = run(cls, tmp_path / "run", student, teacher, lists.rows(states.rows(data)), objective)
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(expected[0], rel=1e-4)
    assert all(not torch.equal(value.double(), start[name]) for name, value in made.model.named_parameters())


def test_rows_of_another_cache_are_refused(tmp_path: Path) -> None:
    """They have the same columns; read with the teacher's own head they would be somebody else's."""
    data, student = rows(4 * STEPS), tiny(16, 1)
    own, other = (hidden_cache(tmp_path / f"of{s}", tiny(24, s), data, keep="hidden") for s in (2, 3))
    own, other = TeacherCache(own.folder), TeacherCache(other.folder)  # of one name
    args, given = arguments(tmp_path), {"data_collator": Collator(0)}
    for wrong in (
        {"train_dataset": other.rows(data)},
        {"train_dataset": own.rows(data), "eval_dataset": other.rows(data)},
    ):
        with pytest.raises(ValueError, match="made from something else: teacher_weights"):
            KDTrainer(student, own, "forward_kd", args=args, **wrong, **given)
    joined = torch.utils.data.ConcatDataset([own.rows(data), other.rows(data)])
    with pytest.raises(ValueError, match="made from something else"):
        KDTrainer(student, own, "forward_kd", args=args, train_dataset=joined, **given)
    made = KDTrainer(student, own, "forward_kd", args=args, train_dataset=own.rows(data), **given)
    with pytest.raises(ValueError, match="made from something else"):
        made.evaluate(other.rows(data))
    with pytest.raises(ValueError, match="eval_dataset must have teacher_hidden in its rows, as train_dataset has"):
        KDTrainer(student, own, "forward_kd", args=args, train_dataset=own.rows(data), eval_dataset=data, **given)


def test_drawn_lists_are_for_what_they_are_right_for(tmp_path: Path) -> None:
    data = rows(4 * STEPS)
    drawn = hidden_cache(tmp_path / "drawn", tiny(24, 2), data, keep="sampled", draws=6)
    options = {"args": arguments(tmp_path), "train_dataset": drawn.rows(data), "data_collator": Collator(0)}
    for objective, temperature in (("self_evolution", 1.0), ("forward_kd", 2.0)):
        with pytest.warns(
            UserWarning, match="a drawn list is right on average for ForwardKD and NoEvo at temperature 1"
        ):
            KDTrainer(tiny(16, 1), drawn, objective, temperature=temperature, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="a drawn list")
        KDTrainer(tiny(16, 1), drawn, "forward_kd", **options)


def test_what_does_not_go_together(tmp_path: Path) -> None:
    data, student = rows(4 * STEPS), tiny(16, 1)
    lists = hidden_cache(tmp_path / "lists", tiny(24, 2), data, k=6)
    listed = TeacherCache(tmp_path / "lists", tail="listed")
    for teacher, given, error, message in (
        ([(0.5, tiny(24, 2)), (0.6, tiny(24, 3))], {}, ValueError, "weights must add up to 1"),
        ([(0.5, tiny(24, 2)), tiny(24, 3)], {}, TypeError, "got a list with a LlamaForCausalLM in place of a pair"),
        ({"math": tiny(24, 2)}, {}, TypeError, r"got dict: several are \[\(weight, teacher\), ...\]"),
        ([(0.5, tiny(24, 2), 1)], {}, TypeError, "got a list with a tuple of 3 in place of a pair"),
        ((0.5, tiny(24, 2)), {}, TypeError, "got a list with a tuple of 2 in place of a pair"),
        ([(tiny(24, 2), 0.5), (tiny(24, 3), 0.5)], {}, TypeError, "the weight comes first"),
        ([("0.5", tiny(24, 2)), (0.5, tiny(24, 3))], {}, TypeError, r"weights\[0\] must be a number"),
        (zip((0.5, 0.5), (tiny(24, 2), tiny(24, 3)), strict=True), {}, TypeError, "got zip: several are"),
        (torch.nn.ModuleList([tiny(24, 2)]), {}, TypeError, "got ModuleList: several are"),
        (OwnTeacher, {}, TypeError, "got the class OwnTeacher: give an object of it"),
        ([tiny(24, 2), lists], {}, ValueError, "tail must be 'uniform' or 'renormalize' of lists whose rows stand"),
        ([(0.5, lists), (0.5, lists)], {}, ValueError, "teachers must read columns of their own"),
        ([], {}, TypeError, "got a list of none"),
        (fk.Mixture([torch.zeros(1, 5)]), {}, TypeError, r"give a trainer the pairs, \[\(weight, teacher\), ...\]"),
        ([(0.5, tiny(24, 2)), (0.5, "./model")], {}, ValueError, r"got '\./model': there is no such folder"),
        ([(0.5, tiny(24, 2)), (0.5, listed)], {}, ValueError, "tail must be 'renormalize', 'uniform' or 'bucket'"),
        ([(0.5, tiny(24, 2)), (0.5, lists)], {"lists": fk.Lists(3)}, ValueError, "lists must be None with a cache"),
        ([(0.5, tiny(24, 2)), (0.5, tiny(24, 3, vocab=70))], {}, ValueError, "vocabularies of 61 and 61 and 70"),
        ([(0.5, tiny(24, 2)), (0.5, student)], {}, ValueError, "teacher must be another model than the student"),
        ([(1.0, tiny(24, 2)), (0.0, tiny(24, 3))], {"vocab_map": torch.arange(VOCAB)}, ValueError, "with several"),
    ):
        with pytest.raises(error, match=message):
            KDTrainer(student, teacher, "forward_kd", args=arguments(tmp_path), train_dataset=data, **given)
    made = KDTrainer(
        student, [tiny(24, 2), tiny(24, 3)], "forward_kd", args=arguments(tmp_path), train_dataset=data,
        data_collator=Collator(0),
    )  # fmt: skip
    with pytest.raises(ValueError, match="batch must have teacher_id for 2 teachers without weights"):
        made.train()
    made.train_dataset = [{**row, "teacher_id": 2} for row in data]
    with pytest.raises(ValueError, match=r"teacher_id must be in \[0, 2\), got 2"):
        made.train()


@pytest.mark.parametrize("kind", ["gkd", "distillation"])
def test_trl(kind: str, tmp_path: Path) -> None:
    """A mixture of a model and of what a server would answer: a batch's loss against both models' logits."""
    pytest.importorskip("trl")
    import tests.integrations.test_trl as trl_tests

    class Served:
        """Answers as a server does."""

        columns, vocab_size = (), trl_tests.VOCAB

        def head(self, batch: Any, targets: torch.Tensor, device: torch.device) -> fk.LMHead:
            read = {name: batch[name] for name in ("input_ids", "attention_mask")}
            with torch.no_grad():
                hidden = served.model(**read).last_hidden_state
            assert targets.shape == hidden.shape[:2] and targets.device.type == "cpu"
            return fk.LMHead(hidden, served.lm_head.weight.detach())

    student, first, served = (tiny(size, seed, vocab=trl_tests.VOCAB) for size, seed in ((16, 1), (24, 2), (32, 3)))
    teacher, exact = [(0.25, first), (0.75, Served())], copy.deepcopy(student).double()
    cls = trl_tests.ours.GKDTrainer if kind == "gkd" else trl_tests.ours.DistillationTrainer
    config = trl_tests.gkd.GKDConfig if kind == "gkd" else trl_tests.trl.DistillationConfig
    options = {"lmbda": 0.0} if kind == "gkd" else {"max_completion_length": 4}
    data = trl_tests.dialogues() if kind == "gkd" else trl_tests.prompts()
    given = {"processing_class": trl_tests.tokenizer(), "objective": "forward_kd:lam=1"}
    made = cls(student, teacher, trl_tests.arguments(config, tmp_path, **options), train_dataset=data, **given)
    ids = torch.randint(5, trl_tests.VOCAB, (3, 9))
    labels = torch.where(torch.rand(3, 9) < 0.6, ids, -100)
    read = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    loss, _ = made.fused_loss(made.model, read, labels, None, 1)
    loss.backward()
    log_p = (0.25 * probabilities(first, read) + 0.75 * probabilities(served, read)).log()
    wanted = reference_kd_loss(exact(**read).logits, log_p.detach(), labels, fk.ForwardKD(lam=1.0), shift=True).loss
    wanted.backward()
    assert float(loss) == pytest.approx(float(wanted), rel=1e-5)
    for value, other in zip(student.parameters(), exact.parameters(), strict=True):
        assert float((value.grad - other.grad).norm()) <= 1e-4 * float(other.grad.norm())
    made.train()
    for wrong, message in (
        ([first, served], "teacher_model must be \\[\\(weight, teacher\\), ...\\]: no row of TRL's says whose it is"),
        (hidden_cache(tmp_path / "cache", tiny(24, 2), rows(4), k=3), "teacher_model must be no cache"),
    ):
        with pytest.raises(ValueError, match=message):
            cls(student, wrong, trl_tests.arguments(config, tmp_path, **options), **given)
