"""The student as its own teacher: against full logits in float64, and against a second model that follows."""

from __future__ import annotations

import copy
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from fused_kd.integrations.own import AdaptersOff, AsItIs, MovingAverage, OwnTeacher  # noqa: E402
from fused_kd.integrations.own_checkpoints import AVERAGE, load_average, save_average  # noqa: E402
from fused_kd.integrations.transformers import lm_head_of  # noqa: E402
from fused_kd.reference import reference_kd_loss  # noqa: E402
from fused_kd.training.checkpoints import last_checkpoint  # noqa: E402
from fused_kd.training.contexts import with_context  # noqa: E402
from tests.integrations.test_pair import HALF, OBJECTIVE, TRAINERS, adapted, finished  # noqa: E402
from tests.training.test_checkpoints import cut  # noqa: E402
from tests.training.test_trainer import SGD, assert_same_weights, logged, trainer, weights  # noqa: E402
from tests.training.tiny import rows, tiny  # noqa: E402

IDS = torch.tensor([[5, 6, 7, 8, 9]])
lora = functools.partial(adapted, lora_dropout=0.0)


def bfloat16(model: Any) -> Any:
    return model.bfloat16()


def plain(model: Any) -> Any:
    return model


def tied(model: Any) -> Any:
    return tiny(16, 1, tie_word_embeddings=True)


@pytest.mark.parametrize("decay", [0.5, 0.999, 1.0])
@pytest.mark.parametrize("make", [plain, tied, bfloat16, lora], ids=lambda make: getattr(make, "__name__", "lora"))
def test_the_average_is_the_recurrence(make: Callable[[Any], Any], decay: float) -> None:
    """Also of a student in bf16, whose own dtype would keep it where it is; only what is trained has one."""
    student = make(tiny(16, 1))
    trained = {name: value for name, value in student.named_parameters() if value.requires_grad}
    own = OwnTeacher(decay=decay).bound(student)
    own.follow()
    expected = {name: value.detach().double() for name, value in trained.items()}
    torch.manual_seed(5)
    for _ in range(6):
        for name, value in trained.items():
            value.data += (torch.randn_like(value) * 0.05).to(value.dtype)
            expected[name] = decay * expected[name] + (1 - decay) * value.detach().double()
        own.update()
    found = own.averages()
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == torch.float32
        assert (value.double() - expected[name]).norm() <= 1e-6 * expected[name].norm(), name
        assert (value.double() - trained[name].double()).norm() > 1e-2 * expected[name].norm(), name


def test_no_second_copy() -> None:
    """Of a LoRA student the adapters; while it teaches, its tensors are in the place of the student's."""
    student = lora(tiny(16, 1))
    own = MovingAverage(student, 0.9)
    own.follow()
    adapters = sum(value.numel() * 4 for name, value in student.named_parameters() if "lora_" in name)
    assert sum(value.numel() * value.element_size() for value in own.averages().values()) == adapters
    assert 0 < adapters < 0.1 * sum(value.numel() * 4 for value in student.parameters())
    assert list(own.parameters()) == [] and list(own.children()) == []
    places = {name: value.data_ptr() for name, value in student.named_parameters()}
    with own.active():
        for name, value in student.named_parameters():
            assert value.data_ptr() == (own.averages()[name].data_ptr() if "lora_" in name else places[name]), name
    assert {name: value.data_ptr() for name, value in student.named_parameters()} == places


@pytest.mark.parametrize("make", [plain, tied, bfloat16, lora], ids=lambda make: getattr(make, "__name__", "lora"))
def test_the_teacher_is_the_average(make: Callable[[Any], Any]) -> None:
    """Its logits, and its head after the student is back, are those of a copy with the averages in it."""
    student = make(tiny(16, 1, attention_dropout=0.3)).train()
    own = MovingAverage(student, 0.9)
    own.follow()
    copied = copy.deepcopy(student).eval()
    for value in student.parameters():
        if value.requires_grad:
            value.data += 0.1 * torch.randn_like(value)
    start = weights(student)
    expected = copied(IDS).logits
    assert torch.equal(own(IDS).logits, expected)
    with torch.no_grad(), own.active():
        hidden = student.get_decoder()(IDS).last_hidden_state if make is not lora else student.model.model(IDS)[0]
    head = own.head(hidden)
    assert not head.weight.requires_grad
    assert torch.equal(head.hidden @ head.weight.T, expected)
    for name, value in student.named_parameters():
        assert torch.equal(value, start[name]), name
    assert student.training and all(module.training for module in student.modules())


@pytest.mark.parametrize("own", [OwnTeacher(), OwnTeacher(decay=0.9), OwnTeacher(adapters=False)], ids=str)
def test_an_error_leaves_the_student_as_it_was(own: OwnTeacher, monkeypatch: pytest.MonkeyPatch) -> None:
    student = lora(tiny(16, 1)).train()
    teacher = own.bound(student)
    if isinstance(teacher, MovingAverage):
        teacher.follow()
        for value in student.parameters():
            if value.requires_grad:
                value.data += 1
    start, flags = weights(student), [value.requires_grad for value in student.parameters()]
    expected = student(IDS).logits

    def broken(*args: object, **options: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(student.get_base_model().model, "forward", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        teacher(IDS)
    monkeypatch.undo()
    assert student.training and [value.requires_grad for value in student.parameters()] == flags
    assert all(torch.equal(value, start[name]) for name, value in student.named_parameters())
    assert torch.equal(student(IDS).logits, expected)


# The whole training, against full logits in float64.


def context_of(row: Any) -> list[int]:
    """Three to five tokens that depend on the row."""
    return [3 + (7 * token) % 50 for token in row["input_ids"][:5]][: 3 + len(row["input_ids"]) % 3]


def logits_of(model: Any, row: dict[str, Any], prefix: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    """Of one row without padding: the logits that predict its targets, and these."""
    labels = torch.tensor(row[prefix + "labels"])[1:]
    logits = model(torch.tensor([row[prefix + "input_ids"]])).logits[0, :-1]
    return logits[labels != -100], labels[labels != -100]


def oracle(
    student: Any, own: OwnTeacher, batches: list[list[list[dict]]], prefix: str
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """SGD as users would write it; ``batches``: of each step its micro-batches. Losses, and the weights at the end."""
    student = student.double()
    average = {name: value.detach().clone() for name, value in student.named_parameters() if value.requires_grad}
    losses = []
    for step in batches:
        data = [row for batch in step for row in batch]
        teacher = copy.deepcopy(student).eval()
        if not own.adapters:
            teacher = teacher.unload()
        if own.decay is not None:
            teacher.load_state_dict(average, strict=False)
        found, total = [logits_of(student, row) for row in data], 0.0
        with torch.no_grad():
            theirs = [logits_of(teacher, row, prefix)[0] for row in data]
        z, z_t, labels = torch.cat([z for z, _ in found]), torch.cat(theirs), torch.cat([y for _, y in found])
        total = reference_kd_loss(z, z_t, labels, OBJECTIVE).loss
        student.zero_grad()
        total.backward()
        losses.append(total.item())
        with torch.no_grad():
            for name, value in student.named_parameters():
                if value.grad is not None:
                    value -= SGD["learning_rate"] * value.grad
                if name in average and own.decay is not None:
                    average[name] = own.decay * average[name] + (1 - own.decay) * value
    return losses, weights(student)


FORMS = {
    "average": (OwnTeacher(decay=0.8), plain, False),
    "average of adapters": (OwnTeacher(decay=0.8), lora, False),
    "average, prompt": (OwnTeacher(decay=0.8), plain, True),
    "prompt": (OwnTeacher(), plain, True),
    "prompt, tied": (OwnTeacher(), tied, True),
    "adapters off": (OwnTeacher(adapters=False), lora, False),
    "adapters off, prompt": (OwnTeacher(adapters=False), lora, True),
}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_same_as_full_logits(tmp_path: Path, form: str, accumulation: int) -> None:
    own, make, prompted = FORMS[form]
    data: Any = rows(16)
    if prompted:
        data = with_context(data, None, context_of)
    listed = [data[index] for index in range(16)]
    micro = [listed[4 * i : 4 * i + 4] for i in range(4)]
    steps = [micro[i : i + accumulation] for i in range(0, 4, accumulation)]
    start = weights(make(tiny(16, 1)))
    expected, theirs = oracle(make(tiny(16, 1)), own, steps, "teacher_" if prompted else "")
    run = trainer(
        tmp_path, make(tiny(16, 1)), OBJECTIVE, data, teacher=own, gradient_accumulation_steps=accumulation,
        max_steps=len(steps), max_grad_norm=0.0, **{**SGD, "logging_steps": 1},
    )  # fmt: skip
    run.train()
    assert [entry["loss"] for entry in logged(run)] == pytest.approx(expected, rel=1e-5)
    for name, value in weights(run.model).items():
        moved, rounding = (theirs[name] - start[name]).norm(), 2e-7 * theirs[name].norm()
        assert (value - theirs[name]).norm() <= 1e-4 * moved + rounding, name


# Against a second model that follows as the average does.


class Follower(transformers.TrainerCallback):
    """Keeps a whole model at the average of the student."""

    def __init__(self, student: Any, teacher: Any, decay: float) -> None:
        self.student, self.teacher, self.decay = student, teacher, decay

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        theirs = dict(self.teacher.named_parameters())
        for name, value in self.student.named_parameters():
            if value.requires_grad:
                theirs[name].copy_(self.decay * theirs[name] + (1 - self.decay) * value)


def of_gkd(folder: Path, student: Any, teacher: Any, **options: Any) -> Any:
    """TRL's trainer on the answers of its data; there OwnTeacher is no model that could write others."""
    trl_tests = pytest.importorskip("tests.integrations.test_trl")
    args = trl_tests.arguments(trl_tests.gkd.GKDConfig, folder, lmbda=0.0, max_new_tokens=4, **options)
    data = {"train_dataset": trl_tests.dialogues(), "processing_class": trl_tests.tokenizer()}
    return trl_tests.ours.GKDTrainer(student, teacher, args, objective=OBJECTIVE, **data)


@pytest.mark.parametrize("kind", [plain, lora], ids=["plain", "lora"])
@pytest.mark.parametrize(
    "name, options",
    [("trainer", {}), ("trainer", HALF), ("mixin", {"bf16": True}), ("gkd", {}), ("gkd", HALF)],
    ids=["trainer", "trainer-half", "mixin-half", "gkd", "gkd-half"],
)
def test_same_as_a_second_model(tmp_path: Path, name: str, options: dict[str, Any], kind: Any) -> None:
    """Losses and weights, also under autocast, which keeps casts of the weights that it has seen."""
    make, vocab = (of_gkd, 45) if name == "gkd" else TRAINERS[name]
    student = kind(tiny(16, 1, vocab=vocab))
    teacher = copy.deepcopy(student).requires_grad_(False)
    second = make(tmp_path, student, teacher, **options)
    second.add_callback(Follower(student, teacher, 0.5))
    expected, theirs = finished(second)
    losses, ours = finished(make(tmp_path, kind(tiny(16, 1, vocab=vocab)), OwnTeacher(decay=0.5), **options))
    assert len(losses) >= 3 and losses == pytest.approx(expected, rel=1e-6)
    assert_same_weights(ours, theirs, 1e-6)
    assert len(set(losses)) == len(losses)


def test_autocast_gives_the_student_its_gradient(tmp_path: Path) -> None:
    """Casts made in the teacher's forward, which has no graph, are not the student's."""
    data = with_context(rows(8), None, [9, 8, 7])
    student = tiny(16, 1)
    start = weights(student)
    trainer(tmp_path, student, OBJECTIVE, data, teacher=OwnTeacher(), bf16=True, max_steps=1).train()
    for name, value in weights(student).items():
        assert not torch.equal(value, start[name]), name


# Checkpoints.


def run_of(folder: Path, kind: Any = plain, **options: Any) -> Any:
    given = {"save_strategy": "steps", "save_steps": 2, "teacher": OwnTeacher(decay=0.7), "max_steps": 6, **options}
    return trainer(folder, kind(tiny(16, 1)), OBJECTIVE, rows(16), **given)


@pytest.mark.parametrize("kind", [plain, lora], ids=["plain", "lora"])
def test_resumes(tmp_path: Path, kind: Any) -> None:
    whole = run_of(tmp_path / "whole", kind)
    whole.train()
    killed = run_of(tmp_path / "killed", kind)
    cut(killed, 4)
    torch.manual_seed(99)
    resumed = run_of(tmp_path / "killed", kind)
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(weights(resumed.model), weights(whole.model), 0.0)
    for name, value in whole.teacher.averages().items():
        assert torch.equal(value, resumed.teacher.averages()[name]), name
        assert not torch.equal(value, dict(whole.model.named_parameters())[name]), name
    checkpoint = tmp_path / "killed" / "checkpoint-4"
    assert AVERAGE in json.loads((checkpoint / "manifest.json").read_text())["files"]
    with pytest.raises(ValueError, match=r"averages must be of what the student trains, they differ in "):
        load_average(MovingAverage(tiny(24, 1), 0.5), checkpoint / AVERAGE)
    shutil.rmtree(tmp_path / "killed" / "checkpoint-6")
    (checkpoint / AVERAGE).unlink()
    with pytest.warns(UserWarning, match=f"checkpoint-4 lacks {AVERAGE}: passed over"):
        assert last_checkpoint(tmp_path / "killed").name == "checkpoint-2"


def test_two_averages(tmp_path: Path) -> None:
    """A mixture of two: each has its file, and of two equal ones the mixture is one."""
    both = [(0.3, OwnTeacher(decay=0.5)), (0.7, OwnTeacher(decay=0.9))]
    whole = run_of(tmp_path / "whole", teacher=both)
    whole.train()
    cut(run_of(tmp_path / "killed", teacher=both), 2)
    checkpoint = tmp_path / "killed" / "checkpoint-2"
    assert {path.name for path in checkpoint.glob("own_*")} == {AVERAGE, "own_teacher_2.safetensors"}
    resumed = run_of(tmp_path / "killed", teacher=both)
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(weights(resumed.model), weights(whole.model), 0.0)
    forms: list[Any] = [one.averages() for one in whole.teaching.forms]
    assert not torch.equal(forms[0]["lm_head.weight"], forms[1]["lm_head.weight"])
    one, same = run_of(tmp_path), run_of(tmp_path, teacher=[(w, OwnTeacher(decay=0.7)) for w in (0.3, 0.7)])
    one.train()
    same.train()
    assert_same_weights(weights(same.model), weights(one.model), 1e-4)


def test_a_checkpoint_without_an_average(tmp_path: Path) -> None:
    cut(run_of(tmp_path, teacher=tiny(24, 2)), 2)
    with pytest.raises(ValueError, match=rf"checkpoint-2/{AVERAGE} cannot be read .*had another teacher"):
        run_of(tmp_path).train(resume_from_checkpoint=True)


def test_a_file_is_written_whole_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = MovingAverage(tiny(16, 1).bfloat16(), 0.5)
    path = tmp_path / "new" / AVERAGE
    save_average(own, path)
    content = path.read_bytes()
    own.update()
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        save_average(own, path)
    assert path.read_bytes() == content and [each.name for each in path.parent.iterdir()] == [AVERAGE]


# Errors.


def test_arguments() -> None:
    for wrong, message in (
        ({"decay": 0}, "decay must be above 0 and at most 1, got 0"),
        ({"decay": 1.01}, "decay must be above 0 and at most 1, got 1.01"),
        ({"decay": float("nan")}, "decay must be above 0 and at most 1, got nan"),
        ({"decay": 0.9, "adapters": False}, "decay must be None with adapters=False, got 0.9"),
    ):
        with pytest.raises(ValueError, match=message):
            OwnTeacher(**wrong)
    for wrong, message in (({"decay": "0.9"}, "decay must be a number"), ({"adapters": 0}, "adapters must be True or")):
        with pytest.raises(TypeError, match=message):
            OwnTeacher(**wrong)
    with pytest.raises(ValueError, match=r"adapters=False needs a student with adapters .*LlamaForCausalLM has none"):
        OwnTeacher(adapters=False).bound(tiny(16, 1))
    kinds = {"adapters": AdaptersOff, "": AsItIs, "decay": MovingAverage}
    for name, own in {"adapters": OwnTeacher(adapters=False), "": OwnTeacher(), "decay": OwnTeacher(decay=1)}.items():
        assert type(own.bound(lora(tiny(16, 1)))) is kinds[name]


@pytest.mark.parametrize("attribute", ["ds_id", "subclass"])
def test_a_part_of_a_weight_is_refused(attribute: str) -> None:
    student = tiny(16, 1)
    if attribute == "ds_id":
        student.lm_head.weight.ds_id = 1
    else:
        from torch.testing._internal.two_tensor import TwoTensor

        weight = student.lm_head.weight.data
        student.lm_head.weight = torch.nn.Parameter(TwoTensor(weight, weight))
    with pytest.raises(ValueError, match=r"decay must be None where weights are sharded .* lm_head.weight is"):
        MovingAverage(student, 0.5).follow()


def test_a_tuned_prompt_is_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    student = peft.get_peft_model(tiny(16, 1), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="model must not have a tuned prompt"):
        trainer(tmp_path, student, OBJECTIVE, rows(8), teacher=OwnTeacher(decay=0.5))


def test_sharded_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_kd.integrations.own_checkpoints.shards_weights", lambda accelerator: True)
    trainer(tmp_path, tiny(16, 1), OBJECTIVE, rows(8), teacher=OwnTeacher())
    with pytest.raises(ValueError, match=r"decay of OwnTeacher must be None under FSDP2 and ZeRO-3, got 0.5"):
        trainer(tmp_path, tiny(16, 1), OBJECTIVE, rows(8), teacher=OwnTeacher(decay=0.5))


def test_the_student_with_its_own_prompt_is_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, tiny(16, 1), OBJECTIVE, rows(8), teacher=OwnTeacher())
    with pytest.raises(ValueError, match="batch must have teacher_input_ids"):
        run.train()


def test_head_is_a_plain_one() -> None:
    """With nothing trained in it, a head is the student's own."""
    student = lora(tiny(16, 1))
    own = MovingAverage(student, 0.9)
    own.follow()
    head = own.head(torch.zeros(1, 2, 16))
    assert head.weight.data_ptr() == lm_head_of(student, torch.zeros(1, 2, 16)).weight.data_ptr()
