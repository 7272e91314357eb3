"""Prompts, and the tokenised rows made of them, with the loss on the response only.

A row is ``prompt tokens + response tokens + EOS``. Prompt and response are tokenised apart, never as one
string, so no token straddles the boundary: the mask is exact, and a prompt alone (as in generation) has the
very tokens it had in training. Special tokens that the tokenizer puts in front (BOS) belong to the prompt. Text of a
chat template, which has its own BOS and ends of turns, gets no second BOS or EOS, and keeps those ends.
"""

from __future__ import annotations

import math
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fused_kd.training.data.pairs import Pair, language_name, parse_direction

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LABEL_PAD = -100
_FIELDS = ("source", "source_language", "target_language", "source_code", "target_code")


@dataclass(frozen=True)
class PromptTemplate:
    """A prompt with named gaps.

    Args:
        name: the key in `PROMPTS`.
        template: a format string with ``{source}`` (the text to translate) and any of ``{source_language}``,
            ``{target_language}`` (English names), ``{source_code}``, ``{target_code}``. The response follows
            its last character directly.

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


# what Alpaca's prompts begin with, for a task with and without an input beside it
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
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


def padding_id(tokenizer: Any) -> int:
    """The token that fills batches: the padding token, else EOS, else 0. It is masked and has no loss: any will do."""
    ids = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    return int(next((token for token in ids if token is not None), 0))


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


def encode_pair(
    tokenizer: PreTrainedTokenizerBase,
    template: PromptTemplate | str,
    pair: Pair,
    direction: str,
    max_length: int,
) -> dict[str, list[int]]:
    """One training row.

    Args:
        tokenizer: needs an EOS token.
        template: a `PromptTemplate` or its name.
        pair: source and target text.
        direction: such as ``"en-de"``.
        max_length: most tokens in the row. What is too much is dropped from the end of the response, EOS
            first, so a cut response does not teach the model to stop there.

    Returns:
        ``{"input_ids": [...], "labels": [...]}`` of equal length. Labels are -100 on the prompt and the token
        itself on the response and EOS; they are *not* shifted.

    Raises:
        ValueError: the prompt alone fills `max_length`, the tokenizer has no EOS, or an unknown template.
    """
    return tokenize_pairs(tokenizer, template, [pair], direction, max_length, skip_long=False)[0]


class PairDataset(Dataset[dict[str, list[int]]]):
    """Tokenised rows for a `torch.utils.data.DataLoader` or a `transformers.Trainer`.

    Attributes:
        rows: dicts of ``input_ids`` and ``labels``, as of `encode_pair`.
        skipped: pairs left out because the prompt alone filled `max_length`.
        truncated: rows whose response was cut.
    """

    def __init__(self, rows: list[dict[str, list[int]]], skipped: int = 0, truncated: int = 0) -> None:
        self.rows = rows
        self.skipped = skipped
        self.truncated = truncated

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.rows[index]

    def __repr__(self) -> str:
        return f"PairDataset({len(self)} rows, skipped={self.skipped}, truncated={self.truncated})"


def tokenize_pairs(
    tokenizer: PreTrainedTokenizerBase,
    template: PromptTemplate | str,
    pairs: Iterable[Pair],
    direction: str,
    max_length: int,
    *,
    skip_long: bool = True,
) -> PairDataset:
    """`encode_pair` for many pairs at once.

    A pair whose prompt alone fills `max_length` is left out and counted in ``.skipped`` (default), or raises
    with ``skip_long=False``. Order is kept.

    Raises:
        ValueError: as `encode_pair`; also where no row is left.
    """
    parse_direction(direction)
    template, pairs = get_prompt(template), list(pairs)
    prompts = [template.render(pair.source, direction) for pair in pairs]
    responses = [pair.target for pair in pairs]
    return tokenize_texts(tokenizer, prompts, responses, max_length, skip_long=skip_long, items=pairs)


def tokenize_texts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    responses: Sequence[str],
    max_length: int,
    *,
    skip_long: bool = True,
    items: Sequence[Any] | None = None,
) -> PairDataset:
    """`tokenize_pairs` for any task: rendered prompts, each with its response, which may end in EOS already.

    ``items`` stand for the prompts in errors; default: the prompts themselves.
    """
    if isinstance(max_length, bool) or not isinstance(max_length, int):
        raise TypeError(f"max_length must be an int, got {max_length!r}")
    if max_length < 2:
        raise ValueError(f"max_length={max_length}: expected at least 2")
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError(f"tokenizer {type(tokenizer).__name__} has no EOS token: set tokenizer.eos_token")
    rows: list[dict[str, list[int]]] = []
    encoded = tokenizer(list(responses), add_special_tokens=False)["input_ids"] if prompts else []
    named = prompts if items is None else items
    for item, prompt, response in zip(named, encode_prompts(tokenizer, prompts), encoded, strict=True):
        whole = response if response[-1:] == [eos] else [*response, eos]
        response = whole[: max(max_length - len(prompt), 0)]
        if response:
            rows.append({"input_ids": prompt + response, "labels": [LABEL_PAD] * len(prompt) + response})
        elif not skip_long:
            raise ValueError(f"max_length={max_length} leaves no room for a response after the prompt of {item!r}")
    if not rows:
        raise ValueError(f"no rows: {len(prompts)} pairs given, max_length={max_length}")
    truncated = sum(row["input_ids"][-1] != eos for row in rows)
    return PairDataset(rows, skipped=len(prompts) - len(rows), truncated=truncated)


def concatenate(datasets: Sequence[PairDataset]) -> PairDataset:
    """One data set of several (directions, tasks), in their order; rows are shared, the counts are sums.

    Raises:
        ValueError: none given. TypeError: something other than `PairDataset`.
    """
    for index, dataset in enumerate(datasets):
        if not isinstance(dataset, PairDataset):
            raise TypeError(f"datasets[{index}] must be a PairDataset, got {type(dataset).__name__}")
    if not datasets:
        raise ValueError("datasets is empty: expected at least one")
    return PairDataset(
        [row for dataset in datasets for row in dataset.rows],
        skipped=sum(dataset.skipped for dataset in datasets),
        truncated=sum(dataset.truncated for dataset in datasets),
    )


def tokenize_directions(
    tokenizer: PreTrainedTokenizerBase,
    template: PromptTemplate | str,
    pairs: Mapping[str, Sequence[Pair]],
    max_length: int,
) -> PairDataset:
    """`tokenize_pairs` for each direction's pairs, as one data set."""
    return concatenate([tokenize_pairs(tokenizer, template, p, d, max_length) for d, p in pairs.items()])


def training_texts(template: PromptTemplate, pairs: Mapping[str, Sequence[Pair]]) -> Iterator[str]:
    """Every prompt and response of each direction's pairs, to train a tokenizer on."""
    for direction, found in pairs.items():
        for pair in found:
            yield template.render(pair.source, direction)
            yield pair.target


def check_rows(rows: Sequence[Any], needed: Sequence[str] = ("input_ids", "labels")) -> None:
    """Raise unless each row is a dict of what is ``needed``, with as many ``labels`` as ``input_ids``."""
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise TypeError(f"rows[{number}] must be a dict of input_ids and labels, got {type(row).__name__}")
        if any(name not in row for name in needed):
            raise ValueError(f"rows[{number}] must have {' and '.join(needed)}, got {', '.join(row) or 'nothing'}")
        if "labels" in row and len(row["labels"]) != len(row["input_ids"]):
            raise ValueError(
                f"rows[{number}] must have as many labels as input_ids, got {len(row['labels'])} and "
                f"{len(row['input_ids'])}: a label for each token, -100 where there is no loss"
            )


@dataclass(frozen=True)
class Collator:
    """Pads rows to one length.

    Args:
        pad_token_id: fills ``input_ids``.
        label_pad: fills ``labels``; default -100.
        pad_to_multiple_of: round the length up to a multiple; None (default) pads to the longest row.
        side: where the padding goes, ``"right"`` (default) or ``"left"``; there a row's first label becomes
            ``label_pad``, as the padding before it predicts nothing.

    Returns on call:
        ``input_ids``, ``attention_mask``, ``labels``: int64 tensors (rows, length). Of rows with a cached teacher's
        lists (``teacher_log_probs`` and ``teacher_indices`` (n, K), one list a label that has a token before it and
        carries loss) also ``teacher_log_probs`` float32 and ``teacher_indices`` int64 (rows, length, K): position i has
        the distribution of the token at i + 1, as the loss takes it with ``shift=True``; a position without loss the
        ids 0 to K - 1, all alike.

    Raises:
        TypeError: a row that is no dict.
        ValueError: an unknown side, a negative pad id, an empty batch, a row without ``input_ids`` and as many
            ``labels``, lists in some rows only or of several K, more or
            fewer of them than labels.
    """

    pad_token_id: int
    label_pad: int = LABEL_PAD
    pad_to_multiple_of: int | None = None
    side: Literal["right", "left"] = "right"

    def __post_init__(self) -> None:
        if self.side not in ("right", "left"):
            raise ValueError(f"side={self.side!r}: expected 'right' or 'left'")
        if isinstance(self.pad_token_id, bool) or not isinstance(self.pad_token_id, int):
            raise TypeError(f"pad_token_id must be an int, got {self.pad_token_id!r}")
        if self.pad_token_id < 0:
            raise ValueError(f"pad_token_id={self.pad_token_id}: expected at least 0")
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of={self.pad_to_multiple_of}: expected at least 1, or None")

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        if not rows:
            raise ValueError("the batch is empty: expected at least one row")
        check_rows(rows)
        length = max(len(row["input_ids"]) for row in rows)
        multiple = self.pad_to_multiple_of or 1
        length = -(-length // multiple) * multiple
        size = (len(rows), length)
        input_ids = torch.full(size, self.pad_token_id, dtype=torch.int64)
        attention_mask = torch.zeros(size, dtype=torch.int64)
        labels = torch.full(size, self.label_pad, dtype=torch.int64)
        for number, row in enumerate(rows):
            count = len(row["input_ids"])
            span = slice(0, count) if self.side == "right" else slice(length - count, length)
            input_ids[number, span] = torch.as_tensor(row["input_ids"], dtype=torch.int64)
            attention_mask[number, span] = 1
            labels[number, span] = torch.as_tensor(row["labels"], dtype=torch.int64)
            if self.side == "left" and count:
                labels[number, length - count] = self.label_pad
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        if any("teacher_log_probs" in row for row in rows):
            batch |= self._teacher_lists(rows, length)
        return batch

    def _teacher_lists(self, rows: Sequence[dict[str, Any]], length: int) -> dict[str, Tensor]:
        if not all("teacher_log_probs" in row and "teacher_indices" in row for row in rows):
            raise ValueError("teacher_log_probs and teacher_indices must be in every row of a batch or in none")
        widths = {row[name].shape[-1] for row in rows for name in ("teacher_log_probs", "teacher_indices")}
        if len(widths) > 1:
            raise ValueError(f"teacher_log_probs must have one K in a batch, got {sorted(widths)}")
        K = widths.pop()
        log_probs = torch.full((len(rows), length, K), -math.log(K), dtype=torch.float32)
        indices = torch.arange(K).repeat(len(rows), length, 1)
        for number, row in enumerate(rows):
            targets = torch.as_tensor(row["labels"])[1:] != self.label_pad
            positions = targets.nonzero().squeeze(1)
            if not len(positions) == len(row["teacher_log_probs"]) == len(row["teacher_indices"]):
                raise ValueError(
                    f"teacher_log_probs has {len(row['teacher_log_probs'])} lists and teacher_indices "
                    f"{len(row['teacher_indices'])} for {len(positions)} labels with loss"
                )
            if self.side == "left":
                positions = positions + length - len(row["input_ids"])
            log_probs[number, positions] = row["teacher_log_probs"].float()
            indices[number, positions] = row["teacher_indices"].long()
        return {"teacher_log_probs": log_probs, "teacher_indices": indices}


def render_sample(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> str:
    """One tokenised row as text, for a look at the data before training.

    The first line counts tokens; then each run without loss as decoded text, each run with loss token by
    token.
    """
    ids, labels = [int(i) for i in row["input_ids"]], [int(i) for i in row["labels"]]
    carrying = sum(label != LABEL_PAD for label in labels)
    lines = [f"{len(ids)} tokens, {carrying} with loss"]
    for has_loss, group in groupby(zip(ids, labels, strict=True), key=lambda item: item[1] != LABEL_PAD):
        run = [token for token, _ in group]
        if has_loss:
            shown = " ".join(f"{tokenizer.convert_ids_to_tokens(token)}[{token}]" for token in run)
            lines.append(f"loss    ({len(run)}): {shown}")
        else:
            lines.append(f"no loss ({len(run)}): {tokenizer.decode(run)!r}")
    return "\n".join(lines)
