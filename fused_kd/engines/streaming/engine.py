"""The streaming engine: logits exist one tile at a time, on chip; no memory of size C x V.

Tiles are made again wherever they are needed, which costs GEMMs in place of memory:

1. statistics of both rows over tiles of the vocabulary, split over programs; they give norms, difficulty, the gate;
2. ``sum h`` and ``sum g`` for the rows that need them, the hard ones of a gate, gathered first;
3. tiles of dlogits, a slab of them at a time into a buffer that stays in the L2 cache, for the two gradient GEMMs.

GEMMs, in units of one over all tokens and the whole vocabulary, for student + teacher (``x``: the share of rows that
need sums, 0 for ``KL(t||q)`` alone, 1 for other divergences without a gate):

====================================== ============= ======================= ==================
step                                   streaming     where                   chunked engine
====================================== ============= ======================= ==================
1. statistics                          1 + 1         all                     1 + 1
2. sums                                x + x         mixtures, hard rows     0
3. dlogits, dH and an fp32 dW          1 + 1         fp32 (or fp16) weights  0
3. dlogits, for dH and dW together     1 + 1         bf16 weights, 4 N H     0
                                                     bytes to spare
3. dlogits, for dH and for dW apart    2 + 2         bf16 weights otherwise  0
gradient GEMMs                         1 + 1 (dH, dW)                        1 + 1
====================================== ============= ======================= ==================

A low-precision dW cannot be its own fp32 accumulator, so its slabs run over all tokens at once. dH takes part where
memory has room for the fp32 sums of all tokens: within 60 MB without a ``memory_budget`` (29 MB at N=8192, H=896), else
within that. Where it has not, dH's slabs run over the whole vocabulary, a chunk of tokens at a time: two orders, two
recomputations. What is not wanted costs nothing.

Memory beyond inputs, results and gradients, in bytes: about 240 N for vectors over the tokens, and the largest of three
that follow each other: 44 N a split of the vocabulary (12 splits and more); for dH alone, dlogits of at most 8 MiB and
the fp32 sums of a chunk, at most 32 MiB; for a low-precision dW, dlogits of all tokens and its fp32 sums, at most
32 MiB (or a tile of columns), together with dH 4 N H more, and at most 128 MiB where a budget allows. At N=8192,
H=4096, V=128256 in bf16 that is under 44 MB, or 270 MB for a third fewer products. Where a device has no product of
low-precision operands with an fp32 result, fp32 copies of a slab's operands come on top.

Deterministic: no atomics, and every sum is taken in a fixed order. Nothing waits for the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from ...workspace import empty
from ..gemm import Projection, interpreted
from ..problem import Problem, Result, gradient_dtype, valid_tokens
from .plan import Plan, Sizes, plan_streaming, sizes_of
from .sweeps import Sweeps


def run(problem: Problem) -> Result:
    """Losses of all tokens and the wanted gradients.

    Ignored tokens cost the kernels nothing, wherever the labels are; the gradient GEMMs take them along as zeros where
    the host does not know them, and in a low-precision dW.

    Where ``grad_filter_eps`` is positive, a tile of dlogits whose every entry is below it in size, before token weights
    and ``scale``, counts as zero. An entry of dlogits is off by less than it, so a token's hidden gradient by less than
    ``eps * sum_v |W_v|`` and a vocabulary entry's weight gradient by less than ``eps * sum_i |h_i|``, each term times
    the token's factor (``1 / n`` for a mean).

    Raises:
        ValueError: for an adaptive divergence, whose head would take 30 more sweeps.
        BudgetTooSmall: for a ``memory_budget`` below the smallest plan.
    """
    device = problem.student.source.device
    index, labels = valid_tokens(problem.labels, device)
    sweeps = Sweeps(problem, index, labels)
    head = None if problem.student.weight is None else _Head(problem, problem.student.weight)
    sizes = sizes_of(problem, sweeps.n, upcast=head is not None and head.upcast)
    plan = plan_streaming(sizes, sweeps.tiles, problem.memory_budget)
    result = Result.allocate(problem, sparse=index is not None)
    # Triton launches on the current device, whatever the tensors' own.
    with contextlib.nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device):
        if sweeps.n > 0:
            sweeps.measure(plan, result)
        if head is not None:
            return _Backward(problem, sweeps, head, sizes, plan).run(result)
        if result.d_source is not None and sweeps.n > 0:
            _logit_gradient(problem, sweeps, result.d_source)
    return result


def _logit_gradient(problem: Problem, sweeps: Sweeps, out: Tensor) -> None:
    """That of a student given as logits."""
    weights, scale, threshold = problem.weights, problem.scale, problem.grad_filter_eps
    factor = scale.expand(sweeps.n) if weights is None else weights[sweeps.tokens] * scale
    everything = slice(0, sweeps.n), slice(0, problem.vocab)
    flags = sweeps.flags(*everything) if threshold > 0 else None
    sweeps.gradient(
        out, *everything, by_token=True, weights=factor.contiguous(), flags=flags, threshold=threshold
    )  # fmt: skip


class _Head:
    """The student's head as the gradient GEMMs see it."""

    def __init__(self, problem: Problem, weight: Tensor) -> None:
        student = problem.student
        self.source, self.weight, self.bias = student.source.detach(), weight.detach(), student.bias
        self.dtype, self.wanted = problem.dtype or student.source.dtype, problem.wanted
        example = self.projection(slice(0, 1))
        example.upcast |= interpreted(weight.device, self.dtype)
        self.upcast, self.operand, self.dlogits_dtype = example.upcast, example.operand, example.gradient_dtype
        # fp32 dlogits carry the factor of all gradients; rounded ones would lose their smallest values to it.
        self.scaled = self.dlogits_dtype == torch.float32

    def projection(self, columns: slice) -> Projection:
        return Projection(self.weight[columns], None, self.dtype)

    def weight_operand(self, columns: slice) -> Tensor:
        return self.operand(self.projection(columns).weight)


class _Backward:
    """The gradients of a head, from slabs of dlogits."""

    def __init__(self, problem: Problem, sweeps: Sweeps, head: _Head, sizes: Sizes, plan: Plan) -> None:
        self._sweeps, self._head, self._sizes, self._plan = sweeps, head, sizes, plan
        self._vocab = problem.vocab
        self._scale, self._threshold = problem.scale, problem.grad_filter_eps
        self._weights = None if problem.weights is None else problem.weights[sweeps.tokens]
        if head.scaled:
            factor = problem.scale.expand(sweeps.n)
            self._weights = factor.contiguous() if self._weights is None else self._weights * factor

    def run(self, result: Result) -> Result:
        """``result`` with the wanted gradients."""
        head, device = self._head, self._head.source.device
        d_weight = d_bias = None
        if head.wanted.weight:
            make = empty if self._sweeps.n > 0 else torch.zeros
            d_weight = make(tuple(head.weight.shape), dtype=gradient_dtype(head.weight.dtype), device=device)
            d_weight[self._vocab :].zero_()
        if head.wanted.bias and head.bias is not None:
            d_bias = torch.zeros(head.bias.shape, dtype=torch.float32, device=device)
        if self._sweeps.n > 0:
            if self._sizes.by_tokens and not self._plan.together:
                others = (None, None) if self._sizes.by_columns else (d_weight, d_bias)
                self._by_tokens(result.d_source, *others)
            if self._sizes.by_columns and d_weight is not None:
                self._by_columns(result.d_source if self._plan.together else None, d_weight, d_bias)
        if d_bias is not None and head.bias is not None:
            d_bias = self._finished(d_bias).to(gradient_dtype(head.bias.dtype))
        return result._replace(d_weight=d_weight, d_bias=d_bias)

    def _by_tokens(self, d_source: Tensor | None, d_weight: Tensor | None, d_bias: Tensor | None) -> None:
        """Chunks of tokens outside, slabs of columns inside: dH is summed a chunk at a time, dW in its fp32 result."""
        sweeps, head, plan = self._sweeps, self._head, self._plan
        device, H = head.source.device, head.source.shape[1]
        dlogits = empty((plan.tokens, plan.columns), head.dlogits_dtype, device)
        chunk_sum = None if d_source is None else empty((plan.tokens, H), torch.float32, device)
        for positions in _slices(sweeps.n, plan.tokens):
            tokens = sweeps.tokens[positions]
            hidden = None
            if d_weight is not None:
                hidden = head.source if self._filters else head.operand(head.source[tokens])
            for columns in _slices(self._vocab, plan.columns):
                out = dlogits[: len(tokens), : columns.stop - columns.start]
                flags = self._dlogits(out, positions, columns, by_token=False)
                if chunk_sum is not None:
                    weight = head.weight[columns] if self._filters else head.weight_operand(columns)
                    self._add(chunk_sum[: len(tokens)], out, weight, flags, first=columns.start == 0)
                if d_weight is not None and hidden is not None:
                    self._add_transposed(d_weight[columns], out, hidden, flags, tokens, first=positions.start == 0)
                if d_bias is not None:
                    d_bias[columns] += out.sum(0, dtype=torch.float32)
            if d_source is not None and chunk_sum is not None:
                d_source[tokens] = self._finished(chunk_sum[: len(tokens)]).to(d_source.dtype)
        if d_weight is not None:
            self._finished(d_weight[: self._vocab])

    def _by_columns(self, d_source: Tensor | None, d_weight: Tensor, d_bias: Tensor | None) -> None:
        """Slabs of columns outside, all tokens inside: a low-precision dW is summed in fp32 and rounded once.

        With ``d_source`` dH is summed beside it, over all columns.
        """
        sweeps, head, plan = self._sweeps, self._head, self._plan
        device, (N, H) = head.source.device, head.source.shape
        # By token, so that the hidden states need no gathering. Rows of ignored tokens are never written.
        make = empty if self._filters else torch.zeros
        dlogits = make((N, plan.columns_of_all), dtype=head.dlogits_dtype, device=device)
        slab_sum = empty((plan.columns_of_all, H), torch.float32, device)
        source_sum = None if d_source is None else empty((N, H), torch.float32, device)
        for columns in _slices(self._vocab, plan.columns_of_all):
            width = columns.stop - columns.start
            out, total = dlogits[:, :width], slab_sum[:width]
            if self._filters:
                out = out[: sweeps.n]
                flags = self._dlogits(out, slice(0, sweeps.n), columns, by_token=False)
                self._add_transposed(total, out, head.source, flags, sweeps.tokens, first=True)
            else:
                self._dlogits(out, slice(0, sweeps.n), columns, by_token=True)
                for part in _slices(N, plan.tokens if self._sizes.copy_bytes else N):
                    hidden = head.operand(head.source[part])
                    self._add_transposed(total, out[part], hidden, None, None, first=part.start == 0)
            d_weight[columns] = self._finished(total)
            if source_sum is not None:
                self._add(source_sum, out, head.weight_operand(columns), None, first=columns.start == 0)
            if d_bias is not None:
                d_bias[columns] = out.sum(0, dtype=torch.float32)
        if d_source is not None and source_sum is not None:
            d_source.copy_(self._finished(source_sum))

    @property
    def _filters(self) -> bool:
        return self._threshold > 0

    def _dlogits(self, out: Tensor, positions: slice, columns: slice, *, by_token: bool) -> Tensor | None:
        """Fill ``out``; the flags of its tiles if they are filtered."""
        flags = self._sweeps.flags(positions, columns) if self._filters else None
        self._sweeps.gradient(
            out, positions, columns, by_token=by_token, weights=self._weights, flags=flags, threshold=self._threshold
        )
        return flags

    def _add(self, out: Tensor, dlogits: Tensor, weight: Tensor, flags: Tensor | None, *, first: bool) -> None:
        """``out (C, H) += dlogits @ weight`` in fp32; ``first`` overwrites instead."""
        if flags is None:
            Projection.accumulate(out, dlogits.t(), weight, first)
        else:
            self._sweeps.flagged_product(out, dlogits, weight, flags, dtype=self._head.dtype, add=not first)

    def _add_transposed(
        self, out: Tensor, dlogits: Tensor, hidden: Tensor, flags: Tensor | None, tokens: Tensor | None, *, first: bool
    ) -> None:
        """``out (columns, H) += dlogits.T @ hidden``, or with flags ``hidden[tokens]``; ``first`` overwrites."""
        if flags is None:
            Projection.accumulate(out, dlogits, hidden, first)
        else:
            self._sweeps.flagged_product(
                out, dlogits, hidden, flags, dtype=self._head.dtype, add=not first, tokens=tokens, transposed=True
            )

    def _finished(self, gradient: Tensor) -> Tensor:
        """Times the factor of all gradients, in place, where dlogits have not carried it."""
        return gradient if self._head.scaled else gradient.mul_(self._scale)


def _slices(size: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, size)) for start in range(0, size, step))
