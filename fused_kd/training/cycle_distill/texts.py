"""The text of a run: the few pairs, the sentences to translate, plain text for a base, and what is scored."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from fused_kd.training.cycle_distill.settings import CycleDistill
from fused_kd.training.data.pairs import Pair, load_pairs, parse_direction
from fused_kd.training.data.reading import text_fault, text_lines
from fused_kd.training.data.sources import SUFFIXES, read_rows, select
from fused_kd.training.runs import read_lines, write_lines

PARTS = ("pairs", "sentences", "plain", "valid", "test")


@dataclass(frozen=True)
class Texts:
    """``sentences`` are the sources to translate, with an empty target where no reference is known.

    ``plain`` is text of the target language, of other rows than the sentences; empty without pretraining.
    """

    pairs: list[Pair]
    sentences: list[Pair]
    plain: list[str]
    valid: list[Pair]
    test: list[Pair]


def collect_texts(config: CycleDistill) -> Texts:
    """Read everything.

    Raises:
        ValueError: as ``load_pairs``; also fewer training rows than asked for.
    """
    own = config.monolingual is None
    wanted = config.pairs + (config.sentences if own else 0)
    limit = None if config.pretrain is not None else wanted
    try:
        train = load_pairs(config.data, "train", config.direction, limit=limit)
    except ValueError as error:
        raise ValueError(f"{error}; give parallel text as data=PATH") from error
    if len(train) < config.pairs + own + (config.pretrain is not None):
        raise ValueError(f"pairs={config.pairs} leaves no sentences of the {len(train)} training rows of {config.data}")
    if config.monolingual is None:
        sentences = train[config.pairs : wanted]
    else:
        source = parse_direction(config.direction)[0]
        sentences = [Pair(text, "") for text in load_sentences(config.monolingual, source, config.sentences)]
    plain: list[str] = []
    if config.pretrain is not None:
        references = {pair.target for pair in sentences}
        plain = [pair.target for pair in train[wanted:] if pair.target not in references][: config.pretrain.plain]
        if not plain:
            raise ValueError(
                f"sentences={config.sentences}, pairs={config.pairs}: none of the {len(train)} training rows is left "
                "for plain text of the target language"
            )
    valid, test = (
        load_pairs(config.data, split, config.direction, limit=most)
        for split, most in ((config.valid, config.valid_limit), (config.test, config.test_limit))
    )
    return Texts(train[: config.pairs], sentences, plain, valid, test)


def load_sentences(source: str, language: str, limit: int) -> list[str]:
    """At most ``limit`` sentences of a text file (one a line, plain or ``.gz``), of JSON or of a hub data set.

    Rows of the latter two have a column of the language's code or "text". Empty lines and those that
    are not UTF-8 are left out.

    Raises:
        ValueError: nothing there, a row without text.
    """
    path = Path(source).expanduser()
    if path.is_file() and not path.name.endswith(SUFFIXES):
        lines = (" ".join(line.split()) for line in text_lines(path) if text_fault(line) is None)
        found = list(islice(filter(None, lines), limit))
        if not found:
            raise ValueError(f"monolingual={source!r} has no text")
        return found

    def text(value: Any) -> str | None:
        value = value.get("translation", value) if isinstance(value, dict) else {"text": value}
        found = next((value[key] for key in (language, "text", "sentence") if isinstance(value.get(key), str)), None)
        return None if found is None else " ".join(found.split())

    def parse(value: Any) -> tuple[str] | str:
        found = text(value)
        return (found,) if found else f"no text for the language {language!r} and none named 'text'"

    rows = read_rows(source, "all" if path.is_file() else "train", text)
    return [item[0] for item in select(rows, parse, f"monolingual={source!r}", limit=limit, seed=None, skip_bad=True)]


def write_texts(folder: Path, texts: Texts) -> None:
    """One JSONL file a part."""
    for part in PARTS:
        items: Iterable[Any] = getattr(texts, part)
        rows = ({"text": item} if isinstance(item, str) else item._asdict() for item in items)
        write_lines(folder / f"{part}.jsonl", (json.dumps(row, ensure_ascii=False) for row in rows))


def read_texts(folder: Path) -> Texts:
    """What :func:`write_texts` wrote."""
    rows = {part: [json.loads(line) for line in read_lines(folder / f"{part}.jsonl")] for part in PARTS}
    return Texts(
        plain=[row["text"] for row in rows.pop("plain")],
        **{part: [Pair(**row) for row in found] for part, found in rows.items()},
    )
