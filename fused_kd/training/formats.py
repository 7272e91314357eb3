"""The formats of data sets: how a row is read, and the tokens and labels that are made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fused_kd.integrations.labels import LABEL_PAD
from fused_kd.training.chat_rows import encode_chats
from fused_kd.training.chat_templates import ChatTemplate, Turns
from fused_kd.training.conversations import (
    MESSAGE_COLUMNS,
    Completion,
    Conversation,
    first_question,
    to_completion,
    to_conversation,
)
from fused_kd.training.data import LANGUAGES, Instruction, Pair, parse_direction, task_of, to_instruction, to_pair
from fused_kd.training.files import columns_of, text_fault
from fused_kd.training.prompts import PromptTemplate, completion_rows, encode_prompts, eos_of, get_prompt
from fused_kd.training.reading import parsed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MESSAGES, COMPLETIONS, TEXT, ALPACA, PAIRS = "messages", "prompt_completion", "text", "alpaca", "pairs"
# what a row of each has, for errors
FORMATS = {
    MESSAGES: "messages (role, content) or conversations (from, value)",
    COMPLETIONS: "prompt and completion, as texts or as lists of messages",
    TEXT: "text",
    ALPACA: "instruction, output and perhaps input",
    PAIRS: "translation, an object of texts by language, or one column a language (en, de)",
}


class Made(NamedTuple):
    """A tokenised row, and whether its end was cut off."""

    row: dict[str, list[int]]
    cut: bool


Outcome = Made | ValueError


@dataclass(frozen=True)
class Format:
    """How rows become tokens.

    Attributes:
        name: a key of `FORMATS`.
        key: the text that decides on a row's part of a file without splits.
        parse: an item of a row's value; raises ``ValueError`` for a bad one.
        encode: what is made of each item, in order.
    """

    name: str
    key: Callable[[Any], str | None]
    parse: Callable[[Any], Any]
    encode: Callable[[Sequence[Any]], list[Outcome]]


def format_of(value: Any) -> str | None:
    """The format that a row has, by the names of its columns; None where it has none of them."""
    if not isinstance(value, Mapping):
        return None
    has = {name for name, entry in value.items() if entry is not None}
    if has & set(MESSAGE_COLUMNS):
        return MESSAGES
    if {"prompt", "completion"} <= has:
        return COMPLETIONS
    if {"instruction", "output"} <= has:
        return ALPACA
    languages = [name for name in has if str(name).split("_")[0].lower() in LANGUAGES]
    if isinstance(value.get("translation"), Mapping) or len(languages) > 1:
        return PAIRS
    return TEXT if "text" in has else None


def chat_format(
    name: str, tokenizer: PreTrainedTokenizerBase, max_length: int, template: str | Path | None, turns: Turns
) -> Format:
    """`MESSAGES`, or `COMPLETIONS` (of which texts need no chat template).

    Raises:
        ValueError: as `ChatTemplate`.
    """
    known = name == MESSAGES or template is not None or getattr(tokenizer, "chat_template", None)
    chats = ChatTemplate(tokenizer, template, turns) if known else None
    parse = to_conversation if name == MESSAGES else to_completion
    return Format(name, first_question, parse, partial(_encode_dialogues, tokenizer, chats, max_length))


def text_format(tokenizer: PreTrainedTokenizerBase, max_length: int) -> Format:
    """`TEXT`: loss on everything, the EOS behind it included."""
    return Format(TEXT, _text_key, _to_text, partial(_encode_texts, tokenizer, max_length))


def alpaca_format(tokenizer: PreTrainedTokenizerBase, max_length: int) -> Format:
    """`ALPACA`, as `tokenize_instructions` has it."""
    return Format(ALPACA, task_of, to_instruction, partial(_encode_instructions, tokenizer, max_length))


def pair_format(
    tokenizer: PreTrainedTokenizerBase, max_length: int, prompt: str | PromptTemplate, direction: str
) -> Format:
    """`PAIRS` in one direction, as `tokenize_pairs` has it. Its rows are read by `pair_rows`."""
    languages = parse_direction(direction)
    encode = partial(_encode_pairs, tokenizer, max_length, get_prompt(prompt), direction)
    return Format(PAIRS, _no_key, partial(to_pair, languages=languages), encode)


def _no_key(value: Any) -> None:
    return None


def _text_key(value: Any) -> str | None:
    try:
        return _to_text(value)
    except ValueError:
        return None


def _to_text(value: Any) -> str:
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise ValueError(f"expected a text, got {columns_of(value)}")
    if fault := "empty" if not text.strip() else text_fault(text):
        raise ValueError(f"the text is {fault}")
    return text


def _encode_dialogues(
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate | None,
    max_length: int,
    items: Sequence[Conversation | Completion],
) -> list[Outcome]:
    made: dict[int, Outcome] = {}
    texts = {n: item for n, item in enumerate(items) if isinstance(item, Completion)}
    chats: dict[int, Any] = {}
    for number, item in enumerate(items):
        if isinstance(item, Conversation):
            template = template or ChatTemplate(tokenizer)
            try:
                chats[number] = template.chat(item)
            except ValueError as error:
                made[number] = error
    rows = encode_chats(tokenizer, list(chats.values()))
    made |= {n: parsed(row, partial(_cut, max_length)) for n, row in zip(chats, rows, strict=True)}
    answers = _encode_completions(
        tokenizer, max_length, [t.prompt for t in texts.values()], [t.completion for t in texts.values()]
    )
    made |= dict(zip(texts, answers, strict=True))
    return [made[number] for number in range(len(items))]


def _encode_texts(tokenizer: PreTrainedTokenizerBase, max_length: int, items: Sequence[str]) -> list[Outcome]:
    eos = eos_of(tokenizer)
    rows = encode_prompts(tokenizer, items)
    wholes = [ids if ids[-1:] == [eos] else [*ids, eos] for ids in rows]
    return [parsed({"input_ids": ids, "labels": ids}, partial(_cut, max_length)) for ids in wholes]


def _encode_instructions(
    tokenizer: PreTrainedTokenizerBase, max_length: int, items: Sequence[Instruction]
) -> list[Outcome]:
    outputs = [item.output for item in items]
    return _encode_completions(tokenizer, max_length, [item.prompt() for item in items], outputs)


def _encode_pairs(
    tokenizer: PreTrainedTokenizerBase, max_length: int, prompt: PromptTemplate, direction: str, items: Sequence[Pair]
) -> list[Outcome]:
    prompts = [prompt.render(pair.source, direction) for pair in items]
    return _encode_completions(tokenizer, max_length, prompts, [pair.target for pair in items])


def _encode_completions(
    tokenizer: PreTrainedTokenizerBase, max_length: int, prompts: Sequence[str], responses: Sequence[str]
) -> list[Outcome]:
    rows = completion_rows(tokenizer, prompts, responses, max_length)
    eos, too_long = tokenizer.eos_token_id, ValueError(f"the prompt alone fills max_length={max_length}")
    return [too_long if row is None else Made(row, row["input_ids"][-1] != eos) for row in rows]


def _cut(max_length: int, row: dict[str, list[int]]) -> Made:
    """The row up to `max_length`, which must have loss there; a first label is predicted by nothing."""
    length = len(row["input_ids"])
    labels = row["labels"][:max_length]
    if not any(label != LABEL_PAD for label in labels[1:]):
        raise ValueError(
            f"no token with loss is among the first {min(length, max_length)} of its {length} (max_length={max_length})"
        )
    return Made({"input_ids": row["input_ids"][:max_length], "labels": labels}, length > max_length)
