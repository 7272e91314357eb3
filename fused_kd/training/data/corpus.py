"""The built-in English-German corpus: a toy language, made by a small grammar, offline and deterministic.

It exists so that everything runs, and means something, without any data at hand: German words and German
grammar (gender, case on articles, adjectives and weak nouns, verb-second and inverted main clauses,
verb-final subordinate and relative clauses, separable verbs, modals and future with the infinitive last,
perfect with haben and sein, negation with nicht and kein) against plain English. A model must learn these
rules, since the sentences are far too many to memorise. It is no natural language: some 250 words and simple
sentences, often of odd meaning, and scores on it say nothing about translation at large. Real data is one
flag away: `fused_kd.training.data.pairs.load_pairs` takes JSON files and hub data sets in its place.
"""

from __future__ import annotations

import hashlib

from fused_kd.training.data.grammar import sentences

SIZES = {"train": 20_000, "valid": 500, "test": 500}
MAX_SIZE = 1_000_000
# of 100 sets of content words: 5 valid, 5 test, 90 train
_BOUNDS = {"valid": 5, "test": 10, "train": 100}


def toy_corpus(split: str, size: int | None = None, *, seed: int = 0) -> list[dict[str, str]]:
    """Sentence pairs of the built-in toy language.

    No sentence occurs twice on either side, so one English sentence has one German reference and the other
    way round. A hash of the content words of a sentence tells its split: whatever the sizes and seeds, splits
    share no sentence on either side, not even one with other articles, numbers or tenses. The first n rows
    are the same for every size.

    Args:
        split: ``"train"``, ``"valid"`` or ``"test"``.
        size: number of rows, at most 1,000,000; None (default) gives 20,000, 500 and 500.
        seed: another seed (default 0) gives other sentences.

    Returns:
        Rows ``{"en": ..., "de": ...}``.

    Raises:
        ValueError: an unknown split, a size out of range. TypeError: size or seed is not an int.
    """
    if split not in SIZES:
        raise ValueError(f"split={split!r}: expected one of {', '.join(SIZES)}")
    size = SIZES[split] if size is None else size
    for name, value in (("size", size), ("seed", seed)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {value!r}")
    if not 1 <= size <= MAX_SIZE:
        raise ValueError(f"size={size}: expected 1 to {MAX_SIZE}")
    rows: list[dict[str, str]] = []
    english: set[str] = set()
    german: set[str] = set()
    for en, de, words in sentences(seed):
        if _split(words) != split or en in english or de in german:
            continue
        english.add(en)
        german.add(de)
        rows.append({"en": en, "de": de})
        if len(rows) == size:
            break
    return rows


def _split(words: frozenset[str]) -> str:
    digest = hashlib.blake2b("|".join(sorted(words)).encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "big") % 100
    return next(split for split, bound in _BOUNDS.items() if number < bound)
