"""A stream of rows as a training reads it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import IterableDataset


class Endless(IterableDataset[Any]):
    """Rows again and again, in their order.

    A Trainer counts a stream as one epoch of ``max_steps``, and a resumed one passes over the batches of the steps that
    are done: in a stream that ends before, it would begin at another row.
    """

    endless = True

    def __init__(self, rows: Iterable[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        given = True
        while given:  # of many workers one may have no row at all
            given = False
            for row in self.rows:
                given = True
                yield row

    def __repr__(self) -> str:
        return repr(self.rows)
