"""Bilingual dictionaries: one word and one translation of it a line, with a tab between."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Dictionary:
    """The translations of each word, its senses, both in lower case; a word is never its own sense.

    Args:
        senses: word -> translations, in the file's order, each once.
    """

    senses: Mapping[str, tuple[str, ...]] = field(repr=False)

    def __len__(self) -> int:
        return len(self.senses)

    def get(self, word: str) -> tuple[str, ...]:
        """The senses of a word in any case; none for a word that is not there."""
        return self.senses.get(word.lower(), ())


def load_dictionary(path: str | Path) -> tuple[Dictionary, Dictionary]:
    """A dictionary and its reverse, from a TSV file, plain or ``.gz``.

    Pairs of equal words are left out: such a switch would change nothing. Blank lines are passed over.

    Raises:
        ValueError: no such file, a line that is not two texts with a tab between (with its place), no pairs at all.
    """
    forward: dict[str, dict[str, None]] = {}
    backward: dict[str, dict[str, None]] = {}
    opener: Any = gzip.open if str(path).endswith(".gz") else open
    try:
        with opener(Path(path).expanduser(), "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                pair = [" ".join(text.split()).lower() for text in line.split("\t")]
                if len(pair) != 2 or not all(pair):
                    raise ValueError(f"{path}, line {number}: expected a word, a tab and its translation, got {line!r}")
                if pair[0] != pair[1]:
                    forward.setdefault(pair[0], {})[pair[1]] = None
                    backward.setdefault(pair[1], {})[pair[0]] = None
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise ValueError(f"dictionary={str(path)!r} cannot be read: {error}") from error
    if not forward:
        raise ValueError(f"dictionary={str(path)!r}: no pairs of different words")
    found = [Dictionary({word: tuple(senses) for word, senses in side.items()}) for side in (forward, backward)]
    return found[0], found[1]
