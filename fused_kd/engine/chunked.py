"""The chunked engine: logits of C tokens, their row, and the gradients' GEMMs, then the next C tokens.

Gradients are made in the forward, so nothing is computed twice: three student GEMMs and one teacher GEMM, fewer where
something is frozen. Ignored tokens are dropped before any GEMM where the labels are on the host.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..objectives import RowSpec, Scalars
from ..rows import Logits, Row, RowInputs, RowOutputs, Sparse
from ..rows.top_k import sparse_teacher
from ..workspace import empty
from .gemm import SLAB_BYTES, Projection
from .plan import Plan, plan_chunks, preferred_chunk


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


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp16 gradients wait in fp32 for the loss scale, which comes with the backward pass; else they would underflow."""
    return torch.float32 if dtype == torch.float16 else dtype


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
) -> Result:
    """Losses of all tokens and the wanted gradients.

    Args:
        labels: (N,) integers, on the student's device or on the CPU. On the CPU, ignored tokens are dropped without a
            synchronisation; on an accelerator their number is unknown to the host, so their rows are skipped instead.
        weights: (N,) fp32 token weights or None.
        scale: 0-d fp32 factor of all gradients.
        scalars: (5,) fp32, see :class:`fused_kd.objectives.Scalars`.
        vocab: both sides are cut to their first ``vocab`` logits.
        dtype: of the GEMM operands under autocast; None takes that of each side.
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
    chunk = plan(n, side_s, side_t, vocab, with_gradient, wanted, memory_budget, device).chunk

    result = allocate(student, N, index is not None, wanted)
    d_weight = accumulator(student.weight, wanted.weight, vocab)
    d_bias = torch.zeros(student.bias.shape, device=device) if wanted.bias and student.bias is not None else None
    buffers = Buffers(chunk, vocab, device)
    spans = [slice(start, min(start + chunk, n)) for start in range(0, n, chunk)]
    chunks = Chunks(side_s, side_t, labels, bad, index, buffers, vocab)
    hard = None
    if spec.ranked:
        hard = largest(_difficulties(chunks, spans, labels, scalars, row, buffers), labels, scalars)
        spans.reverse()  # the logits of the last chunk are still there
    for span in spans:
        tokens, hidden, raw_s, teacher_rows = chunks[span]
        row_weights = weights_of_rows(weights, scale, tokens, span, with_gradient and student.weight is None)
        out = None
        if with_gradient:
            out = gradient_buffer(student, side_s, raw_s.raw, result.d_source, tokens, buffers)
        loss, difficulty, is_hard = (buffers.vector(name, dtype, span) for name, dtype in VECTORS)
        rows = RowOutputs(loss, difficulty, is_hard, out)
        given = None if hard is None else hard[span]
        row(RowInputs(raw_s, teacher_rows, labels[span], row_weights, scalars, spec, cold_labels, given), rows)
        record(result, tokens, rows, bad[span], sparse_logits=student.weight is None and index is not None)
        if out is None or hidden is None or side_s.projection is None:
            continue
        if result.d_source is not None:
            gradient = side_s.projection.hidden_gradient(out)
            result.d_source[tokens] = gradient.mul_(scale).to(result.d_source.dtype)
        add_head_gradient(d_weight, d_bias, out, hidden, scale, first=span is spans[0])
    return finish(result, student, side_s, d_weight, d_bias, scale, n)


VECTORS = (("loss", torch.float32), ("difficulty", torch.float32), ("is_hard", torch.bool))


def weights_of_rows(
    weights: Tensor | None, scale: Tensor, tokens: slice | Tensor, span: slice, scaled: bool
) -> Tensor | None:
    """The row's weights of some tokens; ``scaled`` where no GEMM follows that would take the factor."""
    rows = None if weights is None else weights[tokens]
    if not scaled:
        return rows
    return scale.expand(span.stop - span.start) if rows is None else rows * scale


def record(result: Result, tokens: slice | Tensor, rows: RowOutputs, bad: Tensor, *, sparse_logits: bool) -> None:
    """A chunk's losses, NaN for ``bad`` tokens; for ``sparse_logits`` also their gradient, of some tokens among all."""
    result.loss[tokens] = rows.loss.masked_fill(bad, math.nan)
    result.difficulty[tokens] = rows.difficulty
    result.is_hard[tokens] = rows.is_hard
    if sparse_logits and rows.dlogits is not None and result.d_source is not None:
        result.d_source[:, : rows.dlogits.shape[1]][tokens] = rows.dlogits


def add_head_gradient(
    d_weight: Tensor | None, d_bias: Tensor | None, dlogits: Tensor, hidden: Tensor, scale: Tensor, *, first: bool
) -> None:
    """Add a chunk's part to the first rows of the accumulators; ``first`` overwrites the weight's."""
    V = dlogits.shape[1]
    if d_weight is not None:
        # In fp32 the factor rides on the small operand; rounding it there would cost digits otherwise.
        operand = hidden * scale if hidden.dtype == torch.float32 else hidden
        Projection.accumulate(d_weight[:V], dlogits, operand, first=first)
    if d_bias is not None:
        d_bias[:V] += dlogits.sum(0, dtype=torch.float32)


class Buffers:
    """Chunk-sized buffers, allocated once and reused by every chunk."""

    def __init__(self, C: int, V: int, device: torch.device) -> None:
        self._C, self._V, self._device = C, V, device
        self._held: dict[str, Tensor] = {}

    def matrix(self, name: str, dtype: torch.dtype, rows: int) -> Tensor:
        if name not in self._held:
            self._held[name] = empty((self._C, self._V), dtype, self._device)
        return self._held[name][:rows]

    def vector(self, name: str, dtype: torch.dtype, span: slice) -> Tensor:
        if name not in self._held:
            self._held[name] = empty((self._C,), dtype, self._device)
        return self._held[name][: span.stop - span.start]


class LogitSource:
    """One side as a source of logit chunks, cut to the vocabulary."""

    def __init__(self, side: Side, vocab: int, dtype: torch.dtype | None) -> None:
        self.projection: Projection | None = None
        if side.weight is None:
            self.source, finite = side.source.detach()[:, :vocab], False
        else:
            bias = None if side.bias is None else side.bias[:vocab]
            self.projection = Projection(side.weight[:vocab], bias, dtype or side.source.dtype)
            self.source, finite = side.source.detach(), True
        self._template = (side.logit_scale, side.softcap, finite)

    def chunk(self, tokens: slice | Tensor, buffers: Buffers, name: str) -> tuple[Tensor | None, Logits]:
        """The GEMM operand (None for logits) and the raw logits of some tokens."""
        source = self.source[tokens]
        if self.projection is None:
            return None, Logits(source, *self._template)
        hidden = self.projection.operand(source)
        raw = buffers.matrix(name, torch.float32, hidden.shape[0])
        self.projection.logits(hidden, raw)
        return hidden, Logits(raw, *self._template)


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
    ) -> None:
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
        rows, malformed = sparse_teacher(*lists, self._labels[span], self._vocab, teacher.tail)
        self._bad[span] |= malformed
        return rows


def _difficulties(
    chunks: Chunks, spans: list[slice], labels: Tensor, scalars: Tensor, row: Row, buffers: Buffers
) -> Tensor:
    """``KL(yt||q)`` of every token."""
    difficulty = torch.zeros(labels.shape[0], device=labels.device)
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
    # fp32 scalars are off by 6e-8: 0.1 * 10 must not become 2.
    count = (scalars[Scalars._fields.index("fraction")].double() * valid.sum() * (1 - 1e-6)).ceil()
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
) -> Plan:
    """Chunk and workspace for n valid tokens, from what the sides' tensors are, not what is in them."""
    per_token, fixed = workspace_bytes(student, teacher, vocab, with_gradient, wanted)
    return plan_chunks(
        n,
        bytes_per_token=per_token,
        fixed_bytes=fixed,
        preferred=preferred_chunk(device.type, per_token),
        memory_budget=memory_budget,
    )


def workspace_bytes(
    student: LogitSource, teacher: LogitSource | TopKSide | None, vocab: int, with_gradient: bool, wanted: Wanted
) -> tuple[int, int]:
    """Bytes for each token of a chunk, and those that do not grow with it, with ``vocab`` columns a side."""
    per_token, fixed = 16, 0
    for side in (student, teacher):
        if side is None:
            continue
        if isinstance(side, TopKSide):  # sorted entries, and categories with their gradient
            per_token += 64 * (side.indices.shape[1] + 2)
            continue
        if side.projection is None:
            per_token += vocab * side.source.element_size()  # gathered when tokens are dropped
            continue
        per_token += 4 * vocab + 8 * side.source.shape[1]
        if side.projection.upcast:
            fixed = max(fixed, SLAB_BYTES)
    projection = student.projection
    if with_gradient and projection is None:
        per_token += vocab * student.source.element_size()
    if with_gradient and projection is not None:
        if projection.gradient_dtype != torch.float32:
            per_token += 2 * vocab
        if wanted.weight and projection.weight.dtype != torch.float32:
            fixed += 4 * vocab * projection.weight.shape[1]
    return per_token, fixed


def allocate(student: Side, N: int, sparse: bool, wanted: Wanted) -> Result:
    device = student.source.device
    d_source = None
    if wanted.source:
        # Dropped tokens (and dropped columns) are never written, so their gradient must start as zero.
        make = torch.zeros if sparse or student.weight is None else torch.empty
        d_source = make(student.source.shape, dtype=gradient_dtype(student.source.dtype), device=device)
    return Result(
        torch.zeros(N, device=device),
        torch.zeros(N, device=device),
        torch.zeros(N, dtype=torch.bool, device=device),
        d_source,
        None,
        None,
    )


def accumulator(weight: Tensor | None, wanted: bool, vocab: int) -> Tensor | None:
    if weight is None or not wanted:
        return None
    full = empty(tuple(weight.shape), torch.float32, weight.device, result=True)
    full[vocab:].zero_()
    return full


def gradient_buffer(
    student: Side,
    side: LogitSource,
    raw: Tensor,
    d_source: Tensor | None,
    tokens: slice | Tensor,
    buffers: Buffers,
) -> Tensor:
    """Where the row writes dlogits: over the logits themselves, or straight into the result, where dtypes allow."""
    if side.projection is not None:
        dtype = side.projection.gradient_dtype
        return raw if dtype == torch.float32 else buffers.matrix("dlogits", dtype, raw.shape[0])
    assert d_source is not None
    if isinstance(tokens, slice):
        return d_source[tokens, : raw.shape[1]]
    return buffers.matrix("dlogits", d_source.dtype, raw.shape[0])


def finish(
    result: Result,
    student: Side,
    side: LogitSource,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
    scale: Tensor,
    n: int,
) -> Result:
    """Scale and round the accumulated gradients."""
    if d_weight is not None and student.weight is not None and side.projection is not None:
        if n == 0:
            d_weight.zero_()
        elif side.projection.gradient_dtype != torch.float32:
            d_weight.mul_(scale)
        d_weight = d_weight.to(gradient_dtype(student.weight.dtype))
    if d_bias is not None and student.bias is not None:
        d_bias = d_bias.mul_(scale).to(gradient_dtype(student.bias.dtype))
    return result._replace(d_weight=d_weight, d_bias=d_bias)
