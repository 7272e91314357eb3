"""Parallel text from the built-in corpus, from files or from the Hugging Face hub.

JSON rows are flat (``{"en": ..., "de": ...}``) or ALMA's ``{"translation": {"en": ..., "de": ...}}``; plain
text is two files, aligned by line. Runs of white space become one space, so that a pair is always one line a
side.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fused_kd.training.data.reading import Row
from fused_kd.training.data.sources import BUILTIN, canonical_split, check_request, find_file, read_rows, select

LANGUAGES = {
    "ar": "Arabic", "cs": "Czech", "da": "Danish", "de": "German", "el": "Greek", "en": "English",
    "es": "Spanish", "et": "Estonian", "fi": "Finnish", "fr": "French", "ha": "Hausa", "he": "Hebrew",
    "hi": "Hindi", "hu": "Hungarian", "is": "Icelandic", "it": "Italian", "ja": "Japanese", "ko": "Korean",
    "lt": "Lithuanian", "lv": "Latvian",
    "nl": "Dutch", "no": "Norwegian", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian",
    "ru": "Russian", "sv": "Swedish", "tr": "Turkish", "uk": "Ukrainian", "zh": "Chinese",
}  # fmt: skip

_CODE = r"[A-Za-z]{2,3}(?:_[A-Za-z]{2,4})?"
_DIRECTION = re.compile(rf"({_CODE})-({_CODE})")


class Pair(NamedTuple):
    """One sentence (or paragraph) and its translation, without line breaks."""

    source: str
    target: str


def parse_direction(direction: str) -> tuple[str, str]:
    """``"en-de"`` -> ``("en", "de")``.

    Raises:
        TypeError: not a string. ValueError: not two different language codes joined by a hyphen.
    """
    if not isinstance(direction, str):
        raise TypeError(f"direction must be a string such as 'en-de', got {direction!r}")
    match = _DIRECTION.fullmatch(direction)
    if match is None or match[1] == match[2]:
        raise ValueError(
            f"direction={direction!r}: expected two different language codes and a hyphen, such as 'en-de'"
        )
    return match[1], match[2]


def language_name(code: str) -> str:
    """English name of a language code; a code that is not in `LANGUAGES` stands for itself."""
    return LANGUAGES.get(code.split("_")[0].lower(), code)


def load_pairs(
    source: str,
    split: str,
    direction: str,
    *,
    limit: int | None = None,
    seed: int | None = None,
    skip_bad: bool = False,
) -> list[Pair]:
    """Parallel text as a list of `Pair`.

    Args:
        source: one of

            - ``"builtin"``: the built-in English-German corpus (`fused_kd.training.data.corpus`);
            - a directory: the split's file is found by its name (``train``, ``val``/``valid``/``validation``/
              ``dev``, ``test*``; of several test files the first by name). A direction in the name
              (``test.en-de.jsonl.gz``) is respected; a file of the reverse direction serves for train and
              valid. Text files count where both sides are there: ``train.en`` and ``train.de``, or
              ``train.de-en.en`` and ``train.de-en.de``, plain or with ``.gz``;
            - a JSON file, or the prefix of two text files (``corpus`` for ``corpus.en`` and ``corpus.de``):
              where the name tells the split, that one only; otherwise about 90/5/5 % of its rows are
              train/valid/test, chosen by a hash of the text, so that the splits never overlap;
            - a hub data set, ``"name"`` or ``"name:config"`` (``"wmt16:de-en"``), through `datasets`.
        split: ``"train"``, ``"valid"`` or ``"test"``. In a directory also a full file stem
            (``"test_2016_flickr"``); on the hub also any split of the data set; for a file also ``"all"``.
        direction: source and target language, ``"en-de"``.
        limit: at most this many pairs; None (default) takes all.
        seed: shuffle with this seed before `limit` is applied; None (default) keeps the order.
        skip_bad: leave out bad rows, with one warning that counts them, instead of raising. A broken JSON
            array, and text files with unequal numbers of lines, raise all the same, as the rows after the
            break cannot be found.

    Raises:
        ValueError: unknown source, split or direction; a bad row (not JSON, a language missing or empty),
            with its file and line; no rows at all. TypeError: an argument of the wrong type.
    """
    languages = parse_direction(direction)
    check_request(source, split, limit, seed)
    if str(source) == BUILTIN:
        rows = _builtin_rows(split, languages, limit, shuffled=seed is not None)
    else:
        rows = read_rows(source, split, lambda value: _text(value, min(languages)), languages)
    what = f"source={str(source)!r}, split={split!r}, direction={direction!r}"
    return select(rows, lambda value: _to_pair(value, languages), what, limit=limit, seed=seed, skip_bad=skip_bad)


def load_directions(
    source: str | Mapping[str, str],
    split: str,
    directions: Sequence[str],
    *,
    limit: int | None = None,
    seed: int | None = None,
    skip_bad: bool = False,
) -> dict[str, list[Pair]]:
    """`load_pairs` for several directions, in their order: direction -> pairs.

    ``source`` may be one for all or a mapping from each direction to its own (a hub data set with a
    configuration a language pair). ``limit`` is that of one direction. The seed is the same for all, so the
    two directions of one file have the same pairs, turned around.

    Raises:
        ValueError: as `load_pairs`; also no directions, one twice, or one without a source.
        TypeError: as `load_pairs`; also one string for the directions.
    """
    if isinstance(directions, str):
        raise TypeError(f"directions must be a sequence such as ['en-de', 'de-en'], got {directions!r}")
    directions = list(directions)
    for direction in directions:
        parse_direction(direction)
    if not directions or len(set(directions)) != len(directions):
        raise ValueError(f"directions={directions!r}: expected at least one, and each once")
    sources = source if isinstance(source, Mapping) else dict.fromkeys(directions, source)
    missing = [direction for direction in directions if direction not in sources]
    if missing:
        raise ValueError(f"source has no entry for {', '.join(missing)} (there: {', '.join(sources) or 'none'})")
    return {
        direction: load_pairs(sources[direction], split, direction, limit=limit, seed=seed, skip_bad=skip_bad)
        for direction in directions
    }


def find_split(directory: Path, split: str, direction: str) -> Path:
    """The file of a directory that holds `split`, for text its prefix; the rules are those of `load_pairs`.

    Raises:
        ValueError: no file fits, or several do and none is the obvious one.
    """
    return find_file(directory, split, parse_direction(direction))


def _builtin_rows(split: str, languages: tuple[str, str], limit: int | None, shuffled: bool) -> Iterator[Row]:
    from fused_kd.training.data.corpus import SIZES, toy_corpus

    if set(languages) != {"en", "de"}:
        raise ValueError(f"direction={'-'.join(languages)!r}: the built-in corpus has 'en-de' and 'de-en' only")
    known = canonical_split(split)
    if known is None:
        raise ValueError(f"split={split!r}: the built-in corpus has {', '.join(SIZES)}")
    # in its own order a part is made alone: the first rows are the same for every size
    rows = toy_corpus(known, max(SIZES[known], limit or 0) if shuffled else limit)
    return (Row(f"built-in corpus, row {number}", row) for number, row in enumerate(rows))


def _texts(value: Any) -> dict[str, Any] | None:
    if not isinstance(value, dict):
        return None
    nested = value.get("translation")
    return nested if isinstance(nested, dict) else value


def _text(value: Any, language: str) -> str | None:
    text = (_texts(value) or {}).get(language)
    return text if isinstance(text, str) else None


def _to_pair(value: Any, languages: tuple[str, str]) -> Pair | str:
    """The pair of a row, or what is wrong with it."""
    texts = _texts(value)
    if texts is None:
        return f"expected an object with one text a language, got {str(value)[:80]}"
    sides = []
    for language in languages:
        text = texts.get(language)
        if not isinstance(text, str):
            return f"no text for the language {language!r} (columns: {', '.join(map(str, texts)) or 'none'})"
        text = " ".join(text.split())
        if not text:
            return f"the text for the language {language!r} is empty"
        sides.append(text)
    return Pair(*sides)
