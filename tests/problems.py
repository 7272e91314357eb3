"""Distillation problems at realistic scales, eager PyTorch in the tested dtype, and relative errors."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import fused_kd as fk
from fused_kd import objectives as o
from fused_kd import ops
from fused_kd.objectives import Objective
from fused_kd.reference import reference_kd_loss
from fused_kd.rows.native import build as native_build

_NAMED: dict[str, Objective] = {
    "sft": fk.SFT(),
    "forward_kd": fk.ForwardKD(lam=0.3),
    "reverse_kd": fk.ReverseKD(lam=0.6),
    "no_evo": fk.NoEvo(lam=0.7),
    "skew": fk.Skew(lam=0.4, beta=0.3),
    "skew_teacher": fk.SkewTeacher(lam=0.5, beta=0.9),
    "self_evolution": fk.SelfEvolution(lam=0.5, beta=0.5, gamma=1.0),
    "self_evolution_top_k": fk.SelfEvolutionTopK(lam=0.5, beta=0.5, fraction=0.3),
    "generalized_jsd": fk.GeneralizedJSD(beta=0.3),
    "skew_forward": fk.SkewForward(alpha=0.2),
    "skew_reverse": fk.SkewReverse(alpha=0.3),
    "total_variation": fk.TotalVariation(),
    "adaptive_kl": fk.AdaptiveKL(fraction=0.6),
    "skew_reverse_detached": o.SkewReverseDetached(alpha=0.3),
    "symmetric_kl": o.SymmetricKL(beta=0.3),
    "entropy_gated": o.EntropyGated(tau=4.5),
    "todi": o.ToDi(),
    "alpha_beta": o.AlphaBeta(alpha=0.3, beta=0.6),
    "renyi": o.Renyi(alpha=0.4),
    "acceptance": o.Acceptance(),
    "acceptance_mix": o.AcceptanceMix(),
    "z_loss": o.ZLoss(),
    # other settings of the same classes
    "skew_floor": fk.Skew(lam=0.4, beta=0.3, floor=0.2),
    "self_evolution_floor": fk.SelfEvolution(gamma=2.5, floor=0.3),
    "self_evolution_excess": fk.SelfEvolution(gamma=2.0, gate="excess"),
    "self_evolution_kl": fk.SelfEvolution(gamma=3.8, gate="kl"),
    "top_k_floor": fk.SelfEvolutionTopK(fraction=0.3, floor=0.2),
    # sums
    "sum": 0.5 * fk.SFT() + 0.5 * fk.GeneralizedJSD(beta=0.3),
    "sum_of_kl": fk.ForwardKD(lam=1) + fk.ReverseKD(lam=1),
    "sum_gated": 0.3 * fk.SelfEvolution(gamma=2.5, floor=0.2) + 0.7 * fk.GeneralizedJSD(beta=0.4) + 1e-3 * o.ZLoss(),
    "sum_of_targets": 0.6 * fk.Skew(lam=0.2, beta=0.4) + 0.4 * fk.NoEvo(lam=0.9) + 0.5 * fk.SkewTeacher(lam=0.7),
    "sum_outer": o.Acceptance() + 0.3 * o.AcceptanceMix() + 0.2 * o.ToDi(),
    "sum_ranked": 0.5 * fk.SelfEvolutionTopK(fraction=0.3) + 0.5 * fk.ReverseKD(lam=0.5),
}
OBJECTIVES = list(_NAMED.values())
NAMES = list(_NAMED)
# Whose gradients jump where p = q.
JUMPS = {"total_variation", "acceptance", "acceptance_mix"}
_LABELS = {objective: name for name, objective in _NAMED.items()}


def label(objective: Objective | type[Objective]) -> str:
    """The name among :data:`NAMES`, else that of the class."""
    return objective.name if isinstance(objective, type) else _LABELS.get(objective, objective.name)


def summands(objective: Objective) -> set[str]:
    """Names of the classes of a sum's terms, or of the one there is."""
    return {each.name for _, each in objective.summands} if isinstance(objective, o.Sum) else {objective.name}


def amplified(objective: Objective) -> float:
    """How many times a rounding of 1 is in the loss of near rows: of powers, the sums cancel, are divided by small
    numbers, and have the rounding of a log-sum-exp, of about 8, in their exponents. A KL that nothing stands beside has
    that of a difference of two."""
    factors = [1.0]
    for _, each in objective.summands:
        given: Any = each
        if isinstance(each, o.AlphaBeta):
            factors.append(8 / (given.alpha * given.beta))
        elif isinstance(each, o.Renyi):
            factors.append(8 / (1 - given.alpha))
        elif isinstance(each, (o.Acceptance, o.AcceptanceMix)):
            factors.append(2.0)
        elif isinstance(each, (o.ForwardKD, o.ReverseKD)) and given.lam == 1.0:
            factors.append(4.0)
    return max(factors)


def reads_level(objective: Objective) -> bool:
    """Whether a constant on all logits changes the loss."""
    return any(term.z_loss for term in objective.spec.terms)


def has_powers(objective: Objective) -> bool:
    return any(term.of.powers for term in objective.spec.terms)


def may_overflow(objective: Objective) -> bool:
    """Whether its loss is the logarithm of a sum, infinite where that is 0 in fp32."""
    return any(term.of.outer == "minus_log" for term in objective.spec.terms if term.divergence)


def with_numbers(cls: type[Objective], *, lam: float, beta: float, gamma: float) -> Objective:
    """With these for numbers of their kinds, moved into the range of classes with a smaller one."""
    own = {"lam": lam, "beta": beta, "gamma": gamma, "alpha": beta, "fraction": lam, "floor": 1 - lam, "tau": gamma}
    if cls.name in ("alpha_beta", "renyi"):
        own |= {"alpha": 0.05 + 0.9 * lam, "beta": 0.05 + 0.9 * beta}
    return cls(**{name: own[name] for name in vars(cls()) if name in own})


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
    return 7 if "adaptive_kl" in summands(objective) else min(N, 13)


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


def oracle64(p: Problem, objective: Objective, **options) -> tuple[fk.KDOutput, list[Tensor]]:
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
    assert furthest(actual, refs) < tight * (4 if summands(objective) & JUMPS else 1)
    assert torch.equal(out.is_hard, expected.is_hard)
    assert relative(out.difficulty, expected.difficulty) < tight


class Allocations(TorchDispatchMode):
    """The ``largest`` tensor made inside, and the ``peak`` of what was held at once, results included, in bytes.

    It looks into the loss's op, which is opaque to a mode otherwise.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.peak = 0
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.fused_kd.kd.default:
            with self:
                return ops._kd(*args)
        out = func(*args, **(kwargs or {}))
        known = {x.untyped_storage()._cdata for x in (*args, *(kwargs or {}).values()) if isinstance(x, Tensor)}
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in known:
                storage = x.untyped_storage()
                self._held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self.largest = max(self.largest, storage.nbytes())
        self._held = {key: held for key, held in self._held.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._held.values()))
        return out


class _Head(fk.LMHead):
    """An LMHead of float64 tensors, which the library refuses and the oracle needs."""

    def __post_init__(self) -> None:
        pass


def eager(p: Problem, objective: Objective) -> tuple[Tensor, list[Tensor]]:
    """Losses of valid tokens and gradients of their mean as usual PyTorch code gets them, in the problem's dtype."""
    leaves = [x.detach().clone().requires_grad_() for x in p.leaves]
    valid = p.labels != -100
    z = torch.nn.functional.linear(leaves[0], *leaves[1:])[valid]
    rows = eager_rows(z, (p.hidden_t @ p.weight_t.T)[valid], p.labels[valid], objective)
    return rows, gradients(rows.mean(), leaves)


def eager_rows(z: Tensor, z_t: Tensor, labels: Tensor, objective: Objective) -> Tensor:
    """Per-token losses as a practitioner writes them, from logits (N, V) and valid labels; a sum term by term."""
    if isinstance(objective, o.Sum):
        terms = [weight * eager_rows(z, z_t, labels, part) for weight, part in objective.parts]
        return torch.stack(terms).sum(0)
    given: Any = objective
    y = labels[:, None]
    log_q, log_p = z.log_softmax(-1), z_t.log_softmax(-1)
    ce = -log_q.gather(1, y).squeeze(1)
    if isinstance(objective, fk.SFT):
        return ce
    lam, q, probability_t = getattr(objective, "lam", 1.0), log_q.exp(), log_p.exp()
    target = (lam * probability_t).scatter_add(1, y, torch.full_like(y, 1.0, dtype=z.dtype) * (1 - lam))
    overlap = torch.minimum(probability_t, q).sum(-1)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(a > 0, a * (a.log() - b), 0.0).sum(-1)

    def reverse_kl() -> Tensor:
        return (q * (log_q - log_p)).sum(-1)

    def skew(a: Tensor) -> Tensor:
        return kl(a, (given.beta * q + (1 - given.beta) * a).log())

    def floored() -> Tensor:
        return skew(target) if given.floor == 0 else (1 - given.floor) * skew(target) + given.floor * d

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
        return w * kl(probability_t, log_q) + (1 - w) * reverse_kl()

    def todi() -> Tensor:
        a = torch.sigmoid(log_p - log_q).detach()
        return (a * probability_t * (log_p - log_q) + (1 - a) * q * (log_q - log_p)).sum(-1)

    def alpha_beta(a: float, b: float) -> Tensor:
        both, own = probability_t**a * q**b, a / (a + b) * probability_t ** (a + b)
        return -(both - own - b / (a + b) * q ** (a + b)).sum(-1) / (a * b)

    def acceptance_mix() -> Tensor:
        w = (-3 * overlap).exp().detach()
        return w * kl(probability_t, log_q) + (1 - w) * (1 - overlap)

    def gate() -> Tensor:
        looked_at = {
            "difficulty": lambda: d,
            "excess": lambda: d - kl(target, log_p),
            "kl": lambda: kl(probability_t, log_q),
        }
        return looked_at[given.gate]().detach() > given.gamma

    def largest(fraction: float) -> Tensor:
        count = math.ceil(fraction * len(d))
        return torch.zeros_like(d, dtype=torch.bool).index_fill(0, d.detach().topk(count).indices, True)

    def unsure() -> Tensor:
        return -(probability_t * log_p).sum(-1) > given.tau

    d = kl(target, log_q)
    rows = {
        "forward_kd": lambda: (1 - lam) * ce + lam * kl(probability_t, log_q),
        "reverse_kd": lambda: (1 - lam) * ce + lam * reverse_kl(),
        "no_evo": lambda: d,
        "skew": floored,
        "skew_teacher": lambda: (1 - lam) * ce + lam * skew(probability_t),
        "self_evolution": lambda: torch.where(gate(), floored(), d),
        "self_evolution_top_k": lambda: torch.where(largest(given.fraction), floored(), d),
        "generalized_jsd": lambda: jsd(given.beta),
        "skew_forward": lambda: kl(probability_t, mix(probability_t, q, given.alpha).log()),
        "skew_reverse": lambda: (q * (log_q - mix(q, probability_t, given.alpha).log())).sum(-1),
        "skew_reverse_detached": lambda: (q * (log_q - mix(q, probability_t, given.alpha).log().detach())).sum(-1),
        "total_variation": lambda: (probability_t - q).abs().sum(-1) / 2,
        "adaptive_kl": lambda: adaptive(given.fraction),
        "symmetric_kl": lambda: given.beta * kl(probability_t, log_q) + (1 - given.beta) * reverse_kl(),
        "entropy_gated": lambda: reverse_kl() + torch.where(unsure(), kl(probability_t, log_q), 0.0),
        "todi": todi,
        "alpha_beta": lambda: alpha_beta(given.alpha, given.beta),
        "renyi": lambda: (probability_t**given.alpha * q ** (1 - given.alpha)).sum(-1).log() / (given.alpha - 1),
        "acceptance": lambda: -overlap.log(),
        "acceptance_mix": acceptance_mix,
        "z_loss": lambda: z.logsumexp(-1).square(),
    }
    return rows[objective.name]()
