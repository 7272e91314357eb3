"""The sharded row in PyTorch operations, for any device: blocks of rows, swept as often as the ranks exchange."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from typing import Any

import torch
from torch import Tensor

from ...divergences import EXCLUDED, LEFT_OUT, NOWHERE, Divergence
from ..contract import Logits, RowInputs, RowOutputs, Shards
from ..sharded import Joined, Messages, Shares, Statistics, SweptRow, joined
from .math import (
    Lazy,
    Scratch,
    add_at,
    close_gradient,
    free_gradient,
    known_all,
    maybe_any,
    rows_of_block,
    shares_of,
    table_arguments,
    target,
    top_and_sum,
)
from .sharded_columns import columns_of


def row(inputs: RowInputs, outputs: RowOutputs, shards: Shards) -> Messages:
    """Fill ``outputs`` for one chunk; shapes and meaning as of :mod:`fused_kd.rows.contract`, columns of this rank."""
    yield from _TorchRow(inputs, outputs, shards).run()


class _TorchRow(SweptRow):
    picks_rows = True

    def __init__(self, inputs: RowInputs, outputs: RowOutputs, shards: Shards) -> None:
        super().__init__(inputs, outputs, shards)
        self.columns = columns = columns_of(inputs, self.s, shards)
        self.condensed, self.join_rest = columns.condensed, columns.join_rest  # type: ignore[method-assign]
        self.block = max(1, min(rows_of_block(columns.width, inputs.labels.device), self.C))
        self.scratch = Scratch(self.block, columns.width, inputs.labels.device)
        teacher = inputs.teacher
        self.excludes = not (inputs.student.finite and isinstance(teacher, Logits) and teacher.finite)

    def _blocks(self, index: Tensor | None = None) -> Iterator[slice | Tensor]:
        """Rows a block: of all, or of those at ``index``."""
        count = self.C if index is None else len(index)
        for start in range(0, count, self.block):
            rows = slice(start, min(start + self.block, count))
            yield rows if index is None else index[rows]

    def statistics(self) -> Tensor:
        columns, scratch = self.columns, self.scratch
        message = torch.zeros(self.C, len(Statistics._fields), dtype=torch.float32, device=self.ignored.device)
        own = Statistics(*message.split(1, 1))
        for name in ("top", "top_t", "cold_top", "rest_top"):
            getattr(own, name).fill_(NOWHERE)
        for name in ("beside", "beside_t"):
            getattr(own, name).fill_(-math.inf)
        for name, known in columns.known.items():
            getattr(own, name).copy_(known)
        for rows in self._blocks() if columns.width else ():
            part = Statistics(*message[rows].split(1, 1))
            read = columns.read(rows, scratch)
            y, is_own = columns.label(rows)
            if "top" not in columns.known:
                part.top[:], part.total[:] = top_and_sum(read.z, scratch("work", len(y)))
            part.label[:] = read.z.gather(1, y) * is_own
            if read.z_t is not None:
                bound = EXCLUDED / self.s.temperature
                sides = ((part.beside, read.z, read.z_t), (part.beside_t, read.z_t, read.z))
                for beside, z, other in sides if self.excludes else ():
                    left = scratch("work", len(y)).copy_(z).masked_fill_(other >= bound, -math.inf)
                    beside[:] = left.amax(1, keepdim=True)
                part.top_t[:] = read.z_t.amax(1, keepdim=True)
                excess = torch.sub(read.z_t, part.top_t, out=scratch("work", len(y)))
                weight = torch.exp(excess, out=scratch("p", len(y)))
                part.total_t[:] = weight.sum(1, keepdim=True)
                # over the maxima: a large common offset would swallow the difference
                ratio = excess.sub_(torch.sub(read.z, part.top, out=scratch("q", len(y))))
                part.excess[:] = weight.mul_(ratio).sum(1, keepdim=True)
                part.label_t[:] = read.z_t.gather(1, y) * is_own
            if read.hot is not None and "cold_top" not in columns.known:
                part.cold_top[:], part.cold_total[:] = top_and_sum(read.hot, scratch("work", len(y)))
                part.cold_label[:] = read.hot.gather(1, y) * is_own
        return self.said(message)

    def _probability(self, z: Tensor, top: Tensor, log_sum: Tensor, rows: slice | Tensor, name: str) -> Tensor:
        out = torch.sub(z, top[rows].float(), out=self.scratch(name, len(z))[:, : z.shape[1]]).exp_()
        return out.mul_(log_sum[rows].neg().exp().float())

    def _arguments(
        self,
        of: Joined,
        divergence: Divergence,
        rows: slice | Tensor,
        logits: tuple[Tensor, Tensor],
        p: Tensor,
        q: Tensor,
        shares: Shares,
    ) -> tuple[Any, ...]:
        """What the table's ``h`` and ``g`` take, from ``z_t, z`` and their probabilities in some columns."""
        y, own = self.columns.label(rows)
        d = None
        if "d" in divergence.reads:
            z_t, z = logits
            d = self.scratch("difference", len(z))[:, : z.shape[1]]
            torch.sub(z_t, of.top_t[rows].float(), out=d)
            d.sub_(torch.sub(z, of.top[rows].float(), out=self.scratch("work", len(z))[:, : z.shape[1]]))
            d.sub_((of.log_sum_t - of.log_sum)[rows].float())
            if self.excludes:
                bound = EXCLUDED / self.s.temperature
                d.masked_fill_((z_t < bound) & (of.top_t[rows] >= bound), LEFT_OUT)
        t = target(divergence, p, y, self.s, self.spec.mixed, self.scratch, own)
        ratio = None if d is None else Lazy(d, self.scratch)
        return table_arguments(divergence, t, Lazy(q, self.scratch), ratio, *shares)

    def sums(self, of: Joined, divergence: Divergence, use: Tensor, index: Tensor | None, shares: Shares) -> Tensor:
        count, counted = self.C if index is None else len(index), self.columns.counted
        message = torch.zeros(count, 2, dtype=torch.float32, device=self.ignored.device)
        done = 0
        for rows in self._blocks(index) if counted else ():
            read = self.columns.read(rows, self.scratch)
            assert read.z_t is not None
            z, z_t = read.z[:, :counted], read.z_t[:, :counted]
            here = slice(done, done + len(z))
            p = self._probability(z_t, of.top_t, of.log_sum_t, rows, "p")
            q = self._probability(z, of.top, of.log_sum, rows, "q")
            arguments = self._arguments(of, divergence, rows, (z_t, z), p, q, _rows_of(shares, here))
            for column, term in enumerate((divergence.h, divergence.g)):
                message[here, column] = term(*arguments).value.sum(1)
            done = here.stop
        return message

    def gradient(
        self,
        of: Joined,
        divergence: Divergence | None,
        use: Tensor | None,
        total: Tensor | None,
        shares: Shares | None,
    ) -> None:
        out, columns, s = self.outputs.dlogits, self.columns, self.s
        if out is None or not out.shape[1]:
            return
        for rows in self._blocks():
            assert isinstance(rows, slice)
            read = columns.read(rows, self.scratch)
            y, own = columns.label(rows)
            work = self.scratch("dlogits", len(y))
            q = self._probability(read.z, of.top, of.log_sum, rows, "q")
            if self.spec.divergence is None:
                columns.write(rows, add_at(work.copy_(q), y, -1.0 * own), read, out, of)
                continue
            assert read.z_t is not None
            p = self._probability(read.z_t, of.top_t, of.log_sum_t, rows, "p")
            cold = None
            if read.hot is not None:
                cold = self._probability(read.hot, of.cold_top, of.cold_log_sum, rows, "cold")
            used = None if use is None else use[rows]
            if used is None or not known_all(used):
                free_gradient(p, q, y, cold, s, self.spec, work, own)
            if used is not None and maybe_any(used):
                assert divergence is not None and total is not None and shares is not None
                arguments = self._arguments(of, divergence, rows, (read.z_t, read.z), p, q, _rows_of(shares, rows))
                g = divergence.g(*arguments)
                into = work if known_all(used) else self.scratch("part", len(y))
                part = torch.addcmul(g.value, q, total[rows], value=-1.0, out=into)
                close_gradient(part, q if cold is None else cold, y, s, self.spec, own)
                if part is not work:
                    torch.where(used.unsqueeze(1), part, work, out=work)
            columns.write(rows, work, read, out, of)

    def head_share(self, of: Joined, index: Tensor | None) -> Generator[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """(C', 1) each: as :func:`fused_kd.rows.torch.math.head_share`, the head's threshold found by bisection.

        The bits of positive floats are ordered as the floats are: 31 halvings find the least probable entry of the
        head exactly.
        """
        counted = self.columns.counted
        count = self.C if index is None else len(index)
        device = self.ignored.device
        t, error = (torch.zeros(count, counted, dtype=torch.float32, device=device) for _ in range(2))
        done = 0
        for rows in self._blocks(index) if counted else ():
            read = self.columns.read(rows, self.scratch)
            assert read.z_t is not None
            here = slice(done, done + len(read.z))
            p = self._probability(read.z_t, of.top_t, of.log_sum_t, rows, "p")[:, :counted]
            q = self._probability(read.z, of.top, of.log_sum, rows, "q")[:, :counted]
            t[here] = p
            torch.sub(t[here], q, out=error[here]).abs_()
            done = here.stop
        bits = t.view(torch.int32)
        mass = self.s.fraction
        log_sum_t = of.log_sum_t if index is None else of.log_sum_t[index]
        most = log_sum_t.neg().exp().float()
        low = torch.zeros(count, 1, dtype=torch.int32, device=device)
        high = most.view(torch.int32) + 1
        for _ in range(31):
            middle = low + (high - low) // 2
            inside = joined((yield (t * (bits >= middle)).sum(1, keepdim=True, dtype=torch.float64))) <= mass
            high, low = torch.where(inside, middle, high), torch.where(inside, low, middle + 1)
        head = (bits >= high) | (t == most) | torch.as_tensor(mass >= 1.0, device=device)
        parts = torch.cat([(error * of).sum(1, keepdim=True) for of in (head, ~head)], 1)
        shared, others = shares_of(joined((yield parts)))
        return shared.float(), others.float()


def _rows_of(shares: Shares, rows: slice) -> Shares:
    """Of weights that differ between rows."""
    beta, alpha = (x[rows] if isinstance(x, Tensor) and x.dim() else x for x in shares)
    return beta, alpha
