"""The problems: sizes of real pairs of models, what varies at each, and the tensors that every implementation gets."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fused_kd as fk
from fused_kd.engines.gemm import Projection
from fused_kd.reference import reference_kd_loss

# Which tokens are hard decides what a gated objective computes: none of them, all of them, half of them.
TOKENS = ("easy", "hard", "mixed")
TEACHERS = ("near", "far")


class Shape(NamedTuple):
    """``N`` tokens, hidden sizes ``H_s`` (student) and ``H_t`` (teacher), vocabulary ``V``."""

    name: str
    N: int
    H_s: int
    H_t: int
    V: int

    def __str__(self) -> str:
        return f"{self.name} ({self.N}, {self.H_s}, {self.H_t}, {self.V})"


class Variant(NamedTuple):
    """What is measured at one shape.

    ``tokens``: which are hard. ``valid``: the share that is not ignored. ``teacher``: near the student (it agrees, but
    not quite) or far (independent of it).
    """

    tokens: str = "mixed"
    valid: float = 1.0
    teacher: str = "near"

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Variant:
        """That of a row of results."""
        return cls(*(row[name] for name in cls._fields))

    def __str__(self) -> str:
        parts = [self.tokens]
        if self.valid != 1.0:
            parts.append(f"{100 * self.valid:.0f} % valid")
        if self.teacher != "near":
            parts.append(f"{self.teacher} teacher")
        return ", ".join(parts)


EVERY = tuple(Variant(tokens) for tokens in TOKENS)
FAR = Variant("hard", teacher="far")

# Two cores take about a second for a step of these.
CPU_SHAPES = (
    Shape("32k", 1024, 512, 1024, 32000),
    Shape("128k", 512, 256, 512, 128256),
)
# The peers', whose objectives have no gate.
CPU_PEER_SHAPE = Shape("32k-512", 512, 256, 512, 32000)
# Student and teacher of Llama 3 (8B head, a 13B-sized teacher), Qwen 2.5 (0.5B, 7B) and GPT-2 (small, XL), whose
# vocabulary is odd.
GPU_SHAPES = (
    Shape("A", 8192, 4096, 5120, 128256),
    Shape("B", 8192, 896, 3584, 151936),
)
ODD_SHAPE = Shape("odd", 8192, 768, 1600, 50257)
REHEARSAL_SHAPES = (Shape("A", 64, 32, 48, 1024), Shape("B", 64, 16, 32, 1504), Shape("odd", 64, 16, 24, 517))
QUICK_SHAPE = Shape("tiny", 96, 32, 48, 1000)

# Curves: the same problem, one size varied; the vocabularies are Llama 2's, Llama 3's and Gemma 3's.
CPU_CURVES = {
    "N": tuple(Shape(f"N={N}", N, 128, 256, 32000) for N in (256, 1024, 4096)),
    "V": tuple(Shape(f"V={V}", 256, 128, 256, V) for V in (32000, 128256, 262144)),
}
QUICK_CURVES = {
    "N": tuple(Shape(f"N={N}", N, 16, 24, 500) for N in (16, 64)),
    "V": tuple(Shape(f"V={V}", 32, 16, 24, V) for V in (200, 400)),
}
VALID = (1.0, 0.5, 0.25)

LAM = 0.5
BETA = 0.5
IGNORE = -100
# Entries of a top-k teacher's lists.
TOP_K = 64
LOGIT_STD = 4.0
TEACHER_NOISE = 0.3
CHUNK = 128


class Inputs(NamedTuple):
    """Student leaves that require grad, teacher constants, labels (N,) int64, difficulty (N,) fp32 of each
    token. ``top_k`` stands for the teacher where it is not None."""

    hidden_s: Tensor
    weight_s: Tensor
    hidden_t: Tensor
    weight_t: Tensor
    labels: Tensor
    difficulty: Tensor
    top_k: fk.TopK | None = None

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

    def ignoring(self, valid: float, seed: int = 0) -> Tensor:
        """The labels, of which a random ``1 - valid`` are ignored."""
        N = len(self.labels)
        index = torch.randperm(N, generator=torch.Generator().manual_seed(seed))[round(valid * N) :]
        return self.labels.index_fill(0, index.to(self.labels.device), IGNORE)

    def first(self, n: int) -> Inputs:
        """The first ``n`` tokens, with hidden states that are a leaf of their own; the weights are shared."""
        hidden_s = self.hidden_s.detach()[:n].clone().requires_grad_()
        top_k = None if self.top_k is None else rows_of(self.top_k, slice(0, n))
        teacher = self.hidden_t[:n], self.weight_t
        return Inputs(hidden_s, self.weight_s, *teacher, self.labels[:n], self.difficulty[:n], top_k)

    def drop_gradients(self) -> None:
        self.hidden_s.grad = self.weight_s.grad = None


def make_inputs(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0, teacher: str = "near") -> Inputs:
    """Peaked distributions and labels drawn from the teacher, which is near the student or far from it.

    The same numbers for the same arguments, in any process on the same device.
    """
    if teacher not in TEACHERS:
        raise ValueError(f"teacher must be one of {', '.join(TEACHERS)}, got {teacher!r}")
    g = torch.Generator(device).manual_seed(seed)
    hidden_s = torch.randn(shape.N, shape.H_s, generator=g, device=device)
    scale = LOGIT_STD / shape.H_s**0.5
    weight_s = torch.randn(shape.V, shape.H_s, generator=g, device=device).mul_(scale)
    if teacher == "near":
        hidden_t = _near(hidden_s, shape.H_t, TEACHER_NOISE, g).to(dtype)
        weight_t = _near(weight_s, shape.H_t, TEACHER_NOISE * scale, g).to(dtype)
    else:
        hidden_t = torch.randn(shape.N, shape.H_t, generator=g, device=device).to(dtype)
        weight_t = torch.randn(shape.V, shape.H_t, generator=g, device=device).mul_(LOGIT_STD / shape.H_t**0.5)
        weight_t = weight_t.to(dtype)
    hidden_s, weight_s = hidden_s.to(dtype), weight_s.to(dtype)
    labels, difficulty = _label(hidden_s, weight_s, hidden_t, weight_t, g)
    return Inputs(hidden_s.requires_grad_(), weight_s.requires_grad_(), hidden_t, weight_t, labels, difficulty)


def rows_of(teacher: fk.TopK, tokens: slice) -> fk.TopK:
    """The lists of some tokens."""
    return fk.TopK(teacher.log_probs[tokens], teacher.indices[tokens], teacher.tail)


@torch.no_grad()
def cut_top_k(inputs: Inputs, k: int, tail: str) -> Inputs:
    """The same inputs with the teacher's ``k`` most probable entries in its place; difficulties follow."""
    V = inputs.weight_s.shape[0]
    lists, difficulties = [], []
    for tokens, z, z_t in _logits(*inputs[:4]):
        teacher = fk.TopK(*z_t.log_softmax(1).topk(min(k, V)), tail)
        lists.append((teacher.log_probs, teacher.indices))
        found = reference_kd_loss(z, teacher, inputs.labels[tokens], fk.NoEvo(lam=LAM), reduction="none")
        difficulties.append(found.difficulty.float())
    log_probs, indices = (torch.cat(parts) for parts in zip(*lists, strict=True))
    return inputs._replace(difficulty=torch.cat(difficulties), top_k=fk.TopK(log_probs, indices, tail))


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
    N, device = hidden_s.shape[0], hidden_s.device
    labels = torch.empty(N, dtype=torch.int64, device=device)
    difficulty = torch.empty(N, device=device)
    for tokens, z, z_t in _logits(hidden_s, weight_s, hidden_t, weight_t):
        target = z_t.softmax(1)
        y = torch.multinomial(target, 1, generator=g)
        target.mul_(LAM).scatter_add_(1, y, torch.full_like(target[:, :1], 1.0 - LAM))
        labels[tokens] = y.squeeze(1)
        log_q = z.log_softmax(1)
        difficulty[tokens] = (torch.xlogy(target, target) - target * log_q).sum(1)
    return labels, difficulty


def _logits(
    hidden_s: Tensor, weight_s: Tensor, hidden_t: Tensor, weight_t: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some tokens at a time, and their fp32 logits (C, V) of student and teacher, in buffers that are used again."""
    N, V = hidden_s.shape[0], weight_s.shape[0]
    student, teacher = (Projection(w, None, w.dtype) for w in (weight_s, weight_t))
    z, z_t = torch.empty(2, min(CHUNK, N), V, device=hidden_s.device)
    for start in range(0, N, CHUNK):
        tokens = slice(start, min(start + CHUNK, N))
        rows = tokens.stop - tokens.start
        student.logits(student.operand(hidden_s[tokens]), z[:rows])
        teacher.logits(teacher.operand(hidden_t[tokens]), z_t[:rows])
        yield tokens, z[:rows], z_t[:rows]
