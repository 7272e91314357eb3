"""LoRA students: adapters on the body train as with full logits, adapters on the head are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")

import fused_kd as fk  # noqa: E402
from tests.training.distributed_worker import tiny, with_lora  # noqa: E402
from tests.training.test_trainer import SGD, assert_same_weights, plain_training, trainer, weights  # noqa: E402
from tests.training.tiny import rows  # noqa: E402


def test_same_as_full_logits(tmp_path: Path) -> None:
    data, teacher, objective = rows(16), tiny(24, seed=2), fk.SelfEvolution(gamma=2.0)
    plain = with_lora(tiny(16, seed=1))
    plain_training(plain, teacher, objective, [data[4 * i : 4 * i + 4] for i in range(4)], learning_rate=0.5)
    student = with_lora(tiny(16, seed=1))
    start = weights(student)
    kwargs = {"use_reentrant": True}  # the kind that needs an input with gradient
    run = trainer(
        tmp_path, student, objective, data, teacher=teacher, max_steps=4, max_grad_norm=0.0,
        gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs, **SGD,
    )  # fmt: skip
    run.train()
    trained = weights(student)
    assert_same_weights(trained, weights(plain), 1e-5)
    for name, value in trained.items():
        moved = not torch.equal(value, start[name])
        assert moved == ("lora_" in name), name


def test_resumes(tmp_path: Path) -> None:
    def make() -> transformers.Trainer:
        student = with_lora(tiny(16, seed=1))
        return trainer(
            tmp_path, student, fk.NoEvo(), rows(16), teacher=tiny(24, seed=2), save_strategy="steps", save_steps=3
        )

    whole = make()
    whole.train()
    resumed = make()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same_weights(weights(resumed.model), weights(whole.model), 0.0)


@pytest.mark.parametrize(
    "options", [{"target_modules": ["lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}]
)
def test_adapter_on_the_head_is_refused(tmp_path: Path, options: dict) -> None:
    student = peft.get_peft_model(tiny(16, seed=1), peft.LoraConfig(r=2, **options))
    with pytest.raises(TypeError, match=r"plain linear map, it also has .*leave the head out of the adapter's target"):
        trainer(tmp_path, student, fk.NoEvo(), rows(4), teacher=tiny(24, seed=2))
