"""The inputs that every implementation gets: peaked distributions, a teacher near the student, labels drawn
from it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fused_kd.engine.gemm import Projection

from .shapes import Shape

LAM = 0.5
BETA = 0.5
IGNORE = -100
LOGIT_STD = 4.0
TEACHER_NOISE = 0.3
CHUNK = 128


class Inputs(NamedTuple):
    """Student leaves that require grad, teacher constants, labels (N,) int64, difficulty (N,) fp32 of each
    token."""

    hidden_s: Tensor
    weight_s: Tensor
    hidden_t: Tensor
    weight_t: Tensor
    labels: Tensor
    difficulty: Tensor

    def gamma(self, tokens: str) -> float:
        """The threshold that makes no token, every token, or about half of them hard."""
        if tokens == "easy":
            return math.inf
        if tokens == "hard":
            return 0.0
        if tokens != "mixed":
            raise ValueError(f"tokens must be 'easy', 'hard' or 'mixed', got {tokens!r}")
        # In the widest gap near the median, so that no rounding moves a token across it.
        d = self.difficulty.sort().values
        middle = d[int(0.45 * len(d)) : max(int(0.55 * len(d)), int(0.45 * len(d)) + 2)]
        at = int((middle[1:] - middle[:-1]).argmax())
        return float(middle[at : at + 2].double().mean())

    def hard_fraction(self, gamma: float) -> float:
        return float((self.difficulty > gamma).float().mean())

    def half_ignored(self, seed: int = 0) -> Tensor:
        """The labels with a random half of them ignored."""
        N = len(self.labels)
        index = torch.randperm(N, generator=torch.Generator().manual_seed(seed))[: N // 2]
        return self.labels.index_fill(0, index.to(self.labels.device), IGNORE)

    def first(self, n: int) -> Inputs:
        """The first ``n`` tokens, with hidden states that are a leaf of their own; the weights are shared."""
        hidden_s = self.hidden_s.detach()[:n].clone().requires_grad_()
        return Inputs(hidden_s, self.weight_s, self.hidden_t[:n], self.weight_t, self.labels[:n], self.difficulty[:n])

    def drop_gradients(self) -> None:
        self.hidden_s.grad = self.weight_s.grad = None


def make_inputs(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """The same numbers for the same arguments, in any process on the same device."""
    g = torch.Generator(device).manual_seed(seed)
    hidden_s = torch.randn(shape.N, shape.H_s, generator=g, device=device)
    weight_s = torch.randn(shape.V, shape.H_s, generator=g, device=device).mul_(LOGIT_STD / shape.H_s**0.5)
    hidden_t = _near(hidden_s, shape.H_t, TEACHER_NOISE, g).to(dtype)
    weight_t = _near(weight_s, shape.H_t, TEACHER_NOISE * LOGIT_STD / shape.H_s**0.5, g).to(dtype)
    hidden_s, weight_s = hidden_s.to(dtype), weight_s.to(dtype)
    labels, difficulty = _label(hidden_s, weight_s, hidden_t, weight_t, g)
    return Inputs(hidden_s.requires_grad_(), weight_s.requires_grad_(), hidden_t, weight_t, labels, difficulty)


def _near(student: Tensor, H: int, noise: float, g: torch.Generator) -> Tensor:
    """Noise with the student's columns added: the teacher agrees with the student, but not quite."""
    teacher = torch.randn(student.shape[0], H, generator=g, device=student.device).mul_(noise)
    shared = min(H, student.shape[1])
    teacher[:, :shared] += student[:, :shared]
    return teacher


def _label(
    hidden_s: Tensor, weight_s: Tensor, hidden_t: Tensor, weight_t: Tensor, g: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Labels drawn from the teacher, and KL(yt||q) of each token."""
    N, V, device = hidden_s.shape[0], weight_s.shape[0], hidden_s.device
    student, teacher = (Projection(w, None, w.dtype) for w in (weight_s, weight_t))
    z, z_t = torch.empty(2, min(CHUNK, N), V, device=device)
    labels = torch.empty(N, dtype=torch.int64, device=device)
    difficulty = torch.empty(N, device=device)
    for start in range(0, N, CHUNK):
        tokens = slice(start, min(start + CHUNK, N))
        rows = tokens.stop - tokens.start
        student.logits(student.operand(hidden_s[tokens]), z[:rows])
        teacher.logits(teacher.operand(hidden_t[tokens]), z_t[:rows])
        target = z_t[:rows].softmax(1)
        y = torch.multinomial(target, 1, generator=g)
        target.mul_(LAM).scatter_add_(1, y, torch.full_like(target[:, :1], 1.0 - LAM))
        labels[tokens] = y.squeeze(1)
        log_q = z[:rows].log_softmax(1)
        difficulty[tokens] = (torch.xlogy(target, target) - target * log_q).sum(1)
    return labels, difficulty
