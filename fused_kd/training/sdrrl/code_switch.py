"""Code-switching: some words of a question are replaced by a translation of theirs."""

from __future__ import annotations

import hashlib
import random
import re

from fused_kd.training.sdrrl.dictionary import Dictionary

# letters, with hyphens and apostrophes between them: "T-Shirt" and "man's" are words, "3D" and "my_cat" none
WORD = re.compile(r"(?<!\w)[^\W\d_]+(?:[-'’][^\W\d_]+)*(?!\w)")


def code_switch(text: str, dictionary: Dictionary, *, p: float, seed: int, key: str) -> str:
    """``text`` with each word that the dictionary has replaced with probability ``p``.

    A whole word goes for one of its senses, all equally likely; what lies between words stays. The sense is written as
    the word was: in lower case, with a capital (a single capital letter too), or in capitals; a word of mixed case
    gets the sense as the dictionary has it.

    Args:
        p: in [0, 1]. Words that the dictionary lacks stay, so the share of all words that change is below it.
        seed, key: what the choice depends on besides the text; with a key of its own a row is switched alike whatever
            other rows there are.

    Raises:
        ValueError: ``p`` outside [0, 1].
    """
    check_share(p)
    digest = hashlib.sha256(f"{seed}\n{key}".encode()).digest()
    rng = random.Random(int.from_bytes(digest[:8], "big"))

    def switched(match: re.Match[str]) -> str:
        word = match[0]
        # one draw a word, known or not: another entry in the dictionary changes no other word
        drawn, which = rng.random(), rng.random()
        senses = dictionary.get(word)
        if not senses or drawn >= p:
            return word
        return in_case_of(word, senses[int(which * len(senses))])

    return WORD.sub(switched, text)


def in_case_of(word: str, sense: str) -> str:
    """``sense`` in the case of ``word``: lower, Title or UPPER."""
    if word.islower():
        return sense.lower()
    if word.isupper() and len(word) > 1:
        return sense.upper()
    if word[0].isupper() and not any(char.isupper() for char in word[1:].replace("-", "")):
        return sense[0].upper() + sense[1:].lower()
    return sense


def check_share(p: float) -> None:
    """Raise ``ValueError`` unless ``p`` is a number in [0, 1]."""
    if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 <= p <= 1:
        raise ValueError(f"p must be in [0, 1], got {p!r}")
