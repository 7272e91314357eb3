"""Rows of a top-k teacher: one sweep of the student's logits to condense them, one to expand the gradient.

All entries that the teacher does not list are alike to it, so a token's loss depends on them through their sum of
exponentials alone: with the K listed logits, the label's where the objective reads it, and ``log sum exp`` of the rest,
the row shrinks to at most K + 2 categories, whose softmax are the student's probabilities of them. Any dense row
implementation then gives loss, gate and gradient, whatever the objective: where the teacher is 0, ``h`` is proportional
to ``q``, so that summing the rest first changes nothing. Back on the vocabulary, listed entries take their category's
gradient, and each of the others its share ``q_v / q_rest`` of the rest's.

A uniform tail is a dense target: its rows are swept as such, with the teacher's logits made where they are used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..objectives import RowSpec, Scalars
from ..workspace import empty
from .contract import LOG_ZERO, NOWHERE, Logits, RowInputs, RowOutputs, Sparse
from .torch.math import weighed

DenseRow = Callable[[RowInputs, RowOutputs], None]

# The sweeps below come back to a block, which should still be in the last-level cache.
BLOCK_BYTES = 8 << 20
DEVICE_BLOCK_BYTES = 256 << 20
# By how much the logarithm of a probability near 1 may pass 0.
ROUNDING = 1e-4


def sparse_teacher(
    log_probs: Tensor, indices: Tensor, labels: Tensor, V: int, tail: str, *, reads_label: bool = True
) -> tuple[Sparse, Tensor]:
    """A chunk's teacher in the form that rows take, and which of its rows (C,) are malformed.

    Args:
        log_probs, indices: (C, K), see :class:`fused_kd.inputs.TopK`.
        labels: (C,) int64, negative for rows to be left out.
        V: vocabulary.
        tail: see :class:`fused_kd.inputs.TopK`.
        reads_label: whether the label is to be an entry of its own.
    """
    values, entries = log_probs.float(), indices.long()
    wanted = ~(values == -torch.inf)  # a NaN is somebody's value
    listed = wanted & (entries >= 0) & (entries < V)
    bad = (wanted & ~listed).any(1) | out_of_range(values, tail).any(1)
    y = labels.unsqueeze(1)
    own = torch.full_like(y, V)
    if reads_label:
        own = torch.where((listed & (entries == y)).any(1, keepdim=True) | (y < 0), V, y)
    entries, order = torch.cat([entries.where(listed, V), own], 1).sort(1)
    values = torch.cat([values.where(listed, -torch.inf), torch.full_like(values[:, :1], -torch.inf)], 1)
    values = values.gather(1, order)
    bad |= ((entries[:, 1:] == entries[:, :-1]) & (entries[:, 1:] < V)).any(1)
    if tail == "renormalize":
        bad |= ~listed.any(1)  # 0 / 0
        rest = torch.full_like(values[:, 0], -torch.inf)
    else:
        missing = (1.0 - values.double().exp().sum(1)).clamp_(min=0.0)
        others = V - (values > -torch.inf).sum(1)
        each = missing / others.clamp(min=1)
        values = torch.where((entries == y) & (values == -torch.inf), each.log().unsqueeze(1).float(), values)
        rest = (each if tail == "uniform" else each * (V - (entries < V).sum(1))).log().float()
    return Sparse(entries, values, rest, tail), bad & (labels >= 0)


def out_of_range(log_probs: Tensor, tail: str) -> Tensor:
    """Which values are no log-probabilities; with "renormalize" they may be logits."""
    return ~(log_probs < torch.inf if tail == "renormalize" else log_probs <= ROUNDING)


class Categories(NamedTuple):
    """``student`` and ``teacher`` (C, K + 2) fp32, the last column the rest's; ``labels`` (C,) their columns, any where
    the label is not an entry."""

    student: Tensor
    teacher: Tensor
    labels: Tensor


def categories(teacher: Sparse, labels: Tensor) -> Categories:
    """All but the student's logits, which the caller's sweep fills in."""
    C, K1 = teacher.indices.shape
    column = (teacher.indices == labels.unsqueeze(1)).to(torch.int8).argmax(1)
    return Categories(
        torch.empty(C, K1 + 1, dtype=torch.float32, device=labels.device),
        torch.cat([teacher.log_probs, teacher.rest.unsqueeze(1)], 1),
        torch.where(labels < 0, -1, column),
    )


class CategoryGradient(NamedTuple):
    """``entries`` (C, K + 1) and ``rest`` (C,): d loss / d final logit; ``cold`` (C,) the rest's at temperature 1."""

    entries: Tensor
    rest: Tensor
    cold: Tensor | None


def rest_gradient(gradient: Tensor, rest: Tensor) -> Tensor:
    """0 where the student excludes all tokens of the rest, by its logit: there is none to give it to."""
    return gradient.masked_fill(rest < LOG_ZERO / 2, 0.0)


def category_rows(
    dense: DenseRow, inputs: RowInputs, outputs: RowOutputs, small: Categories, cold_rest: Tensor | None
) -> CategoryGradient | None:
    """Fill ``outputs`` but for dlogits by a dense row over categories; their gradient unless none is wanted.

    ``cold_rest`` (C,) is the rest's logit at temperature 1, for labels whose cross-entropy is taken there.
    """
    teacher = Logits(small.teacher, 1.0, None, False)
    wanted = outputs.dlogits is not None

    def of_rest(gradient: Tensor) -> Tensor:
        return rest_gradient(gradient[:, -1], small.student[:, -1])

    def run(z: Tensor, spec: RowSpec, out: RowOutputs) -> Tensor | None:
        gradient = torch.empty_like(z) if wanted else None
        dense(
            RowInputs(
                Logits(z, 1.0, None, False), None if spec.divergence is None else teacher, small.labels,
                inputs.weights, inputs.scalars, spec, False, inputs.hard,
            ),
            out._replace(dlogits=gradient),
        )  # fmt: skip
        return gradient

    if cold_rest is None:
        gradient = run(small.student, inputs.spec, outputs)
        return None if gradient is None else CategoryGradient(gradient[:, :-1], of_rest(gradient), None)
    # The two temperatures see two rests, so the terms are rows of their own.
    gradient = run(small.student, inputs.spec._replace(hard_label=False), outputs)
    ce = outputs._replace(**{name: torch.empty_like(getattr(outputs, name)) for name in ("loss", "difficulty")})
    ce = ce._replace(is_hard=torch.empty_like(outputs.is_hard))
    cold = torch.cat([small.student[:, :-1], cold_rest.unsqueeze(1)], 1)
    ce_gradient = run(cold, RowSpec(None, hard_label=True), ce)
    share = Scalars(*inputs.scalars).rest
    outputs.loss.add_(weighed(share, ce.loss))
    if gradient is None or ce_gradient is None:
        return None
    ce_gradient *= share
    return CategoryGradient(gradient[:, :-1] + ce_gradient[:, :-1], of_rest(gradient), of_rest(ce_gradient))


def row(dense: DenseRow, inputs: RowInputs, outputs: RowOutputs) -> None:
    """Fill ``outputs`` for one chunk in plain PyTorch, with ``dense`` for what is left of each row.

    Shapes and meaning: :mod:`fused_kd.rows.contract`, the teacher :class:`fused_kd.rows.contract.Sparse`.
    """
    assert isinstance(inputs.teacher, Sparse)
    C, V = inputs.student.raw.shape
    on_host = inputs.labels.device.type == "cpu"
    B = max(1, min(C, (BLOCK_BYTES if on_host else DEVICE_BLOCK_BYTES) // (4 * V)))
    block = _uniform_block if inputs.teacher.tail == "uniform" else _block
    scratch = _Scratch(B, V, inputs.labels.device)
    for start in range(0, C, B):
        rows = slice(start, min(start + B, C))
        out = RowOutputs(outputs.loss[rows], outputs.difficulty[rows], outputs.is_hard[rows], None)
        if outputs.dlogits is not None:
            out = out._replace(dlogits=outputs.dlogits[rows])
        block(dense, _rows_of(inputs, rows), out, scratch)


def _rows_of(inputs: RowInputs, rows: slice) -> RowInputs:
    teacher, student = inputs.teacher, inputs.student
    assert isinstance(teacher, Sparse)
    return inputs._replace(
        student=student._replace(raw=student.raw[rows]),
        teacher=Sparse(teacher.indices[rows], teacher.log_probs[rows], teacher.rest[rows], teacher.tail),
        labels=inputs.labels[rows],
        weights=None if inputs.weights is None else inputs.weights[rows],
        hard=None if inputs.hard is None else inputs.hard[rows],
    )


class _Scratch:
    """(B, V) fp32 buffers by name, made when first asked for."""

    def __init__(self, B: int, V: int, device: torch.device) -> None:
        self._shape, self._device = (B, V), device
        self._held: dict[str, Tensor] = {}

    def __call__(self, name: str, rows: int) -> Tensor:
        if name not in self._held:
            self._held[name] = empty(self._shape, torch.float32, self._device)
        return self._held[name][:rows]


def _block(dense: DenseRow, inputs: RowInputs, outputs: RowOutputs, scratch: _Scratch) -> None:
    assert isinstance(inputs.teacher, Sparse)
    student, B, V = inputs.student, *inputs.student.raw.shape
    small = categories(inputs.teacher, inputs.labels)
    # Where there is no entry, one of the others stands in: what is written there twice is the same, or 0.
    index = torch.minimum(inputs.teacher.indices, inputs.teacher.indices[:, :1]).clamp_(max=V - 1)
    index = torch.where(inputs.teacher.indices < V, inputs.teacher.indices, index)
    out = outputs.dlogits
    overwrites = out is not None and out.data_ptr() == student.raw.data_ptr() and out.dtype == torch.float32
    z = student.raw if overwrites else scratch("z", B).copy_(student.raw)
    slope = None
    if student.softcap is not None:
        z.mul_(student.scale / student.softcap).tanh_()
        slope = torch.mul(z, z, out=scratch("slope", B)).neg_().add_(1.0).mul_(student.scale)
        z.mul_(student.softcap)
    elif student.scale != 1.0:
        z.mul_(student.scale)
    if not student.finite:
        z.clamp_(min=LOG_ZERO)
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
    temperature = Scalars(*inputs.scalars).temperature
    if not (inputs.labels.device.type == "cpu" and float(temperature) == 1.0):
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
    if slope is not None:
        share.mul_(slope)
    elif student.scale != 1.0:
        share.mul_(student.scale)
    if work is not out:
        out.copy_(work)


def _log_sum(top: Tensor, share: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """``T log sum exp(z / T)`` (B,) of rows with maxima ``top`` and softmax ``share``; and the sum of ``share``, not
    quite 1."""
    norm = share.sum(1)
    return top - (share.amax(1) / norm).log() * temperature, norm


def _uniform_block(dense: DenseRow, inputs: RowInputs, outputs: RowOutputs, scratch: _Scratch) -> None:
    teacher = inputs.teacher
    assert isinstance(teacher, Sparse)
    B, V = inputs.student.raw.shape
    each = teacher.rest.clamp(min=LOG_ZERO).unsqueeze(1)
    z_t = scratch("z_t", B).copy_(each.expand(B, V))
    # Where there is no entry, the row's first is written again; in an empty list, what all tokens have.
    present = teacher.indices < V
    first = teacher.indices[:, :1].clamp(max=V - 1)
    index = torch.where(present, teacher.indices, first)
    values = torch.where(present, teacher.log_probs, torch.where(present[:, :1], teacher.log_probs[:, :1], each))
    z_t.scatter_(1, index, values)
    dense(inputs._replace(teacher=Logits(z_t, 1.0, None, False)), outputs)
