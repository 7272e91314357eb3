"""``index.json`` of a teacher cache and the shards that it names, checked before anything is taken from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fused_kd.training.cache.codes import DTYPES, EXCESS, id_dtype
from fused_kd.training.runs import fingerprint_file, shown

FORMAT = "fused_kd teacher cache 1"
INDEX = "index.json"
_ARRAYS = {
    "fp16": {"log_probs": "F16"},
    "fp32": {"log_probs": "F32"},
    "8bit": {"codes": "U8", "top": "F32", "span": "F32"},
}
_IDS = {"uint16": "U16", "int32": "I32"}


def read_index(folder: Path) -> dict[str, Any] | None:
    """What ``index.json`` says, finished or not; None where there is none.

    Raises:
        ValueError: it is no index, or says what cannot be; the message names the entry.
    """
    path = folder / INDEX
    if not path.is_file():
        return None
    try:
        index = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}; without it the cache is made anew") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        found = index.get("format") if isinstance(index, dict) else type(index).__name__
        raise ValueError(f"{path}: expected the format {FORMAT!r}, got {str(found)[:80]!r}")
    if fault := _fault_of(index):
        raise ValueError(f"{path} is damaged: {fault}; without it the cache is made anew")
    return index


def shard_count(index: Mapping[str, Any]) -> int:
    """How many shards the finished cache has."""
    return -(-int(index["rows"]) // int(index["shard_rows"]))


def shard_name(number: int) -> str:
    return f"shards/{number:05d}.safetensors"


def shard_fault(folder: Path, index: Mapping[str, Any], shard: Mapping[str, Any], *, checksum: bool) -> str | None:
    """What is wrong with a shard's file, or None."""
    path = folder / shard["file"]
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size != shard["bytes"]:
        return f"has {size} bytes instead of {shard['bytes']}"
    if checksum and fingerprint_file(path) != shard["sha256"]:
        return "differs from its checksum"
    return _layout_fault(path, index, shard)


def _fault_of(index: Mapping[str, Any]) -> str | None:
    for name in ("k", "vocab_size", "rows", "shard_rows"):
        if not is_count(index.get(name)):
            return f"{name} must be an int of at least 1, got {shown(index.get(name))}"
    if index["k"] > index["vocab_size"]:
        return f"k={index['k']} must be at most vocab_size={index['vocab_size']}"
    if index.get("dtype") not in DTYPES:
        return f"dtype must be one of {', '.join(map(repr, DTYPES))}, got {shown(index.get('dtype'))}"
    for name, kind in (("fingerprints", dict), ("about", dict), ("shards", list)):
        if not isinstance(index.get(name), kind):
            return f"{name} must be a {kind.__name__}, got {shown(index.get(name))}"
    bad = [name for name, value in index["fingerprints"].items() if not isinstance(value, str | None)]
    if bad:
        return f"fingerprints must be texts or null, got {shown(index['fingerprints'][bad[0]])} for {shown(bad[0])}"
    faults = (_shard_entry_fault(index, shard) for shard in index["shards"])
    return next(filter(None, faults), None)


def _shard_entry_fault(index: Mapping[str, Any], shard: Any) -> str | None:
    if not isinstance(shard, dict):
        return f"shards must be objects, got {shown(shard)}"
    file = shard.get("file")
    stem = file.removeprefix("shards/").removesuffix(".safetensors") if isinstance(file, str) else ""
    number = int(stem) if stem.isdecimal() and len(stem) < 19 else -1
    if number < 0 or file != shard_name(number) or number >= shard_count(index):
        return f"shards must be named {shard_name(0)} and so on, got {shown(file)}"
    wanted = min(index["shard_rows"], index["rows"] - number * index["shard_rows"])
    if shard.get("rows") != wanted:
        return f"{file} must have rows={wanted}, got {shown(shard.get('rows'))}"
    for name in ("tokens", "bytes"):
        if not is_count(shard.get(name), 0):
            return f"{file}: {name} must be an int of at least 0, got {shown(shard.get(name))}"
    for name, tokens in (("mass_sum", shard["tokens"]), ("mass_min", 1)):
        value, most = shard.get(name), tokens * (1 + EXCESS)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most:
            return f"{file}: {name} must be a number in [0, {most:.6g}], got {shown(value)}"
    return None if isinstance(shard.get("sha256"), str) else f"{file}: sha256 must be a text"


def _layout_fault(path: Path, index: Mapping[str, Any], shard: Mapping[str, Any]) -> str | None:
    """What of a shard's arrays is not as the index says; their values are not read."""
    from safetensors import SafetensorError, safe_open

    rows, tokens, k = shard["rows"], shard["tokens"], index["k"]
    wanted = {"offsets": ("I64", [rows + 1]), "indices": (_IDS[id_dtype(index["vocab_size"]).name], [tokens, k])}
    for name, dtype in _ARRAYS[index["dtype"]].items():
        wanted[name] = (dtype, [tokens] if name in ("top", "span") else [tokens, k])
    try:
        with safe_open(path, framework="numpy") as file:
            found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            layout = {name: (part.get_dtype(), part.get_shape()) for name, part in found.items()}
            if layout != wanted:
                return f"has the arrays {repr(layout)[:300]}, expected {wanted}"
            offsets = file.get_tensor("offsets")
    except SafetensorError as error:
        return f"is no safetensors file: {error}"
    if offsets[0] != 0 or offsets[-1] != tokens or (offsets[1:] < offsets[:-1]).any():
        return f"has offsets that do not rise from 0 to its {tokens} tokens"
    return None


def is_count(value: Any, low: int = 1) -> bool:
    """Whether a value is an int, no bool, of at least ``low``, that 64 bits hold."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value < 1 << 60


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has {shown(next(name for name in names if names.count(name) > 1))} twice")
    return found
