"""Which of a model's own translations are fit to train on: where they are cut, and the rules that drop the rest."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from fused_kd.training.cycle_distill.language import Identifier, check_identifier, get_identifier, wrong_script

# in the order in which they are asked; a translation counts for the first that it breaks
RULES = ("empty", "unfinished", "copy", "length", "repetition", "language")
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Filters:
    """What the rules go by.

    Args:
        markers: a translation ends before the first of them; by default the end of the line, and what begins the next
            part of a prompt.
        length_ratio: smallest and largest allowed length of a translation over its source's, in characters. For
            languages that need far fewer characters than the source's give other bounds.
        unique_words: at least this share of the words are different ones.
        loops: so many times the same text of four or more characters, one right after the other, is a loop.
        identifier: tells the language, as of :func:`~fused_kd.training.cycle_distill.language.get_identifier`. One of
            the form ``module:function`` is code, which runs when translations are filtered and not before: take a
            configuration with one only from where you would take a program.

    Raises:
        ValueError: bounds out of order or range, an unknown identifier.
    """

    markers: tuple[str, ...] = ("\n", "###")
    length_ratio: tuple[float, ...] = (0.5, 2.0)
    unique_words: float = 0.5
    loops: int = 3
    identifier: str = "stop_words"

    def __post_init__(self) -> None:
        ratio = self.length_ratio
        if len(ratio) != 2 or not 0 <= ratio[0] < ratio[1] or not all(map(math.isfinite, ratio)):
            raise ValueError(f"length_ratio must be two numbers, 0 <= low < high, got {ratio!r}")
        if not 0 <= self.unique_words <= 1:
            raise ValueError(f"unique_words must be in [0, 1], got {self.unique_words!r}")
        if self.loops < 2:
            raise ValueError(f"loops must be at least 2, got {self.loops!r}")
        if not all(self.markers):
            raise ValueError(f"markers must not be empty texts, got {self.markers!r}")
        check_identifier(self.identifier)

    @property
    def identify(self) -> Identifier | None:
        """The identifier; one of a module is imported now."""
        return get_identifier(self.identifier)


def find_cut(text: str, markers: Sequence[str]) -> int | None:
    """Where the first marker after the first visible character begins; None where there is none."""
    start = len(text) - len(text.lstrip())
    if any(text.startswith(marker, start) for marker in markers):
        return start  # a marker and no translation
    found = [place for marker in markers if (place := text.find(marker, start)) >= 0]
    return min(found) if found else None


def truncated(text: str, markers: Sequence[str]) -> str:
    """The text up to its first marker, on one line."""
    return " ".join(text[: find_cut(text, markers)].split())


def broken_rule(
    source: str, text: str, *, whole: bool, languages: tuple[str, str], filters: Filters, identify: Identifier | None
) -> str | None:
    """The first of ``RULES`` that a translation breaks, or None.

    Args:
        source, text: the sentence and its translation, already cut.
        whole: whether the translation ended, by EOS or at a marker, and not because no more tokens were made.
        languages: codes of the source and the target language.
        filters: bounds of the rules. identify: its identifier, looked up once for many texts; None asks for nothing
            of the language.
    """
    words, source_words = ([word.casefold() for word in _WORD.findall(t)] for t in (text, source))
    low, high = filters.length_ratio
    if not any(map(str.isalnum, text)):
        return "empty"
    if not whole:
        return "unfinished"
    if words == source_words:
        return "copy"
    if not low <= len(text) / len(source) <= high:
        return "length"
    if len(set(words)) < filters.unique_words * len(words) or _loops(text, filters.loops):
        return "repetition"
    if identify is not None:
        target = languages[1].split("_")[0].lower()
        found = identify(text)
        if wrong_script(text, target) or (found is not None and found != target):
            return "language"
    return None


def _loops(text: str, times: int) -> bool:
    text = " ".join(text.casefold().split()) + " "
    words = text.split()
    in_a_row = 1
    for earlier, later in pairwise(words):
        in_a_row = in_a_row + 1 if earlier == later else 1
        if in_a_row >= times:
            return True
    return re.search(rf"(.{{4,}}?)\1{{{times - 1},}}", text) is not None
