"""Self-Evolution KD the way it is usually written: full logits, ``log_softmax``, autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .inputs import IGNORE


def self_evolution(
    hidden_s: Tensor,
    weight_s: Tensor,
    hidden_t: Tensor,
    weight_t: Tensor,
    labels: Tensor,
    gamma: Tensor,
    lam: float,
    beta: float,
) -> Tensor:
    """Mean loss over valid tokens. Hidden states (N, H), weights (V, H), labels (N,), ``gamma`` 0-d."""
    valid = labels != IGNORE
    y = labels.clamp(min=0).unsqueeze(1)
    log_q = F.log_softmax(F.linear(hidden_s, weight_s).float(), dim=-1)
    with torch.no_grad():
        p = F.softmax(F.linear(hidden_t, weight_t).float(), dim=-1)
        target = (lam * p).scatter_add(1, y, torch.full_like(p[:, :1], 1.0 - lam))
    easy = F.kl_div(log_q, target, reduction="none").sum(-1)
    mixture = beta * log_q.exp() + (1.0 - beta) * target
    hard = F.kl_div(mixture.log(), target, reduction="none").sum(-1)
    loss = torch.where(easy.detach() > gamma, hard, easy)
    return loss.masked_fill(~valid, 0.0).sum() / valid.sum()
