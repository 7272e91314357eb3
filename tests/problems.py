"""Distillation problems at realistic scales, eager PyTorch in the tested dtype, and relative errors."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import fused_kd as fk
from fused_kd.reference import reference_kd_loss
from fused_kd.rows.native import build as native_build

OBJECTIVES = [
    fk.SFT(),
    fk.ForwardKD(lam=0.3),
    fk.ReverseKD(lam=0.6),
    fk.NoEvo(lam=0.7),
    fk.Skew(lam=0.4, beta=0.3),
    fk.SkewTeacher(lam=0.5, beta=0.9),
    fk.SelfEvolution(lam=0.5, beta=0.5, gamma=1.0),
    fk.SelfEvolutionTopK(lam=0.5, beta=0.5, fraction=0.3),
    fk.GeneralizedJSD(beta=0.3),
    fk.SkewForward(alpha=0.2),
    fk.SkewReverse(alpha=0.3),
    fk.TotalVariation(),
    fk.AdaptiveKL(fraction=0.6),
]
NAMES = [objective.name for objective in OBJECTIVES]


def _why_no_native() -> str:
    try:
        native_build.find_compiler()
    except native_build.NativeRowError as error:
        return str(error)
    return ""


needs_compiler = pytest.mark.skipif(bool(_why_no_native()), reason=_why_no_native() or "has a compiler")
# Backends that run on CPU tensors here; Triton's in its interpreter.
CPU_BACKENDS = [
    "torch",
    pytest.param("native", marks=needs_compiler),
    *(["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else []),
]


@dataclass
class Problem:
    """Student and teacher heads, labels, and what they are cut to."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    hidden_t: Tensor
    weight_t: Tensor
    labels: Tensor

    def student(self) -> fk.LMHead:
        return fk.LMHead(self.hidden, self.weight, self.bias)

    def teacher(self) -> fk.LMHead:
        return fk.LMHead(self.hidden_t, self.weight_t)

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None]

    def logits(self) -> Problem:
        """The same problem with materialised logits as "hidden" and no weights (see :func:`run_logits`)."""
        z = (self.hidden @ self.weight.T).detach().requires_grad_()
        return replace(self, hidden=z, hidden_t=(self.hidden_t @ self.weight_t.T).detach())


def rows_for(objective, backend: str, device: str = "cpu", N: int = 29) -> int:
    """``N``, but few in Triton's interpreter: 30 ms each, or half a second where it sorts them."""
    if (backend, device) != ("triton", "cpu"):
        return N
    return 7 if objective.name == "adaptive_kl" else min(N, 13)


def problem(
    N: int = 29,
    H: int = 24,
    H_t: int = 40,
    V: int = 517,
    *,
    std: float = 2.0,
    near: bool = False,
    dtype: torch.dtype = torch.float32,
    dtype_t: torch.dtype | None = None,
    bias: bool = False,
    ignored: float = 0.25,
    device: str = "cpu",
    seed: int = 0,
) -> Problem:
    """Logits of standard deviation ``std``; a near teacher is the student plus 5 % noise."""
    g = torch.Generator().manual_seed(seed)
    dtype_t = dtype_t or dtype
    hidden = torch.randn(N, H, generator=g)
    weight = torch.randn(V, H, generator=g) * (std / H**0.5)
    if near:
        hidden_t = hidden + 0.05 * torch.randn(N, H, generator=g)
        weight_t = weight + 0.05 * weight.std() * torch.randn(V, H, generator=g)
    else:
        hidden_t = torch.randn(N, H_t, generator=g)
        weight_t = torch.randn(V, H_t, generator=g) * (std / H_t**0.5)
    # Half of the labels are likely ones, so that both easy and hard tokens occur.
    likely = (hidden_t @ weight_t.T).argmax(-1)
    labels = torch.where(torch.rand(N, generator=g) < 0.5, likely, torch.randint(0, V, (N,), generator=g))
    labels[torch.rand(N, generator=g) < ignored] = -100

    def make(x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(device, dtype)

    return Problem(
        make(hidden, dtype).requires_grad_(),
        make(weight, dtype).requires_grad_(),
        make(torch.randn(V, generator=g), dtype).requires_grad_() if bias else None,
        make(hidden_t, dtype_t),
        make(weight_t, dtype_t),
        labels.to(device),
    )


def relative(actual: Tensor, expected: Tensor) -> float:
    """``|actual - expected| / |expected|`` in float64 (absolute where the expected norm is 0)."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert actual.shape == expected.shape
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-30))


def furthest(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest of the pairs' relative errors."""
    return worst(relative(a, e) for a, e in zip(actual, expected, strict=True))


def worst(errors: Iterable[float]) -> float:
    """The largest, or NaN where one is: ``max`` would pass it over."""
    return float(torch.tensor([*errors], dtype=torch.float64).max())


def gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves))


def oracle(student, teacher, labels, objective, leaves, **options) -> tuple[fk.KDOutput, list[Tensor]]:
    """Loss and gradients of the float64 oracle with respect to ``leaves``."""
    out = reference_kd_loss(student, teacher, labels, objective, **options)
    loss = out.loss if out.loss.dim() == 0 else out.loss.sum()
    return out, [g.double() for g in gradients(loss, leaves)]


def oracle64(p: Problem, objective: fk.objectives.Objective, **options) -> tuple[fk.KDOutput, list[Tensor]]:
    """As :func:`oracle`, from float64 copies of a problem's tensors so that no gradient is rounded to its dtype."""
    copies = [x.detach().double().requires_grad_() for x in p.leaves]
    out = reference_kd_loss(
        _Head(*copies), _Head(p.hidden_t.double(), p.weight_t.double()), p.labels, objective, **options
    )
    loss = out.loss if out.loss.dim() == 0 else out.loss.sum()
    return out, gradients(loss, copies)


def compare(
    p: Problem,
    objective,
    *,
    tight: float,
    upstream: Tensor | None = None,
    head: dict | None = None,
    where=None,
    **options,
) -> None:
    """Loss, gradients, difficulty and gate against the oracle's with the same options; ``where``: backend, engine."""
    head = head or {}
    student = fk.LMHead(p.hidden, p.weight, p.bias, **head)
    out = fk.kd_loss(student, p.teacher(), p.labels, objective, **options, **(where or {}))
    copies = [x.detach().double().requires_grad_() for x in p.leaves]
    sides = _Head(*copies, **head), _Head(p.hidden_t.double(), p.weight_t.double())
    expected = reference_kd_loss(*sides, p.labels, objective, **options)
    up = torch.ones_like(out.loss) if upstream is None else upstream
    actual = torch.autograd.grad(out.loss, p.leaves, up)
    refs = torch.autograd.grad(expected.loss, copies, up.double())
    assert relative(out.loss, expected.loss) < tight
    assert furthest(actual, refs) < tight * (4 if objective.name == "total_variation" else 1)
    assert torch.equal(out.is_hard, expected.is_hard)
    assert relative(out.difficulty, expected.difficulty) < tight


class _Head(fk.LMHead):
    """An LMHead of float64 tensors, which the library refuses and the oracle needs."""

    def __post_init__(self) -> None:
        pass


def eager(p: Problem, objective: fk.objectives.Objective) -> tuple[Tensor, list[Tensor]]:
    """Losses of valid tokens and gradients of their mean as usual PyTorch code gets them, in the problem's dtype."""
    leaves = [x.detach().clone().requires_grad_() for x in p.leaves]
    valid = p.labels != -100
    z = torch.nn.functional.linear(leaves[0], *leaves[1:])[valid]
    rows = eager_rows(z, (p.hidden_t @ p.weight_t.T)[valid], p.labels[valid], objective)
    return rows, gradients(rows.mean(), leaves)


def eager_rows(z: Tensor, z_t: Tensor, labels: Tensor, objective: fk.objectives.Objective) -> Tensor:
    """Per-token losses as a practitioner writes them, from logits (N, V) and valid labels."""
    y = labels[:, None]
    log_q, log_p = z.log_softmax(-1), z_t.log_softmax(-1)
    ce = -log_q.gather(1, y).squeeze(1)
    if isinstance(objective, fk.SFT):
        return ce
    lam, q, probability_t = getattr(objective, "lam", 1.0), log_q.exp(), log_p.exp()
    target = (lam * probability_t).scatter_add(1, y, torch.full_like(y, 1.0, dtype=z.dtype) * (1 - lam))

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(a > 0, a * (a.log() - b), 0.0).sum(-1)

    def skew(a: Tensor) -> Tensor:
        return kl(a, (objective.beta * q + (1 - objective.beta) * a).log())  # type: ignore[attr-defined]

    def mix(a: Tensor, b: Tensor, share: float) -> Tensor:
        return share * a + (1 - share) * b

    def jsd(beta: float) -> Tensor:
        log_m = mix(probability_t, q, beta).log()
        return beta * kl(probability_t, log_m) + (1 - beta) * (q * (log_q - log_m)).sum(-1)

    def adaptive(mass: float) -> Tensor:
        sorted_t, order = probability_t.sort(-1, descending=True)
        error = (sorted_t - q.detach().gather(-1, order)).abs()
        head = sorted_t.cumsum(-1) <= mass
        head[:, 0] = True
        w = (error * head).sum(-1) / error.sum(-1)
        return w * kl(probability_t, log_q) + (1 - w) * (q * (log_q - log_p)).sum(-1)

    def largest(fraction: float) -> Tensor:
        count = math.ceil(fraction * len(d))
        return torch.zeros_like(d, dtype=torch.bool).index_fill(0, d.detach().topk(count).indices, True)

    d = kl(target, log_q)
    rows = {
        "forward_kd": lambda: (1 - lam) * ce + lam * kl(probability_t, log_q),
        "reverse_kd": lambda: (1 - lam) * ce + lam * (q * (log_q - log_p)).sum(-1),
        "no_evo": lambda: d,
        "skew": lambda: skew(target),
        "skew_teacher": lambda: (1 - lam) * ce + lam * skew(probability_t),
        "self_evolution": lambda: torch.where(d.detach() > objective.gamma, skew(target), d),  # type: ignore
        "self_evolution_top_k": lambda: torch.where(largest(objective.fraction), skew(target), d),  # type: ignore
        "generalized_jsd": lambda: jsd(objective.beta),  # type: ignore[attr-defined]
        "skew_forward": lambda: kl(probability_t, mix(probability_t, q, objective.alpha).log()),  # type: ignore
        "skew_reverse": lambda: (q * (log_q - mix(q, probability_t, objective.alpha).log())).sum(-1),  # type: ignore
        "total_variation": lambda: (probability_t - q).abs().sum(-1) / 2,
        "adaptive_kl": lambda: adaptive(objective.fraction),  # type: ignore[attr-defined]
    }
    return rows[objective.name]()
