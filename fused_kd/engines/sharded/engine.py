"""The chunked engine of a rank that holds a slice of the vocabulary.

As in :mod:`fused_kd.engines.chunked`, but two chunks are under way: what the ranks exchange of one travels beside the
GEMMs of the other, see :func:`_two_at_a_time`, and so does its hidden gradient, to be added up over the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...divergences import DIVERGENCES
from ...objectives import RowSpec
from ...rows.contract import RowInputs, RowOutputs, Shards
from ...rows.sharded import Messages
from ..buffers import Buffers, row_stride
from ..chunked import (
    VECTORS,
    Chunks,
    LogitSource,
    Result,
    Side,
    TopKSide,
    Wanted,
    allocate,
    gradient_buffer,
    head_gradient,
    largest,
    record,
    valid_tokens,
    weights_of_rows,
    workspace_bytes,
)
from ..head_gradient import carries_scale
from ..plan import Plan, plan_chunks, preferred_chunk
from .exchange import Exchange, Gathering

LANES = 2


def run(
    student: Side,
    teacher: Side | TopKSide | None,
    labels: Tensor,
    *,
    shards: Shards,
    backend: str,
    sum_hidden: bool,
    weights: Tensor | None,
    scale: Tensor,
    scalars: Tensor,
    spec: RowSpec,
    cold_labels: bool,
    ignore_index: int,
    dtype: torch.dtype | None,
    memory_budget: int | None,
    wanted: Wanted,
) -> Result:
    """Losses of all tokens, the same on all ranks, and the wanted gradients.

    Args:
        student, teacher: this rank's slices of weight and bias, or of the logits; hidden states and lists are whole.
        shards: the slices; what lies beyond this rank's is cut off.
        backend: "torch" or "triton".
        sum_hidden: add up the hidden gradient over the ranks; else each has the part of its own slice.
        labels, weights, scale, scalars, ignore_index, dtype: as of :func:`fused_kd.engines.chunked.run`; ids of the
            whole vocabulary.
    """
    device, N = student.source.device, student.source.shape[0]
    row = _row(backend)
    index, labels = valid_tokens(labels, ignore_index, device)
    n, V = labels.shape[0], shards.size
    in_range = labels < shards.vocab
    labels, bad = torch.where(in_range, labels, -1), ~in_range
    side_s = LogitSource(student, V, dtype)
    side_t = LogitSource(teacher, V, dtype) if isinstance(teacher, Side) else teacher
    with_gradient = any(wanted)
    plan = _plan(n, side_s, side_t, shards, spec, with_gradient, wanted, memory_budget, device)
    spans = [span for group in plan.groups(n) for span in group]

    result = allocate(student, N, index is not None, wanted)
    row_weights = weights_of_rows(weights, scale, N, with_gradient and carries_scale(side_s.projection))
    head = head_gradient(student, side_s, scale, wanted, whole=len(spans) == 1)
    exchange = Exchange(shards.group)
    lanes = [Buffers(plan, V, device) for _ in range(min(LANES, max(len(spans), 1)))]
    chunks = [Chunks(side_s, side_t, labels, bad, index, lane, shards.vocab, spec) for lane in lanes]
    lane_of = {span.start: i % len(lanes) for i, span in enumerate(spans)}

    def begin(span: slice, given: Tensor | None, difficulty_only: bool) -> _UnderWay:
        lane, buffers = chunks[lane_of[span.start]], lanes[lane_of[span.start]]
        tokens, hidden, raw_s, teacher_rows = lane[span]
        of_rows = None if row_weights is None else row_weights[tokens]
        out = None
        if with_gradient and not difficulty_only:
            place = slice(0, span.stop - span.start)
            out = gradient_buffer(student, side_s, raw_s.raw, result.d_source, tokens, buffers, place)
        loss, difficulty, is_hard = (buffers.vector(name, dtype, span) for name, dtype in VECTORS)
        outputs = RowOutputs(loss, difficulty, is_hard, out)
        use = RowSpec("kl", mixed=True) if difficulty_only else spec
        cold = cold_labels and not difficulty_only
        inputs = RowInputs(raw_s, teacher_rows, labels[span], of_rows, scalars, use, cold, given)
        messages = row(inputs, outputs, shards)
        return _UnderWay(span, tokens, hidden, outputs, messages, exchange.gather(next(messages)))

    hard = None
    if spec.ranked:
        difficulty = torch.zeros(n, dtype=torch.float32, device=device)
        for chunk in _two_at_a_time(spans, lambda span: begin(span, None, True), exchange):
            difficulty[chunk.span] = chunk.outputs.difficulty
        hard = largest(difficulty, labels, scalars)
        spans.reverse()  # the logits of the last chunks are still there
    sums: list[tuple[slice | Tensor, Gathering]] = []

    def keep_hidden() -> None:
        tokens, summed = sums.pop(0)
        assert result.d_source is not None
        result.d_source[tokens] = summed.wait().to(result.d_source.dtype)

    for chunk in _two_at_a_time(spans, lambda span: begin(span, None if hard is None else hard[span], False), exchange):
        tokens, hidden, out = chunk.tokens, chunk.hidden, chunk.outputs.dlogits
        sparse_logits = student.weight is None and index is not None
        record(result, tokens, chunk.outputs, bad[chunk.span], sparse_logits=sparse_logits)
        if head is None or out is None or hidden is None:
            continue
        gradient = head.add(out, hidden, None, want_hidden=result.d_source is not None)
        if gradient is not None:
            sums.append((tokens, exchange.sum(gradient) if sum_hidden else Gathering(gradient, None)))
        if len(sums) > 1:
            keep_hidden()
    while sums:
        keep_hidden()
    if head is None:
        return result
    d_weight, d_bias = head.finished()
    return result._replace(d_weight=d_weight, d_bias=d_bias)


class _UnderWay(NamedTuple):
    """A chunk whose statistics are being exchanged."""

    span: slice
    tokens: slice | Tensor
    hidden: Tensor | None
    outputs: RowOutputs
    messages: Messages
    statistics: Gathering


def _two_at_a_time(spans: list[slice], begin: Callable[[slice], _UnderWay], exchange: Exchange) -> Iterator[_UnderWay]:
    """Each span's chunk when its row is done.

    The next one begins while a chunk's second message travels, and its own first message travels beside the rest of
    this chunk's row and the caller's work with it.
    """
    waiting = list(reversed(spans))
    chunk = begin(waiting.pop()) if waiting else None
    while chunk is not None:
        message = _answer(chunk.messages, chunk.statistics, exchange)
        following = begin(waiting.pop()) if waiting else None
        while message is not None:
            message = _answer(chunk.messages, message, exchange)
        yield chunk
        chunk = following


def _answer(messages: Messages, gathering: Gathering, exchange: Exchange) -> Gathering | None:
    """Give a row what it asked for; its next message, under way, or None where it is done."""
    try:
        return exchange.gather(messages.send(gathering.wait()))
    except StopIteration:
        return None


def _row(backend: str) -> Callable[[RowInputs, RowOutputs, Shards], Messages]:
    if backend == "triton":
        from ...rows.triton.sharded import row
    else:
        from ...rows.torch.sharded import row
    return row


def _plan(
    n: int,
    student: LogitSource,
    teacher: LogitSource | TopKSide | None,
    shards: Shards,
    spec: RowSpec,
    with_gradient: bool,
    wanted: Wanted,
    memory_budget: int | None,
    device: torch.device,
) -> Plan:
    """The same on all ranks: from the widest slice, whatever this rank's."""
    stride = row_stride(shards.widest, device.type)
    workspace = workspace_bytes(student, teacher, shards.widest, with_gradient, wanted, stride)
    token = workspace.token + 128 * len(shards.sizes)
    if with_gradient and student.projection is not None:
        token += 4 * student.source.shape[1]  # being added up
    preferred = preferred_chunk(device.type, token + workspace.grouped)
    if spec.divergence is not None and DIVERGENCES[spec.divergence].adaptive:
        token += 8 * shards.widest
    workspace = workspace._replace(token=LANES * token, grouped=LANES * workspace.grouped)
    return plan_chunks(n, workspace=workspace, preferred=preferred, memory_budget=memory_budget)
