"""Translations by an encoder-decoder model: what translate-test classifies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fused_kd.training.data.prompts import padding_id
from fused_kd.training.presets import language_id


def encode_sources(tokenizer: Any, texts: Sequence[str], code: str | None, max_length: int) -> list[list[int]]:
    """Token ids as the encoder wants them.

    Args:
        tokenizer: the MT model's.
        texts: in one language.
        code: the tokenizer's name of that language (NLLB: ``"deu_Latn"``); None for a tokenizer without such names.
        max_length: longer texts are cut.

    Raises:
        ValueError: a name for a tokenizer that takes none, none for one that needs one, or one it does not know.
    """
    takes = hasattr(tokenizer, "src_lang")
    if takes != (code is not None):
        raise ValueError(
            f"code={code!r}: {type(tokenizer).__name__} "
            + ("needs a name of the language: set codes" if takes else "has no names of languages: leave codes out")
        )
    if code is not None:
        language_id(tokenizer, code)
        tokenizer.src_lang = code
    ids: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    return ids


def translate(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    source: str | None = None,
    target: str | None = None,
    batch_size: int = 64,
    max_length: int = 512,
    max_new_tokens: int = 128,
    num_beams: int = 1,
) -> list[str]:
    """The texts' translations, in their order; ``source`` and ``target`` are the tokenizer's names of the languages."""
    ids = encode_sources(tokenizer, texts, source, max_length)
    forced = {} if target is None else {"forced_bos_token_id": language_id(tokenizer, target)}
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    made = [""] * len(ids)
    was = model.training
    model.eval()
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        longest = max(len(ids[index]) for index in batch)
        padded = [[*ids[index], *[padding_id(tokenizer)] * (longest - len(ids[index]))] for index in batch]
        mask = [[1] * len(ids[index]) + [0] * (longest - len(ids[index])) for index in batch]
        with torch.no_grad():
            output = model.generate(
                input_ids=torch.tensor(padded, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                max_new_tokens=max_new_tokens,
                num_beams=num_beams,
                do_sample=False,
                **forced,
            )
        for index, text in zip(batch, tokenizer.batch_decode(output, skip_special_tokens=True), strict=True):
            made[index] = " ".join(text.split())
    model.train(was)
    return made
