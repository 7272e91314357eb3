"""Splits of files, of folders, of line-aligned text and of hub data sets, as rows that know their places.

Files are JSON, CSV, Parquet, and text (a row a line) where it is named. Parallel text is a prefix: ``corpora/train``
stands for the files ``corpora/train.en`` and ``corpora/train.de``, plain or with ``.gz``; line i of one goes with line
i of the other. `datasets` reads the hub's data sets and what it saved itself alone, as its readers of files name no
line.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fused_kd.training.files import SUFFIXES, TEXT_SUFFIXES, Row, rows_of, text_lines, without_none
from fused_kd.training.stage import check_counts

BUILTIN = "builtin"
SPLIT_NAMES = {"train": ("train",), "valid": ("valid", "validation", "val", "dev"), "test": ("test",)}

_NAMED_DIRECTION = re.compile(r"(?:^|[._])([a-z]{2,3})-([a-z]{2,3})(?=$|[._])")
# of a single file without splits of its own: shares of 1000 for test and valid
_HELD_OUT = 50
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")

Item = TypeVar("Item")
Value = TypeVar("Value")


def read_rows(
    source: str | Path,
    split: str,
    key: Callable[[Any], str | None],
    languages: tuple[str, str] | None = None,
    *,
    streaming: bool = False,
) -> Iterator[Row]:
    """The rows of a split, read as they are asked for.

    Args:
        source: a directory (`find_files`; one that `datasets` saved is read by it); a file (``.txt`` too, a row a line)
            or a prefix of parallel text (by its name all rows are of one split, or a hash of `key` splits them); else a
            hub data set, ``"name"`` or ``"name:config"``.
        split: ``"train"``, ``"valid"``, ``"test"`` or another spelling of them; a file's stem; ``"all"`` for a file or
            a directory without splits; any split that a hub data set has.
        key: the text of a row's value that decides on its part of a file without splits; None for a row without that
            text, which is in every part, so that it is complained about.
        languages: source and target of parallel text; None (default) for other data.
        streaming: let `datasets` load a hub data set row by row, without a copy on disk.

    Raises:
        ValueError: a missing path or split, text without its other side, or a file that cannot be read.
        ImportError: a hub name without `datasets`.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if _is_saved(path):
            return _saved_rows(path, split, key)
        files, by_hash = find_files(path, split, languages)
        rows = (row for file in files for row in file_rows(file, languages))
        return _part(rows, canonical_split(split), key) if by_hash else rows
    suffixes = SUFFIXES if languages else (*SUFFIXES, *TEXT_SUFFIXES)
    is_file, is_named_so = path.is_file(), path.name.endswith(suffixes)
    if is_file and not is_named_so:
        raise ValueError(
            f"source={str(path)!r}: expected a file name that ends in one of {', '.join(suffixes)}; "
            "of parallel text the path without the language"
        )
    if is_file or any(_side(path, language) for language in languages or ()):
        return _part_of_file(path, split, file_rows(path, languages), key)
    if is_named_so or path.is_absolute() or str(source).startswith((".", "~")):
        beside = "".join(f", nor {path.name}.{language}" for language in languages or ())
        raise ValueError(f"source={str(source)!r}: no such file or directory{beside}")
    return _hub_rows(str(source), split, streaming)


def is_divided(source: str | Path, split: str, languages: tuple[str, str] | None = None) -> bool:
    """Whether a hash decides which rows of files without splits in their names are of this one."""
    path = Path(source).expanduser()
    if path.is_dir():
        return not _is_saved(path) and canonical_split(split) is not None and find_files(path, split, languages)[1]
    return path.is_file() and canonical_split(split) is not None and _split_of(path) is None


class Tally:
    """Counts of the rows of one pass.

    Attributes:
        given: rows given so far.
        skipped: bad rows left out so far.
        first_bad: place and fault of the first of those, or None.
    """

    def __init__(self, skip_bad: bool) -> None:
        self.given = self.skipped = 0
        self.first_bad: str | None = None
        self._skip_bad = skip_bad

    def take(self, place: str, made: Item | ValueError) -> Item | None:
        """What was made of a row, counted. Raises ``ValueError`` for a bad one that may not be left out."""
        if not isinstance(made, ValueError):
            self.given += 1
            return made
        if not self._skip_bad:
            raise ValueError(f"{place}: {made}") from made
        self.skipped += 1
        self.first_bad = self.first_bad or f"{place}: {made}"
        return None

    def end(self, what: str | None, stacklevel: int) -> None:
        """One warning for all that was left out; ``ValueError`` where nothing of ``what`` (None: may be) was given."""
        if self.skipped:
            count = f"skipped {self.skipped} bad rows of {self.given + self.skipped}"
            warnings.warn(f"{count}; the first: {self.first_bad}", stacklevel=stacklevel + 1)
        if what is not None and not self.given:
            raise ValueError(f"{what}: no usable rows")


def parsed(value: Value | ValueError, parse: Callable[[Value], Item]) -> Item | ValueError:
    """What ``parse`` makes of a value, or the `ValueError` that it raises, or that the value is."""
    if isinstance(value, ValueError):
        return value
    try:
        return parse(value)
    except ValueError as error:
        return error


def select(
    rows: Iterable[Row], parse: Callable[[Any], Item], what: str, *, limit: int | None, skip_bad: bool
) -> list[Item]:
    """The first `limit` items of the rows; None takes all.

    ``parse`` makes an item of a row's value, or raises a ``ValueError``; with `skip_bad` that goes into one warning.
    ``what`` names the rows in the error for none at all.
    """
    check_counts(limit=1 if limit is None else limit)
    items: list[Item] = []
    tally = Tally(skip_bad)
    for place, value in rows:
        if (item := tally.take(place, parsed(value, parse))) is not None:
            items.append(item)
        if tally.given == limit:
            break
    tally.end(what, stacklevel=3)
    return items


def canonical_split(split: str) -> str | None:
    """``"dev"`` -> ``"valid"``; None for a name that is not in `SPLIT_NAMES`."""
    return next((known for known, names in SPLIT_NAMES.items() if split in names), None)


def find_file(directory: Path, split: str, languages: tuple[str, str] | None = None) -> Path:
    """The one file, or the prefix of the two text files, that holds `split` in a directory.

    Raises:
        ValueError: no file fits, or several do and none is the obvious one.
    """
    files, by_hash = find_files(directory, split, languages)
    if by_hash or len(files) > 1:
        raise ValueError(f"split={split!r}: expected one file for it in {directory}, got {', '.join(map(str, files))}")
    return files[0]


def find_files(directory: Path, split: str, languages: tuple[str, str] | None = None) -> tuple[list[Path], bool]:
    """The files, or the prefix of the two text files, that hold `split` in a directory; True: with the other splits.

    One file a split (its shards count as one, ``train-00000-of-00002.parquet``), here or in ``data/``. Where no name
    tells a split, and `languages` is None, all files hold all splits.

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

    rows = [name for name in names if name.endswith(SUFFIXES)]
    files = rows + _text_prefixes(names, languages)
    if not files and (directory / "data").is_dir():
        return find_files(directory / "data", split, languages)
    ranked = [(place, name) for name in files if (place := rank(directory / name)) is not None]
    without_splits = languages is None and rows and all(_split_of(directory / name) is None for name in rows)
    if not ranked and without_splits and (wanted is not None or split == "all"):
        return [directory / name for name in rows], True
    if not ranked:
        of = f", direction={'-'.join(languages)!r}" if languages else ""
        raise ValueError(
            f"split={split!r}{of}: no file fits in {directory} (there: {', '.join(names) or 'none'}); "
            "split may be a file's stem, and text needs a file of each language"
        )
    best = sorted(name for place, name in ranked if place == min(ranked)[0])
    wholes = sorted({_whole(directory / name) for name in best})
    if len(wholes) > 1 and wanted not in ("test", None):
        raise ValueError(
            f"split={split!r} is ambiguous in {directory} ({', '.join(best)}): give a full file stem as split"
        )
    return [directory / name for name in best if _whole(directory / name) == wholes[0]], False


def file_rows(path: Path, languages: tuple[str, str] | None) -> Iterator[Row]:
    """All rows of a file, or, in `languages`, of the text with that prefix."""
    return rows_of(path) if languages is None or path.name.endswith(SUFFIXES) else aligned_rows(path, languages)


def is_parallel_text(source: str | Path, split: str, directions: Sequence[str]) -> bool:
    """Whether the source is line-aligned text: a prefix of files, or a directory with no other file for the split."""
    path = Path(source).expanduser()
    sides = [direction.partition("-") for direction in directions]
    languages = [(first, second) for first, _, second in sides]
    if not path.is_dir():
        return not path.is_file() and any(_side(path, language) for pair in languages for language in pair)
    names = sorted(entry.name for entry in path.iterdir() if entry.is_file())
    rows = any(name.endswith(SUFFIXES) for name in names)
    return not rows and any(_text_prefixes(names, pair) for pair in languages)


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
    name = next((path.name[: -len(suffix)] for suffix in SUFFIXES if path.name.endswith(suffix)), path.name)
    return _SHARD.sub("", name)


def _whole(path: Path) -> str:
    """The file's name without its number among the shards."""
    stem = _stem(path)
    return stem if _SHARD.search(path.name.removesuffix(".gz").rpartition(".")[0]) else path.name


def _split_of(path: Path) -> str | None:
    stem = _stem(path)
    return "test" if stem.startswith("test") else canonical_split(re.split(r"[._-]", stem, maxsplit=1)[0])


def _part_of_file(path: Path, split: str, rows: Iterator[Row], key: Callable[[Any], str | None]) -> Iterator[Row]:
    wanted, own = canonical_split(split), _split_of(path)
    if split in ("all", _stem(path), path.stem) or (own is not None and wanted == own):
        return rows
    if wanted is None:
        raise ValueError(f"split={split!r}: expected train, valid, test or all for the file {path}")
    if own is not None:
        raise ValueError(
            f"split={split!r}: {path} holds the {own} split by its name; give its directory, or split='all'"
        )
    return _part(rows, wanted, key)


def _part(rows: Iterator[Row], wanted: str | None, key: Callable[[Any], str | None]) -> Iterator[Row]:
    """The rows of a split by the hash of their key; None: all."""
    return rows if wanted is None else (row for row in rows if _hash_split(key(row.value)) in (wanted, None))


def _hash_split(text: str | None) -> str | None:
    if text is None:
        return None
    digest = hashlib.blake2b(" ".join(text.split()).encode("utf-8", "replace"), digest_size=8).digest()
    bucket = int.from_bytes(digest, "big") % 1000
    return "test" if bucket < _HELD_OUT else "valid" if bucket < 2 * _HELD_OUT else "train"


def _hub_rows(source: str, split: str, streaming: bool) -> Iterator[Row]:
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
    rows = datasets.load_dataset(name, config or None, split=actual, **({"streaming": True} if streaming else {}))
    return (Row(f"{source} ({actual}), row {number}", without_none(row)) for number, row in enumerate(rows))


def _is_saved(directory: Path) -> bool:
    """Whether ``save_to_disk`` of `datasets` made the directory."""
    return (directory / "dataset_dict.json").is_file() or (
        (directory / "state.json").is_file() and (directory / "dataset_info.json").is_file()
    )


def _saved_rows(directory: Path, split: str, key: Callable[[Any], str | None]) -> Iterator[Row]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{directory} was saved by the 'datasets' package: install fused_kd[train]") from error
    found, wanted = datasets.load_from_disk(str(directory)), canonical_split(split)
    if not isinstance(found, dict):
        if wanted is None and split != "all":
            raise ValueError(f"split={split!r}: expected train, valid, test or all for the data set {directory}")
        rows = (Row(f"{directory}, row {number}", without_none(row)) for number, row in enumerate(found))
        return _part(rows, wanted, key)
    actual = next((name for name in (split, *SPLIT_NAMES.get(wanted or "", ())) if name in found), None)
    if actual is None:
        raise ValueError(f"split={split!r}: {directory} has {', '.join(found)}")
    return (Row(f"{directory} ({actual}), row {n}", without_none(row)) for n, row in enumerate(found[actual]))


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
