"""A tiny MT model into English and a tiny English LM, for where no pretrained ones are at hand."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fused_kd as fk
from fused_kd.training.data.prompts import LABEL_PAD
from fused_kd.training.mt_llm.fitting import Fit, Pad, Rows, fit
from fused_kd.training.presets import train_tokenizer


@dataclass(frozen=True)
class TinyMT:
    """An M2M100 of ``layers`` + ``layers``, trained from each language into English.

    English itself is a source too, each token dropped with probability ``noise``: stage 1 feeds the encoder English.
    """

    fit: Fit
    hidden_size: int = 128
    layers: int = 2
    heads: int = 4
    vocab: int = 4000
    dropout: float = 0.1
    noise: float = 0.15


@dataclass(frozen=True)
class TinyLM:
    """A Llama of one of the presets' sizes, trained on English alone."""

    model: str
    epochs: float
    learning_rate: float
    batch: int = 64
    vocab: int = 3000


class Translator(nn.Module):
    """Cross-entropy of an encoder-decoder without its logits: ``target_ids`` begin with BOS and end with EOS."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.criterion = fk.KDLoss(fk.SFT(), ignore_index=LABEL_PAD)

    def forward(
        self, source_ids: Tensor, source_mask: Tensor, target_ids: Tensor, target_mask: Tensor
    ) -> dict[str, Tensor]:
        hidden = self.model.model(
            input_ids=source_ids, attention_mask=source_mask, decoder_input_ids=target_ids[:, :-1], use_cache=False
        ).last_hidden_state
        labels = target_ids[:, 1:].masked_fill(target_mask[:, 1:] == 0, LABEL_PAD)
        return {"loss": self.criterion(fk.LMHead(hidden, self.model.lm_head.weight), None, labels)}


def train_mt(
    folder: Path, captions: Sequence[Mapping[str, str]], languages: Sequence[str], plan: TinyMT, seed: int
) -> dict[str, Any]:
    """Model and tokenizer into ``folder / "model"``; parallel rows, English among the languages. Returns the record."""
    from transformers import GenerationConfig, M2M100Config, M2M100ForConditionalGeneration

    everyone = ["en", *languages]
    tokenizer = train_tokenizer((row[name] for row in captions for name in everyone), plan.vocab)
    config = M2M100Config(
        vocab_size=len(tokenizer),
        d_model=plan.hidden_size,
        encoder_layers=plan.layers,
        decoder_layers=plan.layers,
        encoder_attention_heads=plan.heads,
        decoder_attention_heads=plan.heads,
        encoder_ffn_dim=4 * plan.hidden_size,
        decoder_ffn_dim=4 * plan.hidden_size,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
        dropout=plan.dropout,
        attention_dropout=0.0,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.bos_token_id,
        init_std=plan.hidden_size**-0.5,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = M2M100ForConditionalGeneration(config)
    ids = {name: tokenizer([row[name] for row in captions])["input_ids"] for name in everyone}
    targets = [[*row, tokenizer.eos_token_id] for row in ids["en"]]
    rng = random.Random(seed)
    sources = {**ids, "en": [_dropped(row, plan.noise, rng) for row in ids["en"]]}
    rows = Rows(
        [
            {"source_ids": source, "target_ids": target}
            for name in everyone
            for source, target in zip(sources[name], targets, strict=True)
        ]
    )
    pad = Pad(dict.fromkeys(("source", "target"), tokenizer.pad_token_id))
    record = fit(Translator(model), rows, pad, plan.fit, folder, title="mt", seed=seed)
    model.generation_config = GenerationConfig(
        decoder_start_token_id=tokenizer.bos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return record


def lm_rows(tokenizer: Any, texts: Sequence[str]) -> list[dict[str, list[int]]]:
    """Every text with EOS as a row of a causal LM's training."""
    made = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(list(texts))["input_ids"]]
    return [{"input_ids": ids, "labels": ids} for ids in made]


def _dropped(ids: Sequence[int], share: float, rng: random.Random) -> list[int]:
    """Without each token after the first with probability ``share``."""
    return [token for place, token in enumerate(ids) if place == 0 or rng.random() >= share]
