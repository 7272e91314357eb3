"""Prompt templates, tokenised rows, masks, the collator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from fused_kd.training.collate import Collator
from fused_kd.training.data import Instruction, Pair
from fused_kd.training.prompts import (
    PROMPTS,
    PromptTemplate,
    concatenate,
    encode_prompts,
    get_prompt,
    render_sample,
    tokenize_instructions,
    tokenize_pairs,
    tokenize_texts,
)

from .byte_level import make_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAIR = Pair("A dog sees the cat.", "Ein Hund sieht die Katze.")
TEXTS = [*PAIR, "en: de:\n"]


def encode_pair(tokenizer, template, pair: Pair, direction: str, max_length) -> dict[str, list[int]]:
    return tokenize_pairs(tokenizer, template, [pair], direction, max_length, skip_long=False)[0]


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


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.mark.parametrize("options", [{}, {"bos": False}, {"closing_eos": True}])
def test_text_of_a_chat_template_is_not_marked_twice(options: dict) -> None:
    """The ids of the template itself: one BOS, and the ends of turns, that of the last one too."""
    tokenizer = make_tokenizer(TEXTS, **options)
    tokenizer.chat_template = TEMPLATE
    chat = [{"role": "user", "content": PAIR.source}, {"role": "assistant", "content": PAIR.target}]
    for messages, generation in ((chat[:1], True), (chat[:1], False), (chat, False)):
        made = [
            tokenizer.apply_chat_template(messages, add_generation_prompt=generation, tokenize=tokenize)
            for tokenize in (False, True)
        ]
        ids = made[1]["input_ids"]
        assert encode_prompts(tokenizer, [made[0]]) == [ids]
        assert ids[0] == 1 and 1 not in ids[1:] and (ids[-1] == 2) is not generation
    prompt = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, tokenize=False)
    (row,) = tokenize_texts(tokenizer, [prompt], [f"{PAIR.target}</s>"], 512).rows
    assert row["input_ids"] == tokenizer.apply_chat_template(chat, add_generation_prompt=False)["input_ids"]
    # other text is marked as before
    front = [1] if options.get("bos", True) else []
    assert encode_prompts(tokenizer, ["", "cat"])[0] == front and encode_prompts(tokenizer, ["cat"])[0][-1] != 2


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
    assert repr(rows) == "Rows(3 rows, skipped=1, truncated=1)"
    both = concatenate([rows, tokenize_pairs(tokenizer, "tiny", pairs[:2], "de-en", 60)])
    assert repr(both) == "Rows(4 rows, skipped=2, truncated=1)" and both.rows[:3] == rows.rows
    bare = make_tokenizer(TEXTS)
    bare.eos_token = None
    for made_by, given, direction, length, message in (
        (tokenizer, pairs, "en-de", 60, "max_length=60 leaves no room .*the cat"),
        (tokenizer, [], "en-de", 60, "no rows: 0 pairs given, max_length=60"),
        (tokenizer, pairs, "en-de", 1, "max_length=1: expected at least 2"),
        (tokenizer, pairs, "ende", 60, "direction='ende'"),
        (bare, pairs, "en-de", 60, "no EOS token"),
    ):
        with pytest.raises(ValueError, match=message):
            tokenize_pairs(made_by, "tiny", given, direction, length, skip_long=False)
    with pytest.raises(ValueError, match="no rows: 1 pairs"):
        tokenize_pairs(tokenizer, "tiny", pairs[1:2], "en-de", 60)


@pytest.mark.parametrize(("side", "start"), [("right", 0), ("left", 1)])
@pytest.mark.parametrize("cached", [False, True])
def test_collator(side: str, start: int, cached: bool) -> None:
    """Position i holds the cached list of the token at i + 1; the others are uniform over the first K ids."""
    rows: list[dict[str, Any]] = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},  # predicted at its positions 0 and 1
        {"input_ids": [8], "labels": [8]},  # a first label has no prediction
    ]
    values = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]])
    if cached:
        rows[0] |= {"teacher_log_probs": values.half(), "teacher_indices": torch.tensor([[30, 20], [31, 20]]).int()}
        rows[1] |= {"teacher_log_probs": values[:0].half(), "teacher_indices": torch.empty(0, 2).int()}
    batch = Collator(9, pad_to_multiple_of=2, side=side)(rows)  # type: ignore[arg-type]
    left = side == "left"
    expected = {
        "input_ids": [[9, 5, 6, 7], [9, 9, 9, 8]] if left else [[5, 6, 7, 9], [8, 9, 9, 9]],
        "attention_mask": [[0, 1, 1, 1], [0, 0, 0, 1]] if left else [[1, 1, 1, 0], [1, 0, 0, 0]],
        "labels": [[-100, -100, 6, 7], [-100] * 4] if left else [[-100, 6, 7, -100], [8, -100, -100, -100]],
    }
    if cached:
        log_probs, indices = torch.full((2, 4, 2), 0.5).log(), torch.tensor([0, 1]).repeat(2, 4, 1)
        log_probs[0, start : start + 2], indices[0, start : start + 2] = values, torch.tensor([[30, 20], [31, 20]])
        assert torch.allclose(batch.pop("teacher_log_probs"), log_probs)
        expected["teacher_indices"] = indices.tolist()
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected
    assert Collator(9)(rows)["labels"].shape == (2, 3)


LISTS = {"teacher_log_probs": torch.zeros(1, 1), "teacher_indices": torch.zeros(1, 1, dtype=torch.int64)}
ROW: dict[str, Any] = {"input_ids": [5, 6], "labels": [-100, 6]}


@pytest.mark.parametrize(
    ("options", "rows", "message"),
    [
        ({"side": "middle"}, [], "side='middle': expected 'right' or 'left'"),
        ({"pad_to_multiple_of": 0}, [], "pad_to_multiple_of=0: expected at least 1, or None"),
        ({"pad_token_id": -1}, [], "pad_token_id=-1: expected at least 0"),
        ({"pad_token_id": None}, [], "pad_token_id=None: expected at least 0"),
        ({}, [], "batch is empty"),
        ({}, [ROW | LISTS, ROW], "in every row of a batch or in none"),
        ({}, [ROW | {"teacher_log_probs": torch.zeros(1, 1)}], "in every row of a batch or in none"),
        (
            {},
            [ROW | LISTS, ROW | {name: v.repeat(1, 2) for name, v in LISTS.items()}],
            r"one width .*\[\(1,\), \(2,\)\]",
        ),
        ({}, [ROW | LISTS | {"labels": [5, -100]}], r"teacher_log_probs of rows\[0\] has 1 entries for 0 labels"),
    ],
    ids=range(9),
)
def test_collator_rejects_nonsense(options: dict, rows: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Collator(**{"pad_token_id": 0, **options})(rows)


def test_instructions_carry_loss_on_the_output_alone() -> None:
    alone = Instruction("Name two\ncolours.", "", "Red,\nblue.")
    with_input = Instruction("Translate {this}.", "A dog", "Ein Hund")
    assert alone.prompt() == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nName two\ncolours.\n\n### Response:"
    )
    assert with_input.prompt().endswith("\n\n### Instruction:\nTranslate {this}.\n\n### Input:\nA dog\n\n### Response:")
    tokenizer = make_tokenizer([*alone, *with_input])
    rows = tokenize_instructions(tokenizer, [alone, with_input], 2_000)
    prompts = encode_prompts(tokenizer, [alone.prompt(), with_input.prompt()])
    for row, prompt, task in zip(rows.rows, prompts, (alone, with_input), strict=True):
        answer = row["input_ids"][len(prompt) :]
        assert row["input_ids"][: len(prompt)] == prompt and row["labels"] == [-100] * len(prompt) + answer
        assert answer[-1] == tokenizer.eos_token_id and tokenizer.decode(answer[:-1]) == task.output
    rows = tokenize_instructions(tokenizer, [alone, with_input], len(prompts[0]) + 1)
    assert (len(rows), rows.skipped, rows.truncated) == (1, 1, 1)


def test_render_sample_shows_which_tokens_carry_loss(tokenizer: PreTrainedTokenizerFast) -> None:
    row = encode_pair(tokenizer, "tiny", PAIR, "en-de", 64)
    head, prompt, response = render_sample(tokenizer, row).split("\n")
    count = sum(label != -100 for label in row["labels"])
    assert head == f"{len(row['input_ids'])} tokens, {count} with loss"
    assert prompt.startswith(f"no loss ({len(row['input_ids']) - count}): ") and PAIR.source in prompt
    assert response.startswith(f"loss    ({count}): ") and response.endswith("</s>[2]")
    assert len(response.split(": ", 1)[1].split(" ")) == count
