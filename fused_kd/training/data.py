"""Parallel text from the built-in corpus, from JSON files or from the Hugging Face hub.

Rows are JSON objects, either flat (``{"en": ..., "de": ...}``) or ALMA's ``{"translation": {"en": ..., "de":
...}}``, one a line or in one array, plain or gzip. Runs of white space become one space, so that a pair is
always one line a side.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import re
import warnings
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

BUILTIN = "builtin"
SUFFIXES = (".jsonl.gz", ".json.gz", ".jsonl", ".json")
SPLIT_NAMES = {
    "train": ("train",),
    "valid": ("valid", "validation", "val", "dev"),
    "test": ("test",),
}
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
_NAMED_DIRECTION = re.compile(r"(?:^|[._])([a-z]{2,3})-([a-z]{2,3})(?=$|[._])")
# a single file without splits of its own: shares of 1000 for test and valid
_HELD_OUT = 50


class Pair(NamedTuple):
    """One sentence (or paragraph) and its translation, without line breaks."""

    source: str
    target: str


class _Row(NamedTuple):
    place: str
    value: Any


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

            - ``"builtin"``: the built-in English-German corpus (`fused_kd.training.corpus`);
            - a directory: the split's file is found by its name (``train``, ``val``/``valid``/``validation``/
              ``dev``, ``test*``; of several test files the first by name). A direction in the name
              (``test.en-de.jsonl.gz``) is respected; a file of the reverse direction serves for train and
              valid;
            - a file: where its name tells its split, that one only; otherwise about 90/5/5 % of its rows are
              train/valid/test, chosen by a hash of the text, so that the splits never overlap;
            - a hub data set, ``"name"`` or ``"name:config"`` (``"wmt16:de-en"``), through `datasets`.
        split: ``"train"``, ``"valid"`` or ``"test"``. In a directory also a full file stem
            (``"test_2016_flickr"``); on the hub also any split of the data set; for a file also ``"all"``.
        direction: source and target language, ``"en-de"``.
        limit: at most this many pairs; None (default) takes all.
        seed: shuffle with this seed before `limit` is applied; None (default) keeps the order.
        skip_bad: leave out bad rows, with one warning that counts them, instead of raising. A broken JSON
            array raises all the same, as the rows after the break cannot be found.

    Raises:
        ValueError: unknown source, split or direction; a bad row (not JSON, a language missing or empty),
            with its file and line; no rows at all. TypeError: an argument of the wrong type.
    """
    languages = parse_direction(direction)
    if not isinstance(split, str):
        raise TypeError(f"split must be a string, got {split!r}")
    if not isinstance(source, (str, Path)):
        raise TypeError(f"source must be a string or a path, got {source!r}")
    _check_int("limit", limit, 1)
    _check_int("seed", seed, 0)

    if str(source) == BUILTIN:
        rows = _builtin_rows(split, languages, limit)
    else:
        path = Path(source).expanduser()
        if path.is_dir():
            rows = _file_rows(find_split(path, split, direction))
        elif path.is_file():
            rows = _single_file_rows(path, split, min(languages))
        elif path.name.endswith(SUFFIXES) or path.is_absolute() or str(source).startswith((".", "~")):
            raise ValueError(f"source={str(source)!r}: no such file or directory")
        else:
            rows = _hub_rows(str(source), split)

    # without a shuffle nothing past the limit needs to be read
    pairs = _to_pairs(rows, languages, limit if seed is None else None, skip_bad)
    if not pairs:
        raise ValueError(f"source={str(source)!r}, split={split!r}, direction={direction!r}: no usable rows")
    if seed is not None:
        random.Random(seed).shuffle(pairs)
    return pairs if limit is None else pairs[:limit]


def find_split(directory: Path, split: str, direction: str) -> Path:
    """The file of a directory that holds `split`; the rules are those of `load_pairs`.

    Raises:
        ValueError: no file fits, or several do and none is the obvious one.
    """
    source, target = parse_direction(direction)
    files = sorted(path for path in directory.iterdir() if path.is_file() and path.name.endswith(SUFFIXES))
    for path in files:
        if _stem(path) == split and split not in chain(*SPLIT_NAMES.values()):
            return path
    wanted = _canonical_split(split)
    ranked: list[tuple[int, bool, str, Path]] = []
    reverse = None
    for path in files:
        if wanted is None or _split_of(path) != wanted:
            continue
        named = _NAMED_DIRECTION.search(_stem(path))
        if named is None:
            ranked.append((1, _stem(path) not in SPLIT_NAMES[wanted], path.name, path))
        elif named.groups() == (source, target):
            ranked.append((0, False, path.name, path))
        elif named.groups() == (target, source):
            reverse = path
            if wanted != "test":
                ranked.append((2, False, path.name, path))
    if not ranked:
        known = ", ".join(_stem(path) for path in files) or "none"
        hint = f"; split={_stem(reverse)!r} takes the file of the reverse direction" if reverse else ""
        raise ValueError(
            f"split={split!r}, direction={direction!r}: no file fits in {directory} (there: {known}){hint}"
        )
    ranked.sort()
    ties = [entry for entry in ranked if entry[:2] == ranked[0][:2]]
    if len(ties) > 1 and wanted != "test":
        names = ", ".join(entry[2] for entry in ties)
        raise ValueError(f"split={split!r} is ambiguous in {directory} ({names}): give a full file stem as split")
    return ranked[0][3]


def _check_int(name: str, value: object, low: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int or None, got {value!r}")
    if value < low:
        raise ValueError(f"{name}={value}: expected at least {low}, or None")


def _canonical_split(split: str) -> str | None:
    return next((known for known, names in SPLIT_NAMES.items() if split in names), None)


def _stem(path: Path) -> str:
    return next(path.name[: -len(suffix)] for suffix in SUFFIXES if path.name.endswith(suffix))


def _split_of(path: Path) -> str | None:
    stem = _stem(path)
    if stem.startswith("test"):
        return "test"
    return _canonical_split(re.split(r"[._-]", stem, maxsplit=1)[0])


def _builtin_rows(split: str, languages: tuple[str, str], limit: int | None) -> Iterator[_Row]:
    from fused_kd.training.corpus import SIZES, toy_corpus

    if set(languages) != {"en", "de"}:
        raise ValueError(f"direction={'-'.join(languages)!r}: the built-in corpus has 'en-de' and 'de-en' only")
    known = _canonical_split(split)
    if known is None:
        raise ValueError(f"split={split!r}: the built-in corpus has {', '.join(SIZES)}")
    rows = toy_corpus(known, max(SIZES[known], limit or 0))
    return (_Row(f"built-in corpus, row {number}", row) for number, row in enumerate(rows))


def _single_file_rows(path: Path, split: str, language: str) -> Iterator[_Row]:
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"source={str(path)!r}: expected a file name that ends in one of {', '.join(SUFFIXES)}")
    wanted, own = _canonical_split(split), _split_of(path)
    if split in ("all", _stem(path)) or (own is not None and wanted == own):
        return _file_rows(path)
    if wanted is None:
        raise ValueError(f"split={split!r}: expected train, valid, test or all for the file {path}")
    if own is not None:
        raise ValueError(
            f"split={split!r}: {path} holds the {own} split by its name; give its directory, or split='all'"
        )
    return (row for row in _file_rows(path) if _hash_split(row.value, language) in (wanted, None))


def _hash_split(value: Any, language: str) -> str | None:
    texts = _texts(value)
    if texts is None or not isinstance(texts.get(language), str):
        return None
    digest = hashlib.blake2b(" ".join(texts[language].split()).encode("utf-8", "replace"), digest_size=8).digest()
    bucket = int.from_bytes(digest, "big") % 1000
    return "test" if bucket < _HELD_OUT else "valid" if bucket < 2 * _HELD_OUT else "train"


def _hub_rows(source: str, split: str) -> Iterator[_Row]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"source={source!r} is not a file or directory, and hub data sets need the 'datasets' package: "
            "install fused_kd[train]"
        ) from error
    name, _, config = source.partition(":")
    try:
        known = datasets.get_dataset_split_names(name, config or None)
    except Exception as error:
        raise ValueError(
            f"source={source!r} is neither {BUILTIN!r} nor a file or directory here, and the Hugging Face "
            f"hub did not give it: {error}"
        ) from error
    aliases = (split, *SPLIT_NAMES.get(_canonical_split(split) or "", ()))
    actual = next((alias for alias in aliases if alias in known), None)
    if actual is None:
        raise ValueError(f"split={split!r}: {source} has {', '.join(map(str, known))}")
    rows = datasets.load_dataset(name, config or None, split=actual)
    return (_Row(f"{source} ({actual}), row {number}", row) for number, row in enumerate(rows))


def _file_rows(path: Path) -> Iterator[_Row]:
    opener = gzip.open if path.name.endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            lines = enumerate(file, start=1)
            first = next(((number, line) for number, line in lines if line.strip()), None)
            if first is None:
                return
            number, head = first
            if head.lstrip().startswith("["):
                yield from _array_rows(path, "\n" * (number - 1) + head + file.read())
            else:
                yield from _line_rows(path, chain([first], lines))
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _line_rows(path: Path, lines: Iterable[tuple[int, str]]) -> Iterator[_Row]:
    for number, line in lines:
        if not line.strip():
            continue
        try:
            value: Any = json.loads(line)
        except json.JSONDecodeError as error:
            value = error
        yield _Row(f"{path}, line {number}", value)


def _array_rows(path: Path, text: str) -> Iterator[_Row]:
    decoder = json.JSONDecoder()
    gap = re.compile(r"\s*")
    position = gap.match(text, gap.match(text).end() + 1).end()  # type: ignore[union-attr]
    line, counted = 1, 0
    closed = text[position : position + 1] == "]"
    while not closed:
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {error.lineno}: not a JSON array: {error.msg}") from error
        yield _Row(f"{path}, line {line}", value)
        position = gap.match(text, position).end()  # type: ignore[union-attr]
        closed = text[position : position + 1] == "]"
        if not closed and text[position : position + 1] != ",":
            line += text.count("\n", counted, position)
            raise ValueError(f"{path}, line {line}: not a JSON array: expected ',' or ']' after a row")
        position = gap.match(text, position + 1).end()  # type: ignore[union-attr]


def _texts(value: Any) -> dict[str, Any] | None:
    if not isinstance(value, dict):
        return None
    nested = value.get("translation")
    return nested if isinstance(nested, dict) else value


def _to_pairs(rows: Iterator[_Row], languages: tuple[str, str], limit: int | None, skip_bad: bool) -> list[Pair]:
    pairs: list[Pair] = []
    complaints: list[str] = []
    for row in rows:
        pair = _to_pair(row.value, languages)
        if isinstance(pair, Pair):
            pairs.append(pair)
        elif skip_bad:
            complaints.append(f"{row.place}: {pair}")
        else:
            raise ValueError(f"{row.place}: {pair}")
        if len(pairs) == limit:
            break
    if complaints:
        count = f"skipped {len(complaints)} bad rows of {len(complaints) + len(pairs)}"
        warnings.warn(f"{count}; the first: {complaints[0]}", stacklevel=3)
    return pairs


def _to_pair(value: Any, languages: tuple[str, str]) -> Pair | str:
    """The pair of a row, or what is wrong with it."""
    if isinstance(value, json.JSONDecodeError):
        return f"not JSON: {value}"
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
