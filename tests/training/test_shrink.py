"""A student made of its teacher's layers: the same numbers as the teacher with its other layers left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from fused_kd.training import shrink  # noqa: E402
from fused_kd.training.shrinking import plan_for, spread, stack_of  # noqa: E402

LAYERS = 6
VOCAB = 61
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "max_position_embeddings": 64,
}  # fmt: skip
MOE: dict[str, Any] = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 4},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4},
    "phi3": {},
    "olmo2": {},
    "smollm3": {},
    "gpt2": {},
    "gpt_neox": {},
    "falcon": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "cohere2": {"head_dim": 8, "sliding_window": 4},
    "mixtral": {"num_local_experts": 2},
    "qwen2_moe": {**MOE, "decoder_sparse_step": 2, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**MOE, "head_dim": 8, "mlp_only_layers": [1, 5]},
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8, "sliding_window": 4},
}


def make(family: str = "llama", **options: Any) -> Any:
    """A random model in eager attention, whose tensors are all unlike each other."""
    torch.manual_seed(0)
    try:
        config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES.get(family, {}), **options})
    except ValueError:
        pytest.skip(f"no {family} in this transformers")
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def ids(count: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(3, VOCAB, (count, length), generator=torch.Generator().manual_seed(1))


class Left(nn.Module):
    """What a layer that is left out does."""

    def __init__(self, returns_tuple: bool) -> None:
        super().__init__()
        self.returns_tuple = returns_tuple

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden, None, None) if self.returns_tuple else hidden


@contextmanager
def without(model: Any, kept: Sequence[int]) -> Iterator[None]:
    """Within, the model's other layers give back what they are given."""
    stack = stack_of(model)[1]
    old, seen = list(stack), []
    handle = old[0].register_forward_hook(lambda module, args, output: seen.append(isinstance(output, tuple)))
    model(ids(), use_cache=False)
    handle.remove()
    for index in set(range(len(old))) - set(kept):
        stack[index] = Left(seen[0])
    yield
    for index, layer in enumerate(old):
        stack[index] = layer


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_the_teacher_without_its_other_layers(family: str, tmp_path: Path) -> None:
    teacher, kept, x = make(family), [0, 2, 5], ids()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = shrink(teacher, kept)
    got = student(x).logits
    with without(teacher, kept):
        want = teacher(x, use_cache=False).logits
    assert torch.equal(got, want)
    assert float((got - teacher(x).logits).norm() / got.norm()) > 0.1, "the layers left out must matter"

    plain, cached = (student.generate(x, max_new_tokens=8, do_sample=False, use_cache=cache) for cache in (False, True))
    assert torch.equal(plain, cached)

    tied = teacher.get_input_embeddings().weight is teacher.get_output_embeddings().weight
    assert (student.get_input_embeddings().weight is student.get_output_embeddings().weight) == tied
    ours, theirs = ({p.data_ptr() for p in model.parameters()} for model in (student, teacher))
    assert not ours & theirs
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in student.parameters())

    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(again(x).logits, got)
    assert again.config.num_hidden_layers == 3


def test_it_is_trained_as_any_model(tmp_path: Path) -> None:
    teacher = make().requires_grad_(False).to(torch.bfloat16)
    student = shrink(teacher, 2).train()
    assert student.dtype == torch.bfloat16
    student(ids(), labels=ids()).loss.backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in student.parameters())


@pytest.mark.parametrize(
    ("keep", "count", "kept"),
    [
        ("even", 1, [0]),
        ("even", 2, [0, 5]),
        ("even", 4, [0, 2, 3, 5]),
        ("even", 6, [0, 1, 2, 3, 4, 5]),
        ("first_last", 1, [0]),
        ("first_last", 3, [0, 1, 5]),
        ("first_last", 6, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_which_layers(keep: Any, count: int, kept: list[int]) -> None:
    assert list(plan_for(make(), count, keep=keep).layers) == kept
    assert all(len(set(spread(30, n))) == n for n in range(1, 31))


def test_importance_is_one_minus_the_cosine_of_states() -> None:
    model, x = make(), ids(3, 10)
    with torch.no_grad():
        for index, scale in ((1, 1e-3), (4, 1e-2)):  # layers that change next to nothing
            for name, parameter in stack_of(model)[1][index].named_parameters():
                if "o_proj" in name or "down_proj" in name:
                    parameter *= scale
        states = model.double()(x, output_hidden_states=True).hidden_states
        last: list[torch.Tensor] = []
        handle = stack_of(model)[1][-1].register_forward_hook(lambda module, args, output: last.append(output))
        model(x)
        handle.remove()
    states = [*states[:-1], last[0]]  # the model gives the last ones normed
    cosine = torch.nn.functional.cosine_similarity
    want = [1 - float(cosine(before, after, dim=-1).mean()) for before, after in pairwise(states)]
    model.float()
    plan = plan_for(model, 4, keep="importance", text=[{"input_ids": row.tolist()} for row in x])
    assert plan.influence == pytest.approx(want, rel=1e-4, abs=1e-7)
    assert list(plan.layers) == [0, 2, 3, 5]
    batch = {
        "input_ids": torch.nn.functional.pad(x, (0, 4)),
        "attention_mask": torch.nn.functional.pad(x * 0 + 1, (0, 4)),
    }
    assert plan_for(model, 4, keep="importance", text=[batch]) == plan, "padding must not count"
    assert plan_for(model, 4, keep="importance", text=[batch], tokens=30) == plan
    assert plan_for(model, 4, keep="importance", text=[batch], tokens=11).influence != plan.influence
