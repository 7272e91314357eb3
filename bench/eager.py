"""Each objective the way it is usually written: full logits, fp32 softmax, autograd; plain and under torch.compile."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .implementation import JSD, JSD_BETA, KL, SELF_EVOLUTION, SFT, Implementation, Step
from .inputs import BETA, IGNORE, LAM, Inputs

# Hidden states (N, H), weights (V, H), labels (N,); the mean loss over valid tokens.


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
    """Self-Evolution KD with a threshold ``gamma`` (0-d)."""
    y = labels.clamp(min=0).unsqueeze(1)
    log_q = F.log_softmax(F.linear(hidden_s, weight_s).float(), dim=-1)
    with torch.no_grad():
        p = F.softmax(F.linear(hidden_t, weight_t).float(), dim=-1)
        target = (lam * p).scatter_add(1, y, torch.full_like(p[:, :1], 1.0 - lam))
    easy = F.kl_div(log_q, target, reduction="none").sum(-1)
    mixture = beta * log_q.exp() + (1.0 - beta) * target
    hard = F.kl_div(mixture.log(), target, reduction="none").sum(-1)
    return _mean(torch.where(easy.detach() > gamma, hard, easy), labels)


def generalized_jsd(
    hidden_s: Tensor, weight_s: Tensor, hidden_t: Tensor, weight_t: Tensor, labels: Tensor, beta: float
) -> Tensor:
    """``beta * KL(p||m) + (1 - beta) * KL(q||m)`` with ``m = beta * p + (1 - beta) * q``, 0 < beta < 1."""
    log_q = F.log_softmax(F.linear(hidden_s, weight_s).float(), dim=-1)
    with torch.no_grad():
        log_p = F.log_softmax(F.linear(hidden_t, weight_t).float(), dim=-1)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1.0 - beta))
    of_p = F.kl_div(log_m, log_p, reduction="none", log_target=True).sum(-1)
    of_q = F.kl_div(log_m, log_q, reduction="none", log_target=True).sum(-1)
    return _mean(beta * of_p + (1.0 - beta) * of_q, labels)


def forward_kl(hidden_s: Tensor, weight_s: Tensor, hidden_t: Tensor, weight_t: Tensor, labels: Tensor) -> Tensor:
    """``KL(p||q)``."""
    log_q = F.log_softmax(F.linear(hidden_s, weight_s).float(), dim=-1)
    with torch.no_grad():
        p = F.softmax(F.linear(hidden_t, weight_t).float(), dim=-1)
    return _mean(F.kl_div(log_q, p, reduction="none").sum(-1), labels)


def sft(hidden_s: Tensor, weight_s: Tensor, labels: Tensor) -> Tensor:
    """``-log q_y``."""
    return F.cross_entropy(F.linear(hidden_s, weight_s).float(), labels, ignore_index=IGNORE)


def _mean(loss: Tensor, labels: Tensor) -> Tensor:
    valid = labels != IGNORE
    return loss.masked_fill(~valid, 0.0).sum() / valid.sum()


def _build(group: str, compiled: bool) -> Callable[[Inputs, float], Step]:
    def wrapped(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return torch.compile(loss, dynamic=False) if compiled else loss

    def build(inputs: Inputs, gamma: float) -> Step:
        student, tensors = inputs[:2], inputs[:4]
        if group == SFT:
            loss = wrapped(sft)
            return lambda labels: loss(*student, labels)
        if group == JSD:
            loss = wrapped(generalized_jsd)
            return lambda labels: loss(*tensors, labels, JSD_BETA)
        if group == KL:
            loss = wrapped(forward_kl)
            return lambda labels: loss(*tensors, labels)
        loss = wrapped(self_evolution)
        threshold = torch.tensor(gamma, device=inputs.hidden_s.device)
        return lambda labels: loss(*tensors, labels, threshold, LAM, BETA)

    return build


def _entry(group: str, compiled: bool) -> Implementation:
    return Implementation(group, _build(group, compiled), compiles=compiled)


EAGER: dict[str, Implementation] = {
    f"{'torch.compile' if compiled else 'eager'}{suffix}": _entry(group, compiled)
    for group, suffix in ((SELF_EVOLUTION, ""), (JSD, " jsd"), (KL, " kl"), (SFT, " sft"))
    for compiled in (False, True)
}
