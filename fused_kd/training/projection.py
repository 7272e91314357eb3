"""Fewer numbers a hidden state: the subspace that keeps most of what a teacher says.

With states h of mean mu and covariance C, the r directions are those for which ``mu + up @ down.T @ (h - mu)`` is
nearest to h in the mean square, over all affine maps of rank r, in a metric M: with ``M = S.T @ S`` and U the r main
eigenvectors of ``S @ C @ S.T``, ``down = S.T @ U / s`` and ``up = pinv(S) @ U * s``. The s are the roots of their
eigenvalues, so that what is kept has unit variance, and with the head's weight stays within any dtype.

To the second order a change d of a state changes the teacher's probabilities p by a KL divergence of
``d.T @ F @ d / 2``, F the mean of ``J.T @ (diag(p) - p @ p.T) @ J`` with J the head's weight, of a capped head times
the cap's slope. M is F and a tenth, by their traces, of ``W.T @ W``, the change of the logits, for what no sampled
token makes likely. On the text of a model with 135M parameters half of the numbers leave a KL of 0.15 nats so, 0.28
with ``W.T @ W`` alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fused_kd import ForwardKD, LMHead, kd_loss

_BLOCK = 8192  # rows of a head in float64 at a time
_KEPT = 4096  # at least as many tokens are asked for their probabilities, where there are so many
_LOGITS = 0.1  # share of the logits' metric
_COLUMNS = 4096  # of the logits whose difference is measured
# below this share of the largest, a direction of the head is rounding
_RANK = 1e-13
# and what the states vary in a direction, below this share of them
_ROUNDING = 1e-7


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
        up = self.up.to(head.weight.device)
        weight = torch.cat([(block @ up).to(head.weight.dtype) for block in _double_blocks(head.weight)])
        return _on_other_states(head, weight, self.mean)


@dataclass(frozen=True)
class Scaling:
    """States without their ``mean`` and divided by a ``scale``, both (H,) float64: for codes with one step a token.

    The scale is the power of two next to the root of a number's standard deviation: large numbers lose some of their
    steps to the small ones, but not all. The head's weight takes it up exactly, the bias has the mean's share.
    """

    mean: Tensor
    scale: Tensor

    def states(self, hidden: Tensor) -> Tensor:
        """(N, H) -> (N, H) float32."""
        mean, scale = (each.to(hidden.device, torch.float32) for each in (self.mean, self.scale))
        return (hidden.float() - mean) / scale

    @torch.no_grad()
    def head(self, head: LMHead) -> LMHead:
        """As :meth:`Projection.head`; (0, H)."""
        return _on_other_states(head, head.weight * self.scale.to(head.weight), self.mean)


def _on_other_states(head: LMHead, weight: Tensor, mean: Tensor) -> LMHead:
    mean = mean.to(weight.device)
    bias = torch.cat([block @ mean for block in _double_blocks(head.weight)])
    bias = (bias if head.bias is None else bias + head.bias.double()).float()
    return replace(head, hidden=weight.new_empty(0, weight.shape[1]), weight=weight, bias=bias)


class Moments:
    """Sums over states: how many, theirs, and of their products, float64; and some thousands of the states, evenly
    spread."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.count, self._stride = 0, 1
        self.sum = torch.zeros(width, dtype=torch.float64, device=device)
        self.products = torch.zeros(width, width, dtype=torch.float64, device=device)
        self._kept = torch.zeros(0, width, device=device)

    def add(self, hidden: Tensor) -> None:
        """(N, H), floating point."""
        picked = hidden.detach()[-self.count % self._stride :: self._stride]
        self._kept = torch.cat([self._kept.to(hidden.dtype), picked])
        while len(self._kept) > 2 * _KEPT:
            self._kept, self._stride = self._kept[::2], 2 * self._stride
        for part in hidden.split(_BLOCK):
            exact = part.double()
            self.count += len(part)
            self.sum += exact.sum(0)
            self.products.addmm_(exact.T, exact)

    def covariance(self) -> tuple[Tensor, Tensor]:
        """(H,) mean and (H, H) covariance."""
        mean = self.sum / max(self.count, 1)
        return mean, self.products / max(self.count, 1) - torch.outer(mean, mean)

    @property
    def states(self) -> Tensor:
        """(4096 to 8192, H), or all where there are fewer."""
        return self._kept


@torch.no_grad()
def fit(moments: Moments, head: LMHead, r: int, memory: int = 256 << 20) -> Projection:
    """Find the best directions, at most r: no more than the head tells apart.

    Args:
        memory: bytes for logits, of a part of the states at a time.

    Raises:
        ValueError: states that are not finite, a head that tells no states apart.
    """
    mean, covariance = moments.covariance()
    if not bool(covariance.isfinite().all()):
        raise ValueError(f"project={r}: the teacher's hidden states must be finite numbers")
    values, vectors = torch.linalg.eigh(metric(replace(head, hidden=moments.states), memory))
    kept = values > values[-1] * _RANK
    if not bool(kept.any()):
        raise ValueError(f"project={r}: the teacher's head must not give every token the same logit, as zeros do")
    roots, vectors = values[kept].sqrt(), vectors[:, kept]
    spread = roots[:, None] * (vectors.T @ covariance @ vectors) * roots
    sizes, main = (part.flip(-1)[..., :r] for part in torch.linalg.eigh(spread))
    square = float((covariance.trace() + mean @ mean) * values[-1])
    s = sizes.clamp(min=_ROUNDING**2 * square if square > 0 else 1.0).sqrt()
    return Projection(mean, vectors @ (roots[:, None] * main / s), vectors @ (main / roots[:, None] * s))


def scaling_of(moments: Moments) -> Scaling:
    """Find mean and scale of these states; the median of the scales is 1, none is beyond 256 times that."""
    mean, covariance = moments.covariance()
    spread = covariance.diagonal().clamp(min=torch.finfo(torch.float64).tiny).sqrt()
    exponents = (spread / spread.median()).log2().div(2).round().clamp(-8, 8)
    return Scaling(mean, torch.exp2(exponents))


@torch.no_grad()
def error_of(exact: LMHead, stored: LMHead, memory: int) -> dict[str, float]:
    """Measure what becomes of a teacher that is stored, over the same tokens (N,) and all columns of its head.

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
        stored, exact, labels, ForwardKD(lam=1.0), statistics=("kl", "top_1"), memory_budget=max(memory, 64 << 20)
    )
    columns = torch.arange(0, exact.vocab, -(-exact.vocab // _COLUMNS), device=exact.hidden.device)
    theirs, ours = (_centred(_logits(head, columns)) for head in (exact, stored))
    size = float(theirs.norm())
    return {
        "logits": float((ours - theirs).norm()) / size if size else 0.0,
        "kl": max(float(out.statistics["kl"].mean()), 0.0),
        "top_1": float(out.statistics["top_1"].mean()),
        "tokens": count,
    }


def _centred(logits: Tensor) -> Tensor:
    return logits - logits.mean(1, keepdim=True)


def _logits(head: LMHead, columns: Tensor | slice) -> Tensor:
    """(N, columns) float32."""
    logits = (head.hidden @ head.weight[columns].T).float()
    if head.bias is not None:
        logits = logits + head.bias[columns].float()
    logits = logits * head.logit_scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def metric(head: LMHead, memory: int) -> Tensor:
    """(H, H) float64: how much changes of a state matter, over the head's tokens."""
    (of_p, rounding), of_logits = _of_probabilities(head, memory), _of_logits(head)
    values, vectors = torch.linalg.eigh(of_p)
    values = values.clamp(min=0)  # below 0 by rounding
    share = max(_LOGITS * float(values.sum()), rounding)  # all of it where every token is certain
    size = float(of_logits.trace())
    if not share > 0 or not size > 0:  # no token, or logits that are all alike
        return of_logits
    found: Tensor = (vectors * values) @ vectors.T + share / size * of_logits
    return found


def _of_probabilities(head: LMHead, memory: int) -> tuple[Tensor, float]:
    """The matrix, a difference, and what of its trace can be rounding."""
    weight, N = head.weight, max(len(head.hidden), 1)
    V, H = weight.shape
    weights = torch.zeros(V, dtype=torch.float64, device=weight.device)
    found = torch.zeros(H, H, dtype=torch.float64, device=weight.device)
    for hidden in head.hidden.split(max(1, memory // (16 * V))):
        logits = _logits(replace(head, hidden=hidden), slice(None))
        p = logits.softmax(1)
        slope = torch.ones_like(p) if head.softcap is None else 1 - (logits / head.softcap) ** 2
        weights += (p * slope**2).sum(0, dtype=torch.float64)
        mean = ((p * slope).to(weight.dtype) @ weight).double()
        found.addmm_(mean.T, mean, alpha=-1 / N)
    squares = 0.0
    for block, share in zip(_double_blocks(weight), weights.split(_BLOCK), strict=True):
        found.addmm_(block.T, block * share[:, None], alpha=1 / N)
        squares += float(block.square().sum(1) @ share) / N
    return found, squares * max(torch.finfo(weight.dtype).eps, 1e-6)


def _of_logits(head: LMHead) -> Tensor:
    """What all logits of a token have in common says nothing of its probabilities, unless they are capped."""
    weight = head.weight
    found = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64, device=weight.device)
    total = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    for block in _double_blocks(weight):
        found.addmm_(block.T, block)
        total += block.sum(0)
    return found if head.softcap is not None else found - torch.outer(total, total) / head.vocab


def _double_blocks(weight: Tensor) -> Iterator[Tensor]:
    return (block.double() for block in weight.split(_BLOCK))
