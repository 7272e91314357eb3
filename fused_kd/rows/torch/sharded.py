"""The sharded row in PyTorch operations, for any device: blocks of rows, swept as often as the ranks exchange."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from typing import Any

import torch
from torch import Tensor

from ...divergences import EXCLUDED, LEFT_OUT, NOWHERE
from ...terms import Scalars
from ..contract import Logits, RowInputs, RowOutputs, Shards
from ..sharded import Joined, Messages, Statistics, Sums, SweptRow, joined
from .math import (
    Factors,
    Lazy,
    Scratch,
    add_label,
    add_scaled,
    known_all,
    picked,
    rows_of_block,
    shares_of,
    spread,
    table_arguments,
    target,
    top_and_sum,
    write_softmaxes,
)
from .sharded_columns import columns_of


def row(inputs: RowInputs, outputs: RowOutputs, shards: Shards) -> Messages:
    """Fill ``outputs`` for one chunk; shapes and meaning as of :mod:`fused_kd.rows.contract`, columns of this rank."""
    yield from _TorchRow(inputs, outputs, shards).run()


class _TorchRow(SweptRow):
    picks_rows = True

    def __init__(self, inputs: RowInputs, outputs: RowOutputs, shards: Shards) -> None:
        super().__init__(inputs, outputs, shards)
        self.columns = columns = columns_of(inputs, self.temperature, shards)
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
                bound = EXCLUDED / picked(self.temperature, rows)
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
        sums: Sums,
        rows: slice | Tensor,
        here: slice | Tensor,
        logits: tuple[Tensor, Tensor],
        p: Tensor,
        q: Tensor,
    ) -> list[tuple[Any, ...]]:
        """What each term's ``h`` and ``g`` take, from ``z_t, z`` and their probabilities in some columns; ``here`` are
        the rows' places among those of ``sums``."""
        y, own = self.columns.label(rows)
        z_t, z = logits
        log_p = log_q = d = None
        if any(term.term.of.powers for term in sums.terms):
            log_p, log_q = (
                (Lazy(x, self.scratch) - top[rows].float()) - log_sum[rows].float()  # an offset costs no digits
                for x, top, log_sum in ((z_t, of.top_t, of.log_sum_t), (z, of.top, of.log_sum))
            )
        if any("d" in term.term.of.reads for term in sums.terms):
            d = self.scratch("difference", len(z))[:, : z.shape[1]]
            torch.sub(z_t, of.top_t[rows].float(), out=d)
            d.sub_(torch.sub(z, of.top[rows].float(), out=self.scratch("work", len(z))[:, : z.shape[1]]))
            d.sub_((of.log_sum_t - of.log_sum)[rows].float())
            if self.excludes:
                bound = EXCLUDED / picked(self.temperature, rows)
                for logits_of, top in ((z_t, of.top_t), (z, of.top)):
                    d.masked_fill_((logits_of < bound) & (top[rows] >= bound), LEFT_OUT)
        made = []
        for term, mixture in zip(sums.terms, sums.mixtures, strict=True):
            s = Scalars(*(picked(x, rows) for x in self.scalars[term.index]))
            divergence = term.term.of
            t = target(divergence, p, y, s, term.term.mixed, self.scratch, own)
            ratio = Lazy(d, self.scratch) if d is not None and "d" in divergence.reads else None
            logs = (log_p, log_q) if log_p is not None and log_q is not None and divergence.powers else None
            beta, alpha = (picked(x, here) for x in mixture)
            made.append(table_arguments(divergence, t, Lazy(q, self.scratch), ratio, beta, alpha, logs))
        return made

    def sums(self, of: Joined, sums: Sums) -> Tensor:
        count, counted = self.C if sums.index is None else len(sums.index), self.columns.counted
        message = torch.zeros(count, 2 * len(sums.terms), dtype=torch.float32, device=self.ignored.device)
        done = 0
        for rows in self._blocks(sums.index) if counted else ():
            read = self.columns.read(rows, self.scratch)
            assert read.z_t is not None
            z, z_t = read.z[:, :counted], read.z_t[:, :counted]
            here = slice(done, done + len(z))
            p = self._probability(z_t, of.top_t, of.log_sum_t, rows, "p")
            q = self._probability(z, of.top, of.log_sum, rows, "q")
            for j, arguments in enumerate(self._arguments(of, sums, rows, here, (z_t, z), p, q)):
                for column, term in enumerate((sums.terms[j].term.of.h, sums.terms[j].term.of.g)):
                    message[here, 2 * j + column] = term(*arguments).value.sum(1)
            done = here.stop
        return message

    def gradient(self, of: Joined, factors: Factors, sums: Sums | None) -> None:
        out, columns = self.outputs.dlogits, self.columns
        if out is None or not out.shape[1]:
            return
        columns.cold_share = _single(factors.cold)
        whole = None if sums is None else self._whole(sums)
        for rows in self._blocks():
            assert isinstance(rows, slice)
            read = columns.read(rows, self.scratch)
            y, own = columns.label(rows)
            work = self.scratch("dlogits", len(y))
            q, p, cold = self._probability(read.z, of.top, of.log_sum, rows, "q"), None, None
            if read.z_t is not None:
                p = self._probability(read.z_t, of.top_t, of.log_sum_t, rows, "p")
            if read.hot is not None:
                cold = self._probability(read.hot, of.cold_top, of.cold_log_sum, rows, "cold")
            its = Factors(*(picked(_single(x), rows) for x in factors))
            write_softmaxes(work, q, p, its)
            if whole is not None and read.z_t is not None and p is not None:
                self._add_sums(work, of, whole, rows, (read.z_t, read.z), p, q)
            add_label(work, cold, y, its, own)
            columns.write(rows, work, read, out, of)

    def _whole(self, sums: Sums) -> Sums:
        """With numbers of all rows, 0 where they take no sums; as far as this device can, without looking."""
        index, C = sums.index, self.C
        mixtures = [(spread(beta, index, C), spread(alpha, index, C)) for beta, alpha in sums.mixtures]
        masked = []
        for term, factor in zip(sums.terms, sums.factors, strict=True):
            everywhere = spread(factor, index, C)
            masked.append(_single(everywhere * term.use.unsqueeze(1)) if not known_all(term.use) else everywhere)
        of_g = tuple(_single(spread(own, index, C)) for own in sums.of_g)
        return Sums(None, sums.terms, mixtures, tuple(masked), of_g)

    def _add_sums(
        self, work: Tensor, of: Joined, sums: Sums, rows: slice, logits: tuple[Tensor, Tensor], p: Tensor, q: Tensor
    ) -> None:
        """Add ``sum_i factor_i * (g_i - q * sum g_i) / T``: scaled after they cancel."""
        inverse = 1.0 / picked(self.temperature, rows)
        for term, factor, own, arguments in zip(
            sums.terms, sums.factors, sums.of_g, self._arguments(of, sums, rows, rows, logits, p, q), strict=True
        ):
            g = term.term.of.g(*arguments).value
            if not known_all(term.use):
                g = g.masked_fill(~term.use[rows].unsqueeze(1), 0.0)
            part = torch.mul(q, picked(own, rows), out=self.scratch("part", len(q)))
            torch.sub(g, part, out=part)
            add_scaled(work, part, picked(_single(factor), rows) * inverse, work)

    def head_share(
        self, of: Joined, index: Tensor | None, mass: float | Tensor
    ) -> Generator[Tensor, Tensor, tuple[Tensor, Tensor]]:
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
        mass = picked(mass, index)
        log_sum_t = of.log_sum_t if index is None else of.log_sum_t[index]
        most = log_sum_t.neg().exp().float()
        low = torch.zeros(count, 1, dtype=torch.int32, device=device)
        high = most.view(torch.int32) + 1
        for _ in range(31):
            middle = low + (high - low) // 2
            inside = joined((yield (t * (bits >= middle)).sum(1, keepdim=True, dtype=torch.float64))) <= mass
            high, low = torch.where(inside, middle, high), torch.where(inside, low, middle + 1)
        head = (bits >= high) | (t == most) | (mass >= 1.0)
        parts = torch.cat([(error * of).sum(1, keepdim=True) for of in (head, ~head)], 1)
        shared, others = shares_of(joined((yield parts)))
        return shared.float(), others.float()


def _single(x: float | Tensor) -> float | Tensor:
    """In fp32."""
    return x.float() if isinstance(x, Tensor) else x
