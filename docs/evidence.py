"""Writes the tables and figures of docs/evidence.md from committed results alone. ``make docs`` runs it."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import evidence_claims as claims
import evidence_data as data
import evidence_figures as figures
import evidence_plane as plane
import evidence_runs
import matplotlib
from matplotlib.figure import Figure

PAGE = data.ROOT / "docs" / "evidence.md"
FOLDER = data.ROOT / "docs" / "evidence"
MARKS = re.compile(r"(<!-- evidence: (\w+) -->\n).*?(<!-- /evidence -->)", re.DOTALL)
TABLES: dict[str, Callable[[], str]] = {
    **{section: partial(claims.table, section) for section in claims.SECTIONS},
    "sweeps": claims.sweeps,
    "runs": evidence_runs.table,
    "plane": lambda: plane.table(plane.cells()),
}
SHOWN = ("self_evolution", "cycle_distill", "sdrrl")
FIGURES: dict[str, Callable[[], Figure]] = {
    **{section: partial(figures.forest, section) for section in SHOWN},
    "plane": lambda: figures.plane(plane.cells()),
    "rule": lambda: figures.rule(plane.cells()),
}


def written(text: str) -> str:
    """The page with each table between its marks."""
    unknown = {name for _, name, _ in MARKS.findall(text)} - TABLES.keys()
    if unknown:
        raise ValueError(f"marks must name one of {', '.join(TABLES)}, got {', '.join(sorted(unknown))}")
    return MARKS.sub(lambda mark: f"{mark[1]}{TABLES[mark[2]]()}\n{mark[3]}", text)


def draw(folder: Path = FOLDER) -> list[Path]:
    """Every figure, as PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with matplotlib.rc_context(figures.STYLE):
        for name, figure in FIGURES.items():
            paths.append(folder / f"{name}.png")
            figure().savefig(paths[-1], dpi=200, metadata={"Software": None})
    return paths


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the tables are as they should be")
    check = parser.parse_args(arguments).check
    text = PAGE.read_text(encoding="utf-8")
    new = written(text)
    if check:
        print("stale" if new != text else "current")
        return int(new != text)
    PAGE.write_text(new, encoding="utf-8")
    print(*(path.relative_to(data.ROOT) for path in [PAGE, *draw()]), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
