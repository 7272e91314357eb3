"""The chunked engine: logits of C tokens and their row, chunk after chunk; gradients after every group of chunks.

Gradients are made in the forward, so nothing is computed twice: three student GEMMs and one teacher GEMM, fewer where
something is frozen. Ignored tokens are dropped before any GEMM where the labels are on the host. Where low-precision
dlogits have a buffer of their own, those of several chunks share the gradients' GEMMs, see :mod:`.head_gradient`; how
many is bounded in bytes, so that memory does not grow with the tokens.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..objectives import RowSpec, Scalars
from ..rows.contract import EXCLUDED, Logits, RowInputs, RowOutputs, Sparse
from ..rows.select import Row
from ..rows.top_k import sparse_teacher
from ..rows.torch.math import known_all
from ..tuning import current
from .buffers import Buffers, row_stride
from .gemm import SLAB_BYTES, Projection
from .head_gradient import HeadGradient, carries_scale, gradient_dtype
from .plan import Plan, Workspace, plan_chunks, preferred_chunk
from .tile_filter import host_bytes


class Side(NamedTuple):
    """Student or teacher. ``source`` is (N, H) with ``weight`` (V, H), or logits (N, V) with ``weight`` None."""

    source: Tensor
    weight: Tensor | None
    bias: Tensor | None
    logit_scale: float
    softcap: float | None


class TopKSide(NamedTuple):
    """A top-k teacher: ``log_probs``, ``indices`` (N, K), see :class:`fused_kd.inputs.TopK`."""

    log_probs: Tensor
    indices: Tensor
    tail: str


class Wanted(NamedTuple):
    """Which gradients to make; what is not wanted costs nothing."""

    source: bool
    weight: bool
    bias: bool


class Result(NamedTuple):
    """Unweighted ``loss``, ``difficulty``, ``is_hard`` (N,); gradients of ``scale * sum(weights * loss)``."""

    loss: Tensor
    difficulty: Tensor
    is_hard: Tensor
    d_source: Tensor | None
    d_weight: Tensor | None
    d_bias: Tensor | None


def run(
    student: Side,
    teacher: Side | TopKSide | None,
    labels: Tensor,
    *,
    weights: Tensor | None,
    scale: Tensor,
    scalars: Tensor,
    spec: RowSpec,
    cold_labels: bool,
    vocab: int,
    ignore_index: int,
    row: Row,
    dtype: torch.dtype | None,
    memory_budget: int | None,
    wanted: Wanted,
    grad_filter_eps: float = 0.0,
) -> Result:
    """Losses of all tokens and the wanted gradients.

    Args:
        labels: (N,) integers, on the student's device or on the CPU. On the CPU, ignored tokens are dropped without a
            synchronisation; on an accelerator their number is unknown to the host, so their rows are skipped instead.
        weights: (N,) fp32 token weights or None.
        scale: 0-d fp32 factor of all gradients.
        scalars: (8,) fp32, see :class:`fused_kd.objectives.Scalars`.
        vocab: both sides are cut to their first ``vocab`` logits.
        dtype: of the GEMM operands under autocast; None takes that of each side.
        grad_filter_eps: see :mod:`.tile_filter`.
    """
    device = student.source.device
    N = student.source.shape[0]
    index, labels = valid_tokens(labels, ignore_index, device)
    n = labels.shape[0]
    in_range = labels < vocab
    labels, bad = torch.where(in_range, labels, -1), ~in_range

    side_s = LogitSource(student, vocab, dtype)
    side_t = LogitSource(teacher, vocab, dtype) if isinstance(teacher, Side) else teacher
    with_gradient = any(wanted)
    planned = plan(n, side_s, side_t, vocab, with_gradient, wanted, memory_budget, device, filtered=grad_filter_eps > 0)

    result = allocate(student, N, index is not None, wanted)
    row_weights = weights_of_rows(weights, scale, N, with_gradient and carries_scale(side_s.projection))
    whole = planned.group >= n
    head = head_gradient(student, side_s, scale, wanted, whole=whole, grad_filter_eps=grad_filter_eps)
    buffers = Buffers(planned, vocab, device)
    chunks = Chunks(side_s, side_t, labels, bad, index, buffers, vocab, spec)
    groups = planned.groups(n)
    hard = None
    if spec.ranked:
        spans = [span for group in groups for span in group]
        hard = largest(_difficulties(chunks, spans, labels, scalars, row, buffers), labels, scalars)
        groups = [group[::-1] for group in groups[::-1]]  # the logits of the last chunk are still there
    for group in groups:
        first, last = min(span.start for span in group), max(span.stop for span in group)
        for span in group:
            tokens, hidden, raw_s, teacher_rows = chunks[span]
            out = None
            if with_gradient:
                place = slice(span.start - first, span.stop - first)
                out = gradient_buffer(student, side_s, raw_s.raw, result.d_source, tokens, buffers, place)
            loss, difficulty, is_hard = (buffers.vector(name, dtype, span) for name, dtype in VECTORS)
            rows = RowOutputs(loss, difficulty, is_hard, out)
            of_rows = None if row_weights is None else row_weights[tokens]
            given = None if hard is None else hard[span]
            row(RowInputs(raw_s, teacher_rows, labels[span], of_rows, scalars, spec, cold_labels, given), rows)
            record(result, tokens, rows, bad[span], sparse_logits=student.weight is None and index is not None)
        if head is None or out is None or hidden is None:
            continue
        if len(group) > 1:
            tokens = slice(first, last) if index is None else index[first:last]
            hidden = side_s.operand(tokens)
            out = buffers.dlogits(out.dtype, slice(0, last - first))
        factors = None if row_weights is None else row_weights[tokens]
        d_hidden = head.add(out, hidden, factors, want_hidden=result.d_source is not None)
        if d_hidden is not None and result.d_source is not None:
            result.d_source[tokens] = d_hidden.to(result.d_source.dtype)
    if head is None:
        return result
    d_weight, d_bias = head.finished()
    return result._replace(d_weight=d_weight, d_bias=d_bias)


VECTORS = (("loss", torch.float32), ("difficulty", torch.float32), ("is_hard", torch.bool))


def weights_of_rows(weights: Tensor | None, scale: Tensor, N: int, scaled: bool) -> Tensor | None:
    """The row's weights of all tokens; ``scaled`` where it applies the factor of all gradients."""
    if not scaled:
        return weights
    return (scale.expand(N) if weights is None else weights * scale).contiguous()


def record(result: Result, tokens: slice | Tensor, rows: RowOutputs, bad: Tensor, *, sparse_logits: bool) -> None:
    """A chunk's losses, NaN for ``bad`` tokens; for ``sparse_logits`` also their gradient, of some tokens among all."""
    result.loss[tokens] = rows.loss.masked_fill(bad, math.nan)
    result.difficulty[tokens] = rows.difficulty
    result.is_hard[tokens] = rows.is_hard
    if sparse_logits and rows.dlogits is not None and result.d_source is not None:
        result.d_source[:, : rows.dlogits.shape[1]][tokens] = rows.dlogits


class LogitSource:
    """One side as a source of logit chunks, cut to the vocabulary."""

    def __init__(self, side: Side, vocab: int, dtype: torch.dtype | None) -> None:
        self.projection: Projection | None = None
        if side.weight is None:
            self.source, finite = side.source.detach()[:, :vocab], False
        else:
            bias = None if side.bias is None else side.bias.detach()[:vocab]
            self.projection = Projection(side.weight[:vocab], bias, dtype or side.source.dtype)
            rounded = self.projection.bias  # a finite fp32 bias may be -inf in fp16
            finite = rounded is None or known_all(rounded * side.logit_scale > EXCLUDED)
            self.source = side.source.detach()
        self._template = (side.logit_scale, side.softcap, finite)

    def chunk(self, tokens: slice | Tensor, buffers: Buffers, name: str) -> tuple[Tensor | None, Logits]:
        """The GEMM operand (None for logits) and the raw logits of some tokens."""
        source = self.source[tokens]
        if self.projection is None:
            return None, Logits(source, *self._template)
        hidden = self.projection.operand(source)
        raw = buffers.logits(name, hidden.shape[0])
        self.projection.logits(hidden, raw)
        return hidden, Logits(raw, *self._template)

    def operand(self, tokens: slice | Tensor) -> Tensor:
        """The GEMM operand of some tokens."""
        assert self.projection is not None
        return self.projection.operand(self.source[tokens])


class Chunks:
    """What the row reads of a span of the tokens to process; that of the last span asked for is kept.

    Marks tokens as ``bad`` whose top-k entries are malformed. ``vocab`` counts the ids of the lists.
    """

    def __init__(
        self,
        student: LogitSource,
        teacher: LogitSource | TopKSide | None,
        labels: Tensor,
        bad: Tensor,
        index: Tensor | None,
        buffers: Buffers,
        vocab: int,
        spec: RowSpec,
    ) -> None:
        self._reads_label = spec.reads_label
        self._student, self._teacher, self._index, self._buffers = student, teacher, index, buffers
        self._labels, self._bad, self._vocab = labels, bad, vocab
        self._last: tuple[slice, tuple[slice | Tensor, Tensor | None, Logits, Logits | Sparse | None]] | None = None

    def __getitem__(self, span: slice) -> tuple[slice | Tensor, Tensor | None, Logits, Logits | Sparse | None]:
        """Positions among all tokens, the student's GEMM operand (None for logits), student and teacher."""
        if self._last is None or self._last[0] != span:
            tokens = span if self._index is None else self._index[span]
            hidden, raw_s = self._student.chunk(tokens, self._buffers, "student")
            self._last = span, (tokens, hidden, raw_s, self._teacher_rows(span, tokens))
        return self._last[1]

    def _teacher_rows(self, span: slice, tokens: slice | Tensor) -> Logits | Sparse | None:
        teacher = self._teacher
        if isinstance(teacher, LogitSource):
            return teacher.chunk(tokens, self._buffers, "teacher")[1]
        if teacher is None:
            return None
        lists = teacher.log_probs[tokens], teacher.indices[tokens]
        rows, malformed = sparse_teacher(
            *lists, self._labels[span], self._vocab, teacher.tail, reads_label=self._reads_label
        )
        self._bad[span] |= malformed
        return rows


def _difficulties(
    chunks: Chunks, spans: list[slice], labels: Tensor, scalars: Tensor, row: Row, buffers: Buffers
) -> Tensor:
    """``KL(yt||q)`` of every token."""
    difficulty = torch.zeros(labels.shape[0], dtype=torch.float32, device=labels.device)
    for span in spans:
        _, _, raw_s, teacher = chunks[span]
        unused, found, is_hard = (buffers.vector(name, dtype, span) for name, dtype in VECTORS)
        spec = RowSpec("kl", mixed=True)
        row(
            RowInputs(raw_s, teacher, labels[span], None, scalars, spec, cold_labels=False),
            RowOutputs(unused, found, is_hard, None),
        )
        difficulty[span] = found
    return difficulty


def largest(difficulty: Tensor, labels: Tensor, scalars: Tensor) -> Tensor:
    """Which valid tokens are among the ``ceil(fraction * n)`` most difficult of n; ties go by position."""
    valid = labels >= 0
    fraction = scalars[Scalars._fields.index("fraction")].double()
    # fp32 scalars but 1 are off by 6e-8: 0.1 * 10 must not become 2.
    count = (torch.where(fraction < 1.0, fraction * (1 - 2**-24), fraction) * valid.sum()).ceil()
    order = torch.where(valid, difficulty, -1.0).argsort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return valid & (rank < count)


def valid_tokens(labels: Tensor, ignore_index: int, device: torch.device) -> tuple[Tensor | None, Tensor]:
    """Positions of the tokens to process (None: all of them) and their labels as int64, ignored ones negative."""
    labels = labels.long()
    if labels.device.type == "cpu":
        index = (labels != ignore_index).nonzero().squeeze(1)
        if index.shape[0] == labels.shape[0]:
            return None, labels.to(device, non_blocking=True)
        return index.to(device, non_blocking=True), labels[index].to(device, non_blocking=True)
    # A negative label that is not ignore_index is out of range: past any vocabulary, so that it is caught as such.
    past = torch.iinfo(torch.int64).max
    return None, torch.where(labels == ignore_index, -1, torch.where(labels < 0, past, labels))


def plan(
    n: int,
    student: LogitSource,
    teacher: LogitSource | TopKSide | None,
    vocab: int,
    with_gradient: bool,
    wanted: Wanted,
    memory_budget: int | None,
    device: torch.device,
    *,
    filtered: bool = False,
) -> Plan:
    """Chunk, group and workspace for n valid tokens, from what the sides' tensors are, not what is in them."""
    workspace = workspace_bytes(student, teacher, vocab, with_gradient, wanted, row_stride(vocab, device.type))
    if filtered and device.type == "cpu":
        workspace = workspace._replace(fixed=workspace.fixed + host_bytes(vocab))
    projection = student.projection
    return plan_chunks(
        n,
        workspace=workspace,
        preferred=preferred_chunk(device.type, workspace.token + workspace.grouped),
        memory_budget=memory_budget,
        grouped=current().device_chunk if current().gradient_groups and workspace.grouped else 0,
        rounded=device.type == "cpu" and wanted.source and projection is not None and not projection.upcast,
    )


def workspace_bytes(
    student: LogitSource,
    teacher: LogitSource | TopKSide | None,
    vocab: int,
    with_gradient: bool,
    wanted: Wanted,
    stride: int,
) -> Workspace:
    """With ``vocab`` columns a side in rows of ``stride``."""
    token, grouped, accumulator, fixed, slab = 16, 0, 0, 0, 0
    for side in (student, teacher):
        if side is None:
            continue
        if isinstance(side, TopKSide):  # sorted entries, and categories with their gradient
            token += 64 * (side.indices.shape[1] + 2)
            continue
        if side.projection is None:
            token += vocab * side.source.element_size()  # gathered when tokens are dropped
            continue
        token += 4 * stride + 8 * side.source.shape[1]
        if side.projection.copied:
            fixed += vocab * side.source.shape[1] * side.projection.dtype.itemsize
        if side.projection.upcast:
            slab = SLAB_BYTES
    projection = student.projection
    if with_gradient and projection is None:
        token += vocab * student.source.element_size()
    if with_gradient and projection is not None:
        H, dtype = projection.weight.shape[1], projection.gradient_dtype
        if dtype != torch.float32:
            # The student's hidden states, once more than a chunk's, and their gradient are the group's.
            token, grouped = token - 6 * H, dtype.itemsize * stride + 8 * H
        if wanted.weight and projection.weight_dtype != torch.float32:
            if gradient_dtype(projection.weight_dtype) == torch.float32:  # fp16's is held to the end
                fixed += 4 * vocab * H
            else:
                accumulator, slab = 4 * vocab * H, SLAB_BYTES
    return Workspace(token, grouped, accumulator, fixed + slab)


def allocate(student: Side, N: int, sparse: bool, wanted: Wanted) -> Result:
    device = student.source.device
    d_source = None
    if wanted.source:
        # Dropped tokens (and dropped columns) are never written, so their gradient must start as zero.
        make = torch.zeros if sparse or student.weight is None else torch.empty
        d_source = make(student.source.shape, dtype=gradient_dtype(student.source.dtype), device=device)
    return Result(
        torch.zeros(N, dtype=torch.float32, device=device),
        torch.zeros(N, dtype=torch.float32, device=device),
        torch.zeros(N, dtype=torch.bool, device=device),
        d_source,
        None,
        None,
    )


def head_gradient(
    student: Side,
    side: LogitSource,
    scale: Tensor,
    wanted: Wanted,
    *,
    whole: bool,
    grad_filter_eps: float = 0.0,
) -> HeadGradient | None:
    """None where the student is given as logits, or nothing of its head or hidden states is wanted."""
    if student.weight is None or side.projection is None or not any(wanted):
        return None
    return HeadGradient(
        student.weight, student.bias, side.projection, scale,
        want_weight=wanted.weight, want_bias=wanted.bias, whole=whole, grad_filter_eps=grad_filter_eps,
    )  # fmt: skip


def gradient_buffer(
    student: Side,
    side: LogitSource,
    raw: Tensor,
    d_source: Tensor | None,
    tokens: slice | Tensor,
    buffers: Buffers,
    place: slice,
) -> Tensor:
    """Where the row writes dlogits: over the logits themselves, or straight into the result, where dtypes allow; else
    into a chunk's ``place`` among those of its group."""
    if side.projection is not None:
        dtype = side.projection.gradient_dtype
        return raw if dtype == torch.float32 else buffers.dlogits(dtype, place)
    assert d_source is not None
    if isinstance(tokens, slice):
        return d_source[tokens, : raw.shape[1]]
    return buffers.dlogits(d_source.dtype, place)
