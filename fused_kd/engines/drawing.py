"""Draws from what a head holds beyond its k largest entries: one sweep for the mass of each, another for the draws.

A draw is where the running sum over the vocabulary passes a threshold, which is fixed before the first logit is read:
so it does not depend on how tokens and vocabulary are divided.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..rows.torch.math import finish_logits_
from .listing import Request, in_order, leading, tiles


class Drawn(NamedTuple):
    """``log_probs`` (N, k) fp32 and ``indices`` (N, k) int64 of the largest, descending, as of
    :class:`fused_kd.engines.listing.Listed`; ``log_rest`` (N,) fp32 of all others; ``draws`` (N, n) int64, ids among
    the others, -1 where there are none."""

    log_probs: Tensor
    indices: Tensor
    log_rest: Tensor
    draws: Tensor


def drawn(request: Request, k: int, uniforms: Tensor) -> Drawn:
    """The k largest entries of each token, and one of the others for each of ``uniforms`` (N, n) float64 in [0, 1):
    that whose share of their mass, in the order of ids, it falls into. The vocabulary is on one rank.

    Raises:
        BudgetTooSmall: where no tile fits ``memory_budget``.
    """
    more = min(k + 1, request.vocab)
    found = leading(request, more)
    # Of the others the largest is the origin of their sums, and the draw that rounding leaves without an entry.
    origin = found.values.amin(1) if more > k else torch.full_like(found.top, -math.inf)
    some = origin > -math.inf
    origin = origin.masked_fill(~some, 0.0).double()
    mass = some + found.total * ((found.top - origin) / request.temperature).exp()
    listed = in_order(request, found, more, 1.0)
    largest, indices = listed.log_probs[:, :k].contiguous(), listed.indices[:, :k].contiguous()
    log_rest, spare = listed.log_rest, torch.full_like(listed.indices[:, :1], -1)
    if more > k:
        log_rest = torch.logaddexp(log_rest.double(), listed.log_probs[:, k].double()).float()
        spare = listed.indices[:, k:]
    draws = _passed(request, indices, origin.float(), uniforms * mass.unsqueeze(1))
    return Drawn(largest, indices, log_rest, draws.where(draws >= 0, spare))


def _passed(request: Request, left_out: Tensor, origin: Tensor, thresholds: Tensor) -> Tensor:
    """(N, n) the ids at which the sums of ``exp((z - origin) / T)`` over all but ``left_out`` (N, k) pass
    ``thresholds``, -1 where none does."""
    ids = torch.full_like(thresholds, -1, dtype=torch.int64)
    before = torch.zeros(len(ids), dtype=torch.float64, device=ids.device)
    # The running sums take as much again as two tiles, which is what a budget counts for PyTorch's operations.
    for rows, first, logits in tiles(replace(request, backend="torch"), spare=1):
        tile, width = logits.raw, logits.raw.shape[1] - 1
        finish_logits_(tile, logits)
        columns = left_out[rows] - first
        tile.scatter_(1, columns.where((columns >= 0) & (columns < width), width), -math.inf)
        share = tile[:, :width].sub_(origin[rows].unsqueeze(1)).div_(request.temperature).exp_()
        sums = share.cumsum(1, dtype=torch.float64)
        wanted = (thresholds[rows] - before[rows].unsqueeze(1)).clamp_(min=0.0)
        column = torch.searchsorted(sums, wanted, right=True)
        passed = (ids[rows] < 0) & (column < width)
        ids[rows] = (column + first).where(passed, ids[rows])
        before[rows] += sums[:, -1]
    return ids
