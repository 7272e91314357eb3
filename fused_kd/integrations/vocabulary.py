"""A student whose vocabulary is another than its teacher's: heads, inputs and labels of a trainer's batches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from fused_kd import LMHead
from fused_kd.checks import check_columns
from fused_kd.integrations.bodies import without_adapters
from fused_kd.integrations.heads import check_head_module
from fused_kd.integrations.labels import LABEL_PAD
from fused_kd.integrations.weights import rows_of

_IDS = "input_ids"


class TeacherMap:
    """Which columns of the teacher a student's are, between two models.

    A student whose embedding and head have one size has ids of its own: the teacher gets them translated. One with
    more embeddings than columns, a draft on a reduced vocabulary, reads the teacher's ids: then the labels are
    translated, and those without a column are left out of an objective that reads them.

    Args:
        columns: as of :class:`fused_kd.LMHead`, or an object that has them (:class:`fused_kd.VocabMap`).
        tail: as there.
        reads_label: whether the objective does.
        student, teacher: models; the teacher's may be another process's in part.

    Raises:
        TypeError, ValueError: columns that do not go with the heads.
    """

    def __init__(self, columns: Any, tail: str, *, reads_label: bool, student: Any, teacher: Any) -> None:
        columns = getattr(columns, "columns", columns)
        self.tail, self._reads_label = tail, reads_label
        V, V_t = (rows_of(check_head_module(model).weight) for model in (student, teacher))
        if not isinstance(columns, torch.Tensor) or columns.shape != (V,):
            got = tuple(columns.shape) if isinstance(columns, torch.Tensor) else type(columns).__name__
            raise ValueError(
                f"vocab_map must have a column of the teacher for each of the student's, shape ({V},), got {got}"
            )
        self._columns = columns.detach().to("cpu", torch.int64)
        check_columns("vocab_map", self._columns, V_t)
        self._on: dict[torch.device, torch.Tensor] = {}
        embedded = rows_of(without_adapters(student).get_input_embeddings().weight)
        self.own_ids = embedded == V
        mapped = (self._columns >= 0).nonzero().squeeze(1)
        self.unmapped: list[int] = (self._columns < 0).nonzero().squeeze(1).tolist()
        self._translates = self.own_ids and not torch.equal(self._columns[mapped], mapped)
        self._columns_of_ids = torch.full((max(V_t, embedded),), LABEL_PAD, dtype=torch.int64)
        self._columns_of_ids[self._columns[mapped]] = mapped

    def columns(self, device: torch.device) -> torch.Tensor:
        """The same tensor each time: what a loss has looked at once, it need not look at again."""
        return self._on.setdefault(device, self._columns.to(device))

    def head(self, head: LMHead) -> LMHead:
        """The teacher's, with the map."""
        return replace(head, columns=self.columns(head.hidden.device), tail=self.tail)

    def inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The teacher's, of the student's."""
        if not self._translates:
            return inputs
        ids = inputs[_IDS]
        return {**inputs, _IDS: self.columns(ids.device)[ids].clamp(min=0)}

    def collated(self, collate: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """``collate``, with labels that are the student's columns; goes to other processes as it does."""
        return functools.partial(self._collate, collate)

    def _collate(self, collate: Callable[[Any], Any], rows: Any) -> Any:
        return self.batch(collate(rows))

    def batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """
        Raises:
            ValueError: ids that the teacher cannot read.
        """
        if self.own_ids:
            ids = batch[_IDS]
            if self.unmapped and ids.device.type == "cpu":
                read = ids if batch.get("attention_mask") is None else ids[batch["attention_mask"].bool()]
                unknown = read[self._columns[read] < 0]
                if len(unknown):
                    raise ValueError(f"batch has the token {int(unknown[0])}, which vocab_map says the teacher lacks")
            return batch
        labels = batch["labels"]
        found = self._columns_of_ids[labels.clamp(min=0)]
        if not self._reads_label:  # any column will do: it only says that the token counts
            found = found.clamp(min=0)
        return {**batch, "labels": torch.where(labels == LABEL_PAD, LABEL_PAD, found)}
