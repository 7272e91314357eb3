"""Rows of JSON files, of line-aligned text and of hub data sets, each with its place for error messages.

JSON is one object a line or one array, plain or gzip. Parallel text is a prefix: ``corpora/train`` stands for the files
``corpora/train.en`` and ``corpora/train.de``, plain or with ``.gz``; line i of one goes with line i of the other.
A bad row does not hide the others: `datasets` reads the hub's data sets alone, as its readers of files name no line.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import re
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

BUILTIN = "builtin"
SUFFIXES = (".jsonl.gz", ".json.gz", ".jsonl", ".json")
SPLIT_NAMES = {"train": ("train",), "valid": ("valid", "validation", "val", "dev"), "test": ("test",)}

_NAMED_DIRECTION = re.compile(r"(?:^|[._])([a-z]{2,3})-([a-z]{2,3})(?=$|[._])")
# a single file without splits of its own: shares of 1000 for test and valid
_HELD_OUT = 50

Item = TypeVar("Item")
_GAP = re.compile(r"\s*")


class Row(NamedTuple):
    """What was read (for a broken line a `ValueError` that says what is wrong), and where."""

    place: str
    value: Any


def read_rows(
    source: str | Path, split: str, key: Callable[[Any], str | None], languages: tuple[str, str] | None = None
) -> Iterator[Row]:
    """The rows of a split.

    Args:
        source: a directory (the file is found by `find_file`); a JSON file or a prefix of parallel text (by
            its name all rows are of one split, or a hash of `key` splits them); else a hub data set,
            ``"name"`` or ``"name:config"``.
        split: ``"train"``, ``"valid"``, ``"test"`` or another spelling of them; a file's stem; ``"all"`` for
            a file; any split that a hub data set has.
        key: the text of a row's value that decides on its part of a file without splits; None for a row
            without that text, which is in every part, so that it is complained about.
        languages: source and target of parallel text; None (default) for other data.

    Raises:
        ValueError, ImportError: a missing path or split, text without its other side, a file that cannot be
        read, or no `datasets` for a hub name.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return file_rows(find_file(path, split, languages), languages)
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise ValueError(
                f"source={str(path)!r}: expected a file name that ends in one of {', '.join(SUFFIXES)}; "
                "of parallel text the path without the language"
            )
        return _part_of_file(path, split, file_rows(path, None), key)
    if languages and any(_side(path, language) for language in languages):
        return _part_of_file(path, split, file_rows(path, languages), key)
    if path.name.endswith(SUFFIXES) or path.is_absolute() or str(source).startswith((".", "~")):
        beside = "".join(f", nor {path.name}.{language}" for language in languages or ())
        raise ValueError(f"source={str(source)!r}: no such file or directory{beside}")
    return _hub_rows(str(source), split)


def select(
    rows: Iterable[Row],
    parse: Callable[[Any], Item | str],
    what: str,
    *,
    limit: int | None,
    seed: int | None,
    skip_bad: bool,
) -> list[Item]:
    """At most `limit` items of the rows, shuffled first where there is a `seed`.

    ``parse`` makes an item of a row's value, or says what is wrong with it; that raises, or with `skip_bad`
    goes into one warning. ``what`` names the rows in the error for none at all.
    """
    items: list[Item] = []
    complaints: list[str] = []
    for place, value in rows:
        item = str(value) if isinstance(value, ValueError) else parse(value)
        if not isinstance(item, str):
            items.append(item)
        elif skip_bad:
            complaints.append(f"{place}: {item}")
        else:
            raise ValueError(f"{place}: {item}")
        # without a shuffle nothing past the limit needs to be read
        if seed is None and len(items) == limit:
            break
    if complaints:
        count = f"skipped {len(complaints)} bad rows of {len(complaints) + len(items)}"
        warnings.warn(f"{count}; the first: {complaints[0]}", stacklevel=3)
    if not items:
        raise ValueError(f"{what}: no usable rows")
    if seed is not None:
        random.Random(seed).shuffle(items)
    return items[:limit]


def check_request(source: object, split: object, limit: object, seed: object) -> None:
    """The checks of arguments that all loaders share."""
    if not isinstance(split, str):
        raise TypeError(f"split must be a string, got {split!r}")
    if not isinstance(source, (str, Path)):
        raise TypeError(f"source must be a string or a path, got {source!r}")
    for name, value, low in (("limit", limit, 1), ("seed", seed, 0)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int or None, got {value!r}")
        if value < low:
            raise ValueError(f"{name}={value}: expected at least {low}, or None")


def canonical_split(split: str) -> str | None:
    """``"dev"`` -> ``"valid"``; None for a name that is not in `SPLIT_NAMES`."""
    return next((known for known, names in SPLIT_NAMES.items() if split in names), None)


def find_file(directory: Path, split: str, languages: tuple[str, str] | None = None) -> Path:
    """The JSON file, or the prefix of the two text files, that holds `split` in a directory.

    Raises:
        ValueError: no file fits, or several do and none is the obvious one.
    """
    paths = [path for path in directory.iterdir() if path.is_file()]
    files = [path for path in paths if path.name.endswith(SUFFIXES)]
    prefixes, lone = _text_prefixes(paths, languages)
    files = sorted([*files, *prefixes])
    for path in files:
        if _stem(path) == split and split not in chain(*SPLIT_NAMES.values()):
            return path
    wanted = canonical_split(split)
    ranked: list[tuple[int, bool, str, Path]] = []
    reverse = None
    for path in files:
        if wanted is None or _split_of(path) != wanted:
            continue
        named = _NAMED_DIRECTION.search(_stem(path)) if languages else None
        if named is None:
            ranked.append((1, _stem(path) not in SPLIT_NAMES[wanted], path.name, path))
        elif named.groups() == languages:
            ranked.append((0, False, path.name, path))
        elif named.groups()[::-1] == languages:
            reverse = path
            if wanted != "test":
                ranked.append((2, False, path.name, path))
    if not ranked:
        known = ", ".join(_stem(path) for path in files) or "none"
        of = f", direction={'-'.join(languages)!r}" if languages else ""
        hint = f"; split={_stem(reverse)!r} takes the file of the reverse direction" if reverse else ""
        hint += f"; without its other side: {', '.join(lone)}" if lone else ""
        raise ValueError(f"split={split!r}{of}: no file fits in {directory} (there: {known}){hint}")
    ranked.sort()
    ties = [entry for entry in ranked if entry[:2] == ranked[0][:2]]
    if len(ties) > 1 and wanted != "test":
        names = ", ".join(entry[2] for entry in ties)
        raise ValueError(f"split={split!r} is ambiguous in {directory} ({names}): give a full file stem as split")
    return ranked[0][3]


def file_rows(path: Path, languages: tuple[str, str] | None) -> Iterator[Row]:
    """All rows of a JSON file, or, in `languages`, of the text with that prefix."""
    if languages is not None and not path.name.endswith(SUFFIXES):
        return aligned_rows(text_paths(path, languages), languages)
    return json_rows(path)


def text_paths(prefix: Path, languages: tuple[str, str]) -> tuple[Path, Path]:
    """Both files of parallel text. Raises ``ValueError`` naming the one that is missing."""
    first, second = (_side(prefix, language) for language in languages)
    if first is None or second is None:
        missing = languages[0] if first is None else languages[1]
        raise ValueError(f"source={str(prefix)!r}: there is no {prefix.name}.{missing} or {prefix.name}.{missing}.gz")
    return first, second


def _side(prefix: Path, language: str) -> Path | None:
    names = (f"{prefix.name}.{language}", f"{prefix.name}.{language}.gz")
    return next((path for path in map(prefix.with_name, names) if path.is_file()), None) if prefix.name else None


def _text_prefixes(paths: list[Path], languages: tuple[str, str] | None) -> tuple[list[Path], list[str]]:
    """Prefixes that have both sides, and the names of files that have no other side."""
    found: dict[Path, dict[str, str]] = {}
    for path in paths:
        name = path.name.removesuffix(".gz")
        for language in languages or ():
            if name.endswith(f".{language}") and name != f".{language}":
                found.setdefault(path.with_name(name.removesuffix(f".{language}")), {})[language] = path.name
    whole = [prefix for prefix, sides in found.items() if len(sides) == 2]
    return whole, sorted(name for sides in found.values() if len(sides) == 1 for name in sides.values())


def _stem(path: Path) -> str:
    return next((path.name[: -len(suffix)] for suffix in SUFFIXES if path.name.endswith(suffix)), path.name)


def _split_of(path: Path) -> str | None:
    stem = _stem(path)
    if stem.startswith("test"):
        return "test"
    return canonical_split(re.split(r"[._-]", stem, maxsplit=1)[0])


def _part_of_file(path: Path, split: str, rows: Iterator[Row], key: Callable[[Any], str | None]) -> Iterator[Row]:
    wanted, own = canonical_split(split), _split_of(path)
    if split in ("all", _stem(path)) or (own is not None and wanted == own):
        return rows
    if wanted is None:
        raise ValueError(f"split={split!r}: expected train, valid, test or all for the file {path}")
    if own is not None:
        raise ValueError(
            f"split={split!r}: {path} holds the {own} split by its name; give its directory, or split='all'"
        )
    return (row for row in rows if _hash_split(key(row.value)) in (wanted, None))


def _hash_split(text: str | None) -> str | None:
    if text is None:
        return None
    digest = hashlib.blake2b(" ".join(text.split()).encode("utf-8", "replace"), digest_size=8).digest()
    bucket = int.from_bytes(digest, "big") % 1000
    return "test" if bucket < _HELD_OUT else "valid" if bucket < 2 * _HELD_OUT else "train"


def _hub_rows(source: str, split: str) -> Iterator[Row]:
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
    aliases = (split, *SPLIT_NAMES.get(canonical_split(split) or "", ()))
    actual = next((alias for alias in aliases if alias in known), None)
    if actual is None:
        raise ValueError(f"split={split!r}: {source} has {', '.join(map(str, known))}")
    rows = datasets.load_dataset(name, config or None, split=actual)
    return (Row(f"{source} ({actual}), row {number}", row) for number, row in enumerate(rows))


def sound(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows, none of them broken. Raises ``ValueError`` at the first that is."""
    for place, value in rows:
        if isinstance(value, ValueError):
            raise ValueError(f"{place}: {value}")
        yield Row(place, value)


@contextmanager
def reading(path: Path, newline: str | None = None) -> Iterator[IO[str]]:
    """A text file, plain or gzip. Raises ``ValueError`` where it cannot be read."""
    opener: Any = gzip.open if path.name.endswith(".gz") else open
    try:
        # bytes that are not UTF-8 become lone surrogates, so that each line can be blamed for its own
        with opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline=newline) as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a text file, plain or gzip, each with its line break.

    A lone carriage return is white space within a line, as it is for wc and paste. Bytes that are not UTF-8 are lone
    surrogates: see `text_fault`. Raises ``ValueError`` where it cannot be read.
    """
    with reading(path, newline="\n") as file:
        yield from file


def text_fault(text: str) -> str | None:
    """What keeps a text from being UTF-8, or None."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        return f"not UTF-8: byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"a lone surrogate {code:#x}"
    return None


def aligned_rows(paths: tuple[Path, Path], languages: tuple[str, str]) -> Iterator[Row]:
    """Line i of both files as one row. Raises ``ValueError`` where one has more lines."""
    # a missing line anywhere shifts all that follow: nothing may be taken before both are counted
    (fewer, shorter), (more, longer) = sorted((sum(1 for _ in text_lines(path)), path) for path in paths)
    if fewer != more:
        raise ValueError(
            f"{longer}, line {fewer + 1}: {shorter} has no such line; expected as many lines in both, "
            f"got {more} and {fewer}"
        )
    for number, texts in enumerate(zip(*map(text_lines, paths), strict=True), start=1):
        faults = [text_fault(text) for text in texts]
        fault = faults[0] or faults[1]
        first = faults[0] or (not faults[1] and (not texts[0].strip() or texts[1].strip()))
        value = ValueError(fault) if fault else dict(zip(languages, texts, strict=True))
        yield Row(f"{paths[0] if first else paths[1]}, line {number}", value)


def json_rows(path: Path) -> Iterator[Row]:
    """The rows of a file of one JSON object a line, or of one array, plain or gzip.

    Raises:
        ValueError: it cannot be read, or is an array that is broken or followed by anything.
    """
    with reading(path) as file:
        first = next((line for line in file if line.strip()), "")
    with reading(path) as file:
        if first.lstrip().startswith("["):
            yield from _array_rows(path, file.read())
            return
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield Row(f"{path}, line {number}", json_value(line))


def json_value(text: str) -> Any:
    """The value of a JSON text, or a `ValueError` that says what is wrong with it."""
    try:
        return ValueError(fault) if (fault := text_fault(text)) else json.loads(text)
    except RecursionError:
        return ValueError("not JSON: nested too deeply")
    except ValueError as error:
        return ValueError(f"not JSON: {error}")


def _array_rows(path: Path, text: str) -> Iterator[Row]:
    decoder = json.JSONDecoder()
    position, line = text.index("[") + 1, 1 + text.count("\n", 0, text.index("["))

    def skip(end: int) -> int:
        """The place of the next character after ``end`` that is no white space; counts the lines on the way."""
        nonlocal line
        found = _GAP.match(text, end).end()  # type: ignore[union-attr]
        line += text.count("\n", position, found)
        return found

    position = skip(position)
    closed = text.startswith("]", position)
    while not closed:
        place = f"{path}, line {line}"
        try:
            value, end = decoder.raw_decode(text, position)
        except RecursionError as error:
            raise ValueError(f"{place}: not a JSON array: nested too deeply") from error
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {error.lineno}: not a JSON array: {error.msg}") from error
        fault = text_fault(text[position:end])
        yield Row(place, ValueError(fault) if fault else value)
        position = skip(end)
        closed = text.startswith("]", position)
        if not closed and not text.startswith(",", position):
            raise ValueError(f"{path}, line {line}: not a JSON array: expected ',' or ']' after a row")
        if not closed:
            position = skip(position + 1)
    if text[position + 1 :].strip():
        raise ValueError(
            f"{path}, line {line}: expected nothing after the array that ends there; rows are one array, or one "
            "object a line"
        )
