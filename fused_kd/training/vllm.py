"""Reads the ``prompt_logprobs`` that vLLM gives for whole rows, prompt and response.

A row's ``input_ids`` are the *prompt* of a request with ``prompt_logprobs=k`` (and ``max_tokens=1``). The answer has
one entry a position: null for the first, else a mapping of token id to ``{"logprob": ..., "rank": ...,
"decoded_token": ...}``, the distribution of the token *at* that position given what is before it: what a cache has at
the position before. The token itself is always listed, beyond the k largest where it is not among them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fused_kd.training.files import json_values, sound
from fused_kd.training.shards import target_positions

# the server's stand-in for -inf, which JSON does not have
MINUS_INFINITY = -9999.0
_ID = re.compile("0|[1-9][0-9]{0,17}")


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
    for place, value in sound(json_values(Path(path))):
        yield from _rows_of(value, place)


def _rows_of(value: Any, place: str) -> Iterator[PromptLogprobs]:
    found = value if isinstance(value, dict) else {}
    choices, response = found.get("choices"), found.get("response")
    if isinstance(value, list) and value[:1] == [None]:
        yield _row(place, value, None)
    elif isinstance(value, list):
        for number, item in enumerate(value, start=1):
            yield from _rows_of(item, f"{place}, item {number}")
    elif isinstance(found.get("prompt_logprobs"), list):
        yield _row(place, found["prompt_logprobs"], found.get("prompt_token_ids"))
    elif isinstance(choices, list) and all(
        isinstance(choice, dict) and type(choice.get("index", 0)) is int for choice in choices
    ):
        for choice in sorted(choices, key=lambda choice: choice.get("index", 0)):
            yield from _rows_of(choice, place)
    elif isinstance(response, dict):
        yield from _rows_of(response.get("body"), place)
    else:
        raise ValueError(f"{place}: expected prompt_logprobs, a list that starts with null, got {_shown(value)}")


def _row(place: str, entries: list[Any], token_ids: Any) -> PromptLogprobs:
    for position, entry in enumerate(entries):
        if not isinstance(entry, dict | None):
            raise ValueError(
                f"{place}: the entry at position {position} must be an object or null, got {_shown(entry)}"
            )
    if not isinstance(token_ids, list | None):
        raise ValueError(f"{place}: prompt_token_ids must be a list of ints, got {_shown(token_ids)}")
    return PromptLogprobs(place, entries, token_ids)


def row_lists(found: PromptLogprobs, row: Any, k: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(n, k) log-probabilities and ids of the positions whose next label is valid."""
    tokens = [int(token) for token in row["input_ids"]]
    theirs = tokens if found.token_ids is None else found.token_ids
    for position, (their, own) in enumerate(zip_longest(theirs, tokens)):
        if their != own:
            difference = f"{their} instead of {own} at position {position}"
            raise ValueError(f"{found.place}: prompt_token_ids are not the row's input_ids: {difference}")
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
        listed = _largest_first(entry, f"{found.place}, the entry at position {position}")
        listed = [item for item in listed if item[0] > MINUS_INFINITY and item[1] < vocab_size][:k]
        log_probs[number, : len(listed)] = [value for value, _ in listed]
        indices[number, : len(listed)] = [token for _, token in listed]
    return log_probs, indices


def _largest_first(entry: dict[str, Any], place: str) -> list[tuple[float, int]]:
    """(log-probability, id) of each token of an entry; of equal ones the smaller id comes first."""
    found = []
    for token, value in entry.items():
        number = value.get("logprob") if isinstance(value, dict) else value  # old versions: the number itself
        no_float = isinstance(number, int) and (isinstance(number, bool) or abs(number) >= 2**63)
        if no_float or not isinstance(number, (int, float)) or number != number:
            raise ValueError(f"{place}: logprob must be a number, got {_shown(number)}")
        if not _ID.fullmatch(token):
            raise ValueError(f"{place}: token ids must be decimal digits, got {_shown(token)}")
        found.append((float(number), int(token)))
    return sorted(found, key=lambda item: (-item[0], item[1]))


def _shown(value: Any) -> str:
    return repr(value)[:80]
