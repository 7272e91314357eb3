"""Reads the ``prompt_logprobs`` that vLLM gives for whole rows, prompt and response, into a teacher cache.

A row's ``input_ids`` are the *prompt* of a request with ``prompt_logprobs=k`` (and ``max_tokens=1``). The answer has
one entry a position: null for the first, else a mapping of token id to ``{"logprob": ..., "rank": ...,
"decoded_token": ...}``, the distribution of the token *at* that position given what is before it: what a cache has at
the position before. The token itself is always listed, beyond the k largest where it is not among them.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fused_kd.training.cache.teacher_cache import Rows, TeacherCache, target_positions
from fused_kd.training.cache.writer import write_lists
from fused_kd.training.data.prompts import PromptTemplate, get_prompt
from fused_kd.training.data.reading import json_value
from fused_kd.training.runs import fingerprint_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# the server's stand-in for -inf, which JSON does not have
MINUS_INFINITY = -9999.0


class PromptLogprobs(NamedTuple):
    """One row: ``place`` in the file, an entry a position, and the prompt's token ids where the file has them."""

    place: str
    entries: list[dict[str, Any] | None]
    token_ids: list[int] | None


def read_prompt_logprobs(path: str | Path) -> Iterator[PromptLogprobs]:
    """The rows of a JSON Lines file or of one JSON value, plain or gzip.

    Each is a bare list of entries, an object with ``prompt_logprobs`` (and ``prompt_token_ids`` where it is known: a
    dumped ``RequestOutput``, a chat completion), a completion with ``choices`` that have them, or a line of a batch
    output, with one of these as its ``response.body``. Several in one array are several rows.

    Raises:
        ValueError: not JSON, or something else in it, with file and line.
    """
    path = Path(path)
    try:
        with (gzip.open if path.name.endswith(".gz") else open)(path, "rt", encoding="utf-8-sig") as file:
            first = True
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                value = json_value(line)
                if isinstance(value, ValueError) and first:
                    value = json_value(line + file.read())  # one value on many lines
                if isinstance(value, ValueError):
                    raise ValueError(f"{path}, line {number}: {value}")
                first = False
                yield from _rows_of(value, f"{path}, line {number}")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def convert_vllm(
    folder: str | Path,
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    *,
    k: int,
    template: PromptTemplate | str,
    teacher: str = "",
    dtype: str = "fp16",
    shard_rows: int = 1024,
    progress: bool = True,
) -> TeacherCache:
    """A cache from a file of :func:`read_prompt_logprobs`, one row of it a row of ``rows``, in order.

    The k largest entries of a token are kept; of a token with fewer, those. Ids beyond the tokenizer's vocabulary (a
    padded head) are left out. The file stands for the teacher: going on needs the same one. Other arguments and errors
    are those of :func:`fused_kd.training.cache.writer.write_cache`; ``teacher`` is its name, for people.

    Raises:
        ValueError: too few or too many rows, a row of other tokens, a token without entries, fewer than k of them
            everywhere; with file and line.
    """
    vocab_size = len(tokenizer)
    data: Any = rows
    read = enumerate(read_prompt_logprobs(path))
    count, widest = 0, 0

    def lists(start: int, stop: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        nonlocal count, widest
        while count < stop:
            index, found = next(read, (count, None))
            if found is None:
                raise ValueError(f"{path} has {count} rows, the data {len(data)}")
            count += 1
            widest = max([widest, *(len(entry) for entry in found.entries if entry)])
            if index >= start:  # what is before belongs to finished shards
                yield index, *_row_lists(found, data[index], k, vocab_size)
        if stop == len(data):
            if next(read, None) is not None:
                raise ValueError(f"{path} has more rows than the data's {len(data)}")
            if widest < k:
                raise ValueError(f"k={k}: {path} lists at most {widest} entries a token")

    return write_lists(
        folder, lists, tokenizer, rows, k=k, template=template, dtype=dtype, shard_rows=shard_rows,
        made_from={"teacher_config": None, "teacher_weights": None, "file": fingerprint_file(Path(path))},
        about={"teacher": teacher, "revision": None, "template": get_prompt(template).name, "file": Path(path).name},
        progress=progress,
    )  # fmt: skip


def _rows_of(value: Any, place: str) -> Iterator[PromptLogprobs]:
    if isinstance(value, list) and value and value[0] is None:
        yield PromptLogprobs(place, value, None)
    elif isinstance(value, list):
        for number, item in enumerate(value, start=1):
            yield from _rows_of(item, f"{place}, item {number}")
    elif isinstance(value, dict) and isinstance(value.get("prompt_logprobs"), list):
        yield PromptLogprobs(place, value["prompt_logprobs"], value.get("prompt_token_ids"))
    elif isinstance(value, dict) and isinstance(value.get("choices"), list):
        for choice in sorted(value["choices"], key=lambda choice: choice.get("index", 0)):
            yield from _rows_of(choice, place)
    elif isinstance(value, dict) and isinstance((value.get("response") or {}).get("body"), dict):
        yield from _rows_of(value["response"]["body"], place)
    else:
        raise ValueError(f"{place}: expected prompt_logprobs, a list that starts with null, got {str(value)[:80]}")


def _row_lists(found: PromptLogprobs, row: Any, k: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(n, k) log-probabilities and ids of the positions whose next label is valid."""
    tokens = [int(token) for token in row["input_ids"]]
    if found.token_ids is not None and list(found.token_ids) != tokens:
        raise ValueError(f"{found.place}: prompt_token_ids are not the row's input_ids: {_difference(found, tokens)}")
    if len(found.entries) != len(tokens):
        raise ValueError(f"{found.place}: {len(found.entries)} entries for a row of {len(tokens)} tokens")
    positions = target_positions(row["labels"])
    log_probs = np.full((len(positions), k), -np.inf, dtype=np.float32)
    indices = np.zeros((len(positions), k), dtype=np.int64)
    for number, position in enumerate(positions + 1):
        entry = found.entries[position] or {}
        if str(tokens[position]) not in entry:
            raise ValueError(
                f"{found.place}: the entry at position {position} does not list the row's token {tokens[position]}: it "
                "belongs to other tokens, or to another position"
            )
        listed = sorted((-_logprob(value, found.place), int(token)) for token, value in entry.items())
        listed = [item for item in listed if item[0] < -MINUS_INFINITY and item[1] < vocab_size][:k]
        log_probs[number, : len(listed)] = [-negative for negative, _ in listed]
        indices[number, : len(listed)] = [token for _, token in listed]
    return log_probs, indices


def _logprob(value: Any, place: str) -> float:
    number = value.get("logprob") if isinstance(value, dict) else value  # old versions: the number itself
    if isinstance(number, bool) or not isinstance(number, (int, float)) or math.isnan(number):
        raise ValueError(f"{place}: logprob must be a number, got {number!r}")
    return float(number)


def _difference(found: PromptLogprobs, tokens: list[int]) -> str:
    theirs = list(found.token_ids or [])
    if len(theirs) != len(tokens):
        return f"{len(theirs)} instead of {len(tokens)}"
    where = next(i for i, (a, b) in enumerate(zip(theirs, tokens, strict=True)) if a != b)
    return f"{theirs[where]} instead of {tokens[where]} at position {where}"
