"""The columns over which a rank adds up: its slice of the logits, or of a top-k teacher's entries and their rest."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...divergences import LOG_ZERO, NOWHERE
from ...workspace import empty
from ..contract import RowInputs, Shards, Sparse
from ..sharded import Joined
from ..top_k import rest_gradient, takes_part
from .math import Scratch, cool, final_logits, picked, rows_of_block, to_raw_, top_and_sum, uniform_logits


class Read(NamedTuple):
    """(B, W) fp32 final logits over T of student and teacher; ``hot`` the student's at temperature 1, where the label's
    cross-entropy is taken there; ``slope`` d final / d raw where that is more than the scale."""

    z: Tensor
    z_t: Tensor | None
    hot: Tensor | None
    slope: Tensor | None


class Columns:
    """A rank's slice of the logits.

    Attributes:
        width: columns. counted: the first of them, which this rank adds up for all.
        condensed: whether they are a top-k teacher's entries instead of the logits themselves.
        cold_share: factor of the student's softmax at temperature 1 in the gradient, known when it is written.
        known: (C, 1) of :class:`fused_kd.rows.sharded.Statistics` by name, those that the columns do not give.
    """

    condensed = False

    def __init__(self, inputs: RowInputs, temperature: float | Tensor, shards: Shards) -> None:
        self.inputs, self.temperature = inputs, temperature
        self.cold_share: float | Tensor = 0.0
        self.known: dict[str, Tensor] = {}
        self.width = self.counted = inputs.student.raw.shape[1]
        local = inputs.labels - shards.start
        self._owned = (inputs.labels >= 0) & (local >= 0) & (local < self.width)
        self._label = local.clamp(0, max(self.width - 1, 0))
        self._start = shards.start

    def label(self, rows: slice | Tensor) -> tuple[Tensor, Tensor]:
        """(B, 1): a column to read for the label, and 1 where it is the label's own, else 0."""
        return self._label[rows].unsqueeze(1), self._owned[rows].unsqueeze(1).float()

    def read(self, rows: slice | Tensor, scratch: Scratch) -> Read:
        student, teacher, T = self.inputs.student, self.inputs.teacher, picked(self.temperature, rows)
        z, slope = final_logits(student, rows, scratch, "z_s")
        hot = z if self.inputs.cold_labels else None
        if teacher is None:
            return Read(z, None, None, slope)
        z = cool(z, T, scratch("z_cool", len(z)))
        if isinstance(teacher, Sparse):
            z_t = uniform_logits(teacher, rows, self._start, scratch("z_t", len(z)))
        else:
            z_t, _ = final_logits(teacher, rows, scratch, "z_t")
        return Read(z, cool(z_t, T, scratch("z_t", len(z))), hot, slope)

    def join_rest(self, above: Tensor, top: Tensor) -> Tensor:
        """Learn the logit of all unlisted entries together over the largest of all, and that, (C, 1) float64 each.

        From then on the columns are logits over ``top``: the digits of the rest's logarithm would drown in a common
        offset. Returns the teacher's rest, which is known.
        """
        raise NotImplementedError

    def write(self, rows: slice, gradient: Tensor, read: Read, out: Tensor, of: Joined) -> None:
        """Into the raw logits' gradient, from that of the columns' final logits, which may be overwritten."""
        to_raw_(gradient, self.inputs.student, read.slope)
        if self.inputs.weights is not None:
            gradient.mul_(self.inputs.weights[rows].unsqueeze(1))
        gradient.masked_fill_((self.inputs.labels[rows] < 0).unsqueeze(1), 0.0)
        out[rows].copy_(gradient)


# An entry of another slice, below log 0; the sum of many does not overflow.
_ELSEWHERE = NOWHERE / 1e4


class CondensedColumns(Columns):
    """A top-k teacher's entries within the slice, and a last column for all others of the vocabulary.

    The last column's student logit is known once the ranks have joined theirs; the first rank counts it. Of a list
    alone it is log 0, and the largest logit is that of the entries.
    """

    condensed = True

    def __init__(self, inputs: RowInputs, temperature: float | Tensor, shards: Shards) -> None:
        super().__init__(inputs, temperature, shards)
        teacher = inputs.teacher
        assert isinstance(teacher, Sparse)
        C, K = teacher.indices.shape
        V, device = self.width, inputs.labels.device
        local = teacher.indices - shards.start
        self._present = (teacher.indices < shards.vocab) & (local >= 0) & (local < V)
        self._index = torch.where(self._present, local, V)
        self._listed = teacher.tail == "listed"
        self._part = self._present & takes_part(teacher, shards.vocab, inputs.spec) if self._listed else self._present
        self.width, self.counted = K + 1, K + 1 if shards.rank == 0 else K
        self._z = torch.full((C, K + 1), _ELSEWHERE, dtype=torch.float32, device=device)
        self._z_t = torch.full_like(self._z, LOG_ZERO)
        values = teacher.log_probs.clamp(min=LOG_ZERO)
        self._z_t[:, :K] = cool(values, temperature, torch.empty_like(values)).where(self._present, LOG_ZERO)
        self._label = (teacher.indices == inputs.labels.unsqueeze(1)).to(torch.int8).argmax(1)
        self._hot = torch.full_like(self._z, LOG_ZERO) if inputs.cold_labels else None
        tops = {"top": _ELSEWHERE, "rest_top": NOWHERE} | ({"cold_top": NOWHERE} if inputs.cold_labels else {})
        self.known |= {name: torch.full_like(self._z[:, :1], value) for name, value in tops.items()}
        totals = ("total", "rest_total", *(("cold_total", "cold_label") if inputs.cold_labels else ()))
        self.known |= {name: torch.zeros_like(self._z[:, :1]) for name in totals}
        self._block = max(1, min(C, rows_of_block(V, device)))
        self._scratch = Scratch(self._block, V, device)
        self._padded = empty((self._block, V + 1), torch.float32, device)
        for start in range(0, C if V else 0, self._block):
            self._condense(slice(start, min(start + self._block, C)))

    def _condense(self, rows: slice) -> None:
        known = {name: column[rows] for name, column in self.known.items()}
        index = self._index[rows]
        z, _ = final_logits(self.inputs.student, rows, self._scratch, "z_s")
        if self._hot is not None:
            known["cold_top"][:], known["cold_total"][:] = top_and_sum(z, self._scratch("work", len(z)))
            column, own = super().label(rows)
            entry = index.gather(1, column).clamp(max=z.shape[1] - 1)
            known["cold_label"][:] = z.gather(1, entry) * own
        z = cool(z, picked(self.temperature, rows), self._scratch("z_cool", len(z)))
        entries = z.gather(1, index.clamp(max=z.shape[1] - 1))
        self._z[rows, :-1] = entries.where(self._part[rows], _ELSEWHERE)
        if self._listed:
            known["top"][:], known["total"][:] = top_and_sum(self._z[rows, :-1], entries)
        else:
            known["top"][:], known["total"][:] = top_and_sum(z, self._scratch("work", len(z)))
        if self._listed:
            known["rest_total"][:] = top_and_sum(z, self._scratch("work", len(z)))[1].clamp_(1.0, 1.0)  # or NaN
            return
        unlisted = self._unlisted(z, rows)
        known["rest_top"][:], known["rest_total"][:] = top_and_sum(unlisted, self._scratch("work", len(z)))

    def _unlisted(self, z: Tensor, rows: slice) -> Tensor:
        """``z`` with log 0 where the teacher lists an entry; what is not in the slice goes into a column of its own."""
        padded = self._padded[: len(z)]
        padded[:, :-1] = z
        return padded.scatter_(1, self._index[rows], NOWHERE)[:, :-1]

    def read(self, rows: slice | Tensor, scratch: Scratch) -> Read:
        return Read(self._z[rows], self._z_t[rows], None if self._hot is None else self._hot[rows], None)

    def join_rest(self, above: Tensor, top: Tensor) -> Tensor:
        teacher = self.inputs.teacher
        assert isinstance(teacher, Sparse)
        self._top = top.float()
        self._z.sub_(self._top).clamp_(min=LOG_ZERO)
        self._z[:, -1:] = above.clamp(min=LOG_ZERO)
        rest = teacher.rest.clamp(min=LOG_ZERO).unsqueeze(1)
        self._z_t[:, -1:] = cool(rest, self.temperature, torch.empty_like(rest))
        return self._z_t[:, -1:]

    def write(self, rows: slice, gradient: Tensor, read: Read, out: Tensor, of: Joined) -> None:
        for start in range(rows.start, rows.stop, self._block):
            part = slice(start, min(start + self._block, rows.stop))
            self._expand(part, gradient[start - rows.start : part.stop - rows.start], out, of)

    def _expand(self, rows: slice, gradient: Tensor, out: Tensor, of: Joined) -> None:
        present, index = self._present[rows], self._index[rows]
        hot, slope = final_logits(self.inputs.student, rows, self._scratch, "z_s")
        z = cool(hot, picked(self.temperature, rows), self._scratch("z_cool", len(hot)))
        # each entry that is not listed has its share of the rest's gradient
        work = self._scratch("work", len(z))
        if self._listed:
            work.zero_()
        else:
            rest = self._z[rows, -1:]
            share = self._unlisted(z, rows).sub_(self._top[rows])
            work.copy_(share.sub_(rest).exp_().mul_(rest_gradient(gradient[:, -1:], rest)))
        if self._hot is not None:  # the entries' own columns have only the label's part of the cross-entropy
            cold = hot.sub(of.cold_top[rows].float()).exp_().mul_(of.cold_log_sum[rows].neg().exp().float())
            work.add_(cold.mul_(picked(self.cold_share, rows)))
        entries = gradient[:, :-1].masked_fill(~present, 0.0)
        work.scatter_add_(1, index.clamp(max=z.shape[1] - 1), entries)
        super().write(rows, work, Read(z, None, None, slope), out, of)


def columns_of(inputs: RowInputs, temperature: float | Tensor, shards: Shards) -> Columns:
    """Of a chunk."""
    sparse = isinstance(inputs.teacher, Sparse) and inputs.teacher.tail != "uniform"
    return (CondensedColumns if sparse else Columns)(inputs, temperature, shards)
