"""Rows of one file, each with its place for error messages: JSON, CSV and Parquet; and lines of text.

JSON is one object a line or one array; JSON, CSV and text are plain or gzip. A bad row does not hide the others.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple

JSON_SUFFIXES = (".jsonl.gz", ".json.gz", ".jsonl", ".json")
CSV_SUFFIXES = (".csv.gz", ".csv")
PARQUET_SUFFIX = ".parquet"
SUFFIXES = (*JSON_SUFFIXES, *CSV_SUFFIXES, PARQUET_SUFFIX)
# read where such a file is named; in a folder it may be a note
TEXT_SUFFIXES = (".txt.gz", ".txt")

# of a Parquet file, so many are in memory at once
_PARQUET_ROWS = 64


class Row(NamedTuple):
    """What was read (for a broken line a `ValueError` that says what is wrong), and where."""

    place: str
    value: Any


def rows_of(path: Path) -> Iterator[Row]:
    """All rows of a file whose name ends in one of `SUFFIXES` or `TEXT_SUFFIXES`, read as they are asked for.

    Raises:
        ValueError: it cannot be read, or what is broken hides the rows behind it.
        ImportError: Parquet without `pyarrow`.
    """
    if path.name.endswith(PARQUET_SUFFIX):
        return parquet_rows(path)
    if path.name.endswith(TEXT_SUFFIXES):
        return text_rows(path)
    return csv_rows(path) if path.name.endswith(CSV_SUFFIXES) else json_rows(path)


def columns_of(value: Any) -> str:
    """What a row has, for errors: its columns, or the beginning of what is no object."""
    if not isinstance(value, dict):
        return str(value)[:80]
    return f"the columns {', '.join(map(str, value))}" if value else "no columns"


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


def text_rows(path: Path) -> Iterator[Row]:
    """The lines of a text file, plain or gzip, as rows of ``text``, without the lines that are empty.

    Raises:
        ValueError: it cannot be read.
    """
    for number, line in enumerate(text_lines(path), start=1):
        if line.strip():
            fault = text_fault(line)
            yield Row(f"{path}, line {number}", ValueError(fault) if fault else {"text": line.rstrip("\r\n")})


def text_fault(text: str) -> str | None:
    """What keeps a text from being UTF-8, or None."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code, before = ord(text[error.start]), text[max(0, error.start - 20) : error.start]
        fault = f"not UTF-8: byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"a lone surrogate {code:#x}"
        return f"{fault} after {before!r}"
    return None


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


def csv_rows(path: Path) -> Iterator[Row]:
    """The rows of a CSV file whose first line names the columns, as dicts of texts; the place is a row's first line.

    Raises:
        ValueError: it cannot be read, has no names of columns, or a quotation is broken.
    """
    with reading(path, newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            names = next(reader, None)
            if not names or len(set(names)) != len(names) or text_fault(",".join(names)):
                raise ValueError(
                    f"{path}, line 1: expected the names of the columns, each once, got {names or 'nothing'}"
                )
            while True:
                line = reader.line_num + 1
                if (cells := next(reader, None)) is None:
                    return
                if cells:
                    yield Row(f"{path}, line {line}", _of_columns(names, cells))
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: not CSV: {error}") from error


def _of_columns(names: list[str], cells: list[str]) -> Any:
    if len(cells) != len(names):
        return ValueError(f"expected {len(names)} columns ({', '.join(names)}), got {len(cells)}")
    fault = text_fault("".join(cells))
    return ValueError(fault) if fault else dict(zip(names, cells, strict=True))


def parquet_rows(path: Path) -> Iterator[Row]:
    """The rows of a Parquet file, without the None that Parquet puts where a record lacks a field.

    Raises:
        ValueError: it cannot be read.
        ImportError: no `pyarrow`.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ImportError(f"{path}: Parquet needs the 'pyarrow' package: install fused_kd[train]") from error
    try:
        with ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=_PARQUET_ROWS)
            values = chain.from_iterable(batch.to_pylist() for batch in batches)
            for number, value in enumerate(values, start=1):
                yield Row(f"{path}, row {number}", without_none(value))
    except (OSError, ArrowException) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def without_none(value: Any) -> Any:
    """The value without the entries of its dicts, at any depth, that are None: tables have all fields in all rows."""
    if isinstance(value, dict):
        return {name: without_none(entry) for name, entry in value.items() if entry is not None}
    return [without_none(entry) for entry in value] if isinstance(value, list) else value
