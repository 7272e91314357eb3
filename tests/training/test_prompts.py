"""Prompt templates, tokenised rows, masks, the collator."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from fused_kd.training.data import Pair
from fused_kd.training.prompts import (
    PROMPTS,
    Collator,
    PromptTemplate,
    encode_pair,
    encode_prompts,
    get_prompt,
    render_sample,
    tokenize_pairs,
)

from .byte_level import make_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAIR = Pair("A dog sees the cat.", "Ein Hund sieht die Katze.")
TEXTS = [*PAIR, "en: de:\n"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(TEXTS)


def test_templates_read_as_written() -> None:
    assert PROMPTS["paper"].render("Hi {x}", "en-de") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nTranslate the following text from English to German.\n\n"
        "### Input:\nHi {x}\n\n### Response:\n"
    )
    alpaca = PROMPTS["alpaca"].render("Hallo", "de-en")
    assert "### Input:" not in alpaca and "from German to English.\nHallo\n\n### Response:\n" in alpaca
    assert PROMPTS["tiny"].render("Hi", "en-cs") == "en: Hi\ncs:\n"


def test_unknown_names_and_gaps() -> None:
    with pytest.raises(ValueError, match="'papper' is unknown: expected one of paper, alpaca, tiny"):
        get_prompt("papper")
    for text in ("no gap", "{source} {sorce}", "{target_language}"):
        with pytest.raises(ValueError, match="has the gaps"):
            PromptTemplate("x", text)
    own = PromptTemplate("own", "{source} =>")
    assert get_prompt(own) is own


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("options", [{}, {"bos": False}, {"closing_eos": True}])
def test_mask_is_exact(name: str, options: dict) -> None:
    tokenizer = make_tokenizer(TEXTS, **options)
    row = encode_pair(tokenizer, name, PAIR, "en-de", 512)
    prompt = encode_prompts(tokenizer, [PROMPTS[name].render(PAIR.source, "en-de")])[0]
    count = len(prompt)
    assert (prompt[0] == 1) is options.get("bos", True) and prompt[-1] != 2
    assert row["input_ids"][:count] == prompt
    assert row["labels"][:count] == [-100] * count
    assert row["labels"][count:] == row["input_ids"][count:]
    assert row["input_ids"].count(2) == 1 and row["input_ids"][-1] == 2
    assert tokenizer.decode(row["input_ids"][count:-1]) == PAIR.target
    text = tokenizer.decode(prompt, skip_special_tokens=True)
    assert text == PROMPTS[name].render(PAIR.source, "en-de")


def test_truncation_drops_from_the_end_of_the_response(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = encode_pair(tokenizer, "tiny", PAIR, "en-de", 512)
    size = len(whole["input_ids"])
    prompt = sum(label == -100 for label in whole["labels"])
    assert encode_pair(tokenizer, "tiny", PAIR, "en-de", size) == whole
    for length in (size - 1, prompt + 1):
        cut = encode_pair(tokenizer, "tiny", PAIR, "en-de", length)
        assert cut == {key: values[:length] for key, values in whole.items()}
    with pytest.raises(ValueError, match=f"max_length={prompt} leaves no room"):
        encode_pair(tokenizer, "tiny", PAIR, "en-de", prompt)


def test_many_pairs_are_the_pairs_one_by_one(tokenizer: PreTrainedTokenizerFast) -> None:
    pairs = [PAIR, Pair("the cat " * 30, "die"), Pair("cat", "die Katze " * 30), Pair("dog", "Hund")]
    rows = tokenize_pairs(tokenizer, "tiny", pairs, "en-de", 60)
    assert (len(rows), rows.skipped, rows.truncated) == (3, 1, 1)
    expected = [encode_pair(tokenizer, "tiny", pair, "en-de", 60) for pair in (pairs[0], *pairs[2:])]
    assert [rows[index] for index in range(3)] == expected
    assert repr(rows) == "PairDataset(3 rows, skipped=1, truncated=1)"
    with pytest.raises(ValueError, match="leaves no room"):
        tokenize_pairs(tokenizer, "tiny", pairs, "en-de", 60, skip_long=False)
    with pytest.raises(ValueError, match="no rows: 0 pairs"):
        tokenize_pairs(tokenizer, "tiny", [], "en-de", 60)
    with pytest.raises(ValueError, match="no rows: 1 pairs"):
        tokenize_pairs(tokenizer, "tiny", pairs[1:2], "en-de", 60)


def test_bad_arguments(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="max_length=1"):
        encode_pair(tokenizer, "tiny", PAIR, "en-de", 1)
    with pytest.raises(TypeError, match="max_length"):
        encode_pair(tokenizer, "tiny", PAIR, "en-de", 9.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="direction="):
        encode_pair(tokenizer, "tiny", PAIR, "ende", 64)
    bare = make_tokenizer(TEXTS)
    bare.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        encode_pair(bare, "tiny", PAIR, "en-de", 64)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("multiple", "length"), [(None, 3), (8, 8), (3, 3)])
def test_collator(side: str, multiple: int | None, length: int) -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = Collator(9, pad_to_multiple_of=multiple, side=side)(rows)  # type: ignore[arg-type]
    assert list(batch) == ["input_ids", "attention_mask", "labels"]
    for name, fill, values in (
        ("input_ids", 9, [[5, 6, 7], [8]]),
        ("attention_mask", 0, [[1, 1, 1], [1]]),
        ("labels", -100, [[-100, 6, 7], [8]]),
    ):
        pads = [[fill] * (length - len(row)) for row in values]
        expected = [r + p if side == "right" else p + r for r, p in zip(values, pads, strict=True)]
        assert batch[name].dtype == torch.int64 and batch[name].tolist() == expected


def test_collator_rejects_nonsense() -> None:
    for options, message in (
        ({"side": "middle"}, "side='middle'"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of=0"),
    ):
        with pytest.raises(ValueError, match=message):
            Collator(0, **options)
    with pytest.raises(ValueError, match="pad_token_id=-1"):
        Collator(-1)
    with pytest.raises(TypeError, match="pad_token_id"):
        Collator(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch is empty"):
        Collator(0)([])


def test_render_sample_shows_which_tokens_carry_loss(tokenizer: PreTrainedTokenizerFast) -> None:
    row = encode_pair(tokenizer, "tiny", PAIR, "en-de", 64)
    head, prompt, response = render_sample(tokenizer, row).split("\n")
    count = sum(label != -100 for label in row["labels"])
    assert head == f"{len(row['input_ids'])} tokens, {count} with loss"
    assert prompt.startswith(f"no loss ({len(row['input_ids']) - count}): ") and PAIR.source in prompt
    assert response.startswith(f"loss    ({count}): ") and response.endswith("</s>[2]")
    assert len(response.split(": ", 1)[1].split(" ")) == count
