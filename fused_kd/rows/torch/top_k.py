"""Sweeps of :mod:`fused_kd.rows.top_k` in PyTorch operations, for any device: blocks of rows that stay in cache."""

from __future__ import annotations

import torch
from torch import Tensor

from ...divergences import NOWHERE
from ..contract import RowInputs, RowOutputs, Sparse
from ..top_k import categories, category_rows
from .math import DEVICE_BLOCK_BYTES, Scratch, blocks, finish_logits_, is_nothing, on_host, scalars_of, to_raw_
from .row import row as dense

# The sweeps below come back to a block, which should still be in the last-level cache.
BLOCK_BYTES = 8 << 20


def row(inputs: RowInputs, outputs: RowOutputs) -> None:
    """Fill ``outputs`` for one chunk, as :mod:`fused_kd.rows.contract` says, of a teacher's lists without a uniform
    tail."""
    C, V = inputs.student.raw.shape
    B = max(1, min(C, (BLOCK_BYTES if on_host(inputs.labels) else DEVICE_BLOCK_BYTES) // (4 * V)))
    scratch = Scratch(B, V, inputs.labels.device)
    for rows, out in blocks(inputs, outputs, B):
        _block(rows, out, scratch)


def _block(inputs: RowInputs, outputs: RowOutputs, scratch: Scratch) -> None:
    assert isinstance(inputs.teacher, Sparse)
    student, B, V = inputs.student, *inputs.student.raw.shape
    small = categories(inputs)
    # Where there is no entry, one of the others stands in: what is written there twice is the same, or 0.
    index = torch.minimum(inputs.teacher.indices, inputs.teacher.indices[:, :1]).clamp_(max=V - 1)
    index = torch.where(inputs.teacher.indices < V, inputs.teacher.indices, index)
    out = outputs.dlogits
    overwrites = out is not None and out.data_ptr() == student.raw.data_ptr() and out.dtype == torch.float32
    z = student.raw if overwrites else scratch("z", B).copy_(student.raw)
    slope = finish_logits_(z, student, scratch, "slope")
    entries = z.gather(1, index).where(inputs.teacher.indices < V, NOWHERE)
    z.scatter_(1, index, NOWHERE)

    work = out if out is not None and out.dtype == torch.float32 else scratch("work", B)
    top = z.amax(1)
    # Only differences count: a large common offset would swallow the digits of the rest's logarithm.
    origin = torch.maximum(top, entries.amax(1))
    torch.sub(entries, origin.unsqueeze(1), out=small.student[:, :-1])
    top = top - origin
    cold_share = cold_rest = None
    if inputs.cold_labels:
        cold_share = torch.softmax(z, 1, out=scratch("cold", B))
        cold_rest, cold_norm = _log_sum(top, cold_share, 1.0)
    temperature = scalars_of(inputs)[0].temperature
    if not is_nothing(temperature, 1.0):
        z.div_(temperature).scatter_(1, index, NOWHERE)
    share = torch.softmax(z, 1, out=work)  # may overwrite z
    small.student[:, -1], norm = _log_sum(top, share, temperature)

    gradient = category_rows(dense, inputs, outputs, small, cold_rest)
    if gradient is None or out is None:
        return
    share.mul_((gradient.rest / norm).unsqueeze(1))
    if gradient.cold is not None and cold_share is not None:
        share.addcmul_(cold_share, (gradient.cold / cold_norm).unsqueeze(1))
    share.scatter_add_(1, index, gradient.entries)
    to_raw_(share, student, slope)
    if work is not out:
        out.copy_(work)


def _log_sum(top: Tensor, share: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """``T log sum exp(z / T)`` (B,) of rows with maxima ``top`` and softmax ``share``; and the sum of ``share``, not
    quite 1."""
    norm = share.sum(1)
    if isinstance(temperature, Tensor):
        temperature = temperature.reshape(-1)
    return top - (share.amax(1) / norm).log() * temperature, norm
