"""The teacher of these rows reads another prompt than the student: more context before the same response."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset

from fused_kd.integrations.labels import LABEL_PAD
from fused_kd.integrations.teacher_columns import OTHER_IDS, OTHER_LABELS, PROMPT
from fused_kd.training.cached_rows import without_caches

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Context = str | Sequence[int]
_COLUMNS = (OTHER_IDS, OTHER_LABELS)
_HIGHEST = (1 << 31) - 1  # of a token id, which is held in 32 bits


def with_context(
    rows: Sequence[Mapping[str, Any]] | Dataset[Any],
    tokenizer: PreTrainedTokenizerBase | None,
    context: Context | Callable[[Mapping[str, Any]], Context],
    *,
    max_length: int | None = None,
    skip_long: bool = True,
) -> ContextRows:
    """Give each row's teacher a context to read: instructions, worked examples, the reference solution.

    The teacher's row is the student's with the context's tokens before it, after the BOS token where the row begins
    with one. Its labels are the student's and carry no loss on the context. Where the context has to stand in the
    middle, as in a user's turn of a chat template, give rows their ``teacher_input_ids`` and ``teacher_labels``
    yourself: all that the trainers want is that both end in the same targets.

    Args:
        rows: with ``input_ids`` and ``labels``, and what else batches are made of.
        tokenizer: of the teacher and the student; takes each context without special tokens. May be None where
            contexts are token ids.
        context: text or token ids, one for all rows, or a function that gives a row's from the row (of a cache's rows,
            from the row that the cache was made for).
        max_length: tokens of a teacher's row at most; None (default): as many as there are.
        skip_long: leave longer rows out and count them in ``.skipped`` (default); False raises.

    Raises:
        TypeError: a context that is neither text nor ids.
        ValueError: ``max_length`` below 2, a longer row with ``skip_long=False``, no row left, a row without as many
            ``labels`` as ``input_ids``, an id below 0 or of more than 32 bits.
    """
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length={max_length}: expected at least 2, or None")
    data = without_caches(rows)
    bos = getattr(tokenizer, "bos_token_id", None)
    fixed = None if callable(context) else _tokens(tokenizer, context)
    contexts: list[array[int]] = []
    kept = array("q")
    for number in range(len(data)):
        row = data[number]
        if len(row["labels"]) != len(row["input_ids"]):
            raise ValueError(
                f"rows[{number}] must have as many labels as input_ids, got {len(row['labels'])} and "
                f"{len(row['input_ids'])}"
            )
        tokens = fixed if fixed is not None else _tokens(tokenizer, context(row))  # type: ignore[operator]
        length = len(tokens) + len(row["input_ids"])
        if max_length is not None and length > max_length:
            if not skip_long:
                raise ValueError(f"rows[{number}] has {length} tokens with its context, max_length={max_length}")
            continue
        contexts.append(tokens)
        kept.append(number)
    if not kept:
        raise ValueError(f"no row is left: {len(data)} given, max_length={max_length}")
    return ContextRows(rows, bos, kept, contexts)


class ContextRows(Dataset[dict[str, Any]]):
    """Rows with ``teacher_input_ids`` and ``teacher_labels``, made by :func:`with_context`.

    Attributes:
        skipped: rows left out as too long.
    """

    def __init__(self, rows: Any, bos: int | None, kept: Sequence[int], contexts: Sequence[array[int]]) -> None:
        self.rows = rows
        self.skipped = len(rows) - len(kept)
        self._bos, self._kept, self._contexts = bos, kept, contexts

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[self._kept[index]]
        context = self._contexts[index].tolist()
        ids, labels = _listed(row["input_ids"]), _listed(row["labels"])
        front = int(ids[:1] == [self._bos])
        # a row's first label has no prediction in the student's row
        labels = [LABEL_PAD, *labels[1:]] if labels else []
        return {
            **row,
            OTHER_IDS: ids[:front] + context + ids[front:],
            OTHER_LABELS: labels[:front] + [LABEL_PAD] * len(context) + labels[front:],
        }

    @property
    def lengths(self) -> list[int]:
        """How many tokens the student's row has; a cache is not read for that."""
        data = without_caches(self.rows)
        return [len(data[number]["input_ids"]) for number in self._kept]

    def __repr__(self) -> str:
        return f"ContextRows({len(self)} rows, skipped={self.skipped})"


def teacher_batch(rows: Sequence[Any], collate: Callable[[list[dict[str, Any]]], Mapping[str, Any]]) -> dict[str, Any]:
    """Collate the teacher's rows as the student's are, under the names ``teacher_...``; return {} where rows have none.

    Raises:
        ValueError: some rows have them only, or not as many labels as tokens.
    """
    having = [sum(name in row for name in _COLUMNS) for row in rows]
    if not any(having):
        return {}
    for number, (row, count) in enumerate(zip(rows, having, strict=True)):
        if count < len(_COLUMNS):
            raise ValueError(
                f"{' and '.join(_COLUMNS)} must be in every row of a batch or in none, rows[{number}] has "
                f"{', '.join(row)}"
            )
        ids, labels = (row[name] for name in _COLUMNS)
        if len(ids) != len(labels):
            raise ValueError(
                f"rows[{number}] must have as many teacher_labels as teacher_input_ids, got {len(labels)} and "
                f"{len(ids)}: a label for each token, -100 where there is no loss"
            )
    made = collate([{name.removeprefix(PROMPT): row[name] for name in _COLUMNS} for row in rows])
    return {PROMPT + name: value for name, value in made.items()}


def _tokens(tokenizer: Any, context: Any) -> array[int]:
    if isinstance(context, str):
        if tokenizer is None:
            raise TypeError(f"tokenizer must be given for a context that is text, got {context[:80]!r}")
        return array("i", tokenizer(context, add_special_tokens=False)["input_ids"])
    tokens: list[Any] = _listed(context) if hasattr(context, "__iter__") else [None]
    if any(isinstance(token, bool) or not isinstance(token, int) for token in tokens):
        raise TypeError(f"context must be text or token ids, or a function of a row that gives them, got {context!r}")
    if tokens and not 0 <= min(tokens) <= max(tokens) <= _HIGHEST:
        raise ValueError(f"context must have token ids in [0, {_HIGHEST}], got {min(tokens)} to {max(tokens)}")
    return array("i", tokens)


def _listed(values: Any) -> list[Any]:
    return list(values.tolist() if hasattr(values, "tolist") else values)
