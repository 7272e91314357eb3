"""Several teachers as one: in each chunk ``T log sum_i w_i p_i``, which any row takes as a teacher's logits.

Two buffers of a chunk's logits, however many teachers there are: what is mixed so far, and the next one's. Where each
token has one teacher alone, the others' GEMMs leave it out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..mixtures import check_which
from ..rows.contract import Logits
from ..rows.mixing import add
from ..rows.top_k import sparse_teacher
from ..rows.torch.math import finish_logits_
from .problem import IGNORED, Problem, Side


class Place(NamedTuple):
    """Of some tokens: ``tokens`` are their places among all, ``labels`` theirs, ``into`` fp32 rows (C, V) for their
    logits; ``temperature`` (1,) or (C,) fp32; ``backend`` that of the call."""

    tokens: slice | Tensor
    labels: Tensor
    into: Tensor
    temperature: Tensor
    backend: str

    def some(self, rows: Tensor, into: Tensor) -> Place:
        """Of some of its tokens, in the first rows of ``into``."""
        tokens, T = self.tokens, self.temperature
        tokens = rows + tokens.start if isinstance(tokens, slice) else tokens[rows]
        T = T if len(T) == 1 else T[rows]
        return Place(tokens, self.labels[rows], into[: len(rows)], T, self.backend)


class OneTeacher(Protocol):
    def read(self, place: Place) -> tuple[Logits, Tensor | None]:
        """The logits of a place, in its rows or elsewhere, and which (C,) have no distribution; None: none."""


class ListLogits:
    """A list with the tail "renormalize" or "uniform", as the logits that it stands for."""

    def __init__(self, side: Side, vocab: int) -> None:
        self._side, self._vocab = side, vocab

    def read(self, place: Place) -> tuple[Logits, Tensor | None]:
        side, tokens, V, into = self._side, place.tokens, self._vocab, place.into
        assert side.indices is not None
        listed, malformed = sparse_teacher(
            side.source[tokens], side.indices[tokens], place.labels, V, side.tail, reads_label=False,
            temperature=side.temperature, log_rest=None if side.log_rest is None else side.log_rest[tokens],
        )  # fmt: skip
        rest, there = listed.rest.unsqueeze(1), listed.indices < V
        into.copy_(rest.expand_as(into))
        # where there is no entry, the first one's again, or the rest of a list without any
        first = torch.where(there[:, :1], listed.log_probs[:, :1], rest)
        index = torch.where(there, listed.indices, listed.indices[:, :1].clamp(max=V - 1))
        into.scatter_(1, index, torch.where(there, listed.log_probs, first))
        return Logits(into, 1.0, None, False), malformed


class MixedSource:
    """Logits of the mixture of a problem's teachers, chunk by chunk."""

    def __init__(self, problem: Problem, teachers: Sequence[OneTeacher]) -> None:
        self.teachers, self._shares, self._which = teachers, problem.shares, problem.which
        if self._which is None:
            return
        kept = problem.labels != IGNORED
        if problem.labels.device.type == "cpu":
            self._which, kept = self._which[kept], torch.ones(())
        if kept.device.type == "cpu":
            check_which(self._which, len(teachers))

    def chunk(self, span: slice, place: Place, spare: Tensor) -> tuple[Logits, Tensor]:
        """Of the tokens of ``span`` among those to process; ``spare`` is as ``place.into``. And which have none."""
        bad = torch.zeros_like(place.labels, dtype=torch.bool)
        if self._which is not None:
            finite = self._pick(self._which[span], place, spare, bad)
            return Logits(place.into, 1.0, None, finite), bad
        assert self._shares is not None
        finite = True
        shares = self._shares if len(self._shares) == 1 else self._shares[place.tokens]
        for i, teacher in enumerate(self.teachers):
            own, share = place if i == 0 else place._replace(into=spare), shares[:, i].contiguous()
            logits, malformed = teacher.read(own)
            finite &= logits.finite
            add(place.into, logits, share, place.temperature, place.backend, first=i == 0)
            if malformed is not None:
                bad |= malformed & (share > -math.inf)
        return Logits(place.into, 1.0, None, finite), bad

    def _pick(self, which: Tensor, place: Place, spare: Tensor, bad: Tensor) -> bool:
        """Each token's own teacher's logits; whether they are known to be finite."""
        device, finite = place.labels.device, True
        for i, teacher in enumerate(self.teachers):
            rows = (which == i).nonzero().squeeze(1).to(device, non_blocking=True)
            if len(rows) == 0:
                continue
            alone = len(rows) == len(place.labels)
            own = place if alone else place.some(rows, spare)
            logits, malformed = teacher.read(own)
            finite &= logits.finite
            if logits.raw is not own.into:
                own.into.copy_(logits.raw)
            finish_logits_(own.into, logits._replace(finite=True))  # -inf stays
            if not alone:
                place.into.index_copy_(0, rows, own.into)
            if malformed is not None:
                bad.index_copy_(0, rows, malformed)
        unknown = ((which < 0) | (which >= len(self.teachers))).nonzero().squeeze(1)
        bad.index_fill_(0, unknown.to(device, non_blocking=True), True)
        return finite
