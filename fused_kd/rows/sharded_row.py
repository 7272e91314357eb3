"""The row of a rank that holds a slice of the vocabulary: a generator of the few numbers that the ranks must share.

1. Sweep the slice for statistics (maxima, sums of exponentials, the expectation of the log-ratio, the label's logits),
   share them, and join them to each token's loss and difficulty.
2. Where the divergence is more than KL: sweep for ``sum h`` and ``sum g`` over the slice, and share those.
3. Write the slice's gradient, ``g - q sum g``.

What is shared is gathered and joined by each rank in the same order and in float64, so all of them agree on every bit
of a token's difficulty, and with it on which tokens are hard. Between sweeps nothing of size C x V is kept but the
logits.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator

import torch
from torch import Tensor

from ..divergences import DIVERGENCES, Divergence
from ..objectives import Scalars
from .base import EXCLUDED, LOG_ZERO, RowInputs, RowOutputs, Shards
from .sharded_columns import Columns, Joined, columns_of
from .torch_math import (
    TINY,
    Lazy,
    Scratch,
    add_at,
    close_gradient,
    difficulty_of,
    divergence_terms,
    free_gradient,
    free_loss,
    known_all,
    maybe_any,
    on_host,
    target,
)

Messages = Generator[Tensor, Tensor, None]

CPU_BLOCK_BYTES = 2 << 20
CPU_BLOCK_ROWS = 8
DEVICE_BLOCK_BYTES = 256 << 20


def row(inputs: RowInputs, outputs: RowOutputs, shards: Shards) -> Messages:
    """Fill ``outputs`` for one chunk; shapes and meaning as of :mod:`fused_kd.rows.base`, logits (C, V of this rank).

    ``labels`` are ids of the whole vocabulary. Yields tensors (C', k) to be gathered, and is sent them as (P, C', k).
    """
    here = on_host(inputs.labels)
    s = Scalars(*(inputs.scalars.tolist() if here else inputs.scalars.unbind()))
    yield from _Row(inputs, outputs, s, columns_of(inputs, s, shards), shards).run()


class _Row:
    def __init__(self, inputs: RowInputs, outputs: RowOutputs, s: Scalars, columns: Columns, shards: Shards) -> None:
        self.inputs, self.outputs, self.s, self.columns, self.shards = inputs, outputs, s, columns, shards
        self.spec = inputs.spec
        self.C = inputs.labels.shape[0]
        self.ignored = inputs.labels < 0
        width = max(columns.width, 1)
        here = on_host(inputs.labels)
        block = max(CPU_BLOCK_ROWS, CPU_BLOCK_BYTES // (4 * width)) if here else DEVICE_BLOCK_BYTES // (4 * width)
        self.block = max(1, min(block, self.C))
        self.scratch = Scratch(self.block, columns.width, inputs.labels.device)

    def run(self) -> Messages:
        spec, s = self.spec, self.s
        gathered = yield self._statistics()
        self.of = of = self._join(gathered.to(torch.float64))
        hard = torch.zeros_like(self.ignored)
        if spec.divergence is None:
            loss = difficulty = -of.log_q_y
            use, divergence = None, None
        else:
            difficulty = difficulty_of(of.kl, of.log_p_y, of.log_q_y, s.lam)
            loss = free_loss(difficulty, of.kl, of.ce, s.lam, spec)
            if spec.gated:
                given = self.inputs.hard
                hard = (difficulty > s.gamma).squeeze(1) if given is None else given
            divergence = DIVERGENCES[spec.divergence]
            use = None if divergence.free else hard if spec.gated else torch.ones_like(hard)
            if use is not None and divergence.kl_at_one:
                use = use & (torch.as_tensor(s.beta, device=use.device) < 1.0)
            if use is not None and not maybe_any(use):
                use = None
        if use is None or divergence is None:
            self._write(loss, difficulty, hard)
            self._gradient(None, None, None, None)
            return
        # On the host every rank leaves out the same tokens; elsewhere that would wait for the device.
        index = use.nonzero().squeeze(1) if on_host(use) and not known_all(use) else None
        beta: float | Tensor = s.beta
        if divergence.adaptive:
            beta = yield from self._head_share(index)
        sums = joined((yield self._sums(divergence, index, beta)))
        value, total = sums.split(1, 1)
        if not spec.mixed:
            ce = of.ce if index is None else of.ce[index]
            value = s.lam * value + ((1.0 - s.lam) * ce if spec.hard_label else 0.0)
        if index is None:
            loss = torch.where(use.unsqueeze(1), value, loss)
        else:
            loss = loss.index_copy(0, index, value)
            total = torch.zeros_like(loss).index_copy(0, index, total)
        self._write(loss, difficulty, hard)
        self._gradient(divergence, use, total.float(), beta)

    def _blocks(self, index: Tensor | None = None) -> Iterator[slice | Tensor]:
        """Rows a block: of all, or of those at ``index``."""
        count = self.C if index is None else len(index)
        for start in range(0, count, self.block):
            rows = slice(start, min(start + self.block, count))
            yield rows if index is None else index[rows]

    def _statistics(self) -> Tensor:
        """(C, k) fp32 of this slice: maximum, sum and label's logit of the student; of the teacher, with the
        expectation of ``z_t - z`` over the maxima; of the student at temperature 1."""
        columns, message = self.columns, torch.zeros(self.C, 12, device=self.ignored.device)
        message[:, [0, 3, 7, 10]] = LOG_ZERO
        for rows in self._blocks() if columns.width else ():
            read = columns.read(rows, self.scratch)
            y, own = columns.label(rows)
            part = message[rows]
            if columns.student_statistics is not None:
                part[:, 0:2] = columns.student_statistics[rows]
                top = part[:, 0:1]
            else:
                top = read.z.amax(1, keepdim=True)
                part[:, 0:1] = top
                part[:, 1] = torch.sub(read.z, top, out=self.scratch("work", len(y))).exp_().sum(1)
            part[:, 2:3] = read.z.gather(1, y) * own
            if read.z_t is not None:
                top_t = read.z_t.amax(1, keepdim=True)
                excess = torch.sub(read.z_t, top_t, out=self.scratch("work", len(y)))
                weight = torch.exp(excess, out=self.scratch("p", len(y)))
                part[:, 3:4], part[:, 4] = top_t, weight.sum(1)
                # over the maxima: a large common offset would swallow the difference
                ratio = excess.sub_(torch.sub(read.z, top, out=self.scratch("q", len(y))))
                part[:, 5] = weight.mul_(ratio).sum(1)
                part[:, 6:7] = read.z_t.gather(1, y) * own
            if read.hot is not None:
                top = read.hot.amax(1, keepdim=True)
                part[:, 7:8] = top
                part[:, 8] = torch.sub(read.hot, top, out=self.scratch("work", len(y))).exp_().sum(1)
                part[:, 9:10] = read.hot.gather(1, y) * own
            message[rows] = part
        if columns.cold_statistics is not None:
            message[:, 7:10] = columns.cold_statistics
        if columns.rest_statistics is not None:
            message[:, 10:12] = columns.rest_statistics
        if columns.condensed:
            return message
        return message[:, :10] if self.inputs.cold_labels else message[:, : 3 if self.inputs.teacher is None else 7]

    def _join(self, x: Tensor) -> Joined:
        """From (P, C, k) statistics."""
        x = torch.nn.functional.pad(x, (0, 12 - x.shape[2]))
        bounds = torch.tensor(self.shards.sizes, device=x.device).cumsum(0)
        last = len(self.shards.sizes) - 1
        owner = torch.bucketize(self.inputs.labels.clamp(min=0), bounds, right=True).clamp(max=last)[None, :, None]

        def of_label(column: int) -> Tensor:
            return x[:, :, column : column + 1].gather(0, owner)[0]

        top, total = _log_sum(x[:, :, 0:1], x[:, :, 1:2])
        log_q_y = (of_label(2) - top) - total
        nothing = torch.zeros_like(top)
        kl = log_p_y = top_t = total_t = nothing
        if self.inputs.teacher is not None:
            a, b, mass, excess = x[:, :, 0:1], x[:, :, 3:4], x[:, :, 4:5], x[:, :, 5:6]
            if self.columns.condensed:
                # the rest is one more entry, that no rank has alone
                rest = torch.add(*_log_sum(x[:, :, 10:11], x[:, :, 11:12]))
                rest_t = self.columns.join_rest(rest, top).to(torch.float64)
                a, b = torch.cat([a, rest[None]]), torch.cat([b, rest_t[None]])
                mass = torch.cat([mass, nothing[None] + 1.0])
                excess = torch.cat([excess, nothing[None]])
            top_t, total_t = _log_sum(b, mass)
            share = (b - top_t).exp()
            ratio = (share * (excess + mass * ((b - top_t) - (a - top)))).sum(0) / total_t.exp()
            kl = (ratio - total_t + total).clamp_(min=0.0)
            log_p_y = (of_label(6) - top_t) - total_t
        cold_top, cold_total, ce = nothing, nothing, -log_q_y
        if self.inputs.cold_labels:
            cold_top, cold_total = _log_sum(x[:, :, 7:8], x[:, :, 8:9])
            ce = cold_total - (of_label(9) - cold_top)
        if self.columns.condensed:
            top = nothing
        return Joined(top, total, log_q_y, kl, top_t, total_t, log_p_y, cold_top, cold_total, ce)

    def _write(self, loss: Tensor, difficulty: Tensor, hard: Tensor) -> None:
        for result, value in ((self.outputs.loss, loss), (self.outputs.difficulty, difficulty)):
            value = value.squeeze(1).float()
            result.copy_(value.masked_fill_(value > EXCLUDED, math.inf).masked_fill_(self.ignored, 0.0))
        self.outputs.is_hard.copy_(hard & ~self.ignored)

    def _probability(self, z: Tensor, top: Tensor, log_sum: Tensor, rows: slice | Tensor, name: str) -> Tensor:
        out = torch.sub(z, top[rows].float(), out=self.scratch(name, len(z))).exp_()
        return out.mul_(log_sum[rows].neg().exp().float())

    def _terms(
        self, divergence: Divergence, rows: slice | Tensor, beta: float | Tensor, counted: int, with_gradient: bool
    ) -> tuple[Tensor, Lazy | None, Tensor, Tensor]:
        """``sum h`` over the first ``counted`` columns, ``g`` in them, and the two distributions."""
        of, scratch = self.of, self.scratch
        read = self.columns.read(rows, scratch)
        assert read.z_t is not None
        y, own = self.columns.label(rows)
        d = None
        p = self._probability(read.z_t, of.top_t, of.log_sum_t, rows, "p")
        if "d" in divergence.reads:
            d = torch.sub(read.z_t, (of.top_t - of.top)[rows].float(), out=scratch("difference", len(y)))
            d.sub_(read.z).sub_((of.log_sum_t - of.log_sum)[rows].float())
        q = self._probability(read.z, of.top, of.log_sum, rows, "q")
        t = target(p, y, self.s.lam, self.spec.mixed, scratch, own)
        at = Lazy(t.value[:, :counted], scratch), Lazy(q[:, :counted], scratch)
        ratio = None if d is None else Lazy(d[:, :counted], scratch)
        value, g = divergence_terms(divergence, *at, ratio, beta, with_gradient)
        return value, g, p, q

    def _sums(self, divergence: Divergence, index: Tensor | None, beta: float | Tensor) -> Tensor:
        """(C', 2) fp32: this slice's ``sum h`` and ``sum g``."""
        count = self.C if index is None else len(index)
        message = torch.zeros(count, 2, device=self.ignored.device)
        done = 0
        for rows in self._blocks(index) if self.columns.counted else ():
            here = slice(done, done + (rows.stop - rows.start if isinstance(rows, slice) else len(rows)))
            weight = beta[here] if isinstance(beta, Tensor) and beta.dim() else beta
            value, g, _, _ = self._terms(divergence, rows, weight, self.columns.counted, True)
            assert g is not None
            message[here, 0:1] = value
            message[here, 1] = g.value.sum(1)
            done = here.stop
        return message

    def _gradient(
        self, divergence: Divergence | None, use: Tensor | None, total: Tensor | None, beta: float | Tensor | None
    ) -> None:
        """Write this slice's gradient; ``total`` (C, 1) is ``sum g`` of the rows in ``use``."""
        out, columns = self.outputs.dlogits, self.columns
        if out is None or not out.shape[1]:
            return
        if isinstance(beta, Tensor) and beta.dim() and use is not None and len(beta) < self.C:
            beta = torch.zeros_like(self.of.top).float().index_copy(0, use.nonzero().squeeze(1), beta)
        for rows in self._blocks():
            assert isinstance(rows, slice)
            read = columns.read(rows, self.scratch)
            y, own = columns.label(rows)
            work = self.scratch("dlogits", len(y))
            of, s = self.of, self.s
            q = self._probability(read.z, of.top, of.log_sum, rows, "q")
            used = None if use is None else use[rows]
            cold = None
            if read.hot is not None:
                cold = self._probability(read.hot, of.cold_top, of.cold_log_sum, rows, "cold")
            if self.spec.divergence is None:
                add_at(work.copy_(q), y, -1.0 * own)
            elif read.z_t is not None and (used is None or not known_all(used)):
                p = self._probability(read.z_t, of.top_t, of.log_sum_t, rows, "p")
                free_gradient(p, q, y, cold, s, self.spec, work, own)
            if used is not None and divergence is not None and total is not None and maybe_any(used):
                weight = beta[rows] if isinstance(beta, Tensor) and beta.dim() else beta
                assert weight is not None
                _, g, _, q = self._terms(divergence, rows, weight, columns.width, True)
                assert g is not None
                part = torch.addcmul(g.value, q, total[rows], value=-1.0, out=self.scratch("part", len(y)))
                close_gradient(part, q if cold is None else cold, y, s, self.spec, own)
                if known_all(used):
                    work.copy_(part)
                else:
                    torch.where(used.unsqueeze(1), part, work, out=work)
            columns.write(rows, work, read, out, of)

    def _head_share(self, index: Tensor | None) -> Generator[Tensor, Tensor, Tensor]:
        """(C', 1): as :func:`fused_kd.rows.torch_math.head_share`, the head's threshold found by bisection.

        The bits of positive floats are ordered as the floats are: 31 halvings find the least probable entry of the
        head exactly.
        """
        of, counted = self.of, self.columns.counted
        count = self.C if index is None else len(index)
        device = self.ignored.device
        t, error = (torch.zeros(count, counted, device=device) for _ in range(2))
        done = 0
        for rows in self._blocks(index) if counted else ():
            read = self.columns.read(rows, self.scratch)
            assert read.z_t is not None
            here = slice(done, done + len(read.z))
            p = self._probability(read.z_t, of.top_t, of.log_sum_t, rows, "p")[:, :counted]
            q = self._probability(read.z, of.top, of.log_sum, rows, "q")[:, :counted]
            torch.add(p, TINY, out=t[here])
            torch.sub(t[here], q, out=error[here]).abs_()
            done = here.stop
        bits = t.view(torch.int32)
        mass = self.s.fraction
        log_sum_t = of.log_sum_t if index is None else of.log_sum_t[index]
        most = log_sum_t.neg().exp().float() + TINY
        low = torch.zeros(count, 1, dtype=torch.int32, device=device)
        high = most.view(torch.int32) + 1
        for _ in range(31):
            middle = low + (high - low) // 2
            inside = joined((yield (t * (bits >= middle)).sum(1, keepdim=True, dtype=torch.float64))) <= mass
            high, low = torch.where(inside, middle, high), torch.where(inside, low, middle + 1)
        head = (bits >= high) | (t == most) | torch.as_tensor(mass >= 1.0, device=device)
        sums = joined((yield torch.cat([(error * head).sum(1, keepdim=True), error.sum(1, keepdim=True)], 1)))
        share, whole = sums.split(1, 1)
        return torch.where(whole > 0, share / whole.clamp(min=TINY), 0.5).float()


def _log_sum(tops: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """From (P, C, 1) maxima and sums of exponentials over them: the maximum, and the logarithm of the sum over it."""
    top = tops.amax(0)
    return top, (sums * (tops - top).exp()).sum(0).log()


def joined(gathered: Tensor) -> Tensor:
    """(P, ...) summands of the ranks, added up in float64 and in one order, so that all ranks have the same bits."""
    return gathered.to(torch.float64).sum(0)
