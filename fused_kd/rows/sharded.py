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

import itertools
import math
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..divergences import EXCLUDED, LOG_LEAST, TINY
from ..terms import Number, Scalars
from .contract import RowInputs, RowOutputs, Shards, Sparse
from .shares import Shares, Tabled, Token, after_sums, label_target, loss_shares
from .torch.math import Factors as Factors
from .torch.math import (
    Over,
    infinite,
    known_all,
    on_host,
    picked,
    raised_,
    scalars_of,
    settled,
    spread,
)

Messages = Generator[Tensor, Tensor, None]
"""Yields tensors (C', k) to be gathered, and is sent them as (P, C', k)."""


@dataclass(frozen=True)
class Sums:
    """Of the rows that take sums (all, or those at ``index``): the terms, ``beta`` and ``alpha`` of each, of an
    adaptive divergence (C', 1), and, once they are known, the factor of each one's ``g``, ``sum g`` and
    ``sum_i factor_i * sum g_i``."""

    index: Tensor | None
    terms: list[Tabled]
    mixtures: list[tuple[Number, Number]]
    factors: tuple[Number, ...] = ()
    of_g: tuple[Number, ...] = ()
    total: Tensor | None = None


class Statistics(NamedTuple):
    """What a rank says of each token's logits in its slice, one column of a message each.

    A message ends before what there is none of: a teacher, another temperature of the label's cross-entropy, lists.
    """

    top: Tensor  # the student's maximum
    total: Tensor  # the sum of exponentials over it
    label: Tensor  # the label's logit
    top_t: Tensor  # the same of the teacher
    total_t: Tensor
    excess: Tensor  # the teacher's expectation of its logits over their maximum less the student's, times total_t
    label_t: Tensor
    beside: Tensor  # the largest logit of the student where the teacher excludes the token
    beside_t: Tensor
    cold_top: Tensor  # the student's at temperature 1
    cold_total: Tensor
    cold_label: Tensor
    rest_top: Tensor  # the student's of all that a top-k teacher does not list
    rest_total: Tensor

    @classmethod
    def of(cls, message: Tensor) -> Statistics:
        """The columns (..., 1) of a message (..., k), 0 where it has none."""
        padded = torch.nn.functional.pad(message, (0, len(cls._fields) - message.shape[-1]))
        return cls(*padded.split(1, -1))


class Joined(NamedTuple):
    """What all ranks know of each token, (C, 1) float64: maxima, logarithms of sums of exponentials over them, the
    label's log-probabilities and its cross-entropies, at temperature T and at that of the loss; which side is above 0
    where the other excludes a token; and the student's log-sum-exp at the loss's temperature."""

    top: Tensor
    log_sum: Tensor
    log_q_y: Tensor
    kl: Tensor
    top_t: Tensor
    log_sum_t: Tensor
    log_p_y: Tensor
    cold_top: Tensor
    cold_log_sum: Tensor
    warm_ce: Tensor
    ce: Tensor
    over: Over
    log_sum_exp: Tensor


class SweptRow:
    """What all implementations share: which sweeps a row takes, and what the ranks make of each other's numbers.

    Subclasses have the sweeps. ``labels`` are ids of the whole vocabulary, the logits' columns those of this rank.
    """

    condensed = False
    picks_rows = False

    def __init__(self, inputs: RowInputs, outputs: RowOutputs, shards: Shards) -> None:
        self.inputs, self.outputs, self.shards, self.spec = inputs, outputs, shards, inputs.spec
        self.scalars = scalars_of(inputs)
        self.temperature = self.scalars[0].temperature if inputs.teacher is not None else 1.0
        self.C = inputs.labels.shape[0]
        self.ignored = inputs.labels < 0

    def statistics(self) -> Tensor:
        """(C, k) fp32 :class:`Statistics` of this slice, as far as :meth:`said` goes."""
        raise NotImplementedError

    def said(self, message: Tensor) -> Tensor:
        """The columns of a message that there is something to say in."""
        if self.condensed:
            return message
        if self.inputs.cold_labels:
            return message[:, : Statistics._fields.index("rest_top")]
        return message[:, : Statistics._fields.index("top_t" if self.inputs.teacher is None else "cold_top")]

    def sums(self, of: Joined, sums: Sums) -> Tensor:
        """(C', 2 * terms) fp32: this slice's ``sum h`` and ``sum g`` of each term."""
        raise NotImplementedError

    def gradient(self, of: Joined, factors: Factors, sums: Sums | None) -> None:
        """Write this slice's gradient, as :mod:`fused_kd.rows.shares` says."""
        raise NotImplementedError

    def head_share(
        self, of: Joined, index: Tensor | None, mass: Number
    ) -> Generator[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """(C', 1) each: ``AdaptiveKL``'s two weights of each row."""
        raise NotImplementedError

    def join_rest(self, above: Tensor, top: Tensor) -> Tensor:
        """As :meth:`fused_kd.rows.torch.sharded_columns.Columns.join_rest`."""
        raise NotImplementedError

    def run(self) -> Messages:
        gathered = yield self.statistics()
        of = self.join(Statistics.of(gathered.to(torch.float64)))
        token = Token(of.kl, of.log_p_y, of.log_q_y, of.warm_ce, of.ce, of.log_sum_exp)
        teacher = self.inputs.teacher
        alone = isinstance(teacher, Sparse) and teacher.tail == "listed" and not self.spec.mixes_label
        shares = loss_shares(self.spec, self.scalars, token, self.inputs.hard, without_target=alone)
        use, sums = shares.use, None
        if use is not None:
            # On the host every rank leaves out the same tokens; elsewhere that would wait for the device.
            index = use.nonzero().squeeze(1) if self.picks_rows and on_host(use) and not known_all(use) else None
            sums = yield from self._summed(of, Sums(index, shares.tabled, []), shares, token)
        for result, value in ((self.outputs.loss, shares.loss), (self.outputs.difficulty, shares.difficulty)):
            result.copy_(settled(value, self.ignored))
        self.outputs.is_hard.copy_(shares.hard & ~self.ignored)
        inverse = 1.0 / self.temperature
        self.gradient(of, shares.factors(token, inverse, cold=self.inputs.cold_labels), sums)

    def _summed(self, of: Joined, sums: Sums, shares: Shares, token: Token) -> Generator[Tensor, Tensor, Sums]:
        """Add the terms' sums over all ranks to the loss."""
        index, C = sums.index, self.C
        for term in sums.terms:
            s = self.scalars[term.index]
            mixture: tuple[Number, Number] = (picked(s.beta, index), picked(s.alpha, index))
            if term.term.of.adaptive:
                mixture = yield from self.head_share(of, index, s.fraction)
            sums.mixtures.append(mixture)
        found = joined((yield self.sums(of, sums)))
        over = Over(*(picked(x, index) for x in of.over))
        factors: list[Number] = []
        of_g: list[Number] = []
        total = torch.zeros_like(found[:, :1])
        for j, term in enumerate(sums.terms):
            value, own = found[:, 2 * j : 2 * j + 1], found[:, 2 * j + 1 : 2 * j + 2]
            fraction = picked(self.scalars[term.index].fraction, index)
            beyond = infinite(term.term.of, over, fraction, sums.mixtures[j][0])
            if beyond is not None:
                raised_(value, beyond)
            if not known_all(term.use):
                unused = picked(~term.use.unsqueeze(1), index)
                value, own = value.masked_fill(unused, 0.0), own.masked_fill(unused, 0.0)
            factor = after_sums(shares, term, value, token, lambda x: picked(x, index), lambda x: spread(x, index, C))
            factors.append(factor)
            of_g.append(own)
            total = total + factor * own
        return replace(sums, factors=tuple(factors), of_g=tuple(of_g), total=total)

    def join(self, ranks: Statistics) -> Joined:
        """From (P, C, 1) float64 of all ranks."""
        # compared with each bound in turn: a tensor of them would have to be copied to the device
        owner = torch.zeros_like(self.inputs.labels)
        for bound in list(itertools.accumulate(self.shards.sizes))[:-1]:
            owner += self.inputs.labels >= bound
        owner = owner[None, :, None]

        def of_label(label: Tensor) -> Tensor:
            return label.gather(0, owner)[0]

        top, total = _log_sum(ranks.top, ranks.total)
        label = of_label(ranks.label)
        log_q_y = (label - top) - total
        nothing = torch.zeros_like(top)
        limit = EXCLUDED / self.temperature
        label_out = (label < limit) & (top >= limit)
        warm_ce = raised_(-log_q_y, label_out)
        kl = log_p_y = top_t = total_t = nothing
        over = Over(nothing > 0.0, nothing > 0.0)
        if self.inputs.teacher is not None:
            beside, beside_t = ranks.beside.amax(0), ranks.beside_t.amax(0)
            above, b, mass, excess = ranks.top - top, ranks.top_t, ranks.total_t, ranks.excess
            if self.condensed:
                # the rest is one more entry, that no rank has alone
                rest, rest_sum = _log_sum(ranks.rest_top, ranks.rest_total)
                rest_above = (rest - top) + rest_sum  # log 0 would swallow the logarithm
                rest = rest + rest_sum
                rest_t = self.join_rest(rest_above, top).to(torch.float64)
                beside = torch.maximum(beside, rest.where(rest_t < limit, -math.inf))
                beside_t = torch.maximum(beside_t, rest_t.where(rest < limit, -math.inf))
                above, b = torch.cat([above, rest_above[None]]), torch.cat([b, rest_t[None]])
                mass = torch.cat([mass, nothing[None] + 1.0])
                excess = torch.cat([excess, nothing[None]])
            top_t, total_t = _log_sum(b, mass)
            share = (b - top_t).exp()
            ratio = (share * (excess + mass * ((b - top_t) - above))).sum(0) / total_t.exp()
            over = Over(
                (beside - top - total > LOG_LEAST) & (top_t >= limit),
                (beside_t - top_t - total_t > LOG_LEAST) & (top >= limit),
            )
            kl = raised_((ratio - total_t + total).clamp_(min=0.0), over.teacher)
            log_p_y = (of_label(ranks.label_t) - top_t) - total_t
        cold_top, cold_total, ce = nothing, nothing, warm_ce
        if self.inputs.cold_labels:
            cold_top, cold_total = _log_sum(ranks.cold_top, ranks.cold_total)
            cold_label = of_label(ranks.cold_label)
            ce = raised_(cold_total - (cold_label - cold_top), (cold_label < EXCLUDED) & (cold_top >= EXCLUDED))
        log_sum_exp = cold_top + cold_total if self.inputs.cold_labels else top + total
        if self.condensed:
            top = nothing
        return Joined(
            top, total, log_q_y, kl, top_t, total_t, log_p_y, cold_top, cold_total, warm_ce, ce, over, log_sum_exp
        )


def _log_sum(tops: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """From (P, C, 1) maxima and sums of exponentials over them: the maximum, and the logarithm of the sum over it."""
    top = tops.amax(0)
    return top, (sums * (tops - top).exp()).sum(0).log()


def label_d(of: Joined, s: Scalars) -> Tensor:
    """(C, 1) float64: ``log yt - log q`` of the label."""
    return label_target(of.log_p_y, s).clamp(min=TINY).log() - of.log_q_y


def joined(gathered: Tensor) -> Tensor:
    """(P, ...) summands of the ranks, added up in float64 and in one order, so that all ranks have the same bits."""
    return gathered.to(torch.float64).sum(0)
