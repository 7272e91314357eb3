"""Results as lines of JSON, each whole on the disk before the next is measured: a run that is cut keeps them."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from .store import json_safe


class Lines:
    """A file of results. ``code`` names what was measured: rows of other code do not count as measured."""

    def __init__(self, path: Path, code: str = "") -> None:
        self.path, self.code = path, code
        path.parent.mkdir(parents=True, exist_ok=True)

    def put(self, stage: str, key: str, status: str, **fields: Any) -> dict[str, Any]:
        """Add a row; the latest of a stage and key counts."""
        row = {"stage": stage, "key": key, "status": status, "code": self.code, "at": round(time.time(), 1), **fields}
        append(self.path, row)
        return row

    def all(self) -> list[dict[str, Any]]:
        return read(self.path)

    def rows(self) -> dict[tuple[str, str], dict[str, Any]]:
        """The rows of this code, by stage and key."""
        return {(row["stage"], row["key"]): row for row in self.all() if row["code"] == self.code}

    def finished(self, stage: str) -> set[str]:
        """Keys of the stage that need not be tried again: what failed once fails again with the same code."""
        return {key for s, key in self.rows() if s == stage}


def append(path: Path, row: dict[str, Any]) -> None:
    """One line, by one write, flushed to the disk. After a torn line it starts a new one."""
    text = json.dumps(json_safe(row), allow_nan=False) + "\n"
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                text = "\n" + text
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """All whole lines; a torn one is no row."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            found.append(row)
    return found
