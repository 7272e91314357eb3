"""A base that translates poorly: plain text of both languages, and a few pairs in running text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fused_kd.training.data.pairs import Pair
from fused_kd.training.data.prompts import PairDataset, PromptTemplate, encode_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def documents(
    tokenizer: PreTrainedTokenizerBase, template: PromptTemplate, pairs: Sequence[Pair], direction: str, size: int
) -> PairDataset:
    """``size`` pairs a row, each as a prompt with its translation, a line break between them; loss everywhere.

    After a translation mostly another prompt follows: as of text from the web, a model learns to translate but not to
    stop.
    """
    prompts = encode_prompts(tokenizer, [template.render(pair.source, direction) for pair in pairs])
    targets = tokenizer([pair.target for pair in pairs], add_special_tokens=False)["input_ids"]
    # as it is within a text: alone, some tokenizers put a space before it
    line, broken = (list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in ("a", "a\n"))
    line_break = broken[len(line) :]
    bos = tokenizer.bos_token_id
    rows = []
    for start in range(0, len(pairs), size):
        ids: list[int] = []
        for prompt, target in zip(prompts[start : start + size], targets[start : start + size], strict=True):
            if ids:
                ids += line_break
                prompt = prompt[1:] if prompt[0] == bos else prompt
            ids += prompt + target
        rows.append(_whole([*ids, tokenizer.eos_token_id]))
    return PairDataset(rows)


def plain_rows(tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str]) -> PairDataset:
    """A sentence a row, EOS after it; loss everywhere."""
    eos = tokenizer.eos_token_id
    return PairDataset([_whole([*row, eos]) for row in encode_prompts(tokenizer, sentences)])


def _whole(ids: list[int]) -> dict[str, list[int]]:
    return {"input_ids": ids, "labels": list(ids)}
