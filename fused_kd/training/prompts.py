"""Prompts, and the tokenised rows made of them, with the loss on the response only.

A row is ``prompt tokens + response tokens + EOS``. Prompt and response are tokenised apart, never as one string, so no
token straddles the boundary: the mask is exact, and a prompt alone (as in generation) has the very tokens it had in
training. Special tokens that the tokenizer puts in front (BOS) belong to the prompt. Text of a chat template, which has
its own BOS and ends of turns, gets no second BOS or EOS, and keeps those ends.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset

from fused_kd.integrations.labels import LABEL_PAD
from fused_kd.training.data import WITH_INPUT, WITHOUT_INPUT, Instruction, Pair, language_name, parse_direction

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# tokens of a run that are shown of a sample
_SHOWN = 150
_FIELDS = ("source", "source_language", "target_language", "source_code", "target_code")


@dataclass(frozen=True)
class PromptTemplate:
    """A prompt with named gaps.

    Args:
        name: the key in `PROMPTS`.
        template: a format string with ``{source}`` (the text to translate) and any of ``{source_language}``,
            ``{target_language}`` (English names), ``{source_code}``, ``{target_code}``. The response follows its last
            character directly.

    Raises:
        ValueError: no ``{source}``, or a gap with another name.
    """

    name: str
    template: str

    def __post_init__(self) -> None:
        fields = {field for _, field, _, _ in string.Formatter().parse(self.template) if field is not None}
        unknown = sorted(fields - set(_FIELDS))
        if unknown or "source" not in fields:
            raise ValueError(
                f"template {self.name!r} has the gaps {sorted(fields)}: "
                f"expected 'source', and no others than {', '.join(_FIELDS)}"
            )

    def render(self, source: str, direction: str) -> str:
        """The prompt for one source text; `direction` such as ``"en-de"``."""
        source_code, target_code = parse_direction(direction)
        return self.template.format(
            source=source,
            source_code=source_code,
            target_code=target_code,
            source_language=language_name(source_code),
            target_language=language_name(target_code),
        )


_INSTRUCTION = "### Instruction:\nTranslate the following text from {source_language} to {target_language}.\n"
PROMPTS = {
    prompt.name: prompt
    for prompt in (
        PromptTemplate("paper", WITH_INPUT + _INSTRUCTION + "\n### Input:\n{source}\n\n### Response:\n"),
        PromptTemplate("alpaca", WITHOUT_INPUT + _INSTRUCTION + "{source}\n\n### Response:\n"),
        PromptTemplate("tiny", "{source_code}: {source}\n{target_code}:\n"),
    )
}


def get_prompt(name: str | PromptTemplate) -> PromptTemplate:
    """The template of that name; a template is returned as it is.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    if isinstance(name, PromptTemplate):
        return name
    if name not in PROMPTS:
        raise ValueError(f"prompt {name!r} is unknown: expected one of {', '.join(PROMPTS)}")
    return PROMPTS[name]


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of rendered prompts: with BOS where the tokenizer adds one, never with an EOS that it adds.

    Special tokens written out in a prompt, as by a chat template, stay; one that begins with BOS gets no other.
    """
    if not prompts:
        return []
    rows = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    front, back = _added_tokens(tokenizer, prompts)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    without_bos = [token for token in front if token != bos]
    back = back[:-1] if back[-1:] == [eos] else back
    return [(without_bos if bos is not None and row[:1] == [bos] else front) + row + back for row in rows]


def _added_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text."""
    special = set(tokenizer.all_special_ids)
    for text in texts:  # the first that is more than special tokens
        alone = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not special.issuperset(alone):
            break
    whole = tokenizer(text, add_special_tokens=True)["input_ids"]
    start = max(i for i in range(len(whole) + 1) if whole[i : i + len(alone)] == alone)
    return whole[:start], whole[start + len(alone) :]


@dataclass(repr=False, eq=False)
class Rows(Dataset[dict[str, list[int]]]):
    """Tokenised rows for a `torch.utils.data.DataLoader` or a `transformers.Trainer`.

    Attributes:
        rows: dicts of ``input_ids`` and ``labels``.
        skipped: pairs left out because the prompt alone filled `max_length`, and bad rows left out.
        truncated: rows whose response was cut.
        format: what the rows were read as, where `load_rows` read them.
    """

    rows: list[dict[str, list[int]]]
    skipped: int = 0
    truncated: int = 0
    format: str | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.rows[index]

    def __repr__(self) -> str:
        of = f" of {self.format}" if self.format else ""
        return f"Rows({len(self)} rows{of}, skipped={self.skipped}, truncated={self.truncated})"


def tokenize_pairs(
    tokenizer: PreTrainedTokenizerBase,
    template: PromptTemplate | str,
    pairs: Iterable[Pair],
    direction: str,
    max_length: int,
    *,
    skip_long: bool = True,
) -> Rows:
    """A row a pair: prompt, response and EOS, in this order, with the loss on response and EOS.

    A response that leads beyond `max_length` tokens is cut at its end. A pair whose prompt alone fills `max_length` is
    left out and counted in ``.skipped`` (default), or raises with ``skip_long=False``. Order is kept.

    Raises:
        ValueError: an unknown template or direction, a `max_length` below 2, a tokenizer without EOS, no row left.
    """
    template, pairs = get_prompt(template), list(pairs)
    prompts = [template.render(pair.source, direction) for pair in pairs]
    return tokenize_texts(tokenizer, prompts, [pair.target for pair in pairs], max_length, skip_long=skip_long)


def tokenize_texts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    responses: Sequence[str],
    max_length: int,
    *,
    skip_long: bool = True,
) -> Rows:
    """`tokenize_pairs` for any task: rendered prompts, each with its response, which may end in EOS already."""
    made = completion_rows(tokenizer, prompts, responses, max_length)
    for text, row in zip(prompts, made, strict=True):
        if row is None and not skip_long:
            raise ValueError(f"max_length={max_length} leaves no room for a response after the prompt {text!r}")
    rows = [row for row in made if row is not None]
    if not rows:
        raise ValueError(f"no rows: {len(prompts)} pairs given, max_length={max_length}")
    truncated = sum(row["input_ids"][-1] != tokenizer.eos_token_id for row in rows)
    return Rows(rows, skipped=len(prompts) - len(rows), truncated=truncated)


def completion_rows(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], responses: Sequence[str], max_length: int
) -> list[dict[str, list[int]] | None]:
    """`tokenize_texts` row by row, in order: None for a prompt that leaves no room.

    Raises:
        ValueError: a `max_length` below 2, a tokenizer without EOS.
    """
    if max_length < 2:
        raise ValueError(f"max_length={max_length}: expected at least 2")
    eos = eos_of(tokenizer)
    rows: list[dict[str, list[int]] | None] = []
    encoded = tokenizer(list(responses), add_special_tokens=False)["input_ids"] if prompts else []
    for prompt, response in zip(encode_prompts(tokenizer, prompts), encoded, strict=True):
        whole = response if response[-1:] == [eos] else [*response, eos]
        response = whole[: max(max_length - len(prompt), 0)]
        labels = [LABEL_PAD] * len(prompt) + response
        rows.append({"input_ids": prompt + response, "labels": labels} if response else None)
    return rows


def eos_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of EOS. Raises ``ValueError`` for a tokenizer without one."""
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {type(tokenizer).__name__} has no EOS token: set tokenizer.eos_token")
    return int(tokenizer.eos_token_id)


def tokenize_instructions(
    tokenizer: PreTrainedTokenizerBase, instructions: Iterable[Instruction], max_length: int
) -> Rows:
    """`tokenize_pairs` for instructions: loss on the output and EOS alone.

    An instruction whose prompt alone fills `max_length` is left out and counted in ``.skipped``; a longer output is
    cut at its end.

    Raises:
        ValueError: a `max_length` below 2, a tokenizer without EOS, no row left.
    """
    instructions = list(instructions)
    prompts = [instruction.prompt() for instruction in instructions]
    return tokenize_texts(tokenizer, prompts, [instruction.output for instruction in instructions], max_length)


def concatenate(datasets: Sequence[Rows]) -> Rows:
    """One data set of several (directions, tasks), in their order; rows are shared, the counts are sums."""
    formats = dict.fromkeys(dataset.format for dataset in datasets if dataset.format)
    return Rows(
        [row for dataset in datasets for row in dataset.rows],
        skipped=sum(dataset.skipped for dataset in datasets),
        truncated=sum(dataset.truncated for dataset in datasets),
        format=" and ".join(formats) or None,
    )


def tokenize_directions(
    tokenizer: PreTrainedTokenizerBase,
    template: PromptTemplate | str,
    pairs: Mapping[str, Sequence[Pair]],
    max_length: int,
) -> Rows:
    """`tokenize_pairs` for each direction's pairs, as one data set."""
    return concatenate([tokenize_pairs(tokenizer, template, p, d, max_length) for d, p in pairs.items()])


def training_texts(template: PromptTemplate, pairs: Mapping[str, Sequence[Pair]]) -> Iterator[str]:
    """Every prompt and response of each direction's pairs, to train a tokenizer on."""
    for direction, found in pairs.items():
        for pair in found:
            yield template.render(pair.source, direction)
            yield pair.target


def render_sample(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> str:
    """One tokenised row as text, for a look at the data before training.

    The first line counts tokens; then each run without loss as decoded text, each run with loss token by token. Of long
    runs the beginning and the end are shown.
    """
    ids, labels = [int(i) for i in row["input_ids"]], [int(i) for i in row["labels"]]
    carrying = sum(label != LABEL_PAD for label in labels)
    lines = [f"{len(ids)} tokens, {carrying} with loss"]
    for has_loss, group in groupby(zip(ids, labels, strict=True), key=lambda item: item[1] != LABEL_PAD):
        run = [token for token, _ in group]
        first, last = (run, []) if len(run) <= _SHOWN else (run[: _SHOWN - _SHOWN // 3], run[-(_SHOWN // 3) :])
        shown = [_shown(tokenizer, part, has_loss) for part in (first, last) if part]
        left_out = f" ... {len(run) - _SHOWN} more tokens ... "
        lines.append(f"{'loss   ' if has_loss else 'no loss'} ({len(run)}): {left_out.join(shown)}")
    return "\n".join(lines)


def _shown(tokenizer: PreTrainedTokenizerBase, run: list[int], has_loss: bool) -> str:
    if not has_loss:
        return repr(tokenizer.decode(run))
    return " ".join(f"{tokenizer.convert_ids_to_tokens(token)}[{token}]" for token in run)
