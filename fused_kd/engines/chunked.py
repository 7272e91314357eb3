"""The chunked engine: logits of C tokens and their row, chunk after chunk; gradients after every group of chunks.

Gradients are made in the forward, so nothing is computed twice: three student GEMMs and one teacher GEMM, fewer where
something is frozen. Ignored tokens are dropped before any GEMM where the labels are on the host. Where low-precision
dlogits have a buffer of their own, those of several chunks share the gradients' GEMMs, see :mod:`.head_gradient`; how
many is bounded in bytes, so that memory does not grow with the tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..rows.contract import Row
from ..tuning import current
from .chunks import Buffers, Chunks, row_stride
from .plan import Plan, plan_chunks, preferred_chunk
from .problem import Problem, Result, largest, valid_tokens
from .tile_filter import host_bytes


def run(problem: Problem, row: Row) -> Result:
    """Losses of all tokens and the wanted gradients."""
    device = problem.student.source.device
    index, labels = valid_tokens(problem.labels, device)
    n = len(labels)
    chunks = Chunks(problem, problem.vocab, index, labels)
    planned = plan(chunks, device)
    buffers = Buffers(planned, problem.vocab, device)
    result = Result.allocate(problem, sparse=index is not None)
    head = chunks.head(whole=planned.group >= n)
    weights, hard = chunks.row_weights(), None
    groups = planned.groups(n)
    if problem.spec.ranked:
        difficulty = _difficulties(chunks, [span for group in groups for span in group], row, buffers)
        hard = largest(difficulty, labels, problem.fraction)
        groups = [group[::-1] for group in groups[::-1]]  # the logits of the last chunk are still there
    for group in groups:
        first, last = min(span.start for span in group), max(span.stop for span in group)
        for span in group:
            chunk, dlogits = chunks.chunk(span, buffers), None
            if any(problem.wanted):
                place = slice(span.start - first, span.stop - first)
                dlogits = chunks.gradient_buffer(chunk, result.d_source, buffers, place)
            rows = buffers.outputs(len(chunk.labels), problem.statistics)._replace(dlogits=dlogits)
            row(chunk.inputs(problem, weights, hard), rows)
            result.record(chunk.tokens, rows, chunk.bad, sparse_logits=chunks.sparse_logits)
        tokens, hidden = chunk.tokens, chunk.hidden
        if head is None or dlogits is None or hidden is None:
            continue
        if len(group) > 1:
            tokens = slice(first, last) if index is None else index[first:last]
            hidden = chunks.student.operand(tokens)
            dlogits = buffers.dlogits(dlogits.dtype, slice(0, last - first))
        factors = None if weights is None else weights[tokens]
        d_hidden = head.add(dlogits, hidden, factors, want_hidden=result.d_source is not None)
        if d_hidden is not None and result.d_source is not None:
            result.d_source[tokens] = d_hidden.to(result.d_source.dtype)
    if head is None:
        return result
    d_weight, d_bias = head.finished()
    return result._replace(d_weight=d_weight, d_bias=d_bias)


def _difficulties(chunks: Chunks, spans: list[slice], row: Row, buffers: Buffers) -> Tensor:
    """``KL(yt||q)`` of every token."""
    difficulty = torch.zeros(len(chunks.labels), dtype=torch.float32, device=chunks.labels.device)
    for span in spans:
        chunk = chunks.chunk(span, buffers)
        rows = buffers.outputs(len(chunk.labels))
        row(chunk.difficulty_inputs(chunks.problem), rows)
        difficulty[span] = rows.difficulty
    return difficulty


def plan(chunks: Chunks, device: torch.device) -> Plan:
    """Chunk, group and workspace on a device, from what the sides' tensors are, not what is in them."""
    problem, projection = chunks.problem, chunks.student.projection
    workspace = chunks.workspace(problem.vocab, row_stride(problem.vocab, device.type))
    if problem.grad_filter_eps > 0 and device.type == "cpu":
        workspace = workspace._replace(fixed=workspace.fixed + host_bytes(problem.vocab))
    return plan_chunks(
        len(chunks.labels),
        workspace=workspace,
        preferred=preferred_chunk(device.type, workspace.token + workspace.grouped),
        memory_budget=problem.memory_budget,
        grouped=current().device_chunk if workspace.grouped else 0,
        rounded=device.type == "cpu" and problem.wanted.source and projection is not None and not projection.upcast,
    )
