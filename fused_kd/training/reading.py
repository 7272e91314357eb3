"""Rows of JSON files, of line-aligned text and of hub data sets, each with its place for error messages.

JSON is one object a line or one array, plain or gzip. Parallel text is a prefix: ``corpora/train`` stands for the files
``corpora/train.en`` and ``corpora/train.de``, plain or with ``.gz``; line i of one goes with line i of the other.
A bad row does not hide the others: `datasets` reads the hub's data sets alone, as its readers of files name no line.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

BUILTIN = "builtin"
SUFFIXES = (".jsonl.gz", ".json.gz", ".jsonl", ".json")
SPLIT_NAMES = {"train": ("train",), "valid": ("valid", "validation", "val", "dev"), "test": ("test",)}

_NAMED_DIRECTION = re.compile(r"(?:^|[._])([a-z]{2,3})-([a-z]{2,3})(?=$|[._])")
# of a single file without splits of its own: shares of 1000 for test and valid
_HELD_OUT = 50

Item = TypeVar("Item")


class Row(NamedTuple):
    """What was read (for a broken line a `ValueError` that says what is wrong), and where."""

    place: str
    value: Any


def read_rows(
    source: str | Path, split: str, key: Callable[[Any], str | None], languages: tuple[str, str] | None = None
) -> Iterator[Row]:
    """The rows of a split.

    Args:
        source: a directory (the file is found by `find_file`); a JSON file or a prefix of parallel text (by its name
            all rows are of one split, or a hash of `key` splits them); else a hub data set, ``"name"`` or
            ``"name:config"``.
        split: ``"train"``, ``"valid"``, ``"test"`` or another spelling of them; a file's stem; ``"all"`` for a file;
            any split that a hub data set has.
        key: the text of a row's value that decides on its part of a file without splits; None for a row without that
            text, which is in every part, so that it is complained about.
        languages: source and target of parallel text; None (default) for other data.

    Raises:
        ValueError: a missing path or split, text without its other side, or a file that cannot be read.
        ImportError: a hub name without `datasets`.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return file_rows(find_file(path, split, languages), languages)
    is_file, is_json = path.is_file(), path.name.endswith(SUFFIXES)
    if is_file and not is_json:
        raise ValueError(
            f"source={str(path)!r}: expected a file name that ends in one of {', '.join(SUFFIXES)}; "
            "of parallel text the path without the language"
        )
    if is_file or any(_side(path, language) for language in languages or ()):
        return _part_of_file(path, split, file_rows(path, languages), key)
    if is_json or path.is_absolute() or str(source).startswith((".", "~")):
        beside = "".join(f", nor {path.name}.{language}" for language in languages or ())
        raise ValueError(f"source={str(source)!r}: no such file or directory{beside}")
    return _hub_rows(str(source), split)


def select(
    rows: Iterable[Row], parse: Callable[[Any], Item | str], what: str, *, limit: int | None, skip_bad: bool
) -> list[Item]:
    """The first `limit` items of the rows; None takes all.

    ``parse`` makes an item of a row's value, or says what is wrong with it; that raises, or with `skip_bad`
    goes into one warning. ``what`` names the rows in the error for none at all.
    """
    if limit is not None and (type(limit) is not int or limit < 1):
        raise ValueError(f"limit={limit!r}: expected an int of at least 1, or None")
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
        if len(items) == limit:
            break
    if complaints:
        count = f"skipped {len(complaints)} bad rows of {len(complaints) + len(items)}"
        warnings.warn(f"{count}; the first: {complaints[0]}", stacklevel=3)
    if not items:
        raise ValueError(f"{what}: no usable rows")
    return items


def canonical_split(split: str) -> str | None:
    """``"dev"`` -> ``"valid"``; None for a name that is not in `SPLIT_NAMES`."""
    return next((known for known, names in SPLIT_NAMES.items() if split in names), None)


def find_file(directory: Path, split: str, languages: tuple[str, str] | None = None) -> Path:
    """The JSON file, or the prefix of the two text files, that holds `split` in a directory.

    Raises:
        ValueError: no file fits, or several do and none is the obvious one.
    """
    names = sorted(path.name for path in directory.iterdir() if path.is_file())
    wanted = canonical_split(split)

    def rank(path: Path) -> int | None:
        """0 is the best; None: not of this split and direction."""
        stem = _stem(path)
        if wanted is None or _split_of(path) != wanted:
            return 0 if stem == split else None
        named = _NAMED_DIRECTION.search(stem) if languages else None
        if named is None:
            return 1 if stem in SPLIT_NAMES[wanted] else 2
        if named.groups() == languages:
            return 0
        return 3 if named.groups()[::-1] == languages and wanted != "test" else None

    files = [name for name in names if name.endswith(SUFFIXES)] + _text_prefixes(names, languages)
    ranked = [(place, name) for name in files if (place := rank(directory / name)) is not None]
    if not ranked:
        of = f", direction={'-'.join(languages)!r}" if languages else ""
        raise ValueError(
            f"split={split!r}{of}: no file fits in {directory} (there: {', '.join(names) or 'none'}); "
            "split may be a file's stem, and text needs a file of each language"
        )
    best = sorted(name for place, name in ranked if place == min(ranked)[0])
    if len(best) > 1 and wanted not in ("test", None):
        raise ValueError(
            f"split={split!r} is ambiguous in {directory} ({', '.join(best)}): give a full file stem as split"
        )
    return directory / best[0]


def file_rows(path: Path, languages: tuple[str, str] | None) -> Iterator[Row]:
    """All rows of a JSON file, or, in `languages`, of the text with that prefix."""
    return json_rows(path) if languages is None or path.name.endswith(SUFFIXES) else aligned_rows(path, languages)


def _side(prefix: Path, language: str) -> Path | None:
    """The file of one language of parallel text."""
    names = (f"{prefix.name}.{language}", f"{prefix.name}.{language}.gz")
    return next((path for path in map(prefix.with_name, names) if path.is_file()), None) if prefix.name else None


def _text_prefixes(names: list[str], languages: tuple[str, str] | None) -> list[str]:
    """Prefixes of the files of which both languages are there."""
    if languages is None:
        return []
    first, second = (f".{language}" for language in languages)
    plain = {name.removesuffix(".gz") for name in names}
    prefixes = {name.removesuffix(first) for name in plain if name.endswith(first)}
    return [prefix for prefix in prefixes if prefix and prefix + second in plain]


def _stem(path: Path) -> str:
    return next((path.name[: -len(suffix)] for suffix in SUFFIXES if path.name.endswith(suffix)), path.name)


def _split_of(path: Path) -> str | None:
    stem = _stem(path)
    return "test" if stem.startswith("test") else canonical_split(re.split(r"[._-]", stem, maxsplit=1)[0])


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
        code, before = ord(text[error.start]), text[max(0, error.start - 20) : error.start]
        fault = f"not UTF-8: byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"a lone surrogate {code:#x}"
        return f"{fault} after {before!r}"
    return None


def aligned_rows(prefix: Path, languages: tuple[str, str]) -> Iterator[Row]:
    """Line i of both files as one row. Raises ``ValueError`` where a file is missing or one has more lines."""
    paths = []
    for language in languages:
        if (path := _side(prefix, language)) is None:
            raise ValueError(
                f"source={str(prefix)!r}: there is no {prefix.name}.{language} or {prefix.name}.{language}.gz"
            )
        paths.append(path)
    # a missing line anywhere shifts all that follow: nothing may be taken before both are counted
    (fewer, shorter), (more, longer) = sorted((sum(1 for _ in text_lines(path)), path) for path in paths)
    if fewer != more:
        raise ValueError(
            f"{longer}, line {fewer + 1}: {shorter} has no such line; expected as many lines in both, "
            f"got {more} and {fewer}"
        )
    for number, texts in enumerate(zip(*map(text_lines, paths), strict=True), start=1):
        yield Row(f"{prefix}, line {number}", dict(zip(languages, texts, strict=True)))


def json_rows(path: Path) -> Iterator[Row]:
    """The rows of a file of one JSON object a line, or of arrays of them, plain or gzip.

    Raises:
        ValueError: it cannot be read, or is an array that is broken.
    """
    for place, value in json_values(path):
        array = isinstance(value, list)
        for number, row in enumerate(value if array else [value], start=1):
            fault = None if isinstance(row, ValueError) else text_fault(json.dumps(row, ensure_ascii=False))
            broken = fault is not None and fault.startswith("not UTF-8")  # an escaped surrogate is its text's own fault
            yield Row(f"{place}, row {number}" if array else place, ValueError(fault) if broken else row)


def json_values(path: Path) -> Iterator[Row]:
    """The values of a file that has one a line, or one on many lines; a line that is broken is a `ValueError`.

    In a value on many lines, bytes that are not UTF-8 are lone surrogates: see `text_fault`.

    Raises:
        ValueError: it cannot be read, or is a broken array: what comes after the break cannot be found.
    """
    with reading(path) as file:
        begin, first = next(((n, line) for n, line in enumerate(file, start=1) if line.strip()), (1, ""))
        if first and isinstance(json_value(first), ValueError):
            whole = _parsed("\n" * (begin - 1) + first + file.read())
            if not isinstance(whole, ValueError):
                yield Row(f"{path}, line {begin}", whole)
                return
            if first.lstrip().startswith("["):
                raise ValueError(f"{path}, array from line {begin}: {whole}")
    with reading(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield Row(f"{path}, line {number}", json_value(line))


def json_value(text: str) -> Any:
    """The value of a JSON text, or a `ValueError` that says what is wrong with it."""
    return ValueError(fault) if (fault := text_fault(text)) else _parsed(text)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        return ValueError("not JSON: nested too deeply")
    except ValueError as error:
        return ValueError(f"not JSON: {error}")
