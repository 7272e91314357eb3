"""What a row tells of its tokens, without gradient: see :data:`fused_kd.terms.STATISTICS`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...terms import STATISTICS, WITHOUT_SWEEP, Scalars
from ..shares import Token, target_entropy
from .math import Lazy, Scratch, Softmax


def entropy(side: Softmax, scratch: Scratch) -> Tensor:
    """(B, 1) ``sum p * (lse - z)``: summands of one sign, so that nothing cancels; log 0 weighs nothing."""
    return ((Lazy(side.z, scratch) - side.lse) * side.prob).value.sum(1, keepdim=True).neg_()


def statistics(columns: int, q: Softmax, p: Softmax | None, token: Token, s: Scalars, scratch: Scratch) -> Tensor:
    """(B, ``columns``); NaN where there is no teacher to tell of."""
    found = torch.full((len(q.lse), len(STATISTICS)), math.nan, device=q.lse.device)
    known = {
        "log_sum_exp_s": q.log_sum_exp,
        "entropy_s": entropy(q, scratch),
        "cross_entropy": token.ce,
        "log_q_y": token.log_q_y,
    }
    if p is not None:
        entropy_t = entropy(p, scratch)
        known |= {
            "log_sum_exp_t": p.log_sum_exp,
            "entropy_t": entropy_t,
            "kl": token.kl,
            "log_p_y": token.log_p_y,
            "target_entropy": target_entropy(entropy_t, token.log_p_y, s),
        }
        if columns > WITHOUT_SWEEP:
            # of some token, also where several share the largest logit
            both = (q.z == q.z.amax(1, keepdim=True)) & (p.z == p.z.amax(1, keepdim=True))
            known["top_1"] = both.any(1, keepdim=True).float()
            known["overlap"] = torch.minimum(q.prob, p.prob, out=scratch.take()[: len(q.prob)]).sum(1, keepdim=True)
    for name, value in known.items():
        found[:, STATISTICS.index(name)] = value.squeeze(1)
    return found[:, :columns]
