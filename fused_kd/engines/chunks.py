"""A chunk of tokens: the logits of both sides, the buffers that they lie in, and what it takes of memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..divergences import EXCLUDED
from ..rows.contract import Beyond, Logits, RowInputs, RowOutputs, Sparse
from ..rows.top_k import sparse_teacher
from ..rows.torch.math import known_all
from ..terms import RowSpec, Term
from ..workspace import empty
from .choosing import chosen
from .gemm import SLAB_BYTES, Projection, interpreted
from .head_gradient import HeadGradient, carries_scale
from .listing import tile_stride
from .mapping import MappedSource
from .mixing import ListLogits, MixedSource, Place
from .plan import Plan, Workspace
from .problem import INVALID, Problem, Side, Wanted, gradient_dtype

# 128 bytes of bf16, 256 of fp32.
ROW_MULTIPLE = 64


def row_stride(V: int, device_type: str) -> int:
    """Elements from row to row of a buffer: on a GPU rows begin where vector loads and the BLAS's fast kernels can."""
    return V if device_type == "cpu" else -(-V // ROW_MULTIPLE) * ROW_MULTIPLE


class Buffers:
    """Of a chunk's logits and a group's dlogits, ``V`` columns each: made when asked for, used by each in turn."""

    def __init__(self, plan: Plan, V: int, device: torch.device) -> None:
        self._plan, self._V, self._device = plan, V, device
        self._held: dict[str, Tensor] = {}
        self.chunk: Chunk | None = None  # whose logits they hold

    def logits(self, name: str, rows: int) -> Tensor:
        most = max(self._plan.rows, self._plan.chunk) if name == "student" else self._plan.chunk
        return self._matrix(name, torch.float32, most)[:rows]

    def dlogits(self, dtype: torch.dtype, rows: slice) -> Tensor:
        return self._matrix("dlogits", dtype, self._plan.group)[rows]

    def outputs(self, count: int, statistics: int = 0) -> RowOutputs:
        """Of a row, without dlogits."""
        float32 = torch.float32
        loss, difficulty = (self._vector(name, float32)[:count] for name in ("loss", "difficulty"))
        told = empty((count, statistics), float32, self._device) if statistics else None
        return RowOutputs(loss, difficulty, self._vector("is_hard", torch.bool)[:count], None, told)

    def _vector(self, name: str, dtype: torch.dtype) -> Tensor:
        if name not in self._held:
            self._held[name] = empty((self._plan.chunk,), dtype, self._device)
        return self._held[name]

    def _matrix(self, name: str, dtype: torch.dtype, rows: int) -> Tensor:
        if name not in self._held:
            self._held[name] = empty((rows, row_stride(self._V, self._device.type)), dtype, self._device)
        return self._held[name][:, : self._V]


class LogitSource:
    """A side, unless it is a top-k teacher, as a source of logit chunks: its first ``columns``."""

    def __init__(self, side: Side, columns: int, dtype: torch.dtype | None) -> None:
        self.projection: Projection | None = None
        self.source = side.source.detach()
        if side.weight is None:
            self.source, finite = self.source[:, :columns], False
        else:
            bias = None if side.bias is None else side.bias.detach()[:columns]
            self.projection = Projection(side.weight[:columns], bias, dtype or side.source.dtype)
            rounded = self.projection.bias  # a finite fp32 bias may be -inf in fp16
            finite = rounded is None or known_all(rounded * side.logit_scale > EXCLUDED)
        self._template = (side.logit_scale, side.softcap, finite)

    def chunk(self, tokens: slice | Tensor, buffers: Buffers, name: str) -> tuple[Tensor | None, Logits]:
        """The GEMM operand (None for logits) and the raw logits of some tokens."""
        if self.projection is None:
            return None, Logits(self.source[tokens], *self._template)
        hidden = self.operand(tokens)
        raw = buffers.logits(name, hidden.shape[0])
        self.projection.logits(hidden, raw)
        return hidden, Logits(raw, *self._template)

    def read(self, place: Place) -> tuple[Logits, None]:
        """As one of several teachers."""
        if self.projection is None:
            return Logits(self.source[place.tokens], *self._template), None
        self.projection.logits(self.operand(place.tokens), place.into)
        return Logits(place.into, *self._template), None

    def operand(self, tokens: slice | Tensor) -> Tensor:
        """The GEMM operand of some tokens."""
        assert self.projection is not None
        return self.projection.operand(self.source[tokens])


_DIFFICULTY = RowSpec.of(Term("kl", mixed=True))


class Chunk(NamedTuple):
    """Of the tokens of ``span``, among those to process: ``tokens`` are their places among all, ``hidden`` the
    student's GEMM operand (None for logits), ``bad`` (C,) bool those whose loss is NaN."""

    span: slice
    tokens: slice | Tensor
    hidden: Tensor | None
    student: Logits
    teacher: Logits | Sparse | None
    labels: Tensor
    bad: Tensor
    beyond: Beyond | None

    def inputs(self, problem: Problem, weights: Tensor | None, hard: Tensor | None) -> RowInputs:
        """For the loss; ``weights`` of all tokens, ``hard`` of those to process."""
        return RowInputs(
            self.student, self.teacher, self.labels, None if weights is None else weights[self.tokens],
            problem.scalars_of(self.tokens), problem.spec, problem.cold_labels,
            None if hard is None else hard[self.span], self.beyond,
        )  # fmt: skip

    def difficulty_inputs(self, problem: Problem) -> RowInputs:
        """For ``KL(yt||q)`` alone."""
        own = slice(problem.spec.main, problem.spec.main + 1)
        scalars = problem.scalars_of(self.tokens)[:, own].contiguous()
        return RowInputs(
            self.student, self.teacher, self.labels, None, scalars, _DIFFICULTY, cold_labels=False, beyond=self.beyond
        )


class Chunks:
    """The chunks of a call: its sides' logits ``columns`` wide, its tokens to process."""

    def __init__(self, problem: Problem, columns: int, index: Tensor | None, labels: Tensor) -> None:
        self.problem, self.index, self.labels = problem, index, labels
        self.student = LogitSource(problem.student, columns, problem.dtype)
        if self.student.projection is not None and problem.backend == "triton":
            self.student.projection.upcast |= interpreted(labels.device, self.student.projection.dtype)
        self.teacher: LogitSource | MappedSource | MixedSource | None = None
        sides = problem.teachers
        if len(sides) > 1:
            self.teacher = MixedSource(
                problem, [self._source(side, columns) or ListLogits(side, columns) for side in sides]
            )
        elif sides:
            self.teacher = self._source(sides[0], columns)

    def _source(self, teacher: Side, columns: int) -> LogitSource | MappedSource | None:
        """None of a list."""
        if teacher.columns is not None:
            return MappedSource(teacher, columns, self.problem.dtype)
        return LogitSource(teacher, columns, self.problem.dtype) if teacher.indices is None else None

    def chunk(self, span: slice, buffers: Buffers) -> Chunk:
        """The logits of a span, unless they are in ``buffers`` already."""
        if buffers.chunk is None or buffers.chunk.span != span:
            buffers.chunk = self._made(span, buffers)
        return buffers.chunk

    def _made(self, span: slice, buffers: Buffers) -> Chunk:
        tokens = span if self.index is None else self.index[span]
        labels = self.labels[span]
        bad = labels == INVALID
        hidden, student = self.student.chunk(tokens, buffers, "student")
        teacher: Logits | Sparse | None = None
        beyond: Beyond | None = None
        of = self.problem.teacher
        if isinstance(self.teacher, MappedSource):
            out = buffers.logits("teacher", len(labels))
            temperature = self.problem.temperature_of(tokens)
            teacher, beyond, without = self.teacher.chunk(tokens, out, temperature, self.problem.backend)
            bad |= False if without is None else without & (labels >= 0)
        elif self.teacher is not None:
            if isinstance(self.teacher, MixedSource):
                into, spare = (buffers.logits(name, len(labels)) for name in ("teacher", "other teacher"))
                temperature = self.problem.temperature_of(tokens)
                place = Place(tokens, labels, into, temperature, self.problem.backend)
                teacher, malformed = self.teacher.chunk(span, place, spare)
                bad |= malformed & (labels >= 0)
            else:
                _, teacher = self.teacher.chunk(tokens, buffers, "teacher")
            if self.problem.listing.k:
                teacher, malformed = self._chosen(student, teacher, tokens, labels)
                bad |= malformed
        elif of is not None and of.indices is not None:
            lists, reads_label = (of.source[tokens], of.indices[tokens]), self.problem.spec.reads_label
            teacher, malformed = sparse_teacher(
                *lists, labels, self.problem.vocab, of.tail, reads_label=reads_label, temperature=of.temperature,
                log_rest=None if of.log_rest is None else of.log_rest[tokens],
            )  # fmt: skip
            bad |= malformed
        return Chunk(span, tokens, hidden, student, teacher, labels, bad, beyond)

    def _chosen(
        self, student: Logits, teacher: Logits, tokens: slice | Tensor, labels: Tensor
    ) -> tuple[Sparse, Tensor]:
        problem, listing = self.problem, self.problem.listing
        temperature, own = problem.temperature_of(tokens), not self._given_logits
        listed = chosen(student, teacher, listing, temperature, problem.backend, reusable=own)
        return sparse_teacher(
            listed.log_probs, listed.indices, labels, problem.vocab, listing.tail,
            reads_label=problem.spec.reads_label, temperature=temperature, log_rest=listed.log_rest,
        )  # fmt: skip

    @property
    def _given_logits(self) -> bool:
        """Whether the teacher's logits are the caller's own."""
        return isinstance(self.teacher, LogitSource) and self.teacher.projection is None

    def gradient_buffer(self, chunk: Chunk, d_source: Tensor | None, buffers: Buffers, place: slice) -> Tensor:
        """Where the row writes dlogits: over the logits themselves, or straight into the result, where dtypes allow;
        else into the chunk's ``place`` among those of its group."""
        raw, projection = chunk.student.raw, self.student.projection
        if projection is not None:
            dtype = projection.gradient_dtype
            return raw if dtype == torch.float32 else buffers.dlogits(dtype, place)
        assert d_source is not None
        if isinstance(chunk.tokens, slice):
            return d_source[chunk.tokens, : raw.shape[1]]
        return buffers.dlogits(d_source.dtype, place)

    def head(self, *, whole: bool) -> HeadGradient | None:
        """None where the student is given as logits, or nothing of its head or hidden states is wanted.

        ``whole``: one group holds all tokens.
        """
        problem, projection = self.problem, self.student.projection
        if problem.student.weight is None or projection is None or not any(problem.wanted):
            return None
        return HeadGradient(
            problem.student.weight, problem.student.bias, projection, problem.scale,
            want_weight=problem.wanted.weight, want_bias=problem.wanted.bias, whole=whole,
            grad_filter_eps=problem.grad_filter_eps,
        )  # fmt: skip

    def row_weights(self) -> Tensor | None:
        """The row's weights of all tokens, with the factor of all gradients where it is the row that applies it."""
        problem = self.problem
        if not (any(problem.wanted) and carries_scale(self.student.projection)):
            return problem.weights
        if problem.weights is None:
            return problem.scale.expand(len(self.student.source)).contiguous()
        return (problem.weights * problem.scale).contiguous()

    @property
    def sparse_logits(self) -> bool:
        """Whether the gradient of given logits is that of some tokens among all."""
        return self.student.projection is None and self.index is not None

    def workspace(self, columns: int, stride: int) -> Workspace:
        """With ``columns`` a side in rows of ``stride``."""
        problem = self.problem
        found = workspace_bytes(self.student, self.teacher, problem.teachers, columns, problem.wanted, stride)
        listing = problem.listing
        if not listing.k:
            return found
        copied = listing.of_student and self._given_logits
        # doubles of the list and its sums, and what lists take anyway
        return found._replace(token=found.token + 176 * (listing.k + 2) + (4 * columns if copied else 0))


def workspace_bytes(
    student: LogitSource,
    teacher: LogitSource | MappedSource | MixedSource | None,
    sides: tuple[Side, ...],
    vocab: int,
    wanted: Wanted,
    stride: int,
) -> Workspace:
    """From what the sides' tensors are, not what is in them; ``sides`` are the teacher's, one or several."""
    token, grouped, accumulator, fixed, slab = 16, 0, 0, 0, 0
    for lists in sides:
        if lists.indices is not None:  # sorted entries, and categories with their gradient
            token += (96 if lists.tail == "listed" else 64) * (lists.indices.shape[1] + 2)
    teachers: Sequence[Any] = [teacher]
    if isinstance(teacher, MixedSource):
        teachers = teacher.teachers
        token += 8 * stride  # what is mixed, and the next one's
    for side in (student, *teachers):
        if side is None or isinstance(side, ListLogits):
            continue
        own = stride if side is student or len(teachers) == 1 else 0
        if isinstance(side, MappedSource):
            # a tile, and what is picked from it
            token += 4 * (own + 2 * tile_stride(side.width)) + 8 * side.source.shape[1]
            fixed += side.fixed_bytes(vocab)
            continue
        if side.projection is None:
            token += vocab * side.source.element_size()  # gathered when tokens are dropped
            continue
        token += 4 * own + 8 * side.source.shape[1]
        if side.projection.copied:
            fixed += vocab * side.source.shape[1] * side.projection.dtype.itemsize
        if side.projection.upcast:
            slab = SLAB_BYTES
    projection = student.projection
    if any(wanted) and projection is None:
        token += vocab * student.source.element_size()
    if any(wanted) and projection is not None:
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
