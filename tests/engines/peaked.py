"""Gradients of which most tiles are negligible, and what may be left out of them."""

from __future__ import annotations

import torch
from torch import Tensor

import fused_kd as fk

from ..problems import Problem

EPS = 1e-4
LIKELY = 64  # columns; a tile begins behind them
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2e-3}


def peak(p: Problem) -> tuple[fk.LMHead, fk.LMHead]:
    """Both sides; a bias leaves columns from :data:`LIKELY` on less than 1e-6 of the probability."""
    assert p.bias is not None
    p.labels[p.labels >= LIKELY] = 5
    with torch.no_grad():
        p.bias[LIKELY:] = -30.0
    return p.student(), fk.LMHead(p.hidden_t, p.weight_t, p.bias.detach())


def check_left_out(
    p: Problem, exact: list[Tensor], filtered: list[Tensor], factors: Tensor, behind: int = LIKELY
) -> None:
    """dH and dW of :data:`EPS` against those of 0: within the bound, and what is left out was not 0 anyway.

    ``factors`` (N,): of each token's gradient in the loss's; ``behind``: the first column that tiles leave out.
    """
    (dh, dw), (dh_f, dw_f) = ([g.double() for g in grads[:2]] for grads in (exact, filtered))
    assert not dw_f[behind:].any()
    assert dw[behind:].any() or p.hidden.dtype == torch.float16  # which holds nothing so small
    rounding = ROUNDING[p.hidden.dtype]
    bound_h = EPS * factors * p.weight.double().norm(dim=1).sum()
    bound_w = EPS * (factors * p.hidden.double().norm(dim=1)).sum()
    assert ((dh_f - dh).norm(dim=1) <= bound_h + rounding * dh.norm(dim=1)).all()
    assert ((dw_f - dw).norm(dim=1) <= bound_w + rounding * dw.norm(dim=1)).all()
