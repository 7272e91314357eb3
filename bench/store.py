"""One JSON of results, rewritten whole after every row, so that a killed run loses nothing."""

from __future__ import annotations

import datetime
import json
import math
import os
from pathlib import Path
from typing import Any

from .shapes import Variant

SCHEMA = 2


class Store:
    """Results of one suite. Rows of an earlier run are kept where code and settings are still the same.

    Args:
        path: the JSON. header: what is written above the rows; ``header["source"]["digest"]`` and
        ``header["settings"]`` decide
            whether an earlier file's rows still count.
        fresh: forget an earlier file.
    """

    def __init__(self, path: Path, header: dict[str, Any], fresh: bool = False) -> None:
        self.path = path
        self.data: dict[str, Any] = {"schema": SCHEMA, **header, "rows": []}
        if not fresh and path.exists():
            old = json.loads(path.read_text())
            if old.get("schema") == SCHEMA and _identity(old) == _identity(self.data):
                self.data = {**old, **self.data, "rows": old["rows"]}
        path.parent.mkdir(parents=True, exist_ok=True)

    def finished(self, key: tuple) -> bool:
        """Whether a row was measured; everything else is tried again."""
        return any(row_key(row) == key and row["status"] == "ok" for row in self.data["rows"])

    def add(self, row: dict[str, Any]) -> None:
        rows = [r for r in self.data["rows"] if row_key(r) != row_key(row)]
        self.data["rows"] = [*rows, row]
        self.write()

    def write(self, **fields: Any) -> None:
        """Set top-level fields and write the file, atomically."""
        self.data.update(fields)
        self.data["written"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(json_safe(self.data), indent=1, allow_nan=False) + "\n")
        os.replace(temporary, self.path)


def row_key(row: dict[str, Any]) -> tuple:
    """What a row is about: shape, implementation, and the variant's fields."""
    return (row["shape"]["name"], row["implementation"], *(row[name] for name in Variant._fields))


def json_safe(value: Any) -> Any:
    """Infinite and undefined numbers become text ("inf", "nan"), which ``float`` reads back."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {k: json_safe(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(v) for v in value]
    return value


def _identity(data: dict[str, Any]) -> str:
    identity = (data["source"]["digest"], data["settings"], data["hardware"], data["versions"])
    return json.dumps(json_safe(identity), sort_keys=True)
