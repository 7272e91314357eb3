"""Makes and reads the shards of a cache of lists, the k largest or drawn ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fused_kd import top_k_of
from fused_kd.draws import draws_of, thresholds
from fused_kd.training.codes import EXCESS, decode, decode_ids, encode, encode_ids, mass
from fused_kd.training.drawn_codes import decode_draws, encode_draws, ids_of
from fused_kd.training.shards import MakeShard, offsets_of
from fused_kd.training.teacher_runs import Runs

# The lists of rows [start, stop), in any order: (row, log-probabilities (n, k) float32, ids (n, k)), and behind them,
# where it is known, what all others hold, as log-probabilities (n,) float32. Of drawn lists the ids are (n, k + draws).
Source = Callable[[int, int], Iterator[tuple[Any, ...]]]


def list_writer(source: Source, data: Any) -> Callable[[Path, dict[str, Any]], MakeShard]:
    """Return what makes the shards of a cache of lists, for :func:`fused_kd.training.shards.write_shards`."""

    def begin(_: Path, index: dict[str, Any]) -> MakeShard:
        make = _lists if index["keep"] == "lists" else _drawn_lists
        return lambda start, stop, bar: make(source, data, index, start, stop, bar)

    return begin


def teacher_lists(runs: Runs, k: int, vocab_size: int, memory: int) -> Source:
    """The source gives a teacher's k largest entries, and what all others hold."""

    def lists(start: int, stop: int) -> Iterator[tuple[Any, ...]]:
        for run in runs(range(start, stop)):
            found = top_k_of(run.head, k, vocab_size=vocab_size, memory_budget=memory)
            assert found.log_rest is not None
            parts = (part.cpu().split(run.targets) for part in (found.log_probs, found.indices, found.log_rest))
            for row, *values in zip(run.rows, *parts, strict=True):
                yield row, *(value.numpy() for value in values)

    return lists


def teacher_draws(runs: Runs, k: int, n: int, seed: int, vocab_size: int, memory: int) -> Source:
    """The source gives a teacher's k largest entries and n draws, which depend on the seed and the row's number."""

    def lists(start: int, stop: int) -> Iterator[tuple[Any, ...]]:
        for run in runs(range(start, stop)):
            device = run.head.hidden.device
            at = [thresholds(targets, n, _generator(seed, row), device) for row, targets in zip(run.rows, run.targets)]  # noqa: B905
            made = draws_of(run.head, torch.cat(at), k=k, vocab_size=vocab_size, memory_budget=memory)
            if bool(made.log_rest.isnan().any()):
                raise ValueError(f"rows {run.rows}: the teacher's logits must be numbers, got NaN or inf")
            parts = (part.cpu().split(run.targets) for part in (made.log_probs, ids_of(made)))
            for row, *values in zip(run.rows, *parts, strict=True):
                yield row, *(value.numpy() for value in values)

    return lists


def _generator(seed: int, row: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {row}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def _lists(
    source: Source, data: Any, index: Mapping[str, Any], start: int, stop: int, bar: Any
) -> tuple[bytes, dict[str, Any]]:
    from safetensors.numpy import save

    k, vocab_size = index["k"], index["vocab_size"]
    offsets = offsets_of(data, start, stop)
    log_probs = np.full((offsets[-1], k), np.nan, dtype=np.float32)  # a row that does not come is an error
    ids = np.zeros((offsets[-1], k), dtype=np.int32)
    rest = np.full(offsets[-1], np.nan, dtype=np.float32)
    for row, values, found, *others in source(start, stop):
        tokens = slice(offsets[row - start], offsets[row - start + 1])
        listed = values > -np.inf
        if (listed & ((found < 0) | (found >= vocab_size))).any():
            raise ValueError(f"row {row}: ids must be in [0, {vocab_size - 1}], got {found.min()} to {found.max()}")
        if fault := repetition(listed, found):
            raise ValueError(f"row {row}: {fault}")
        log_probs[tokens], ids[tokens] = values, np.where(listed, found, 0)
        if others:
            rest[tokens] = np.minimum(others[0], 0)
        bar.update()
    total = np.minimum(mass(log_probs), 1)  # by rounding it can be a little more
    try:
        arrays = encode(log_probs, index["dtype"])
    except ValueError as error:
        raise ValueError(f"rows {start} to {stop - 1}: {error}") from error
    if index["rest"]:
        if np.isnan(rest).any():
            raise ValueError(f"rows {start} to {stop - 1}: the source must give what is not listed, at most 0")
        arrays["log_rest"] = rest
    content = save({"offsets": offsets, **encode_ids(ids, vocab_size), **arrays})
    return content, {
        "tokens": int(offsets[-1]),
        "mass_sum": float(total.sum()),
        "mass_min": float(total.min(initial=1.0)),
    }


def _drawn_lists(
    source: Source, data: Any, index: Mapping[str, Any], start: int, stop: int, bar: Any
) -> tuple[bytes, dict[str, Any]]:
    from safetensors.numpy import save

    k, n, vocab_size = index["k"], index["draws"], index["vocab_size"]
    offsets = offsets_of(data, start, stop)
    log_probs = np.full((offsets[-1], k), np.nan, dtype=np.float32)
    ids = np.full((offsets[-1], k + n), -1, dtype=np.int32)  # what does not come is an error
    for row, values, found in source(start, stop):
        tokens = slice(offsets[row - start], offsets[row - start + 1])
        log_probs[tokens], ids[tokens] = values, found
        bar.update()
    try:
        arrays = encode_draws(log_probs, ids, index["dtype"], vocab_size)
    except ValueError as error:
        raise ValueError(f"rows {start} to {stop - 1}: {error}") from error
    return save({"offsets": offsets, **arrays}), {"tokens": int(offsets[-1])}


def read_lists(arrays: Mapping[str, np.ndarray], index: Mapping[str, Any]) -> tuple[dict[str, Tensor], str | None]:
    """``log_probs`` (n, K) float32, ``indices`` (n, K) int64 and, where it is known, ``log_rest`` (n,) of some tokens;
    and why these can be no lists of a teacher, or None."""
    k, vocab_size = index["k"], index["vocab_size"]
    if index["keep"] == "lists":
        log_probs, ids = decode(arrays), decode_ids(arrays, k, vocab_size)
    else:
        log_probs, ids = (x.numpy() for x in decode_draws(arrays, k, index["draws"], vocab_size))
        ids = ids.clip(min=0)
    values, fault = {"log_probs": log_probs, "indices": ids}, _fault_of(log_probs, ids, vocab_size)
    if "log_rest" in arrays:
        values["log_rest"] = arrays["log_rest"]
        if not (arrays["log_rest"] <= 0).all():
            fault = fault or f"expected log_rest of at most 0, got {arrays['log_rest'].max()}"
    return {name: torch.from_numpy(value) for name, value in values.items()}, fault


def no_lists(index: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a row without targets has: lists of no tokens."""
    width = index["k"] + index.get("draws", 0)
    found = {"log_probs": torch.empty(0, width), "indices": torch.empty(0, width, dtype=torch.int64)}
    return {**found, "log_rest": torch.empty(0)} if index.get("rest") else found


def _fault_of(log_probs: np.ndarray, ids: np.ndarray, vocab_size: int) -> str | None:
    if not ((ids >= 0) & (ids < vocab_size)).all() or not (log_probs <= 0).all():
        return (
            f"expected ids below {vocab_size} and log-probabilities of at most 0, got {ids.min()} to {ids.max()} and "
            f"{log_probs.max()}"
        )
    total = mass(log_probs)
    if not ((total > 0) & (total <= 1 + EXCESS)).all():
        return f"expected probabilities that add up to more than 0 and at most 1, got {total.min()} to {total.max()}"
    return repetition(log_probs > -np.inf, ids)


def repetition(listed: np.ndarray, ids: np.ndarray) -> str | None:
    """Say which of the ids (n, k) that are ``listed`` a token has twice, for a message; None if there is none."""
    given = np.sort(np.where(listed, ids, -1 - np.arange(ids.shape[1])), axis=1)  # left out: each another one
    twice = given[:, 1:][given[:, 1:] == given[:, :-1]]
    return f"expected the ids of a token once each, got {twice[0]} twice" if len(twice) else None
