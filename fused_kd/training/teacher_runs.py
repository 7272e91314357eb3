"""Runs a teacher over rows and gives its head on the tokens that carry loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch

from fused_kd import LMHead
from fused_kd.integrations.bodies import eval_mode
from fused_kd.integrations.labels import LABEL_PAD
from fused_kd.integrations.transformers import hidden_states, lm_head_of
from fused_kd.training.collate import Collator


class Run(NamedTuple):
    """Some rows: their numbers, how many targets each has, and the teacher's head on those of all of them, in order."""

    rows: list[int]
    targets: list[int]
    head: LMHead


# The runs of some rows, by number.
Runs = Callable[[Iterable[int]], Iterator[Run]]


def teacher_runs(teacher: Any, data: Any, rows: Iterable[int], pad: int, batch_size: int) -> Iterator[Run]:
    """Run the ``rows`` of ``data``, those of similar length together; ``pad`` fills the batches."""
    collate = Collator(pad)
    order = sorted(rows, key=lambda index: -len(data[index]["input_ids"]))
    with eval_mode(teacher):
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            inputs = collate([{name: data[index][name] for name in ("input_ids", "labels")} for index in batch])
            inputs = {name: value.to(teacher.device) for name, value in inputs.items()}
            valid = inputs.pop("labels")[:, 1:] != LABEL_PAD
            with torch.no_grad():
                hidden = hidden_states(teacher, **inputs)
                head = lm_head_of(teacher, hidden[:, :-1][valid.to(hidden.device)])
            yield Run(batch, valid.sum(1).tolist(), head)
