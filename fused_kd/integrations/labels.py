"""Labels of a batch: which of them carry loss, and what that loss is the mean of, target tokens or sequences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

LABEL_PAD = -100
Average = Literal["tokens", "sequences"]


def count_targets(labels: torch.Tensor) -> torch.Tensor:
    """Valid target tokens of unshifted labels (..., length): the first of a row has no prediction."""
    return (labels[..., 1:] != LABEL_PAD).sum()


def row_numbers(batch: Mapping[str, Any]) -> torch.Tensor:
    """(batch, length) int64: the number of the row that each token belongs to, -1 outside of all rows.

    The result is on the labels' device. Packed rows are counted through the whole batch. Rows are where the
    ``attention_mask`` is 1, one in each line; in a batch without one they begin with each line and where the
    ``position_ids`` are 0. Both must be (batch, length), as the ``labels`` are, or are not looked at; a batch without
    both has a row in each line.
    """
    labels: torch.Tensor = batch["labels"]
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    if mask is None and positions is not None and positions.shape == labels.shape:
        first = positions.to(labels.device) == 0
        first[:, :1] = True
        rows: torch.Tensor = first.flatten().cumsum(0).view(labels.shape) - 1
        return rows
    lines = torch.arange(len(labels), device=labels.device)[:, None].expand(labels.shape)
    if mask is None or mask.shape != labels.shape:
        return lines
    return lines.where(mask.to(labels.device).bool(), -1)


def without_first_targets(batch: dict[str, Any]) -> dict[str, Any]:
    """Return the batch with label -100 at each row's first token, which nothing predicts: before it stands padding or
    another row. :func:`row_numbers` says where rows begin; without a mask and positions the batch stays as it is."""
    labels, mask, positions = (batch.get(name) for name in ("labels", "attention_mask", "position_ids"))
    limits = positions if mask is None else mask
    if labels is None or labels.dim() != 2 or limits is None or limits.shape != labels.shape:
        return batch
    rows = row_numbers(batch)
    first = (rows >= 0) & (rows != torch.nn.functional.pad(rows, (1, -1), value=-1))
    return {**batch, "labels": labels.masked_fill(first, LABEL_PAD)}


def sequence_weights(labels: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
    """(batch, length) fp32: 1/n where one of the n targets of a sequence is predicted, else 0; summed, the sequences.

    Args:
        labels: (batch, length), unshifted: position i predicts label i + 1.
        position_ids: (batch, length) of packed rows, whose sequences begin where it is 0; None: a row is one sequence.
    """
    valid = labels[:, 1:] != LABEL_PAD
    sequence = row_numbers({"labels": labels, "position_ids": position_ids})[:, 1:][valid]
    counts = torch.bincount(sequence, minlength=labels.numel())
    weights = torch.zeros(labels.shape, dtype=torch.float32)
    weights[:, :-1][valid] = 1.0 / counts[sequence].float()
    return weights


def denominator(batch: dict[str, Any], average: Average) -> torch.Tensor:
    """How many tokens or sequences with targets a batch has, int64, on the host as its labels are."""
    if average == "tokens":
        return count_targets(batch["labels"])
    return sequence_weights(batch["labels"], batch.get("position_ids")).sum().round().long()
