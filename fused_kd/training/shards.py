"""The folder of a teacher cache: its index, its shards, what can be wrong with them, and how they come to be.

``index.json`` says what the cache was made from and with, and each shard's rows, tokens, size and SHA-256;
``shards/*.safetensors`` have a fixed number of rows each. Every shard has ``offsets`` (rows + 1,) int64: row r has the
tokens ``offsets[r]:offsets[r + 1]``, one for each position whose *next* label is valid, in order. Beside them a cache
of lists has

- ``packed_ids`` (tokens, bytes) uint8, or where that is not smaller ``indices`` (tokens, k) uint16 for vocabularies of
  at most 65536, else int32: see :mod:`fused_kd.training.codes`;
- ``log_probs`` (tokens, k) fp16 or fp32, or ``codes``, ``top`` and ``span``: see :mod:`fused_kd.training.codes`;
- ``log_rest`` (tokens,) fp32, the log-probability of all that is not listed, where it is known;

one of drawn lists k + n ids and, with k > 0, k log-probabilities: see :mod:`fused_kd.training.drawn_codes`; and one of
hidden states

- ``hidden`` (tokens, width), with "fp8" and "int8" also ``scale`` (tokens,): see :mod:`fused_kd.training.hidden_codes`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fused_kd.integrations.labels import LABEL_PAD
from fused_kd.training.codes import DTYPES, EXCESS, id_dtype, ids_are_packed, packed_bytes
from fused_kd.training.hidden_codes import STORED_AS, WITH_SCALE
from fused_kd.training.stage import (
    check_counts,
    check_same,
    check_writable,
    fingerprint_file,
    lock,
    write_bytes,
    write_json,
)

_ANY_FORMAT = "fused_kd teacher cache "
FORMAT = f"{_ANY_FORMAT}2"
INDEX = "index.json"
HEAD, PROJECTION = "head.safetensors", "projection.safetensors"
KEPT = ("lists", "hidden", "sampled")
_LIST_ARRAYS = {
    "fp16": {"log_probs": "F16"},
    "fp32": {"log_probs": "F32"},
    "8bit": {"codes": "U8", "top": "F32", "span": "F32"},
}
_IDS = {"uint16": "U16", "int32": "I32"}
_A_NUMBER_EACH = ("top", "span")
_BYTES = {"U8": 1, "I8": 1, "F8_E4M3": 1, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "F32": 4}

# The shard of rows [start, stop): its bytes, and what its entry in the index has beside rows and file.
MakeShard = Callable[[int, int, Any], tuple[bytes, dict[str, Any]]]


def target_positions(labels: Any) -> np.ndarray:
    """The positions whose next label is valid, where a model predicts something that carries loss."""
    return np.flatnonzero(np.asarray(labels)[1:] != LABEL_PAD)


def offsets_of(data: Any, start: int, stop: int) -> np.ndarray:
    """(stop - start + 1,) int64: where each row's tokens begin and end."""
    counts = [len(target_positions(data[index]["labels"])) for index in range(start, stop)]
    return np.cumsum([0, *counts], dtype=np.int64)


def shard_name(number: int) -> str:
    return f"shards/{number:05d}.safetensors"


def write_shards(
    folder: str | Path,
    rows: int,
    settings: Mapping[str, Any],
    fingerprints: Mapping[str, str | None],
    about: Mapping[str, Any],
    begin: Callable[[Path, dict[str, Any]], MakeShard],
    *,
    shard_rows: int,
    progress: bool,
) -> None:
    """Make a cache, or what an interrupted one lacks; a second process waits until the first has finished.

    Args:
        settings, fingerprints: what a folder must have been made with to go on. about: for people.
        begin: called with the folder and its index, to which it may add; gives what makes a shard.

    Raises:
        ValueError: a folder made with other settings or from something else; it names them.
    """
    folder = Path(folder)
    settings = {**settings, "rows": rows, "shard_rows": shard_rows}
    check_writable(folder)

    from tqdm import tqdm

    with lock(folder / "shards" / ".lock"):
        for partial in [*folder.glob("*.partial"), *folder.glob("shards/*.partial")]:
            partial.unlink()
        known = read_index(folder)
        index = known or {
            "format": FORMAT, **settings, "fingerprints": dict(fingerprints), "about": dict(about), "shards": [],
        }  # fmt: skip
        theirs = {**{name: index.get(name) for name in settings}, **index["fingerprints"]}
        check_same(folder, theirs, {**settings, **fingerprints})
        make = begin(folder, index)
        finished = {s["file"]: s for s in index["shards"] if shard_fault(folder, index, s, checksum=True) is None}
        with tqdm(total=rows, desc="teacher cache", unit="row", disable=not progress) as bar:
            for start in range(0, rows, shard_rows):
                stop, name = min(start + shard_rows, rows), shard_name(start // shard_rows)
                if name in finished:
                    bar.update(stop - start)
                    continue
                content, more = make(start, stop, bar)
                finished[name] = {"file": name, "rows": stop - start, **write_part(folder / name, content), **more}
                write_json(folder / INDEX, {**index, "shards": [finished[file] for file in sorted(finished)]})


def write_part(path: Path, content: bytes) -> dict[str, Any]:
    """Write a file of the cache; return its size and SHA-256."""
    write_bytes(path, content)
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def read_index(folder: Path) -> dict[str, Any] | None:
    """What ``index.json`` says, finished or not; None where there is none.

    Raises:
        ValueError: it is no index, one of another format, or says what cannot be; the message names the entry.
    """
    path = folder / INDEX
    if not path.is_file():
        return None
    try:
        index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = str(index.get("format"))
        if found == FORMAT:
            _check_index(index)
        elif not found.startswith(_ANY_FORMAT):
            raise ValueError(f"expected the format {FORMAT!r}, got {found[:80]!r}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {str(error)[:300]}); without it the cache is made anew"
        ) from error
    if found != FORMAT:
        raise ValueError(
            f"the teacher cache in {folder} was made by another version ({found[:80]!r}, this one reads {FORMAT!r}): "
            "remove it and make it again"
        )
    return index


def _check_index(index: dict[str, Any]) -> None:
    check_counts(**{name: index[name] for name in ("vocab_size", "rows", "shard_rows")})
    if index["keep"] not in KEPT:
        raise ValueError(f"keep must be one of {KEPT}, got {str(index['keep'])[:80]}")
    lists = index["keep"] == "lists"
    if index["keep"] == "hidden":
        _check_hidden(index)
    else:
        _check_lists(index)
    if not isinstance(index["about"], dict) or not isinstance(index["fingerprints"], dict):
        raise ValueError("about and fingerprints must be objects")
    for shard in index["shards"]:
        number = int(Path(shard["file"]).stem)
        rows = min(index["rows"] - number * index["shard_rows"], index["shard_rows"])
        sound = shard["bytes"] > 0 and isinstance(shard["sha256"], str) and shard["tokens"] >= 0
        if lists:
            sound = sound and 0 <= shard["mass_min"] <= 1 + EXCESS
            sound = sound and 0 <= shard["mass_sum"] <= shard["tokens"] * (1 + EXCESS)
        if shard["file"] != shard_name(number) or shard["rows"] != rows or not sound:
            raise ValueError(f"no shard can be {str(shard)[:200]}")


def _check_lists(index: dict[str, Any]) -> None:
    if index["keep"] == "lists":
        check_counts(k=index["k"])
    else:
        check_counts(draws=index["draws"], k=index["k"] + 1)
    if index["k"] > index["vocab_size"] or index["dtype"] not in DTYPES:
        raise ValueError(f"no cache has k={index['k']} of {index['vocab_size']} tokens in {str(index['dtype'])[:80]}")
    if index["keep"] == "lists" and not isinstance(index["rest"], bool):
        raise ValueError("rest must be true or false")


def _check_hidden(index: dict[str, Any]) -> None:
    head, error = index["head"], index["error"]
    check_counts(width=index["width"], rows=head["rows"])
    if index["dtype"] not in STORED_AS or head["dtype"] not in STORED_AS or not isinstance(head["bias"], bool):
        raise ValueError(f"no hidden states are in {str(index['dtype'])[:80]}, with a head {str(head)[:200]}")
    if index["vocab_size"] > head["rows"]:
        raise ValueError(f"no head of {head['rows']} rows has {index['vocab_size']} tokens")
    errors = [error[name] for name in ("logits", "kl", "top_1", "tokens")]
    numbers = [head["logit_scale"], *errors, *([] if head["softcap"] is None else [head["softcap"]])]
    if not all(type(value) in (int, float) for value in numbers):
        raise ValueError(f"scale, cap and errors must be numbers, got {str(numbers)[:200]}")
    if index["project"] is not None:
        check_counts(project=index["project"], from_width=index["from_width"])
    parts = [head] if index["projection"] is None else [head, index["projection"]]
    if not all(part["bytes"] > 0 and isinstance(part["sha256"], str) for part in parts):
        raise ValueError(f"no head and projection can be {str(parts)[:200]}")


def shard_fault(folder: Path, index: Mapping[str, Any], shard: Mapping[str, Any], *, checksum: bool) -> str | None:
    """What is wrong with a shard's file, or None."""
    fault = file_fault(folder / shard["file"], shard, checksum=checksum)
    return fault or _shard_layout_fault(folder / shard["file"], index, shard)


def bytes_of_token(index: Mapping[str, Any]) -> int:
    """Bytes of a token that carries loss, from an index, or from
    :func:`fused_kd.training.cache.check_options`, of hidden states with their ``width``."""
    return sum(_BYTES[dtype] * (1 if width is None else width) for dtype, width in _arrays_of(index).values())


def head_fault(folder: Path, index: Mapping[str, Any], *, checksum: bool) -> str | None:
    """What is wrong with the file of the head, or None."""
    head, width = index["head"], index["width"]
    wanted = {"weight": (STORED_AS[head["dtype"]], [head["rows"], width])}
    if head["bias"]:
        wanted["bias"] = ("F32", [head["rows"]])
    fault = file_fault(folder / HEAD, head, checksum=checksum)
    return fault or layout_fault(folder / HEAD, wanted)


def file_fault(path: Path, part: Mapping[str, Any], *, checksum: bool) -> str | None:
    """What is wrong with a file of which the index knows ``bytes`` and ``sha256``, or None."""
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size != part["bytes"]:
        return f"has {size} bytes instead of {part['bytes']}"
    if checksum and fingerprint_file(path) != part["sha256"]:
        return "differs from its checksum"
    return None


def layout_fault(path: Path, wanted: Mapping[str, tuple[str, list[int]]]) -> str | None:
    """What of a file's arrays, names to dtype and shape, is not as ``wanted``; their values are not read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            layout = {name: (part.get_dtype(), part.get_shape()) for name, part in found.items()}
    except SafetensorError as error:
        return f"is no safetensors file: {error}"
    return None if layout == wanted else f"has the arrays {repr(layout)[:300]}, expected {wanted}"


def _shard_layout_fault(path: Path, index: Mapping[str, Any], shard: Mapping[str, Any]) -> str | None:
    from safetensors import safe_open

    tokens = shard["tokens"]
    wanted = {"offsets": ("I64", [shard["rows"] + 1])}
    for name, (dtype, width) in _arrays_of(index).items():
        wanted[name] = (dtype, [tokens] if width is None else [tokens, width])
    if fault := layout_fault(path, wanted):
        return fault
    with safe_open(path, framework="numpy") as file:
        offsets = file.get_tensor("offsets")
    if offsets[0] != 0 or offsets[-1] != tokens or (offsets[1:] < offsets[:-1]).any():
        return f"has offsets that do not rise from 0 to its {tokens} tokens"
    return None


def _arrays_of(index: Mapping[str, Any]) -> dict[str, tuple[str, int | None]]:
    """Which arrays a shard has: name to dtype and numbers a token (None: one number, without a dimension)."""
    if index["keep"] == "hidden":
        states: tuple[str, int | None] = (STORED_AS[index["dtype"]], index["width"])
        return {"hidden": states, "scale": ("F32", None)} if index["dtype"] in WITH_SCALE else {"hidden": states}
    k, vocab_size = index["k"], index["vocab_size"]
    width = k + index.get("draws", 0)
    found: dict[str, tuple[str, int | None]] = {}
    if ids_are_packed(width, vocab_size):
        found["packed_ids"] = ("U8", packed_bytes(width, vocab_size))
    else:
        found["indices"] = (_IDS[id_dtype(vocab_size).name], width)
    if k:
        found |= {name: (dtype, None if name in _A_NUMBER_EACH else k)
                  for name, dtype in _LIST_ARRAYS[index["dtype"]].items()}  # fmt: skip
    return {**found, "log_rest": ("F32", None)} if index.get("rest") else found
