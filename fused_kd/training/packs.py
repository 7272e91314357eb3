"""Rows put together so that each pack has about as many tokens as may be: best fit, the longest rows first."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset


@dataclass(repr=False, eq=False)
class PackedRows(Dataset[list[dict[str, Any]]]):
    """Packs of the rows of a data set, lists of them, for a `PackingCollator`, which lays them end to end.

    Attributes:
        rows: the data set.
        packs: the numbers of the rows of each pack.
        tokens: of all rows.
        max_tokens: a pack has at most so many.
    """

    rows: Any
    packs: list[list[int]]
    tokens: int
    max_tokens: int

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        return [self.rows[number] for number in self.packs[index]]

    def __repr__(self) -> str:
        filled = self.tokens / (len(self.packs) * self.max_tokens)
        return (
            f"PackedRows({len(self.rows)} rows in {len(self)} packs of {self.max_tokens} tokens, {filled:.1%} filled)"
        )


def pack_rows(rows: Any, max_tokens: int) -> PackedRows:
    """Put rows together in packs of at most `max_tokens` tokens; no row is cut or divided.

    Args:
        rows: a data set, or a list, of dicts with ``input_ids``; none longer than `max_tokens`.
        max_tokens: the most tokens of a pack; with ``per_device_train_batch_size`` packs a step that many times more.

    Returns:
        `PackedRows`. Which rows are together is the same each time; the order of packs is by their longest row, so that
        a trainer should shuffle them, as it does.

    Raises:
        ValueError: no rows, or one longer than `max_tokens`.
    """
    lengths = [len(rows[number]["input_ids"]) for number in range(len(rows))]
    if not lengths:
        raise ValueError("rows are empty: expected at least one")
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    if type(max_tokens) is not int or max_tokens < lengths[longest]:
        raise ValueError(
            f"max_tokens={max_tokens!r}: expected an int of at least the longest row's {lengths[longest]} tokens "
            f"(rows[{longest}])"
        )
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens that are free, pack), in order
    for number in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        at = bisect_left(room, (lengths[number], 0))
        if at < len(room):
            free, pack = room.pop(at)
        else:
            free, pack = max_tokens, len(packs)
            packs.append([])
        packs[pack].append(number)
        insort(room, (free - lengths[number], pack))
    return PackedRows(rows, packs, sum(lengths), max_tokens)


def unpacked(features: Sequence[Any]) -> list[Any]:
    """The rows of packs, which are lists of rows; rows that are in none are themselves."""
    return [row for feature in features for row in (feature if isinstance(feature, list) else [feature])]
