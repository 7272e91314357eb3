"""LoRA students: adapters on the body and on the head train as with full logits."""

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


HEADS = {
    "adapted": {"target_modules": ["q_proj", "lm_head"]},
    "copied": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "adapted, embeddings copied": {"target_modules": ["lm_head"], "modules_to_save": ["embed_tokens"]},
}


@pytest.mark.parametrize("head", HEADS)
def test_adapters_on_the_head(tmp_path: Path, head: str) -> None:
    """As with full logits, also from a checkpoint on."""
    data, teacher, objective = rows(16), tiny(24, seed=2), fk.SelfEvolution(gamma=2.0)
    plain = with_lora(tiny(16, seed=1), **HEADS[head])
    plain_training(plain, teacher, objective, [data[4 * i : 4 * i + 4] for i in range(4)], learning_rate=0.5)

    def make() -> transformers.Trainer:
        return trainer(
            tmp_path, with_lora(tiny(16, seed=1), **HEADS[head]), objective, data, teacher=teacher, max_steps=4,
            max_grad_norm=0.0, save_strategy="steps", save_steps=2, **SGD,
        )  # fmt: skip

    run = make()
    start = weights(run.model)
    run.train()
    trained = weights(run.model)
    assert_same_weights(trained, weights(plain), 1e-5)
    moved = [name for name, value in trained.items() if not torch.equal(value, start[name])]
    assert any("lm_head" in name for name in moved)
    assert all("lora_" in name or "modules_to_save" in name for name in moved)
    resumed = make()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_weights(weights(resumed.model), trained, 0.0)


@pytest.mark.parametrize("head", ["adapted", "copied"])
def test_adapters_on_a_sharded_head_are_refused(tmp_path: Path, head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_kd.integrations import mixin

    monkeypatch.setattr(mixin, "shards_weights", lambda accelerator: True)
    student = with_lora(tiny(16, seed=1), **HEADS[head])
    with pytest.raises(TypeError, match=r"adapter on the head of LlamaForCausalLM .*FSDP2 and ZeRO-3.* DDP"):
        trainer(tmp_path, student, fk.NoEvo(), rows(4), teacher=tiny(24, seed=2))
