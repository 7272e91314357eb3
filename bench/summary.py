"""The README's table: from a results file, between two marks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .environment import ROOT
from .implementation import GROUPS
from .samples import ratios
from .tables import error_of, fixed, median, memory_of, scientific, table

README = ROOT / "README.md"
_BLOCK = re.compile(r"(<!-- measured: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def summary(data: dict[str, Any]) -> str:
    """A line for each implementation at each shape; several variants are separated by slashes."""
    rows = [
        r for r in data["rows"]
        if r["purpose"] == "table" and r["status"] == "ok"
        and r["valid"] == 1.0 and r["teacher"] == "near" and r["chunk"] is None
    ]  # fmt: skip
    lines = []
    for group in GROUPS:
        cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in (r for r in rows if r["group"] == group):
            s = row["shape"]
            shape = f"{s['N']}, {s['H_s']}, {s['H_t']}, {s['V']}"
            cells.setdefault((shape, row["implementation"]), []).append(row)
        for (shape, name), found in sorted(cells.items(), key=lambda item: int(item[0][0].split(", ")[3])):
            lines.append(
                [
                    group,
                    shape,
                    name,
                    _joined(fixed(median(ratios(r))) for r in found),
                    _joined(fixed(_gb(r)) for r in found),
                    _joined(scientific(error_of(r, "d_hidden")) for r in found),
                ]
            )
    return table(["objective", "N, H_s, H_t, V", "", "time / GEMMs", "GB", "dH error"], lines)


def write_readme(path: Path, data: dict[str, Any], readme: Path = README) -> bool:
    """Put the table into the README where its mark names the results file; say whether it does."""
    text = readme.read_text()
    mark = _BLOCK.search(text)
    if mark is None or (ROOT / mark[2]).resolve() != path.resolve():
        return False
    readme.write_text(_BLOCK.sub(lambda m: f"{m[1]}{summary(data)}\n{m[3]}", text))
    return True


def _gb(row: dict[str, Any]) -> float | None:
    bytes_ = memory_of(row)
    return None if bytes_ is None else bytes_ / 1e9


def _joined(values: Any) -> str:
    return " / ".join(values)
