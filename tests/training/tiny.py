"""Tiny random models and rows that several test files train on."""

from __future__ import annotations

import random

import torch
import transformers

VOCAB = 61


def tiny(
    hidden: int, seed: int, vocab: int = VOCAB, layers: int = 1, **options: object
) -> transformers.PreTrainedModel:
    """A Llama; ``options`` are further fields of its configuration."""
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            **options,
        )
    )
    with torch.no_grad():  # peaked outputs, so that easy and hard tokens both occur
        model.lm_head.weight.mul_(20)
    return model


def rows(count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Between 5 and 14 random tokens, the first of them without loss."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        ids = [rng.randrange(3, VOCAB) for _ in range(rng.randint(5, 14))]
        prompt = rng.randint(0, 4)  # a first label without a prediction must not count
        made.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return made
