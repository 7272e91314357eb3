"""Data sets of any of the usual formats, from files, folders or the hub, as tokenised rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch.utils.data import IterableDataset, get_worker_info

from fused_kd.training import formats
from fused_kd.training.chat_templates import Turns
from fused_kd.training.data import pair_rows, parse_direction
from fused_kd.training.files import Row, columns_of, sound
from fused_kd.training.formats import FORMATS, Format, Outcome, format_of
from fused_kd.training.prompts import PromptTemplate, Rows
from fused_kd.training.reading import BUILTIN, Tally, is_divided, is_parallel_text, parsed, read_rows
from fused_kd.training.stage import check_counts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AUTO = "auto"
# rows that are tokenised together
_TOGETHER = 256


class Part(NamedTuple):
    """Rows of one format: what opens them, and how they are read."""

    open: Callable[[], Iterator[Row]]
    format: Format


class StreamedRows(IterableDataset[dict[str, list[int]]]):
    """Tokenised rows, each read and made when it is asked for; a pass over them reads the source anew.

    Of several workers of a `DataLoader` each takes its own part, and each has its own counts. Rows come in the order of
    the source. There is no length: a `Trainer` needs ``max_steps``.

    Attributes:
        format: what the rows are read as.
        tally: counts of the last pass so far; ``skipped`` is there too.
        truncated: rows of the last pass so far whose end was cut off.
    """

    def __init__(self, parts: Sequence[Part], what: str, limit: int | None, skip_bad: bool) -> None:
        self.format = parts[0].format.name
        self.tally, self.truncated = Tally(skip_bad), 0
        self._parts, self._what, self._limit, self._skip_bad = list(parts), what, limit, skip_bad

    @property
    def skipped(self) -> int:
        return self.tally.skipped

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        worker = get_worker_info()
        share = (1, 0) if worker is None else (worker.num_workers, worker.id)
        tally, self.truncated = Tally(self._skip_bad), 0
        self.tally = tally
        for part in self._parts:
            for place, outcome in _outcomes(part, self._limit, 1, share):
                if (made := tally.take(place, outcome)) is not None:
                    self.truncated += made.cut
                    yield made.row
        tally.end(self._what if worker is None else None, stacklevel=2)

    def __repr__(self) -> str:
        counts = f"skipped={self.skipped}, truncated={self.truncated}"
        return f"StreamedRows({self.tally.given} rows of {self.format} so far, {counts})"


def load_rows(
    tokenizer: PreTrainedTokenizerBase,
    source: str | Path,
    split: str = "train",
    *,
    format: str = AUTO,
    prompt: str | PromptTemplate = "paper",
    directions: Sequence[str] | None = None,
    max_length: int = 1024,
    limit: int | None = None,
    skip_bad: bool = False,
    streaming: bool = False,
    chat_template: str | Path | None = None,
    turns: Turns = "all",
) -> Rows | StreamedRows:
    """A data set as tokenised rows with labels, of which -100 carry no loss.

    Args:
        tokenizer: of `transformers`; for chats a fast one.
        source: a file (``.jsonl``, ``.json``, ``.csv``, each also with ``.gz``, or ``.parquet``), or one of text
            (``.txt``, ``.txt.gz``), of which each line that is not empty is a row of ``text``; a folder with a file a
            split (shards too), with files of no split, or saved by `datasets` (a ``.txt`` in a folder is no data); a
            hub data set, ``"name"`` or ``"name:config"``; for pairs also ``"builtin"`` and a prefix of two text files.
        split: ``"train"`` (default), ``"valid"`` or ``"test"``; ``"all"`` for files without splits; on the hub any that
            it has. Of files without a split in their names about 90/5/5 % of the rows are train/valid/test, by a hash
            of the question, so that the splits never overlap.
        format: one of

            - ``"auto"`` (default): what the columns of the first row say; ``.format`` of the result has it;
            - ``"messages"``: conversations of turns with ``role`` and ``content`` in ``messages``, or ``from`` and
              ``value`` (ShareGPT) in ``conversations``; loss on what the assistant writes and on the end of its turns,
              but for turns with ``weight`` 0 or ``train`` false;
            - ``"prompt_completion"``: two texts, or two lists of messages; loss on the completion and its end;
            - ``"text"``: loss on everything;
            - ``"alpaca"``: instruction, input and output; loss on the output and EOS;
            - ``"pairs"``: translations; loss on the translation and EOS.
        prompt: of pairs: a name in `PROMPTS`, or a template.
        directions: of pairs, such as ``["en-de", "de-en"]``; None (default): en-de.
        max_length: longer rows lose their end, at least 2; ``.truncated`` counts them.
        limit: the first so many rows (of each direction); None (default) takes all.
        skip_bad: leave out bad rows, with one warning that counts them and names the first, instead of raising.
            ``.skipped`` counts them.
        streaming: give a `StreamedRows`, which reads each row when it is asked for.
        chat_template: a Jinja template, or its file, in place of the tokenizer's own.
        turns: of chats: ``"all"`` (default) assistant turns carry loss, or the ``"last"`` alone.

    Returns:
        `Rows`, or with `streaming` `StreamedRows`.

    Raises:
        ValueError: an unknown source, split, format or option; no row at all; a tokenizer without a chat template where
            one is needed; and, with its file and line, a bad row: of another format, without an assistant turn, with an
            empty one, with a special token of the template in what is said, with a turn that cannot be found in the
            text of the template, or without loss in its first `max_length` tokens (a prompt that alone fills them).
        ImportError: a hub name without `datasets`, or Parquet without `pyarrow`.
    """
    if type(max_length) is not int or max_length < 2:
        raise ValueError(f"max_length={max_length!r}: expected an int of at least 2")
    check_counts(limit=1 if limit is None else limit)
    if format not in (AUTO, *FORMATS):
        raise ValueError(f"format={format!r}: expected one of {', '.join((AUTO, *FORMATS))}")
    if isinstance(directions, str) or (directions is not None and len(set(directions)) != len(directions)):
        raise ValueError(f"directions={directions!r}: expected a list, each once, such as ['en-de']")
    directions = list(directions or ["en-de"])
    seen_at = None
    if format == AUTO:
        format, seen_at = _format_found(str(source), split, directions, streaming, skip_bad)
    if format == formats.PAIRS:
        made = [formats.pair_format(tokenizer, max_length, prompt, direction) for direction in directions]
        opens = [partial(pair_rows, str(source), split, direction, streaming=streaming) for direction in directions]
        parts = [Part(*each) for each in zip(opens, made, strict=True)]
    elif str(source) == BUILTIN:
        raise ValueError(f"source={BUILTIN!r}: the built-in corpus has pairs alone, got format={format!r}")
    else:
        one = _format(format, tokenizer, max_length, chat_template, turns)
        parts = [Part(partial(read_rows, source, split, one.key, streaming=streaming), one)]
    what = f"source={str(source)!r}, split={split!r}, format={format!r}"
    if is_divided(source, split, parse_direction(directions[0]) if format == formats.PAIRS else None):
        what += " (the file has no splits: a hash of each row says of which it is; split='all' takes every row)"
    if streaming:
        return StreamedRows(parts, what, limit, skip_bad)
    try:
        return _collected(parts, what, limit, skip_bad)
    except ValueError as error:
        if seen_at is None or what in str(error):
            raise
        raise ValueError(f"{error} (read as {format}, which {seen_at} is)") from error


def _format(
    name: str, tokenizer: PreTrainedTokenizerBase, max_length: int, chat_template: str | Path | None, turns: Turns
) -> Format:
    if name == formats.TEXT:
        return formats.text_format(tokenizer, max_length)
    if name == formats.ALPACA:
        return formats.alpaca_format(tokenizer, max_length)
    return formats.chat_format(name, tokenizer, max_length, chat_template, turns)


def _format_found(
    source: str, split: str, directions: Sequence[str], streaming: bool, skip_bad: bool
) -> tuple[str, str | None]:
    """The format that the first row has, and that row's place."""
    if source == BUILTIN or is_parallel_text(source, split, directions):
        return formats.PAIRS, None
    rows = read_rows(source, split, lambda _: None, streaming=streaming)
    for place, value in (row for row in rows if not isinstance(row.value, ValueError)) if skip_bad else sound(rows):
        if (found := format_of(value)) is None:
            raise ValueError(
                f"{place}: format='auto' knows no format of {columns_of(value)}: expected one of "
                f"{'; '.join(FORMATS.values())}. Rename the columns, or say which format= it is"
            )
        return found, place
    hint = " (a hash of each row says of which split it is)" if is_divided(source, split) else ""
    raise ValueError(f"source={source!r}, split={split!r}: no usable rows{hint}")


def _outcomes(
    part: Part, limit: int | None, together: int, share: tuple[int, int] = (1, 0)
) -> Iterator[tuple[str, Outcome]]:
    """What is made of each row, with its place, in order; `limit` counts rows that could be read.

    ``share``: (n, i) takes the rows i, i + n, ... of it.
    """
    every, mine = share
    waiting: list[tuple[str, Any]] = []
    readable = 0
    for number, (place, value) in enumerate(part.open()):
        if number % every != mine and limit is None:
            continue
        item = parsed(value, part.format.parse)
        readable += not isinstance(item, ValueError)
        if number % every == mine:
            waiting.append((place, item))
        if len(waiting) == together:
            yield from _encoded(part.format, waiting)
            waiting = []
        if readable == limit:
            break
    yield from _encoded(part.format, waiting)


def _encoded(format: Format, waiting: Sequence[tuple[str, Any]]) -> Iterator[tuple[str, Outcome]]:
    made = iter(format.encode([item for _, item in waiting if not isinstance(item, ValueError)]))
    for place, item in waiting:
        yield place, item if isinstance(item, ValueError) else next(made)


def _collected(parts: Sequence[Part], what: str, limit: int | None, skip_bad: bool) -> Rows:
    tally, rows, truncated = Tally(skip_bad), [], 0
    one: dict[int, int] = {}
    for part in parts:
        for place, outcome in _outcomes(part, limit, _TOGETHER):
            if (made := tally.take(place, outcome)) is not None:
                truncated += made.cut
                # each id is one object for all rows: a quarter of the memory
                rows.append({name: list(map(one.setdefault, ids, ids)) for name, ids in made.row.items()})
    tally.end(what, stacklevel=3)
    return Rows(rows, tally.skipped, truncated, parts[0].format.name)
