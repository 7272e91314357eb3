"""Labels of a batch: which of them carry loss, and what that loss is the mean of, target tokens or sequences."""

from __future__ import annotations

from typing import Any, Literal

import torch

LABEL_PAD = -100
Average = Literal["tokens", "sequences"]


def count_targets(labels: torch.Tensor) -> torch.Tensor:
    """Valid target tokens of unshifted labels (..., length): the first of a row has no prediction."""
    return (labels[..., 1:] != LABEL_PAD).sum()


def without_first_targets(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with label -100 at each row's first token: what stands before it, padding or another row, predicts
    nothing.

    Rows begin where the ``attention_mask`` does, and in a batch without one where the ``position_ids`` are 0; both
    (batch, length) as the ``labels``, or they are not looked at.
    """
    labels, mask, positions = (batch.get(name) for name in ("labels", "attention_mask", "position_ids"))
    if labels is None or labels.dim() != 2:
        return batch
    if mask is not None and mask.shape == labels.shape:
        first = mask.bool() & ~torch.nn.functional.pad(mask.bool(), (1, -1))
    elif mask is None and positions is not None and positions.shape == labels.shape:
        first = positions == 0
    else:
        return batch
    return {**batch, "labels": labels.masked_fill(first.to(labels.device), LABEL_PAD)}


def sequence_weights(labels: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
    """(batch, length) fp32: 1/n where one of the n targets of a sequence is predicted, else 0; summed, the sequences.

    Args:
        labels: (batch, length), unshifted: position i predicts label i + 1.
        position_ids: (batch, length) of packed rows, whose sequences begin where it is 0; None: a row is one sequence.
    """
    valid = labels[:, 1:] != LABEL_PAD
    rows = torch.arange(labels.shape[0])[:, None].expand_as(labels) * labels.shape[1]
    if position_ids is not None:
        rows = rows + ((position_ids.to(labels.device) == 0).cumsum(-1) - 1).clamp(min=0)
    sequence = rows[:, 1:][valid]
    counts = torch.bincount(sequence, minlength=labels.numel())
    weights = torch.zeros(labels.shape, dtype=torch.float32)
    weights[:, :-1][valid] = 1.0 / counts[sequence].float()
    return weights


def denominator(batch: dict[str, Any], average: Average) -> torch.Tensor:
    """How many tokens or sequences with targets a batch has, int64, on the host as its labels are."""
    if average == "tokens":
        return count_targets(batch["labels"])
    return sequence_weights(batch["labels"], batch.get("position_ids")).sum().round().long()
