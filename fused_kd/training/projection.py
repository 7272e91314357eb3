"""Fewer numbers a hidden state: the subspace that keeps most of a teacher's logits.

With states h of mean mu and covariance C, and the head's weight W, the r directions are those for which the logits of
``mu + up @ down.T @ (h - mu)`` are nearest to those of h in the mean square, over all affine maps of rank r. In the
metric ``M = W.T @ W`` that is principal components: with ``M = S.T @ S`` and U the r main eigenvectors of
``S @ C @ S.T``, ``down = S.T @ U`` and ``up = pinv(S) @ U``. What all logits of a token have in common says nothing of
its probabilities: each column of W is taken from its mean over the vocabulary, unless the logits are capped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fused_kd import ForwardKD, LMHead, kd_loss

_BLOCK = 8192  # rows of a head in float64 at a time
_COLUMNS = 4096  # of the logits whose difference is measured
# below this share of the largest, a direction of the head is rounding
_RANK = 1e-13


@dataclass(frozen=True)
class Projection:
    """``mean`` (H,), ``down`` and ``up`` (H, r), float64."""

    mean: Tensor
    down: Tensor
    up: Tensor

    def states(self, hidden: Tensor) -> Tensor:
        """(N, H) -> (N, r) float32."""
        mean, down = (each.to(hidden.device, torch.float32) for each in (self.mean, self.down))
        return (hidden.float() - mean) @ down

    @torch.no_grad()
    def head(self, head: LMHead) -> LMHead:
        """The head on such states, with none yet: (0, r). The bias, float32, has the mean's share."""
        up, mean = self.up.to(head.weight.device), self.mean.to(head.weight.device)
        weight = torch.cat([(block @ up).to(head.weight.dtype) for block in _double_blocks(head.weight)])
        bias = torch.cat([block @ mean for block in _double_blocks(head.weight)])
        bias = (bias if head.bias is None else bias + head.bias.double()).float()
        return replace(head, hidden=weight.new_empty(0, weight.shape[1]), weight=weight, bias=bias)


class Moments:
    """Sums over states: how many, theirs, and of their products; float64."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.count = 0
        self.sum = torch.zeros(width, dtype=torch.float64, device=device)
        self.products = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, hidden: Tensor) -> None:
        for part in hidden.split(_BLOCK):
            exact = part.double()
            self.count += len(part)
            self.sum += exact.sum(0)
            self.products.addmm_(exact.T, exact)

    def covariance(self) -> tuple[Tensor, Tensor]:
        """(H,) mean and (H, H) covariance."""
        mean = self.sum / max(self.count, 1)
        return mean, self.products / max(self.count, 1) - torch.outer(mean, mean)


@torch.no_grad()
def fit(moments: Moments, head: LMHead, r: int, vocab_size: int) -> Projection:
    """The best directions, at most r: no more than the head's first ``vocab_size`` rows tell apart."""
    mean, covariance = moments.covariance()
    values, vectors = torch.linalg.eigh(_metric(head, vocab_size))
    kept = values > values[-1] * _RANK
    roots, vectors = values[kept].sqrt(), vectors[:, kept]
    spread = roots[:, None] * (vectors.T @ covariance @ vectors) * roots
    main = torch.linalg.eigh(spread).eigenvectors.flip(1)[:, :r]
    return Projection(mean, vectors @ (roots[:, None] * main), vectors @ (main / roots[:, None]))


@torch.no_grad()
def error_of(exact: LMHead, stored: LMHead, vocab_size: int, memory: int) -> dict[str, float]:
    """What becomes of a teacher that is stored, over the same tokens (N,).

    Returns:
        ``logits``: the norm of the difference of the logits relative to theirs, in each token from their mean (of 4,096
        entries, evenly spread). ``kl``: mean KL(p || stored p) in nats. ``top_1``: how often both have the same largest
        entry. ``tokens``: N.
    """
    count = len(exact.hidden)
    if not count:
        return {"logits": 0.0, "kl": 0.0, "top_1": 1.0, "tokens": 0}
    labels = torch.zeros(count, dtype=torch.int64, device=exact.hidden.device)
    out = kd_loss(
        stored, exact, labels, ForwardKD(lam=1.0), vocab_size=vocab_size, statistics=("kl", "top_1"),
        memory_budget=max(memory, 64 << 20),
    )  # fmt: skip
    columns = torch.arange(0, vocab_size, -(-vocab_size // _COLUMNS), device=exact.hidden.device)
    theirs, ours = _logits(exact, columns), _logits(stored, columns)
    size = float(theirs.norm())
    return {
        "logits": float((ours - theirs).norm()) / size if size else 0.0,
        "kl": max(float(out.statistics["kl"].mean()), 0.0),
        "top_1": float(out.statistics["top_1"].mean()),
        "tokens": count,
    }


def _logits(head: LMHead, columns: Tensor) -> Tensor:
    logits = head.hidden.float() @ head.weight[columns].float().T
    if head.bias is not None:
        logits = logits + head.bias[columns].float()
    logits = logits * head.logit_scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits - logits.mean(1, keepdim=True)


def _metric(head: LMHead, vocab_size: int) -> Tensor:
    """(H, H) float64: how far apart the logits of two states are."""
    weight = head.weight[:vocab_size]
    metric = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64, device=weight.device)
    total = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    for block in _double_blocks(weight):
        metric.addmm_(block.T, block)
        total += block.sum(0)
    return metric if head.softcap is not None else metric - torch.outer(total, total) / vocab_size


def _double_blocks(weight: Tensor) -> Iterator[Tensor]:
    return (block.double() for block in weight.split(_BLOCK))
