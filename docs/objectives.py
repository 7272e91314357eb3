"""Writes the tables of objectives in README.md and docs/objectives.md from the code. ``make docs`` runs it."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import fused_kd as fk
from fused_kd.objectives import Objective

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/objectives.md")
BEGIN, END = "<!-- objectives: made by docs/objectives.py -->", "<!-- /objectives -->"


def table() -> str:
    """Markdown: of each objective its class, the first sentence of its docstring, its numbers and what it costs."""
    lines = ["| objective | loss of a token | in a config | sweeps |", "|---|---|---|---|"]
    lines += [
        f"| `{cls.__name__}({_numbers(cls)})` | {_formula(cls)} | `{name}` | {_cost(cls())} |"
        for name, cls in fk.OBJECTIVES.items()
    ]
    return "\n".join(lines)


def written(text: str) -> str:
    """A page with the table between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def _numbers(cls: type[Objective]) -> str:
    return ", ".join(f"{field.name}={_short(field.default)}" for field in dataclasses.fields(cls))


def _short(value: Any) -> str:
    return repr(value) if isinstance(value, str) else f"{value:g}"


def _formula(cls: type[Objective]) -> str:
    """The docstring up to its first blank line or full stop."""
    paragraph = " ".join((cls.__doc__ or "").split("\n\n")[0].split())
    sentence = re.split(r"(?<!\beq)(?<!\bal)\. ", paragraph)[0].rstrip(".")
    return sentence.replace("``", "`").replace("|", "\\|").replace(":class:", "")


def _cost(objective: Objective) -> str:
    """Sweeps of the logits: statistics and gradient always; what comes on top."""
    terms = [objective.spec.terms[i].of for i in objective.spec.tabled]
    if not terms:
        return "2"
    sweeps = "2 or 3" if objective.spec.gate and objective.spec.gate != "entropy" else "3"
    extras = {"mixture": "mixture", "powers": "powers", "adaptive": "sort"}
    found = [word for name, word in extras.items() if any(getattr(term, name) for term in terms)]
    return ", ".join([sweeps, *found])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the pages are as they should be")
    check, stale = parser.parse_args(arguments).check, []
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        new = written(text)
        if new != text:
            stale.append(page)
            if not check:
                (ROOT / page).write_text(new, encoding="utf-8")
    print(f"{'stale' if check else 'written'}: {', '.join(stale) or 'nothing'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
