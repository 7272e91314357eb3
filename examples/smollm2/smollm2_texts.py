"""What the study's models read: texts in rows, none of which is in two parts, and rows that are garbled."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smollm2_options import BLOCKS, Condition, Config

from fused_kd.integrations.labels import LABEL_PAD
from fused_kd.training.data import load_pairs
from fused_kd.training.reading import BUILTIN, read_rows, select
from fused_kd.training.rows import load_rows
from fused_kd.training.stage import fingerprint, fingerprint_file

PARTS = ("test", "valid", "text")  # what is held out comes first

Row = dict[str, list[int]]


def load_texts(files: Sequence[str], key: str, seen: set[str]) -> list[str]:
    """The texts of files that are not ``seen`` yet, in their order; each is then seen.

    Raises:
        ValueError: a row without text, or a file that cannot be read; with file and line.
    """

    def read(row: Any) -> str:
        found = row.get("text", row.get(key)) if isinstance(row, dict) else None
        if isinstance(found, str) and found.strip():
            return found
        raise ValueError(f"expected a text under 'text' or {key!r}, got {str(row)[:80]!r}")

    found: list[str] = []
    for file in files:
        if file == BUILTIN:
            texts = [pair.source for pair in load_pairs(BUILTIN, "train", "en-de")]
        else:
            rows = read_rows(file, "all", lambda row: None)
            texts = select(rows, read, file, limit=None, skip_bad=False)
        for text in texts:
            if text not in seen:
                seen.add(text)
                found.append(text)
    return found


def blocks(tokenizer: Any, texts: Sequence[str], length: int) -> list[Row]:
    """Rows of so many tokens: the texts one after the other, a line each, cut without regard to where they end."""
    encoded = tokenizer([f"{text}\n" for text in texts], add_special_tokens=False)["input_ids"] if texts else []
    ids = [token for each in encoded for token in each]
    parts = (ids[start : start + length] for start in range(0, len(ids) - length + 1, length))
    return [{"input_ids": part, "labels": part} for part in parts]


def garble(rows: Sequence[Row], share: float, seed: int) -> list[Row]:
    """The rows, of which a share has the tokens that carry loss in another order: what a scraper makes of a page."""
    draw, made = random.Random(seed), list(rows)
    for index in draw.sample(range(len(made)), round(share * len(made))):
        ids, labels = list(made[index]["input_ids"]), list(made[index]["labels"])
        places = [place for place, label in enumerate(labels) if label != LABEL_PAD]
        for place, token in zip(places, draw.sample([ids[place] for place in places], len(places)), strict=True):
            ids[place] = labels[place] = token
        made[index] = {"input_ids": ids, "labels": labels}
    return made


class Texts:
    """The texts of a study by part, ``of``, and ``about``, which says what they are."""

    def __init__(self, config: Config) -> None:
        self.config = config
        seen: set[str] = set()  # the held-out texts first, so that no training text is one of them
        files = {name: getattr(config, name) if config.format == BLOCKS else [] for name in PARTS}
        self.of = {name: load_texts(given, config.key, seen) for name, given in files.items()}
        self.about = {"texts": fingerprint(self.of), "length": config.length}
        if config.format != BLOCKS:
            contents = {name: [fingerprint_file(Path(file)) for file in getattr(config, name)] for name in PARTS}
            self.about |= {"format": config.format, "files": contents}

    def rows(self, tokenizer: Any) -> dict[str, list[Row]]:
        """Rows to heal with, to train the arms on, to choose rates by and to judge by; none is in two of them."""
        config = self.config
        if config.format == BLOCKS:
            made = {name: blocks(tokenizer, texts, config.length) for name, texts in self.of.items()}
        else:
            made = self.formatted(tokenizer)
        for name in ("valid", "test"):
            wanted = getattr(config, f"{name}_rows")
            if not made[name]:  # the end of the text, so that it continues nothing that is trained on
                made["text"], made[name] = made["text"][:-wanted], made["text"][-wanted:]
            made[name] = made[name][:wanted]
        text = made.pop("text")
        random.Random(0).shuffle(text)
        heal = min(config.heal["steps"] * config.batch, len(text) // 2)
        if len(text) < 2 * config.batch or not all(made.values()):
            raise ValueError(f"text must give more rows than {len(text)} of {config.length} tokens")
        return made | {"heal": text[:heal], "arms": text[heal:]}

    def formatted(self, tokenizer: Any) -> dict[str, list[Row]]:
        """The rows of chats and the like, each once."""
        config, seen = self.config, set()
        made: dict[str, list[Row]] = {name: [] for name in PARTS}
        for name in PARTS:
            for file in getattr(config, name):
                for row in load_rows(tokenizer, file, "all", format=config.format, max_length=config.length).rows:
                    if (ids := tuple(row["input_ids"])) not in seen:
                        seen.add(ids)
                        made[name].append(row)
        return made

    def rows_of(self, pool: Sequence[Row], condition: Condition, seed: int) -> list[Row]:
        """What a seed's students are trained on."""
        count = min(condition.rows or self.config.steps * self.config.batch, len(pool))
        return garble(random.Random(seed).sample(pool, count), condition.garbled, seed)
