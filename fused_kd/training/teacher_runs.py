"""Runs a teacher over rows and gives its head on the tokens that carry loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from fused_kd import LMHead
from fused_kd.integrations.bodies import eval_mode
from fused_kd.integrations.labels import LABEL_PAD
from fused_kd.integrations.transformers import hidden_states, lm_head_of
from fused_kd.training.collate import Collator
from fused_kd.training.fingerprints import PROMPT_COLUMNS
from fused_kd.training.shards import target_positions


class Run(NamedTuple):
    """Some rows: their numbers, how many targets each has, and the teacher's head on those of all of them, in order."""

    rows: list[int]
    targets: list[int]
    head: LMHead


# The runs of some rows, by number.
Runs = Callable[[Iterable[int]], Iterator[Run]]


def teacher_runs(teacher: Any, data: Any, rows: Iterable[int], pad: int, batch_size: int) -> Iterator[Run]:
    """Run the ``rows`` of ``data``, as :func:`read_row` gives them, those of similar length together; ``pad`` fills the
    batches.

    Raises:
        ValueError: as :func:`read_row`.
    """
    collate = Collator(pad)
    read = {index: read_row(index, data[index]) for index in rows}
    order = sorted(read, key=lambda index: -len(read[index]["input_ids"]))
    with eval_mode(teacher):
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            inputs = collate([read.pop(index) for index in batch])
            inputs = {name: value.to(teacher.device) for name, value in inputs.items()}
            valid = inputs.pop("labels")[:, 1:] != LABEL_PAD
            with torch.no_grad():
                hidden = hidden_states(teacher, **inputs)
                head = lm_head_of(teacher, hidden[:, :-1][valid.to(hidden.device)])
            yield Run(batch, valid.sum(1).tolist(), head)


def read_row(number: int, row: Mapping[str, Any]) -> dict[str, Any]:
    """The ``input_ids`` and ``labels`` that a teacher reads: the row's own, or those with another prompt, its
    ``teacher_input_ids`` and ``teacher_labels``, whose targets are k-th to k-th those of its ``labels``.

    Raises:
        ValueError: only one of the two, not a label for each token, or other targets; the message has the number.
    """
    having = [name for name in PROMPT_COLUMNS if name in row]
    if not having:
        return {name: row[name] for name in ("input_ids", "labels")}
    if len(having) == 1:
        raise ValueError(f"rows[{number}] must have {' and '.join(PROMPT_COLUMNS)} or neither, got {having[0]} alone")
    ids, labels = (row[name] for name in PROMPT_COLUMNS)
    if len(ids) != len(labels):
        raise ValueError(
            f"rows[{number}] must have as many teacher_labels as teacher_input_ids, got {len(labels)} and {len(ids)}"
        )
    theirs, own = (np.asarray(each)[target_positions(each) + 1] for each in (labels, row["labels"]))
    if not np.array_equal(theirs, own):
        told = f"{len(theirs)} and {len(own)} of them" if len(theirs) != len(own) else "other tokens"
        raise ValueError(f"rows[{number}] must have the same targets in teacher_labels as in labels, got {told}")
    return {"input_ids": ids, "labels": labels}
