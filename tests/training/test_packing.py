"""A packed batch trains as the padded one does: no token sees another row."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import fused_kd as fk
from fused_kd.integrations.packed import check_mask, check_packed
from fused_kd.integrations.transformers import route_head_loss
from fused_kd.training.collate import Collator, PackingCollator
from tests.training.distributed_worker import Cache, tiny, with_top_k
from tests.training.test_trainer import SGD, assert_same_weights, trainer, weights
from tests.training.tiny import rows


def train(folder: Path, collator: object, *, attention: str = "sdpa", cached: bool = False) -> tuple[dict, list[float]]:
    student, teacher = tiny(16, seed=1), tiny(24, seed=2)
    for model in (student, teacher):
        model.set_attn_implementation(attention)
    data = rows(16)
    run = trainer(
        folder, student, fk.SelfEvolution(gamma=2.0), with_top_k(data) if cached else data,
        teacher=Cache() if cached else teacher, gradient_accumulation_steps=2, max_steps=2, logging_steps=1, **SGD,
    )  # fmt: skip
    run.data_collator = collator
    run.train()
    return weights(student), [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("options", [{"attention": "eager"}, {"cached": True}], ids=["eager", "sdpa-cached"])
def test_packed_equals_padded(tmp_path: Path, options: dict) -> None:
    padded, expected = train(tmp_path, Collator(0), **options)
    packed, losses = train(tmp_path, PackingCollator(), **options)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert_same_weights(packed, padded, 1e-6)


def model_of(family: str, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=61, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, state_size=4
    )
    return transformers.AutoModelForCausalLM.from_config(config).to(dtype)


FAMILIES = {"Llama": True, "GPT2": True, "Falcon": False, "Bloom": False, "Mamba": False, "OPT": False}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family, apart", FAMILIES.items(), ids=FAMILIES)
def test_a_model_that_mixes_packed_rows_is_found(family: str, apart: bool, dtype: torch.dtype) -> None:
    """fp32 and bf16 alike, with the small weights of an untrained model."""
    model = model_of(family, dtype).train()
    route_head_loss(model)
    inputs = PackingCollator()(rows(3))
    if apart:
        check_packed(model, inputs)
    else:
        with pytest.raises(ValueError, match=f"{family}ForCausalLM must keep packed rows apart, but .* change by"):
            check_packed(model, inputs)
    assert model.training


def test_a_model_is_refused_before_the_first_step(tmp_path: Path) -> None:
    run = trainer(
        tmp_path, tiny(16, seed=1), "forward_kd", rows(4), teacher=model_of("Falcon"), eval_data=rows(4), max_steps=1
    )
    run.data_collator = PackingCollator()
    for start in (run.train, run.evaluate):
        with pytest.raises(ValueError, match="FalconForCausalLM must keep packed rows apart"):
            start()
    run.data_collator = Collator(0)
    run.train()


class Masked(PackingCollator):
    def __call__(self, *args: object, **options: object) -> dict:
        batch = super().__call__(*args, **options)
        return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}


def test_rows_that_nothing_keeps_apart_are_refused(tmp_path: Path) -> None:
    for collator, message in (
        (PackingCollator(return_position_ids=False), "LlamaForCausalLM must keep packed rows apart"),
        (Masked(), r"attention_mask and position_ids that begin anew at token \d+ of row 0"),
    ):
        with pytest.raises(ValueError, match=message):
            train(tmp_path, collator)
    # positions that begin anew in the padding are those of generation
    check_mask({"attention_mask": torch.tensor([[0, 0, 1, 1]]), "position_ids": torch.tensor([[1, 1, 0, 1]])})


def test_layout() -> None:
    data = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8, 9], "labels": [8, 9]}]
    lists = [torch.full((2, 3), -1.0), torch.full((1, 3), -2.0)]
    cached = [
        {**row, "teacher_log_probs": each, "teacher_indices": torch.tensor([[1, 2, 3]] * len(each))}
        for row, each in zip(data, lists, strict=True)
    ]
    batch = PackingCollator()(cached)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    # position i has the distribution of the token at i + 1
    assert batch["teacher_log_probs"][0, [0, 1, 3], 0].tolist() == [-1.0, -1.0, -2.0]
    assert batch["teacher_indices"].shape == (1, 5, 3)
