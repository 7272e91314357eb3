"""The student and teacher pairs of the end-to-end benchmark: transformers' models with random weights."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SEED = 0
GB = 10**9


class Model(NamedTuple):
    """``family`` is transformers' model_type; a head of ``vocab`` rows by ``hidden`` columns over ``layers`` layers."""

    family: str
    vocab: int
    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    tied: bool = False

    def build(self, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
        """Random weights; logits of standard deviation about 1, so that a label one token off changes the loss."""
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(
            self.family,
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            intermediate_size=self.intermediate,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            tie_word_embeddings=self.tied,
            initializer_range=1.0 / math.sqrt(self.hidden),
        )
        with torch.device(device):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)


class Architecture(NamedTuple):
    """A pair on one kind of ``device`` (None: on any).

    Sequences have ``length`` tokens. ``batch`` sequences are timed with every way. ``budget`` bytes over models and
    optimizer state are what the largest batch may take (None: what the device has); ``most`` is the largest tried.
    """

    name: str
    device: str | None
    student: Model
    teacher: Model
    length: int
    batch: int
    budget: int | None
    most: int

    def build(self, device: torch.device, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedModel]:
        """Student in training mode and frozen teacher in eval mode, the same numbers in every process."""
        torch.manual_seed(SEED)
        student = self.student.build(device, dtype).train()
        return student, self.teacher.build(device, dtype).eval().requires_grad_(False)

    def tokens(self, batch: int, device: torch.device) -> torch.Tensor:
        """Random token ids (batch, length), known to both vocabularies."""
        g = torch.Generator().manual_seed(SEED)
        return torch.randint(self.student.vocab, (batch, self.length), generator=g).to(device)

    def about(self) -> dict[str, Any]:
        return {"student": self.student._asdict(), "teacher": self.teacher._asdict()}


# Scaled from the GPU's pairs: of those the one keeps a head with little below it, the other a deep body below a tied
# head. Depth and width of the body leave a token's activations about as far below its logits as there.
ARCHITECTURES = {
    a.name: a
    for a in (
        Architecture(
            "llama-3-8b-head",
            "cuda",
            student=Model("llama", 128256, 4096, 2, 14336, 32, 8),
            teacher=Model("llama", 128256, 8192, 2, 28672, 64, 8),
            length=512, batch=4, budget=None, most=4096,
        ),
        Architecture(
            "qwen2.5-0.5b",
            "cuda",
            student=Model("qwen2", 151936, 896, 24, 4864, 14, 2, tied=True),
            teacher=Model("qwen2", 152064, 3584, 2, 18944, 28, 4),
            length=512, batch=4, budget=None, most=4096,
        ),
        Architecture(
            "llama-3-small",
            "cpu",
            student=Model("llama", 128256, 128, 16, 1024, 4, 2),
            teacher=Model("llama", 128256, 256, 2, 1024, 8, 2),
            length=32, batch=4, budget=3 * GB // 4, most=1024,
        ),
        Architecture(
            "qwen2.5-small",
            "cpu",
            student=Model("qwen2", 32000, 128, 24, 704, 2, 1, tied=True),
            teacher=Model("qwen2", 32064, 256, 2, 1408, 4, 2),
            length=32, batch=16, budget=GB, most=1024,
        ),
        Architecture(
            "tiny",
            None,
            student=Model("qwen2", 1000, 32, 2, 64, 2, 1, tied=True),
            teacher=Model("qwen2", 1024, 48, 2, 64, 2, 1),
            length=16, batch=4, budget=GB // 20, most=16,
        ),
    )
}  # fmt: skip


def suite(device: str, quick: bool) -> list[Architecture]:
    """Those of this kind of device, or with ``quick`` the tiny one."""
    return [a for a in ARCHITECTURES.values() if a.device == (None if quick else device)]
