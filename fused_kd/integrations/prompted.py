"""Batches whose teacher reads another prompt than the student: whether both predict the same tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fused_kd.integrations.labels import LABEL_PAD, row_numbers, without_first_targets
from fused_kd.integrations.teacher_columns import OTHER_IDS, OTHER_LABELS, PROMPT

# what says where the rows of a batch begin
_LIMITS = ("attention_mask", "position_ids")


def checked_prompts(batch: dict[str, Any], *, shift: bool = True, same_ids: bool = True) -> dict[str, Any]:
    """Check a batch on the host; return it with ``teacher_labels`` -100 where nothing predicts them (a row's first).

    Its ``labels`` must be so already: :func:`fused_kd.integrations.labels.without_first_targets`.

    Args:
        batch: of a trainer; without ``teacher_input_ids``, or ``labels``, it is returned as it is.
        shift: whether the models are causal, as they must be.
        same_ids: whether ``labels`` and ``teacher_labels`` are of one vocabulary, so that their tokens can be compared.

    Raises:
        ValueError: a batch with the teacher's rows and without their labels, of another number of rows, or with other
            targets than the student's; the message names the row.
    """
    if OTHER_IDS not in batch or "labels" not in batch:
        return batch
    if not shift:
        raise ValueError(f"batch must not have {OTHER_IDS} for an encoder-decoder: another prompt is for causal LMs")
    if OTHER_LABELS not in batch:
        raise ValueError(
            f"batch must have {OTHER_LABELS} beside {OTHER_IDS}, got {', '.join(sorted(batch))}: Collator and "
            "PackingCollator of fused_kd.training pad those of its with_context"
        )
    ids, labels = batch[OTHER_IDS], batch[OTHER_LABELS]
    if labels.shape != ids.shape or labels.dim() != 2 or len(labels) != len(batch["labels"]):
        raise ValueError(
            f"{OTHER_LABELS} must have the shape of {OTHER_IDS} and as many rows as labels, got {tuple(labels.shape)}, "
            f"{tuple(ids.shape)} and {tuple(batch['labels'].shape)}"
        )
    theirs = {name: batch[PROMPT + name] for name in _LIMITS if PROMPT + name in batch}
    labels = without_first_targets({**theirs, "labels": labels})["labels"]
    found, found_t = _targets_by_row(batch, batch["labels"]), _targets_by_row(theirs, labels)
    _check_targets(*(each if same_ids else each * torch.tensor([1, 0]) for each in (found, found_t)))
    return {**batch, OTHER_LABELS: labels}


def _check_targets(found: Tensor, found_t: Tensor) -> None:
    """Raise ``ValueError`` unless each row has the same targets on both sides, in their order."""
    if torch.equal(found, found_t):
        return
    for row in torch.cat([found, found_t])[:, 0].unique().tolist():
        here, there = (each[each[:, 0] == row, 1].tolist() for each in (found, found_t))
        if here != there:
            break
    told = f"{len(there)} of them in {OTHER_LABELS} and {len(here)} in labels"
    if len(here) == len(there):
        place = next(i for i, (own, other) in enumerate(zip(here, there, strict=True)) if own != other)
        told = f"token {there[place]} in place of {here[place]} as number {place}"
    raise ValueError(
        f"{OTHER_LABELS} must have the same targets as labels in each row, row {row} has {told}: both end in the same "
        "response, only what comes before it differs"
    )


def _targets_by_row(batch: Mapping[str, Any], labels: Tensor) -> Tensor:
    """(targets, 2): each target's row, packed rows counted one by one, and its token."""
    rows, valid = row_numbers({**batch, "labels": labels}), labels[:, 1:] != LABEL_PAD
    return torch.stack([rows[:, 1:][valid], labels[:, 1:][valid]], dim=1)
