"""Trainings from a served teacher are those from the teacher itself: KDTrainer, the mixin, TRL; also past a kill."""

from __future__ import annotations

import copy
import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fused_kd as fk
from fused_kd.integrations.mixin import KDLossMixin
from fused_kd.reference import reference_kd_loss
from fused_kd.serving import ServedTeacher, TeacherServer
from fused_kd.training.collate import Collator, PackingCollator
from fused_kd.training.contexts import with_context
from fused_kd.training.trainer import KDTrainer
from tests.training.tiny import rows, tiny

from .serving import Process, saved, serve, teacher, tokenizer

LEARNING_RATE, STEPS = 0.05, 4


class MixedIn(KDLossMixin, transformers.Trainer):
    """A Trainer with the mixin alone."""


@pytest.fixture(scope="module")
def server():
    with serve() as made:
        yield made


def arguments(folder: Path, **options: Any) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(
        **{
            "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2, "learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant",
            "optim": "sgd", "max_grad_norm": 0.0, "logging_steps": 1, "save_strategy": "no", "report_to": [],
            "disable_tqdm": True, "use_cpu": True, "seed": 3, **options,
        }
    )  # fmt: skip


def run(cls: Any, folder: Path, given: Any, *, collate: Any = None, resume: bool = False, **options: Any) -> Any:
    objective = options.pop("objective", None) or fk.SelfEvolution()
    context = options.pop("context", None)
    data, evaluated = options.pop("data", None) or rows(4 * STEPS), options.pop("evaluated", None) or rows(5, 9)
    if context is not None:
        data, evaluated = (list(with_context(each, None, context)) for each in (data, evaluated))
    made = cls(
        model=tiny(12, 7), args=arguments(folder, **options), teacher=given, objective=objective,
        train_dataset=data, eval_dataset=evaluated, data_collator=collate or Collator(0),
        processing_class=tokenizer(),
    )  # fmt: skip
    made.remove_callback(transformers.trainer_callback.PrinterCallback)
    made.train(resume_from_checkpoint=resume or None)
    return made


def losses(made: Any) -> list[float]:
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


@torch.no_grad()
def moved_apart(one: Any, other: Any) -> float:
    """The difference of two runs' weights, relative to how far they have moved."""
    start = dict(tiny(12, 7).named_parameters())
    pairs = [
        (value, dict(other.model.named_parameters())[name], start[name]) for name, value in one.model.named_parameters()
    ]
    difference = sum(float((a - b).double().norm() ** 2) for a, b, _ in pairs)
    moved = sum(float((b - s).double().norm() ** 2) for _, b, s in pairs)
    assert moved > 0
    return (difference / moved) ** 0.5


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("cls", [KDTrainer, MixedIn])
def test_a_run_is_that_of_the_local_teacher(cls, packed, server, tmp_path):
    collate = PackingCollator() if packed else Collator(0)
    before = server.batcher.requests
    served = run(cls, tmp_path, ServedTeacher(server.url), collate=collate)
    local = run(cls, tmp_path, copy.deepcopy(server.model), collate=collate)
    assert moved_apart(served, local) < 1e-5 and losses(served) == pytest.approx(losses(local), rel=1e-5)
    assert served.evaluate()["eval_loss"] == pytest.approx(local.evaluate()["eval_loss"], rel=1e-5)
    time.sleep(0.1)
    assert server.batcher.requests >= before + 2 * STEPS


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_another_prompt(packed, server, tmp_path, monkeypatch):
    """What the teacher reads before the response goes to the server, ahead of the step too."""
    collate, client = PackingCollator() if packed else Collator(0), ServedTeacher(server.url)
    asked: list[str] = []
    start = client._answers.start
    monkeypatch.setattr(client._answers, "start", lambda key, ask: (asked.append(key), start(key, ask)))
    monkeypatch.setattr(client._answers, "take", spied := Taken(client._answers.take))
    served = run(KDTrainer, tmp_path, client, collate=collate, context=[9, 8, 7])
    local = run(KDTrainer, tmp_path, copy.deepcopy(server.model), collate=collate, context=[9, 8, 7])
    without = run(KDTrainer, tmp_path, copy.deepcopy(server.model), collate=collate)
    assert moved_apart(served, local) < 1e-5 and moved_apart(without, local) > 1e-2
    assert len(spied.keys) == 2 * STEPS and set(spied.keys) <= set(asked)
    assert served.evaluate()["eval_loss"] == pytest.approx(local.evaluate()["eval_loss"], rel=1e-5)


class Taken:
    """Remembers which answers were taken."""

    def __init__(self, take: Any) -> None:
        self.take, self.keys = take, []

    def __call__(self, key: str, ask: Any) -> Any:
        self.keys.append(key)
        return self.take(key, ask)


def test_a_step_is_that_of_the_dense_oracle(server, tmp_path):
    """SGD in float64 with full logits, a step of 4 rows at a time."""
    student, teaching = tiny(12, 7).double(), copy.deepcopy(server.model).double()
    data = rows(4 * STEPS)
    for step in range(STEPS):
        batch = Collator(0)(data[4 * step : 4 * step + 4])
        read = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            z_t = teaching(**read).logits
        reference_kd_loss(student(**read).logits, z_t, batch["labels"], fk.GeneralizedJSD(), shift=True).loss.backward()
        with torch.no_grad():
            for value in student.parameters():
                value -= LEARNING_RATE * value.grad
                value.grad = None

    class InOrder(KDTrainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    made = run(InOrder, tmp_path, ServedTeacher(server.url), objective=fk.GeneralizedJSD())
    oracle = type("Made", (), {"model": student})
    assert moved_apart(made, oracle) < 1e-4


def test_batches_are_asked_for_before_their_step(server, tmp_path, monkeypatch):
    """With gradient accumulation every micro-batch of a step is under way before the first is used."""
    started: list[str] = []
    taken: list[str] = []
    client = ServedTeacher(server.url)
    start, take = client._answers.start, client._answers.take
    monkeypatch.setattr(client._answers, "start", lambda key, ask: (started.append(key), start(key, ask)))
    monkeypatch.setattr(client._answers, "take", lambda key, ask: (taken.append(key), take(key, ask))[1])
    ranked = fk.SelfEvolutionTopK(fraction=0.5)  # a first pass ranks the tokens of the step
    made = run(KDTrainer, tmp_path, client, objective=ranked)
    local = run(KDTrainer, tmp_path, copy.deepcopy(server.model), objective=ranked)
    assert moved_apart(made, local) < 1e-5
    assert len(set(started)) == 2 * STEPS and len(taken) == 4 * STEPS and set(taken) == set(started)


def test_among_several_teachers(server, tmp_path):
    """In a mixture, and each with rows of its own."""
    other = teacher(seed=8)
    with serve(other) as second:
        urls, models = (server.url, second.url), (server.model, other)
        mixed = [(w, ServedTeacher(url)) for w, url in zip((0.3, 0.7), urls, strict=True)]
        local = run(KDTrainer, tmp_path, [(w, copy.deepcopy(m)) for w, m in zip((0.3, 0.7), models, strict=True)])
        assert moved_apart(run(KDTrainer, tmp_path, mixed), local) < 1e-5
        data = [{**row, "teacher_id": number % 2} for number, row in enumerate(rows(4 * STEPS))]
        served = run(KDTrainer, tmp_path, [ServedTeacher(url) for url in urls], data=data, evaluated=data[:5])
        by_row = run(KDTrainer, tmp_path, [copy.deepcopy(model) for model in models], data=data, evaluated=data[:5])
        assert moved_apart(served, by_row) < 1e-5 and moved_apart(by_row, local) > 1e-3


def test_what_workers_collate_is_asked_for_at_the_beginning_of_the_step(server, tmp_path, monkeypatch):
    client = ServedTeacher(server.url)
    started: list[str] = []
    start = client._answers.start
    monkeypatch.setattr(client._answers, "start", lambda key, ask: (started.append(key), start(key, ask)))
    served = run(KDTrainer, tmp_path, client, dataloader_num_workers=1)
    assert len(set(started)) == 2 * STEPS
    assert moved_apart(served, run(KDTrainer, tmp_path, copy.deepcopy(server.model))) < 1e-5


def test_another_tokenizer_or_head_is_refused(server, tmp_path):
    client = ServedTeacher(server.url)
    options = {"objective": fk.SelfEvolution(), "args": arguments(tmp_path), "train_dataset": rows(4)}
    with pytest.raises(ValueError, match="another tokenizer"):
        KDTrainer(tiny(12, 7), client, processing_class=tokenizer("other"), **options)
    with pytest.raises(ValueError, match="vocabularies of 64 and 61"):
        KDTrainer(tiny(12, 7, vocab=64), client, **options)


def test_a_server_killed_in_mid_training_loses_nothing(tmp_path):
    folder = saved(tmp_path / "teacher")
    undisturbed = run(KDTrainer, tmp_path / "run", teacher())
    first = Process(folder, slow=0.3)
    second: list[Process] = []

    def replace() -> None:
        time.sleep(1.0)  # within one of the steps' requests
        first.kill()
        second.append(Process(folder, "--port", first.port))

    thread = threading.Thread(target=replace)
    try:
        client = ServedTeacher(first.url, patience=120)
        thread.start()
        disturbed = run(KDTrainer, tmp_path / "run", client)
        thread.join()
        assert moved_apart(disturbed, undisturbed) < 1e-5
        assert losses(disturbed) == pytest.approx(losses(undisturbed), rel=1e-5)
        code, out, _ = second[0].end()
        assert code == 0 and not out.startswith("ended: 0 requests")
    finally:
        first.kill()
        for each in second:
            each.kill()


def test_a_run_that_had_to_stop_is_resumed(tmp_path):
    """The server stays away for longer than the patience: an error, and the run goes on from its checkpoint."""
    undisturbed = run(KDTrainer, tmp_path / "whole", teacher())
    saving = {"save_strategy": "steps", "save_steps": 1}
    server = serve()
    port = int(server.url.rsplit(":", 1)[1])
    client = ServedTeacher(server.url, patience=0.3)

    class Interrupted(KDTrainer):
        def training_step(self, *given: Any, **options: Any) -> Any:
            if self.state.global_step == 2:
                server.close()
            return super().training_step(*given, **options)

    with pytest.raises(ConnectionError, match="the run can be resumed from its last checkpoint"):
        run(Interrupted, tmp_path / "run", client, **saving)
    kept = os.listdir(tmp_path / "run")
    assert "checkpoint-2" in kept and f"checkpoint-{STEPS}" not in kept
    with serve(port=port):
        resumed = run(KDTrainer, tmp_path / "run", client, resume=True, **saving)
    assert moved_apart(resumed, undisturbed) < 1e-5


@pytest.mark.parametrize("kind", ["gkd", "distillation"])
def test_trl(kind, tmp_path):
    """Also where the student writes the completions."""
    pytest.importorskip("trl")
    from tests.integrations import test_trl as examples

    cls = examples.ours.GKDTrainer if kind == "gkd" else examples.ours.DistillationTrainer
    config = examples.gkd.GKDConfig if kind == "gkd" else examples.trl.DistillationConfig
    options = {"lmbda": 0.5, "max_new_tokens": 5} if kind == "gkd" else {"max_completion_length": 4}
    data = examples.dialogues() if kind == "gkd" else examples.prompts()
    model = examples.pair()[1].eval()

    def trained(given: Any) -> Any:
        student = examples.pair()[0]
        start = {name: value.detach().clone() for name, value in student.named_parameters()}
        made = cls(
            student, given, examples.arguments(config, tmp_path, **options), train_dataset=data,
            processing_class=examples.tokenizer(),
        )  # fmt: skip
        made.remove_callback(transformers.trainer_callback.PrinterCallback)
        random.seed(11)
        torch.manual_seed(11)
        made.train()
        made.start = start
        return made

    with TeacherServer(model, examples.tokenizer()) as server:
        served, local = trained(ServedTeacher(server.url)), trained(copy.deepcopy(model))
        assert losses(served) == pytest.approx(losses(local), rel=1e-5)
        examples.assert_same_weights(dict(served.model.named_parameters()), local)
        time.sleep(0.1)
        assert server.batcher.requests >= 6
