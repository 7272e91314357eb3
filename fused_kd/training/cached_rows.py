"""A data set's rows with what a teacher cache has for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset

from fused_kd.integrations.teacher_columns import columns_of

AnyRows = Sequence[Mapping[str, Any]] | Dataset[Any]
_NUMBER = "row"  # of a row, in a data set for TRL


class CachedRows(Dataset[dict[str, Any]]):
    """Rows with what a cache has for them under the names of its ``columns``, for ``Collator`` to pad.

    ``cache`` is a :class:`fused_kd.training.teacher_cache.TeacherCache`. A cache of lists adds ``teacher_log_probs``
    (n, k) float32, ``teacher_indices`` (n, k) int64 and, where it is known, ``teacher_log_rest`` (n,) float32; one of
    hidden states adds ``teacher_hidden`` (n, width). One with a name has it behind "teacher": ``teacher_math_hidden``.
    """

    def __init__(self, cache: Any, dataset: AnyRows) -> None:
        self.cache = cache
        self.dataset: Any = dataset

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, index: int) -> dict[str, Any]:
        found = self.cache.row(index)
        return {**self.dataset[index], **dict(zip(columns_of(found, self.cache.name), found.values(), strict=True))}

    @property
    def lengths(self) -> list[int]:
        """How many tokens each row has; the cache is not read for that."""
        data = without_caches(self)
        return [len(data[index]["input_ids"]) for index in range(len(data))]

    def for_trl(self) -> Any:
        """Return the same rows as a ``datasets.Dataset``, the only kind that TRL's trainers take.

        The cache is read where a row is asked for.

        The trainer must leave them as they are: ``dataset_kwargs={"skip_prepare_dataset": True}`` and
        ``remove_unused_columns=False`` in ``trl.SFTConfig``.
        """
        from datasets import Dataset as Arrow

        data = without_caches(self)
        kept = ("input_ids", "labels")
        columns = {name: [list(map(int, data[index][name])) for index in range(len(data))] for name in kept}
        made = Arrow.from_dict({**columns, _NUMBER: list(range(len(data)))})
        return made.with_transform(self._read)

    def _read(self, rows: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        if _NUMBER not in rows:
            raise ValueError("the rows of a cache lost their numbers: set remove_unused_columns=False")
        found = [self[number] for number in rows[_NUMBER]]
        return {name: [row[name] for row in found] for name in found[0]}

    def __repr__(self) -> str:
        return f"CachedRows({self.dataset!r}, {self.cache!r})"


def without_caches(rows: AnyRows) -> Any:
    """Return the rows that caches were opened for: what :class:`CachedRows` were made of."""
    data: Any = rows
    while isinstance(data, CachedRows):
        data = data.dataset
    return data
