"""What a student and its teacher share: refused where it is trained, and the adapters-off teacher beside a copy."""

from __future__ import annotations

import copy
import functools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import fused_kd as fk  # noqa: E402
from fused_kd.integrations.own import AdaptersOff  # noqa: E402
from fused_kd.integrations.pair import check_pair, shared_parameters  # noqa: E402
from fused_kd.integrations.precision import trained_in_float32  # noqa: E402
from fused_kd.integrations.transformers import KDLossMixin  # noqa: E402
from fused_kd.training.trainer import KDTrainer  # noqa: E402
from tests.integrations.test_transformers_mixin import arguments, causal_rows, collator, quiet  # noqa: E402
from tests.training.test_trainer import trainer as make_trainer  # noqa: E402
from tests.training.test_trainer import weights  # noqa: E402
from tests.training.tiny import rows, tiny  # noqa: E402

OBJECTIVE = fk.ForwardKD()


class MixinTrainer(KDLossMixin, transformers.Trainer):
    pass


def some_layers(teacher: Any, student: Any) -> Any:
    student.model.layers[0] = teacher.model.layers[1]
    return student


def embedding(teacher: Any, student: Any) -> Any:
    student.model.embed_tokens = teacher.model.embed_tokens
    return student


def shallow(teacher: Any, student: Any) -> Any:
    return copy.copy(teacher)


def assigned(teacher: Any, student: Any) -> Any:
    student.load_state_dict(
        {key: value for key, value in teacher.state_dict().items() if "layers.1." not in key}, assign=True
    )
    for value in student.parameters():
        value.requires_grad_(True)
    return student


def part(teacher: Any, student: Any) -> Any:
    student.lm_head.weight = torch.nn.Parameter(teacher.lm_head.weight.data[:50])
    return student


SHARED = {
    some_layers: r"share 9 of the 12 .*model.layers.0.self_attn.q_proj.weight \(the teacher's model.layers.1.self",
    embedding: "share 1 of the 12 parameters to train: model.embed_tokens.weight",
    shallow: "share 21 of the 21 .* and 18 more",
    assigned: "share 12 of the 12",
    part: "share 1 of the 12 parameters to train: lm_head.weight",
}


@pytest.mark.parametrize("share", SHARED, ids=lambda share: share.__name__)
def test_trained_parameters_must_not_be_shared(tmp_path: Path, share: Any) -> None:
    teacher = tiny(16, 2, layers=2)
    student = share(teacher, tiny(16, 1))
    with pytest.raises(ValueError, match=SHARED[share]):
        MixinTrainer(student, arguments(tmp_path), teacher=teacher, objective=OBJECTIVE)
    student.requires_grad_(False)
    check_pair(student, teacher)


def test_slices_of_one_buffer_are_apart() -> None:
    buffer = torch.zeros(100)
    assert shared_parameters({"a": buffer[:50]}, {"b": buffer[50:]}) == {}
    assert shared_parameters({"a": buffer[:51]}, {"b": buffer[50:]}) == {"a": "b"}


def adapted(model: Any, **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(7)
    # dropout and fresh values: a teacher with the adapters on, or in train mode, would be another
    given = {"target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.2, "init_lora_weights": False, **options}
    return peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="CAUSAL_LM", **given))


def finished(run: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    torch.manual_seed(3)
    quiet(run).train()
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry], weights(run.model)


def of_kd_trainer(folder: Path, student: Any, teacher: Any, **options: Any) -> Any:
    return make_trainer(folder, student, OBJECTIVE, rows(16), teacher=teacher, logging_steps=1, **options)


def of_mixin(folder: Path, student: Any, teacher: Any, **options: Any) -> Any:
    args = arguments(folder, **options)
    given = {"teacher": teacher, "objective": OBJECTIVE, "data_collator": collator()}
    return MixinTrainer(student, args, train_dataset=causal_rows(12), **given)


def of_trl(name: str, folder: Path, student: Any, teacher: Any, **options: Any) -> Any:
    pytest.importorskip("trl")
    import tests.integrations.test_trl as trl_tests

    if name == "gkd":
        args = trl_tests.arguments(trl_tests.gkd.GKDConfig, folder, lmbda=0.0, seq_kd=True, max_new_tokens=4, **options)
        cls, data = trl_tests.ours.GKDTrainer, trl_tests.dialogues()
    else:
        args = trl_tests.arguments(trl_tests.trl.DistillationConfig, folder, max_completion_length=4, **options)
        cls, data = trl_tests.ours.DistillationTrainer, trl_tests.prompts()
    return cls(student, teacher, args, train_dataset=data, processing_class=trl_tests.tokenizer())


# how each is made, and the vocabulary of its rows
TRAINERS = {
    "trainer": (of_kd_trainer, 61),
    "mixin": (of_mixin, 61),
    "gkd": (functools.partial(of_trl, "gkd"), 45),
    "distillation": (functools.partial(of_trl, "distillation"), 45),
}
HALF = {"bf16": True, "gradient_checkpointing": True}


@pytest.mark.parametrize(
    "name, form, options",
    [
        ("trainer", "student", HALF),
        ("mixin", "base", {}),
        ("gkd", "student", HALF),
        ("distillation", "base", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "half" if value else "full",
)
def test_teacher_with_the_adapters_off(tmp_path: Path, name: str, form: str, options: dict[str, Any]) -> None:
    """Losses and weights of a run with a copy of the base as teacher; nothing of the base moves."""
    make, vocab = TRAINERS[name]
    base = tiny(16, 1, vocab=vocab)
    expected, theirs = finished(make(tmp_path, adapted(copy.deepcopy(base)), copy.deepcopy(base), **options))
    student = adapted(base)
    start = weights(student)
    run = make(tmp_path, student, student if form == "student" else student.get_base_model(), **options)
    losses, ours = finished(run)
    assert len(losses) >= 3 and losses == pytest.approx(expected, rel=1e-5 if options else 1e-6)
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key
        assert torch.equal(value, start[key]) != ("lora_" in key), key


def test_adapters_that_the_trainer_puts_on(tmp_path: Path) -> None:
    """SFTTrainer and GKD with ``peft_config``: the model given is the base, and may be the teacher."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    import tests.integrations.test_trl as trl_tests

    class KDSFTTrainer(KDLossMixin, trl.SFTTrainer):
        pass

    data = datasets.Dataset.from_list([{key: row[key] for key in ("input_ids", "labels")} for row in rows(8)])
    shared = {"processing_class": trl_tests.tokenizer(), "peft_config": trl_tests.lora()}
    for name in ("sft", "gkd"):
        base = tiny(16, 1, vocab=45 if name == "gkd" else 61)
        start = weights(base)
        if name == "sft":
            args = arguments(tmp_path, kind=trl.SFTConfig, bf16=False, gradient_checkpointing=False)
            run: Any = KDSFTTrainer(base, args, teacher=base, objective=OBJECTIVE, train_dataset=data, **shared)
            teacher = run.teacher
        else:
            args = trl_tests.arguments(trl_tests.gkd.GKDConfig, tmp_path, lmbda=0.0)
            run = trl_tests.ours.GKDTrainer(base, base, args, train_dataset=trl_tests.dialogues(), **shared)
            teacher = run.teacher_model
        assert isinstance(teacher, AdaptersOff)
        quiet(run).train()
        moved = {key for key, value in run.model.named_parameters() if "lora_B" in key and value.any()}
        assert moved or name == "gkd"  # a divergence from itself alone is zero
        after = weights(run.model).items()
        kept = {key.replace("base_model.model.", "").replace(".base_layer", ""): value for key, value in after}
        assert all(torch.equal(value, kept[key]) for key, value in start.items())


def test_flags_and_modes_are_left_as_they_were() -> None:
    student = adapted(tiny(16, 1))
    frozen = next(value for name, value in student.named_parameters() if "lora_A" in name)
    frozen.requires_grad_(False)  # the user's choice, which PEFT's own switch forgets
    flags = {name: value.requires_grad for name, value in student.named_parameters()}
    own = AdaptersOff(student)
    ids = torch.tensor([[5, 6, 7]])
    expected = tiny(16, 1).eval()(ids).logits
    for mode in (True, False):
        student.train(mode)
        assert torch.allclose(own(ids).logits, expected, rtol=1e-5)
        assert all(module.training == mode for module in student.modules())
        assert {name: value.requires_grad for name, value in student.named_parameters()} == flags
    assert not torch.allclose(student(ids).logits, expected, rtol=1e-2)


def test_a_teacher_that_would_drift_is_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    student = adapted(tiny(16, 1, attention_bias=True), bias="all")
    with pytest.raises(ValueError, match=r"adapters off must stay as it is .*q_proj.base_layer.bias.* are trained"):
        of_kd_trainer(tmp_path, student, student)
    first = adapted(tiny(16, 1))
    second = peft.PeftModel(first.get_base_model(), peft.LoraConfig(r=2, target_modules=["q_proj"]), "other")
    with pytest.raises(ValueError, match=r"student and teacher share .*lora_A"):
        check_pair(first, second)


@pytest.mark.parametrize("name", ["mixin", "gkd"])
def test_lost_updates_of_half_precision_are_counted(tmp_path: Path, name: str) -> None:
    """The share is that of the weights which such a step of AdamW leaves as they are."""
    make, vocab = TRAINERS[name]
    student, teacher = tiny(16, 1, vocab=vocab).bfloat16(), tiny(24, 2, vocab=vocab)
    steps = {value: value.detach() + 1e-4 == value for value in student.parameters()}
    share = sum(int(lost.sum()) for lost in steps.values()) / sum(lost.numel() for lost in steps.values())
    assert 0.2 < share < 0.99
    with pytest.warns(UserWarning, match=r"trained weights are bfloat16 without float32 masters: a step") as caught:
        make(tmp_path, student, teacher, learning_rate=1e-4)
    text = next(str(each.message) for each in caught if "masters" in str(each.message))
    assert f"leaves {share:.1%} of them as they are" in text
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*masters")
        make(tmp_path, student.float(), teacher.bfloat16(), learning_rate=1e-4)
        frozen = adapted(tiny(16, 1, vocab=vocab).bfloat16())  # whose adapters PEFT makes in float32
        make(tmp_path, frozen, teacher, learning_rate=1e-4)


def test_nothing_to_train(tmp_path: Path) -> None:
    student = tiny(16, 1).requires_grad_(False)
    with pytest.raises(ValueError, match="model must have a parameter to train, all of LlamaForCausalLM are frozen"):
        of_kd_trainer(tmp_path, student, tiny(24, 2))
    args = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    assert KDTrainer(student, tiny(24, 2), OBJECTIVE, args=args)  # to evaluate


def test_what_is_trained_in_half_precision_is_put_into_float32() -> None:
    """Neither a frozen model, such as the base of adapters, nor a quantised one, whose weights are none."""
    assert trained_in_float32(tiny(16, 1).bfloat16()).lm_head.weight.dtype == torch.float32
    assert trained_in_float32(tiny(16, 1).bfloat16().requires_grad_(False)).lm_head.weight.dtype == torch.bfloat16
    quantised = tiny(16, 1).bfloat16()
    quantised.is_quantized = True
    assert trained_in_float32(quantised).lm_head.weight.dtype == torch.bfloat16
