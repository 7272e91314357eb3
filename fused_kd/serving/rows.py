"""The rows of a batch, as far as a teacher has to read them, and where the states that it gives belong."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fused_kd.serving.wire import Request


def key_of(batch: Mapping[str, Any], targets: Tensor) -> str:
    """Stands for the content of what :func:`requested_rows` reads, in a fraction of its time."""
    found = hashlib.blake2b(digest_size=16)
    read = {name: batch.get(name) for name in ("input_ids", "attention_mask", "position_ids")}
    for name, value in {**read, "targets": targets}.items():
        if isinstance(value, Tensor):
            content = value.detach().cpu().contiguous().flatten()
            found.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            found.update(memoryview(content.view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return found.hexdigest()


def requested_rows(batch: Mapping[str, Any], targets: Tensor) -> tuple[Request, Tensor]:
    """The rows of a batch up to their last targets; those without one are left out.

    Args:
        batch: ``input_ids`` (rows, length), with an ``attention_mask`` (rows, length) whose ones follow each other, or
            of packed rows with ``position_ids`` (rows, length), which are 0 where a row begins; without both each row
            is whole.
        targets: (rows, length) bool, the positions whose states are wanted.

    Returns:
        The request, and the place of each wanted token among the rows x length of the batch, ascending, int64; on the
        CPU.

    Raises:
        ValueError: shapes that do not fit, a mask with gaps, a target that the mask leaves out.
    """
    ids = batch["input_ids"].detach().cpu()
    targets = targets.detach().cpu().bool()
    if ids.dim() != 2 or targets.shape != ids.shape:
        raise ValueError(
            f"input_ids and targets must have one shape (rows, length), got {tuple(ids.shape)} and "
            f"{tuple(targets.shape)}"
        )
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    begins = torch.zeros(ids.shape, dtype=torch.bool)
    kept = torch.ones(ids.shape, dtype=torch.bool)
    if mask is not None:
        kept = _like(ids, "attention_mask", mask).bool()
        begins = kept & ~torch.nn.functional.pad(kept, (1, -1))
        if bool((begins.sum(1) > 1).any()):
            row = int((begins.sum(1) > 1).nonzero()[0])
            raise ValueError(f"attention_mask must have its ones in one piece, got a gap in row {row}")
        if bool((targets & ~kept).any()):
            row, position = (targets & ~kept).nonzero()[0].tolist()
            raise ValueError(f"targets has position {position} of row {row}, where attention_mask is 0")
    elif positions is not None:
        begins = _like(ids, "position_ids", positions) == 0
    elif any(batch.get(name) is not None for name in ("cu_seq_lens_q", "seq_idx")):
        raise ValueError("packed rows must have position_ids, which are 0 where a row begins")
    begins[:, 0] |= kept[:, 0]
    places = targets.flatten().nonzero()[:, 0]
    if not len(places):
        return Request(torch.empty(0).int(), torch.empty(0).int(), torch.empty(0).bool()), places
    row_of = begins.flatten().cumsum(0) - 1
    count = int(begins.sum())
    order = torch.arange(ids.numel())
    last = torch.full((count,), -1).scatter_reduce(0, row_of[places], places, "amax")
    sent = kept.flatten() & (order <= last[row_of.clamp_min(0)])
    lengths = torch.bincount(row_of[sent], minlength=count)
    request = Request(ids.flatten()[sent].int(), lengths[lengths > 0].int(), targets.flatten()[sent])
    return request, places


def _like(ids: Tensor, name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.shape != ids.shape:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} must have the shape of input_ids, {tuple(ids.shape)}, got {shape}")
    return value.detach().cpu()
