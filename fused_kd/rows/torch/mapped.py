"""Rows of a teacher of another vocabulary whose tail is a category of its own: a dense row of V + 1 columns.

The student's columns that the teacher lacks are alike to it, as unlisted entries are to a list (see
:mod:`fused_kd.rows.top_k`): they become one category, whose gradient each of them has its share of. In PyTorch
operations around any dense row, for any device, in blocks of rows that stay in cache.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...divergences import LOG_ZERO, NOWHERE
from ...terms import RowSpec
from ..contract import Logits, Row, RowInputs, RowOutputs
from ..top_k import Categories, category_rows
from .math import Scratch, blocks, finish_logits_, rows_of_block, scalars_of, to_raw_

# Of a block's logits on a GPU: there are several buffers of it, and kernels that fill the device at this size.
DEVICE_BLOCK_BYTES = 64 << 20


def block_rows(V: int, device: torch.device) -> int:
    return rows_of_block(V, device) if device.type == "cpu" else max(1, DEVICE_BLOCK_BYTES // (4 * V))


def block_bytes(C: int, V: int, device: torch.device) -> int:
    """Of what a block of a chunk holds: both sides, two gradients, slopes and shares of the unmapped."""
    return 9 * 4 * (V + 1) * min(C, block_rows(V, device))


def row(dense: Row, inputs: RowInputs, outputs: RowOutputs) -> None:
    """Fill ``outputs`` for one chunk, as :mod:`fused_kd.rows.contract` says, of a teacher of another vocabulary."""
    C, V = inputs.student.raw.shape
    B = min(C, block_rows(V, inputs.labels.device))
    wide, narrow = (Scratch(B, columns, inputs.labels.device) for columns in (V + 1, V))
    for rows, out in blocks(inputs, outputs, B):
        _block(dense, rows, out, wide, narrow)


def _block(dense: Row, inputs: RowInputs, outputs: RowOutputs, wide: Scratch, narrow: Scratch) -> None:
    teacher, student, beyond, (B, V) = inputs.teacher, inputs.student, inputs.beyond, inputs.student.raw.shape
    assert isinstance(teacher, Logits) and beyond is not None
    unmapped, label = beyond.unmapped, inputs.labels.clamp(min=0).unsqueeze(1)
    # Of a label that the teacher lacks, but the objective reads: a column of its own.
    own = (unmapped == label) & inputs.spec.reads_label
    alone = own.any(1, keepdim=True)
    columns, all_p = wide("student", B), wide("teacher", B)

    z = columns[:, :V].copy_(student.raw)
    slope = finish_logits_(z, student._replace(finite=False), narrow, "slope")
    rest = z.index_select(1, unmapped).masked_fill_(own, NOWHERE)
    of_label = z.gather(1, label)
    z.index_fill_(1, unmapped, NOWHERE)
    z.scatter_(1, label, torch.where(alone, of_label, z.gather(1, label)))
    listed = _listed(z, label, alone, inputs.spec, wide("listed", B)) if beyond.tail == "listed" else None
    top = torch.full_like(of_label, NOWHERE) if not len(unmapped) else rest.amax(1, keepdim=True)
    # Only differences count: a large common offset would swallow the digits of the rest's logarithm.
    origin = torch.maximum(z.amax(1, keepdim=True), top)
    z.sub_(origin)
    rest, top = rest.sub_(top), top - origin
    temperature = scalars_of(inputs)[0].temperature
    share, columns[:, V:] = _log_sum(rest, top, temperature)
    cold_share = cold_rest = None
    if inputs.cold_labels:
        cold_share, cold_rest = _log_sum(rest, top, 1.0)
        cold_rest = cold_rest.squeeze(1)

    U, others = len(unmapped), beyond.rest.unsqueeze(1)
    all_p[:, :V] = teacher.raw
    if U:
        p_y = others - math.log(U) * temperature
        all_p.scatter_(1, label, torch.where(alone, p_y, all_p.gather(1, label)))
        left = math.log((U - 1) / U) * temperature if U > 1 else -math.inf
        others = torch.where(alone, others + left, others)
    all_p[:, V:] = others

    small = Categories(columns, all_p, inputs.labels, listed)
    gradient = category_rows(dense, inputs, outputs, small, cold_rest)
    if gradient is None or outputs.dlogits is None:
        return
    out = gradient.entries
    if U:
        share.mul_(gradient.rest.unsqueeze(1))
        if gradient.cold is not None and cold_share is not None:
            share.addcmul_(cold_share, gradient.cold.unsqueeze(1))
        out.index_add_(1, unmapped, share)
    to_raw_(out, student, slope)
    outputs.dlogits.copy_(out)


def _listed(z: Tensor, label: Tensor, alone: Tensor, spec: RowSpec, out: Tensor) -> Tensor:
    """The student (B, V + 1) of a divergence over mapped columns, and a label in the target: over their own largest."""
    V = z.shape[1]
    out[:, :V], out[:, V:] = z, NOWHERE
    if not spec.mixes_label:
        out.scatter_(1, label, torch.where(alone, NOWHERE, z.gather(1, label)))
    return out.sub_(out.amax(1, keepdim=True)).clamp_(min=LOG_ZERO)


def _log_sum(rest: Tensor, top: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """Softmax (B, U) of logits that are ``rest`` above ``top``, and ``T log sum exp(z / T)`` (B, 1)."""
    if not rest.shape[1]:
        return rest, torch.full_like(top, LOG_ZERO)
    share = torch.div(rest, temperature).exp_()
    total = share.sum(1, keepdim=True)
    return share.div_(total), top + total.log() * temperature
