"""A student whose vocabulary is another than its teacher's: heads, inputs and labels of a trainer's batches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from fused_kd import LMHead, VocabMap, kd_loss
from fused_kd.integrations.bodies import without_adapters
from fused_kd.integrations.heads import check_head_module
from fused_kd.integrations.labels import LABEL_PAD
from fused_kd.integrations.own import StudentView
from fused_kd.integrations.weights import rows_of
from fused_kd.objectives import Objective

_IDS = "input_ids"


class TeacherMap:
    """Which columns of the teacher a student's are, between two models.

    A student whose embedding and head have one size has ids of its own: the teacher gets them translated. One with
    more embeddings than columns, a draft on a reduced vocabulary, reads the teacher's ids: then the labels are
    translated, and those without a column are left out of an objective that reads them.

    Args:
        vocab_map: a :class:`fused_kd.VocabMap`, or columns as of :class:`fused_kd.LMHead`.
        tail: as there; None: "renormalize".
        objective: what is minimised, with ``options`` of :class:`fused_kd.KDLoss` and ``statistics``.
        student, teacher: causal LMs of their own; of the teacher's weights a part may be here.

    Raises:
        TypeError, ValueError: columns that do not go with the heads; what no loss can be made of.
    """

    def __init__(
        self,
        vocab_map: Any,
        tail: str | None,
        objective: Objective,
        options: dict[str, Any],
        statistics: tuple[str, ...] = (),
        *,
        student: Any,
        teacher: Any,
    ) -> None:
        if isinstance(teacher, StudentView):
            raise ValueError("vocab_map must be None where the student is its own teacher")
        V, V_t = (rows_of(check_head_module(model).weight) for model in (student, teacher))
        if not isinstance(vocab_map, VocabMap):
            if not isinstance(vocab_map, torch.Tensor):
                raise TypeError(f"vocab_map must be a VocabMap or a tensor of columns, got {vocab_map!r}")
            vocab_map = VocabMap.of_columns(vocab_map, V_t)
        if vocab_map.columns.shape != (V,) or vocab_map.teacher_size > V_t:
            raise ValueError(
                f"vocab_map must be of the student's {V} columns and of at most the teacher's {V_t}, got "
                f"{len(vocab_map.columns)} and {vocab_map.teacher_size}"
            )
        self._map, self.tail = vocab_map.to("cpu"), tail or "renormalize"
        self._on: dict[torch.device, torch.Tensor] = {}
        self._reads_label = objective.spec.reads_label
        columns, embedded = self._map.columns, rows_of(without_adapters(student).get_input_embeddings().weight)
        self.own_ids = embedded == V
        self.unmapped: list[int] = (columns < 0).nonzero().squeeze(1).tolist()
        self._translates = self.own_ids and not torch.equal(columns, torch.arange(V))
        # On one token: what is refused is so before anything is trained.
        one, label = torch.ones(1, 1), torch.zeros(1, dtype=torch.int64)
        sides = LMHead(one, torch.ones(V, 1)), self.head(LMHead(one, torch.ones(V_t, 1)))
        kd_loss(*sides, label, objective, statistics=statistics, **options)

    def columns(self, device: torch.device) -> torch.Tensor:
        """The same tensor each time: what a loss has looked at once, it need not look at again."""
        return self._on.setdefault(device, self._map.columns.to(device))

    def head(self, head: LMHead) -> LMHead:
        """The teacher's, with the map."""
        return replace(head, columns=self.columns(head.hidden.device), tail=self.tail)

    def inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The teacher's, of the student's; ids that it lacks stand where nobody looks."""
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
            ValueError: ids that the teacher cannot read, labels beyond its columns.
        """
        if self.own_ids:
            self.check_ids(batch)
            return batch
        labels = batch["labels"]
        found = self._map.labels(labels, LABEL_PAD)
        if not self._reads_label:  # any column will do: it only says that the token counts
            found = torch.where(labels == LABEL_PAD, LABEL_PAD, 0)
        return {**batch, "labels": found}

    def check_ids(self, batch: dict[str, Any]) -> None:
        """Of inputs that are the student's; looks at what is on the host.

        Raises:
            ValueError: an id that the teacher lacks, where the mask has it read.
        """
        ids, mask = batch[_IDS], batch.get("attention_mask")
        if not self.unmapped or ids.device.type != "cpu":
            return
        unknown = (self._map.columns[ids] < 0) & (torch.ones_like(ids) if mask is None else mask).bool()
        if bool(unknown.any()):
            row, place = unknown.nonzero()[0].tolist()
            raise ValueError(
                f"batch has token {int(ids[row, place])} in row {row}, which vocab_map says the teacher lacks: it "
                "cannot read the row; leave such rows out, or put another token in its place"
            )
