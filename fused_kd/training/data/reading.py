"""Rows of JSON and of line-aligned text, one at a time, each with its place; a bad one does not hide the others."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

_GAP = re.compile(r"\s*")
_BLOCK = 1 << 16
# characters of a line, or of an item of an array; a small gzip file can hold more than the memory
LONGEST = 1 << 26


class Row(NamedTuple):
    """What was read (for a broken line a `ValueError` that says what is wrong), and where."""

    place: str
    value: Any


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
    surrogates: see `text_fault`.

    Raises:
        ValueError: it cannot be read, or has a line of more than 64 Mi characters.
    """
    with reading(path, newline="\n") as file:
        yield from bounded_lines(path, file)


def text_fault(text: str) -> str | None:
    """What keeps a text from being UTF-8, or None."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        return f"not UTF-8: byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"a lone surrogate {code:#x}"
    return None


def bounded_lines(path: Path, file: IO[str]) -> Iterator[str]:
    """The lines, each with its line break. Raises ``ValueError`` at one that is too long to be held."""
    number = 1
    while line := file.readline(LONGEST + 1):
        if len(line) > LONGEST:
            raise ValueError(f"{path}, line {number}: expected a line of at most {LONGEST} characters")
        yield line
        number += 1


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
        ValueError: it cannot be read, an array that is broken or followed by anything, a line or an item of more than
            64 Mi characters.
    """
    with reading(path) as file:
        while (block := file.read(_BLOCK)).isspace():
            pass
    with reading(path) as file:
        if block.lstrip().startswith("["):
            yield from array_rows(path, file)
            return
        yield from line_rows(path, file)


def line_rows(path: Path, file: IO[str]) -> Iterator[Row]:
    """A JSON value a line; blank lines are left out."""
    for number, line in enumerate(bounded_lines(path, file), start=1):
        if line.strip():
            yield Row(f"{path}, line {number}", sound_value(line, json_value(line)))


def json_value(text: str) -> Any:
    """The value of a JSON text, or a `ValueError` that says what is wrong with it."""
    try:
        return json.loads(text)
    except RecursionError:
        return ValueError("not JSON: nested too deeply")
    except ValueError as error:
        return ValueError(f"not JSON: {error}")


def sound_value(text: str, value: Any) -> Any:
    """The value of a JSON text, or a `ValueError` where the text or what it stands for is not UTF-8."""
    fault = text_fault(text)
    if fault is None and re.search(r"\\u[dD]", text):  # an escape can stand for a surrogate too
        fault = next(filter(None, map(text_fault, _strings(value))), None)
    return value if fault is None else ValueError(fault)


def _strings(value: Any) -> Iterator[str]:
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list):
            waiting += value


def array_rows(path: Path, file: IO[str]) -> Iterator[Row]:
    """The items of an array, of whose text no more is held than one item takes."""
    decoder, text, position, whole = json.JSONDecoder(), "", 0, False
    line, counted = 1, 0  # the line of text[counted]

    def place(at: int) -> str:
        nonlocal line, counted
        line, counted = line + text.count("\n", counted, at), at
        return f"{path}, line {line}"

    def read_more() -> None:
        """Forget what is before ``position``, and read as much again as there is after it."""
        nonlocal text, position, counted, whole
        place(position)
        rest = file.read(max(_BLOCK, len(text) - position))
        text, position, counted, whole = text[position:] + rest, 0, 0, not rest

    def skip_gap() -> str:
        """Go to the next character that is no white space, and return it."""
        nonlocal position
        while (position := _GAP.match(text, position).end()) == len(text) and not whole:  # type: ignore[union-attr]
            read_more()
        return text[position : position + 1]

    skip_gap()
    position += 1
    closed = skip_gap() == "]"
    while not closed:
        try:
            value, end = decoder.raw_decode(text, position)
            fault = None
        except (ValueError, RecursionError) as error:
            end, fault = len(text), error
        if end == len(text) and not whole and len(text) - position <= LONGEST:
            read_more()
            continue
        if fault is not None:
            where = place(fault.pos if isinstance(fault, json.JSONDecodeError) else position)
            what = "nested too deeply" if isinstance(fault, RecursionError) else getattr(fault, "msg", str(fault))
            raise ValueError(f"{where}: not a JSON array: {what}") from fault
        yield Row(place(position), sound_value(text[position:end], value))
        position = end
        separator = skip_gap()
        closed = separator == "]"
        if not closed and separator != ",":
            raise ValueError(f"{place(position)}: not a JSON array: expected ',' or ']' after a row")
        if not closed:
            position += 1
            skip_gap()
    position += 1
    if skip_gap():
        raise ValueError(
            f"{place(position)}: expected nothing after the array that ends there; rows are one array, or one object a "
            "line"
        )
