"""A teacher that reads another prompt than the student: its rows in a batch, and its states where the student's are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fused_kd.integrations.labels import LABEL_PAD, without_first_targets

PREFIX = "teacher_"
# what a model reads, and the labels that say where its targets are
_INPUTS = (
    "input_ids", "attention_mask", "position_ids",
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx",
)  # fmt: skip
PROMPT_COLUMNS = tuple(PREFIX + name for name in (*_INPUTS, "labels"))


def has_prompt(batch: Mapping[str, Any]) -> bool:
    """Whether the teacher's rows in a batch are others than the student's."""
    return PREFIX + "input_ids" in batch


def teacher_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What the teacher reads, by the names that a model knows."""
    return {name: batch[PREFIX + name] for name in _INPUTS if PREFIX + name in batch}


def targets_of(labels: Tensor) -> Tensor:
    """(rows, length) bool: whether position i predicts a label that carries loss, which is that of i + 1."""
    return pad(labels[:, 1:] != LABEL_PAD, (0, 1))


def checked_prompts(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch, still on the host, with ``teacher_labels`` -100 where nothing predicts them, as a row's first.

    Its ``labels`` must be so already: :func:`fused_kd.integrations.labels.without_first_targets`.

    Raises:
        ValueError: a batch with the teacher's rows and without their labels, of another number of rows, or with other
            targets than the student's; the message names the row.
    """
    if not has_prompt(batch):
        return batch
    if PREFIX + "labels" not in batch:
        raise ValueError(
            f"batch must have {PREFIX}labels beside {PREFIX}input_ids, got {', '.join(sorted(batch))}: "
            "fused_kd.training.Collator and PackingCollator pad those of fused_kd.training.with_context"
        )
    read = teacher_inputs(batch)
    ids, labels = read["input_ids"], batch[PREFIX + "labels"]
    if labels.shape != ids.shape or labels.dim() != 2 or len(labels) != len(batch["labels"]):
        raise ValueError(
            f"{PREFIX}labels must have the shape of {PREFIX}input_ids and as many rows as labels, got "
            f"{tuple(labels.shape)}, {tuple(ids.shape)} and {tuple(batch['labels'].shape)}"
        )
    labels = without_first_targets({**read, "labels": labels})["labels"]
    _check_targets(_targets_by_row(batch, batch["labels"]), _targets_by_row(read, labels))
    return {**batch, PREFIX + "labels": labels}


def _check_targets(found: Tensor, found_t: Tensor) -> None:
    """Raise ``ValueError`` unless each row has the same targets on both sides, in their order."""
    if torch.equal(found, found_t):
        return
    for row in range(int(torch.cat([found, found_t])[:, 0].max()) + 1):
        here, there = (each[each[:, 0] == row, 1].tolist() for each in (found, found_t))
        if here != there:
            break
    told = f"{len(there)} of them in {PREFIX}labels and {len(here)} in labels"
    if len(here) == len(there):
        place = next(i for i, (own, other) in enumerate(zip(here, there, strict=True)) if own != other)
        told = f"token {there[place]} in place of {here[place]} as number {place}"
    raise ValueError(
        f"{PREFIX}labels must have the same targets as labels in each row, row {row} has {told}: both end in the same "
        "response, only what comes before it differs"
    )


def _targets_by_row(batch: Mapping[str, Any], labels: Tensor) -> Tensor:
    """(targets, 2): each target's row, packed rows counted one by one, and its token."""
    rows, positions = torch.arange(len(labels))[:, None].expand_as(labels), batch.get("position_ids")
    if isinstance(positions, Tensor) and positions.shape == labels.shape and batch.get("attention_mask") is None:
        rows = rows + (positions == 0).cumsum(-1) - 1
    valid = labels[:, 1:] != LABEL_PAD
    return torch.stack([rows[:, 1:][valid], labels[:, 1:][valid]], dim=1)


def aligned(hidden_t: Tensor, targets_t: Tensor, targets_s: Tensor) -> Tensor:
    """The teacher's states where the student's targets are predicted, k-th to k-th in each row.

    Args:
        hidden_t: (rows, length_t, H).
        targets_t, targets_s: (rows, length_t) and (rows, length_s) bool on the CPU, of :func:`targets_of`.

    Returns:
        (rows, length_s, H), zeros where the student predicts no target.

    Raises:
        ValueError: shapes that do not fit, unequal numbers of targets in a row, which the message names.
    """
    if hidden_t.shape[:-1] != targets_t.shape or len(targets_t) != len(targets_s):
        raise ValueError(
            "targets_t must have the shape of hidden_t without H, and as many rows as targets_s, got "
            f"{tuple(targets_t.shape)}, {tuple(hidden_t.shape)} and {tuple(targets_s.shape)}"
        )
    counts_t, counts_s = targets_t.sum(1), targets_s.sum(1)
    if not torch.equal(counts_t, counts_s):
        row = int((counts_t != counts_s).nonzero()[0])
        raise ValueError(
            "teacher and student must have as many targets in each row, "
            f"row {row} has {int(counts_t[row])} and {int(counts_s[row])}"
        )
    H, device = hidden_t.shape[-1], hidden_t.device
    # counted on the host, so nothing waits for the device
    here, there = (each.flatten().nonzero().squeeze(1).to(device, non_blocking=True) for each in (targets_s, targets_t))
    out = hidden_t.new_zeros(targets_s.numel(), H)
    out.index_copy_(0, here, hidden_t.reshape(-1, H).index_select(0, there))
    return out.view(*targets_s.shape, H)
