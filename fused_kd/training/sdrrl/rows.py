"""What a study's files hold: tasks in one or more languages, pairs for transfer, rows to train on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fused_kd.training.data.instructions import Instruction
from fused_kd.training.runs import read_lines, write_lines

Style = Literal["alpaca", "tiny"]


class Task(NamedTuple):
    """One instruction in each of its languages. ``kind`` says how its answer is scored; "" for any other."""

    id: str
    kind: str
    texts: Mapping[str, Instruction]


class TrainingRow(NamedTuple):
    """One row to train on. ``part`` is the combination ("ss", "st", "ts", "tt") or a direction ("en-de")."""

    id: str
    part: str
    instruction: Instruction


def render(instruction: Instruction, style: Style) -> str:
    """The prompt: Alpaca's, or for tiny models input and instruction, each on a line of its own."""
    if style == "alpaca":
        return instruction.prompt()
    return "".join(f"{text}\n" for text in (instruction.input, instruction.instruction) if text)


def dump(row: Task | TrainingRow) -> dict[str, Any]:
    """The row as JSON."""
    if isinstance(row, Task):
        return {"id": row.id, "kind": row.kind} | {c: text._asdict() for c, text in row.texts.items()}
    return {"id": row.id, "part": row.part} | row.instruction._asdict()


def write_rows(folder: Path, files: Mapping[str, Iterable[Any]]) -> None:
    """Each name's rows, JSON values, as ``NAME.jsonl``."""
    for name, rows in files.items():
        write_lines(folder / f"{name}.jsonl", (json.dumps(row, ensure_ascii=False) for row in rows))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in read_lines(path)]


def read_tasks(path: Path) -> list[Task]:
    """Tasks as `dump` wrote them."""
    return [
        Task(row.pop("id"), row.pop("kind"), {language: Instruction(**text) for language, text in row.items()})
        for row in read_jsonl(path)
    ]


def read_training_rows(path: Path) -> list[TrainingRow]:
    """Rows as `dump` wrote them."""
    return [TrainingRow(row.pop("id"), row.pop("part"), Instruction(**row)) for row in read_jsonl(path)]
