"""The router's loss of mixtures of experts, against the models' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import fused_kd as fk  # noqa: E402
from fused_kd.integrations.mixin import KDLossMixin  # noqa: E402
from fused_kd.training.collate import Collator, PackingCollator  # noqa: E402
from tests.training.test_trainer import assert_same_weights, logged, trainer, weights  # noqa: E402
from tests.training.tiny import VOCAB, rows, tiny  # noqa: E402

SIZES = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 32, "moe_intermediate_size": 16,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4,
    "num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.5,
    "pad_token_id": 0, "max_position_embeddings": 64, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "shared_expert_intermediate_size": 16, "layer_types": None,
}  # fmt: skip
KINDS = {
    "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM),
    "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
    "qwen2_moe": (transformers.Qwen2MoeConfig, transformers.Qwen2MoeForCausalLM),
    "olmoe": (transformers.OlmoeConfig, transformers.OlmoeForCausalLM),
    "gpt_oss": (transformers.GptOssConfig, transformers.GptOssForCausalLM),
}


def experts(kind: str, **options: Any) -> Any:
    torch.manual_seed(3)
    config, model = KINDS[kind]
    return model(config(**{**SIZES, **options}))


def by_hand(model: Any, parts: list[list], rate: float) -> tuple[float, float]:
    """One step of SGD on cross-entropy over the step's tokens plus the mean of the micro-batches' router losses; the
    loss, and that mean."""
    batches = [Collator(0)(part) for part in parts]
    count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    total = aux = torch.zeros(())
    for batch in batches:
        labels = batch["labels"]
        own = model(**batch)
        ce = torch.nn.functional.cross_entropy(
            own.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )
        tokens = (labels[:, 1:] != -100).sum()
        own_router = own.loss - ce / tokens  # what transformers has added
        torch.testing.assert_close(own_router, 0.5 * own.aux_loss, rtol=1e-4, atol=1e-5)
        total = total + ce / count + own_router / len(batches)
        aux = aux + own.aux_loss / len(batches)
    total.backward()
    with torch.no_grad():
        for value in model.parameters():
            if value.grad is not None:
                value -= rate * value.grad
    return total.item(), aux.item()


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_as_transformers_adds_it(tmp_path: Path, kind: str, accumulation: int) -> None:
    data, student = rows(8), experts(kind)
    plain = experts(kind).train()
    size = 8 // accumulation
    loss, aux = by_hand(plain, [data[i : i + size] for i in range(0, 8, size)], 0.5)
    run = trainer(
        tmp_path, student, fk.SFT(), data, max_steps=1, logging_steps=1, optim="sgd", learning_rate=0.5,
        max_grad_norm=0.0, train_sampling_strategy="sequential", per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation, eval_data=data,
    )  # fmt: skip
    before = run.evaluate()
    assert before["eval_loss"] == pytest.approx(before["eval_ce"], rel=1e-6), "held out, the objective alone"
    run.train()
    assert_same_weights(weights(student), weights(plain), 1e-5)
    (entry,) = logged(run)
    assert entry["router_loss"] == pytest.approx(aux, rel=1e-5)
    assert entry["loss"] == pytest.approx(loss, rel=1e-5) and aux > 0.5


def test_it_is_off_where_the_configuration_has_it_off(tmp_path: Path) -> None:
    trained = []
    for options in ({"output_router_logits": False}, {"router_aux_loss_coef": 0.0}, {}):
        student = experts("mixtral", **options)
        run = trainer(
            tmp_path, student, fk.ForwardKD(), rows(8), teacher=tiny(24, seed=2), max_steps=1, logging_steps=1
        )
        run.train()
        trained.append(weights(student))
        assert ("router_loss" in logged(run)[0]) == ("output_router_logits" not in options)
    assert_same_weights(trained[0], trained[1], 1e-6)
    with pytest.raises(AssertionError):
        assert_same_weights(trained[0], trained[2], 1e-4)


def test_of_packed_rows_of_adapters_and_of_the_mixin(tmp_path: Path) -> None:
    """Packed rows have no padding: the loss is over all of their tokens."""
    data = rows(4)
    packed = PackingCollator()(data)
    student = experts("qwen3_moe").train()
    with torch.no_grad():
        # a cache would have the rows see each other
        inputs = {name: value for name, value in packed.items() if name != "labels"}
        expected = student(**inputs, use_cache=False).aux_loss.item()
    options = {"max_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 0.0}
    options |= {"train_sampling_strategy": "sequential"}
    run = trainer(tmp_path, student, fk.SFT(), data, collator=PackingCollator(), **options)
    run.train()
    assert logged(run)[0]["router_loss"] == pytest.approx(expected, rel=1e-5)

    class MyTrainer(KDLossMixin, transformers.Trainer):
        pass

    student = experts("mixtral")
    base = Collator(0)(data)
    made = MyTrainer(student, run.args, objective="sft", train_dataset=data, data_collator=Collator(0))
    student.train()
    loss, outputs = made.compute_loss(student, made._prepare_inputs(base), return_outputs=True)
    own = student(**base)
    assert loss.item() == pytest.approx(own.loss.item(), rel=1e-5)
    assert outputs["statistics"]["router_loss"].item() == pytest.approx(own.aux_loss.item(), rel=1e-5)
    peft = pytest.importorskip("peft")
    lora = peft.get_peft_model(experts("mixtral"), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    run = trainer(tmp_path, lora, fk.SFT(), data, **options)
    run.train()
    assert logged(run)[0]["router_loss"] == pytest.approx(own.aux_loss.item(), rel=1e-5)


def test_gradient_checkpointing(tmp_path: Path) -> None:
    trained = []
    for checkpointing in (False, True):
        student = experts("mixtral")
        trainer(
            tmp_path, student, fk.SFT(), rows(8), max_steps=1, optim="sgd", gradient_checkpointing=checkpointing
        ).train()
        trained.append(weights(student))
    assert_same_weights(trained[0], trained[1], 1e-6)


def test_what_cannot_be_added(tmp_path: Path) -> None:
    class Other(transformers.LlamaForCausalLM):
        pass

    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        output_router_logits=True,
    )  # fmt: skip
    with pytest.raises(ValueError, match="output_router_logits must be False: the router's auxiliary loss of Other"):
        trainer(tmp_path, Other(config), fk.SFT(), rows(4))
