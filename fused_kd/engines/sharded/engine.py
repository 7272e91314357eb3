"""The chunked engine of a rank that holds a slice of the vocabulary.

As in :mod:`fused_kd.engines.chunked`, but two chunks are under way: what the ranks exchange of one travels beside the
GEMMs of the other, see :func:`two_at_a_time`, and so does its hidden gradient, to be added up over the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...rows.contract import RowInputs, RowOutputs, Shards
from ...rows.sharded import Messages
from ..chunks import Buffers, Chunk, Chunks, row_stride
from ..plan import Plan, plan_chunks, preferred_chunk
from ..problem import Problem, Result, largest, valid_tokens
from .exchange import Exchange, Gathering

LANES = 2


def run(problem: Problem) -> Result:
    """Losses of all tokens, the same on all ranks, and the wanted gradients of a :class:`.problem.Problem` with shards.

    Its student and teacher are this rank's slices of weight and bias, or of the logits; hidden states and lists are
    whole. What lies beyond this rank's slice is cut off.
    """
    assert problem.shards is not None
    return _Engine(problem, problem.shards).run()


class UnderWay(NamedTuple):
    """A chunk whose statistics are being exchanged."""

    chunk: Chunk
    outputs: RowOutputs
    messages: Messages
    statistics: Gathering


class _Engine:
    """One call: its chunks, the buffers that they use in turn, and the hidden gradient that is still travelling."""

    def __init__(self, problem: Problem, shards: Shards) -> None:
        device = problem.student.source.device
        index, labels = valid_tokens(problem.labels, device)
        self._problem, self._shards, self._row = problem, shards, _row(problem.backend)
        self._chunks = Chunks(problem, shards.size, index, labels)
        plan = _plan(self._chunks, shards, device)
        self._spans = [span for group in plan.groups(len(labels)) for span in group]
        lanes = [Buffers(plan, shards.size, device) for _ in range(min(LANES, max(len(self._spans), 1)))]
        self._lane_of = {span.start: lanes[i % len(lanes)] for i, span in enumerate(self._spans)}
        self._result = Result.allocate(problem, sparse=index is not None)
        self._weights = self._chunks.row_weights()
        self._exchange = Exchange(shards.group)
        self._hidden_sum: tuple[slice | Tensor, Gathering] | None = None

    def run(self) -> Result:
        spans, hard = self._spans, None
        if self._problem.spec.ranked:
            hard = self._hardest()
            spans = spans[::-1]  # the logits of the last chunks are still there
        head = self._chunks.head(whole=len(spans) == 1)
        for chunk, outputs, *_ in two_at_a_time(spans, lambda span: self._loss(span, hard), self._exchange):
            sparse = self._chunks.sparse_logits
            self._result.record(chunk.tokens, outputs, chunk.bad, sparse_logits=sparse)
            if head is None or outputs.dlogits is None or chunk.hidden is None:
                continue
            wanted = self._problem.wanted.source
            gradient = head.add(outputs.dlogits, chunk.hidden, None, want_hidden=wanted)
            if gradient is not None:
                summed = self._exchange.sum(gradient) if self._problem.sum_hidden else Gathering(gradient, None)
                self._keep_hidden()
                self._hidden_sum = chunk.tokens, summed
        self._keep_hidden()
        if head is None:
            return self._result
        d_weight, d_bias = head.finished()
        return self._result._replace(d_weight=d_weight, d_bias=d_bias)

    def _hardest(self) -> Tensor:
        labels = self._chunks.labels
        difficulty = torch.zeros(len(labels), dtype=torch.float32, device=labels.device)
        for chunk, outputs, *_ in two_at_a_time(self._spans, self._difficulty, self._exchange):
            difficulty[chunk.span] = outputs.difficulty
        return largest(difficulty, labels, self._problem.fraction)

    def _difficulty(self, span: slice) -> UnderWay:
        buffers = self._lane_of[span.start]
        chunk = self._chunks.chunk(span, buffers)
        return self._begin(chunk, chunk.difficulty_inputs(self._problem), buffers.outputs(len(chunk.labels)))

    def _loss(self, span: slice, hard: Tensor | None) -> UnderWay:
        buffers = self._lane_of[span.start]
        chunk, outputs = self._chunks.chunk(span, buffers), buffers.outputs(span.stop - span.start)
        if any(self._problem.wanted):
            place = slice(0, span.stop - span.start)
            dlogits = self._chunks.gradient_buffer(chunk, self._result.d_source, buffers, place)
            outputs = outputs._replace(dlogits=dlogits)
        return self._begin(chunk, chunk.inputs(self._problem, self._weights, hard), outputs)

    def _begin(self, chunk: Chunk, inputs: RowInputs, outputs: RowOutputs) -> UnderWay:
        messages = self._row(inputs, outputs, self._shards)
        return UnderWay(chunk, outputs, messages, self._exchange.gather(next(messages)))

    def _keep_hidden(self) -> None:
        """The hidden gradient whose sum is under way, into the result."""
        if self._hidden_sum is not None:
            tokens, summed = self._hidden_sum
            d_source = self._result.d_source
            assert d_source is not None
            d_source[tokens] = summed.wait().to(d_source.dtype)
            self._hidden_sum = None


def two_at_a_time(spans: list[slice], begin: Callable[[slice], UnderWay], exchange: Exchange) -> Iterator[UnderWay]:
    """Each span's chunk when its row is done.

    The next one begins while a chunk's second message travels, and its own first message travels beside the rest of
    this chunk's row and the caller's work with it.
    """
    waiting = iter(spans)
    current = _next(waiting, begin)
    while current is not None:
        message = _answer(current.messages, current.statistics, exchange)
        following = _next(waiting, begin)
        while message is not None:
            message = _answer(current.messages, message, exchange)
        yield current
        current = following


def _next(waiting: Iterator[slice], begin: Callable[[slice], UnderWay]) -> UnderWay | None:
    span = next(waiting, None)
    return None if span is None else begin(span)


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


def _plan(chunks: Chunks, shards: Shards, device: torch.device) -> Plan:
    """The same on all ranks: from the widest slice, whatever this rank's."""
    problem, widest = chunks.problem, shards.widest
    workspace = chunks.workspace(widest, row_stride(widest, device.type))
    token = workspace.token + 128 * len(shards.sizes)
    if any(problem.wanted) and chunks.student.projection is not None:
        token += 4 * chunks.student.source.shape[1]  # being added up
    preferred = preferred_chunk(device.type, token + workspace.grouped)
    if any(term.of.adaptive for term in problem.spec.terms):
        token += 8 * widest
    workspace = workspace._replace(token=LANES * token, grouped=LANES * workspace.grouped)
    return plan_chunks(
        len(chunks.labels), workspace=workspace, preferred=preferred, memory_budget=problem.memory_budget
    )
