"""What a preset reads before the method begins: pairs one after another, as on a web page, and plain text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fused_kd.training import Pair, PromptTemplate
from fused_kd.training.data import parse_direction
from fused_kd.training.prompts import encode_prompts

Row = dict[str, list[int]]


def reverse(direction: str) -> str:
    """ "de-en" of "en-de"."""
    return "-".join(parse_direction(direction)[::-1])


def flipped(pairs: Sequence[Pair]) -> list[Pair]:
    """The same pairs for the other direction."""
    return [Pair(pair.target, pair.source) for pair in pairs]


def document_rows(
    tokenizer: Any, template: PromptTemplate, pairs: Sequence[Pair], direction: str, size: int
) -> list[Row]:
    """``size`` pairs a row, each as a prompt with its translation, a line break between them; loss everywhere.

    After a translation mostly another prompt follows: as of text from the web, a model learns to translate but not to
    stop.
    """
    prompts = encode_prompts(tokenizer, [template.render(pair.source, direction) for pair in pairs])
    targets = tokenizer([pair.target for pair in pairs], add_special_tokens=False)["input_ids"]
    # as it is within a text: alone, some tokenizers put a space before it
    line, broken = tokenizer(["a", "a\n"], add_special_tokens=False)["input_ids"]
    rows = []
    for start in range(0, len(pairs), size):
        ids: list[int] = []
        for prompt, target in zip(prompts[start : start + size], targets[start : start + size], strict=True):
            if ids:
                ids += broken[len(line) :]
                prompt = prompt[1:] if prompt[0] == tokenizer.bos_token_id else prompt
            ids += prompt + target
        ids.append(tokenizer.eos_token_id)
        rows.append({"input_ids": ids, "labels": ids})
    return rows


def plain_rows(tokenizer: Any, sentences: Sequence[str]) -> list[Row]:
    """A sentence a row, EOS after it; loss everywhere."""
    rows = [[*row, tokenizer.eos_token_id] for row in encode_prompts(tokenizer, sentences)]
    return [{"input_ids": ids, "labels": ids} for ids in rows]
