"""Where compiled rows are kept for later processes, on this machine or another."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

CACHE_VARIABLE = "FUSED_KD_CACHE"


def cache_folder() -> Path | None:
    """A writable folder that outlives the process, or None: ``$FUSED_KD_CACHE``, else ``~/.cache/fused_kd``."""
    chosen = os.environ.get(CACHE_VARIABLE)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(chosen) if chosen else Path(base) / "fused_kd"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return None


def keep(path: Path, key: str, data: bytes, about: Mapping[str, str]) -> None:
    """Write an entry, whole or not at all, whoever else writes the same: a line of JSON that says what it is (``about``
    with it), then ``data``. Where the disk does not take it, nothing is kept."""
    head = {"key": _digest(key.encode()), "size": len(data), "sha256": _digest(data), **about}
    new = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix="new-", delete=False) as file:
            new = Path(file.name)
            file.write(json.dumps(head).encode() + b"\n" + data)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError:
        if new is not None:
            new.unlink(missing_ok=True)


def kept(path: Path, key: str) -> bytes | None:
    """The data of an entry; None where there is none, or it is damaged, cut short, or of another ``key``."""
    try:
        head, _, data = path.read_bytes().partition(b"\n")
        found = json.loads(head)
        sound = (found["key"], found["size"], found["sha256"]) == (_digest(key.encode()), len(data), _digest(data))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return data if sound else None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
