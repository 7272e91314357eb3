"""The float64 oracle: every objective from its textbook definition, with full logits and plain autograd.

Nothing here is shared with the kernels. It is the truth for tests and for the error columns of benchmarks; it is slow
and holds everything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, cast

import torch
from torch import Tensor

from .inputs import KDOutput, LMHead, TopK
from .mixtures import Mixture, as_teacher
from .objectives import (
    SFT,
    Acceptance,
    AcceptanceMix,
    AdaptiveKL,
    AlphaBeta,
    EntropyGated,
    ForwardKD,
    GeneralizedJSD,
    NoEvo,
    Objective,
    Renyi,
    ReverseKD,
    SelfEvolution,
    SelfEvolutionTopK,
    Skew,
    SkewForward,
    SkewReverse,
    SkewReverseDetached,
    SkewTeacher,
    Sum,
    SymmetricKL,
    ToDi,
    TotalVariation,
    ZLoss,
)
from .reference_lists import LOG_ZERO as _LOG_ZERO
from .reference_lists import floored as _floored
from .reference_lists import full_logits as full_logits
from .reference_lists import of_lists, of_map
from .reference_mixtures import of_mixture

# Log-probabilities below it are those of excluded tokens.
_EXCLUDED = -1e18
# Smaller probabilities are 0 where the other side excludes the token.
_LEAST = 2.0**-126


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """``KL(a||b)`` of a constant ``a``; where it is infinite its gradient is that of what is finite."""
    return _or_infinite((log_a.exp() * (log_a - log_b)).sum(-1), log_a, log_b)


def _kl_of_student(log_q: Tensor, log_p: Tensor) -> Tensor:
    """``KL(q||p)``; where it is infinite its gradient is that of the tokens that ``p`` does not exclude."""
    finite = (log_q.exp() * (log_q - log_p).where(~(log_p <= _EXCLUDED), 0.0)).sum(-1)
    return _or_infinite(finite, log_q, log_p)


def _or_infinite(value: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
    """Infinite where ``b`` excludes what is above 0 in ``a``."""
    infinite = ((log_b <= _EXCLUDED) & (log_a > math.log(_LEAST))).any(-1)
    return value + torch.zeros_like(value).masked_fill(infinite, math.inf)


def _weighed(*terms: tuple[float | Tensor, Tensor]) -> Tensor:
    """``sum weight * value``, where nothing of an infinite value is nothing."""
    parts = [
        torch.where(torch.as_tensor(w == 0, device=x.device), 0.0 * x.where(x != math.inf, 0.0), w * x)
        for w, x in terms
    ]
    return torch.stack(parts).sum(0)


def _mix(log_a: Tensor, log_b: Tensor, share: float | Tensor) -> Tensor:
    """``log(share * a + (1 - share) * b)``; a share may be each row's own."""
    share = torch.as_tensor(share, dtype=torch.float64, device=log_a.device).reshape(-1, 1)
    inside = share.clamp(1e-300, 1 - 1e-16)
    mixed = torch.logaddexp(log_a + inside.log(), log_b + torch.log1p(-inside))
    # ends stay connected to the graph
    return torch.where(share <= 0.0, log_b + 0.0 * log_a, torch.where(share >= 1.0, log_a + 0.0 * log_b, mixed))


def reference_rows(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    objective: Objective,
    temperature: float | Tensor = 1.0,
    own: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-token loss, difficulty (N,) float64 and hardness (N,) bool from logits (N, V) and valid labels (N,).

    Every distribution is ``softmax(logits / temperature)``, except the student's in the hard-label term of ``SFT``,
    ``ForwardKD``, ``ReverseKD`` and ``SkewTeacher``, and in ``ZLoss``, which are taken at temperature 1. Numbers of the
    objective, and the temperature, may be (N,). ``own``: logits and labels of that hard-label term, if they are others.
    """
    losses, difficulties, hards = [], [], []
    parts = _parts(objective)
    for weight, part in parts:
        loss, difficulty, hard = _single(student_logits, teacher_logits, labels, part, temperature, own)
        losses.append((_numbers(weight), loss))
        difficulties.append(difficulty)
        hards.append(hard)
    # Of the gated objective, else of the first whose target has the label in it, else of the first with a teacher.
    gated = (SelfEvolution, SelfEvolutionTopK, EntropyGated)
    for kinds in (gated, (NoEvo, Skew), (Objective,)):
        found = [i for i, (_, part) in enumerate(parts) if isinstance(part, kinds) and not _alone(part)]
        if found:
            return _weighed(*losses), difficulties[found[0]], hards[found[0]]
    return _weighed(*losses), difficulties[0], hards[0]


def _parts(objective: Objective) -> list[tuple[float | Tensor, Objective]]:
    if not isinstance(objective, Sum):
        return [(1.0, objective)]
    return [(weight * own, each) for weight, part in objective.parts for own, each in _parts(part)]


def _each(objective: Objective, change: Callable[[Any], Any]) -> Objective:
    """With all of its numbers changed."""
    if isinstance(objective, Sum):
        return Sum(tuple((change(weight), _each(part, change)) for weight, part in objective.parts))
    return replace(objective, **{name: change(value) for name, value in objective.numbers.items()})


def _alone(objective: Objective) -> bool:
    return isinstance(objective, (SFT, ZLoss))


def _numbers(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) else value


def _single(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    objective: Objective,
    temperature: float | Tensor,
    own: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    z = _floored(student_logits.double())
    T = torch.as_tensor(temperature, dtype=torch.float64, device=z.device).reshape(-1, 1)
    log_q = (z / T).log_softmax(-1)
    z_own, y_own = (z, labels) if own is None else (_floored(own[0].double()), own[1])
    ce = -z_own.log_softmax(-1).gather(-1, y_own[:, None]).squeeze(-1)
    ce = ce + torch.zeros_like(ce).masked_fill(ce >= -_EXCLUDED, math.inf)
    never = torch.zeros_like(labels, dtype=torch.bool)
    if isinstance(objective, SFT):
        return ce, ce.detach(), never
    if isinstance(objective, ZLoss):
        return z.logsumexp(-1).square(), ce.detach(), never
    if teacher_logits is None:
        raise ValueError(f"teacher must not be None for {objective!r}")
    o = {field.name: _numbers(getattr(objective, field.name)) for field in fields(objective)}
    z_t = teacher_logits.detach().double().clamp(min=_LOG_ZERO)
    log_p = (z_t / T).log_softmax(-1)
    log_y = torch.full_like(log_p, _LOG_ZERO).scatter(-1, labels[:, None], 0.0)
    lam: Any = o.get("lam", 1.0)
    log_t = _mix(log_p, log_y, lam)
    d = _kl(log_t, log_q)
    hard = never
    if isinstance(objective, ForwardKD):
        loss = _weighed((1 - lam, ce), (lam, _kl(log_p, log_q)))
    elif isinstance(objective, ReverseKD):
        loss = _weighed((1 - lam, ce), (lam, _kl_of_student(log_q, log_p)))
    elif isinstance(objective, NoEvo):
        loss = d
    elif isinstance(objective, SkewTeacher):
        loss = _weighed((1 - lam, ce), (lam, _kl(log_p, _mix(log_q, log_p, o["beta"]))))
    elif isinstance(objective, (Skew, SelfEvolution, SelfEvolutionTopK)):
        skew = _kl(log_t, _mix(log_q, log_t, o["beta"]))
        loss = _weighed((1 - o["floor"], skew), (o["floor"], d))
        if isinstance(objective, SelfEvolution):
            gates = {
                "difficulty": d,
                "excess": torch.where(d == math.inf, d, d - _kl(log_t, log_p)),
                "kl": _kl(log_p, log_q),
            }
            hard = gates[objective.gate].detach() > o["gamma"]
        elif isinstance(objective, SelfEvolutionTopK):
            count = math.ceil(objective.fraction * d.shape[0] * (1 - 1e-12))
            hard = never.scatter(0, d.detach().argsort(descending=True, stable=True)[:count], True)
        if not isinstance(objective, Skew):
            loss = torch.where(hard, loss, d)
    elif isinstance(objective, GeneralizedJSD):
        loss = _generalized_jsd(log_p, log_q, o["beta"])
    elif isinstance(objective, SkewForward):
        loss = _kl(log_p, _mix(log_p, log_q, o["alpha"]))
    elif isinstance(objective, SkewReverseDetached):
        loss = _kl_of_student(log_q, _mix(log_q, log_p, o["alpha"]).detach())
    elif isinstance(objective, SkewReverse):
        loss = _kl_of_student(log_q, _mix(log_q, log_p, o["alpha"]))
    elif isinstance(objective, TotalVariation):
        loss = 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)
    elif isinstance(objective, AdaptiveKL):
        head, tail = _shares(log_p.exp(), log_q.exp().detach(), o["fraction"])
        loss = _weighed((head, _kl(log_p, log_q)), (tail, _kl_of_student(log_q, log_p)))
    elif isinstance(objective, SymmetricKL):
        loss = _weighed((o["beta"], _kl(log_p, log_q)), (1 - o["beta"], _kl_of_student(log_q, log_p)))
    elif isinstance(objective, EntropyGated):
        hard = -(log_p.exp() * log_p).sum(-1) > o["tau"]
        loss = _kl_of_student(log_q, log_p) + torch.where(hard, _kl(log_p, log_q), 0.0)
    elif isinstance(objective, ToDi):
        a = torch.sigmoid(log_p - log_q.detach())
        gap = (log_p - log_q).where(log_p > _EXCLUDED, 0.0)
        loss = (a * log_p.exp() * gap - (1 - a) * log_q.exp() * gap).sum(-1)
        loss = _or_infinite(_or_infinite(loss, log_q, log_p), log_p, log_q)
    elif isinstance(objective, AlphaBeta):
        loss = _alpha_beta(log_p, log_q, o["alpha"], o["beta"])
    elif isinstance(objective, Renyi):
        order = torch.as_tensor(o["alpha"], dtype=torch.float64, device=z.device).reshape(-1, 1)
        loss = -(order * log_p + (1 - order) * log_q).logsumexp(-1) / (1 - order.squeeze(1))
        loss = loss + torch.zeros_like(loss).masked_fill(loss >= -_EXCLUDED, math.inf)
    elif isinstance(objective, (Acceptance, AcceptanceMix)):
        overlap = torch.minimum(log_p.exp(), log_q.exp()).sum(-1)
        if isinstance(objective, Acceptance):
            loss = -overlap.log()
        else:
            w = (-3 * overlap.detach()).exp()
            loss = _weighed((w, _kl(log_p, log_q)), (1 - w, 1 - overlap))
    else:
        raise TypeError(f"the reference does not know {objective!r}")
    return loss, d.detach(), hard


def _alpha_beta(log_p: Tensor, log_q: Tensor, a: Any, b: Any) -> Tensor:
    if not isinstance(a, Tensor) and not isinstance(b, Tensor) and 0.0 in (a, b):
        return _kl(log_p, log_q) if b == 0.0 else _kl_of_student(log_q, log_p)
    a, b = (torch.as_tensor(x, dtype=torch.float64, device=log_p.device).reshape(-1, 1) for x in (a, b))
    powers = (a * log_p + b * log_q).exp(), ((a + b) * log_p).exp(), ((a + b) * log_q).exp()
    return cast(Tensor, -((powers[0] - a / (a + b) * powers[1] - b / (a + b) * powers[2]) / (a * b)).sum(-1))


def _generalized_jsd(log_p: Tensor, log_q: Tensor, beta: float | Tensor) -> Tensor:
    if not isinstance(beta, Tensor) and beta in (0.0, 1.0):
        return _kl(log_p, log_q) if beta == 0.0 else _kl_of_student(log_q, log_p)
    log_m = _mix(log_p, log_q, beta)
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl_of_student(log_q, log_m)


def _shares(p: Tensor, q: Tensor, mass: float | Tensor) -> tuple[Tensor, Tensor]:
    """Shares of ``sum |p - q|`` in entries of which those at least as probable hold at most ``mass``, and in the top;
    and in the others."""
    error = (p - q).abs()
    inside = torch.zeros_like(p, dtype=torch.bool)
    masses = torch.as_tensor(mass, dtype=p.dtype, device=p.device).expand(len(p))
    for row, p_row, mass in zip(inside, p, masses, strict=True):
        values, index, counts = p_row.unique(return_inverse=True, return_counts=True)
        at_least = (values * counts).flip(0).cumsum(0).flip(0)
        head = (at_least <= mass) | (values == values[-1]) | (mass >= 1)
        row.copy_(head[index])
    total = error.sum(-1)
    head, tail = (torch.where(total == 0, 0.5, (error * of).sum(-1) / total) for of in (inside, ~inside))
    return head, tail


def reference_kd_loss(
    student: LMHead | Tensor,
    teacher: LMHead | TopK | Tensor | Mixture | Sequence[tuple[float | Tensor, Any]] | None,
    labels: Tensor,
    objective: Objective,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
    shift: bool = False,
    token_weights: Tensor | None = None,
    num_items: float | Tensor | None = None,
    signed: bool = False,
) -> KDOutput:
    """:func:`fused_kd.kd_loss` in float64 with everything materialised: its arguments that say what, not how, and its
    results but for statistics."""
    z = full_logits(student)[..., :vocab_size]
    labels = labels.long()
    if shift:
        labels = torch.cat([labels[..., 1:], torch.full_like(labels[..., :1], ignore_index)], -1)
    shape = labels.shape
    labels = labels.reshape(-1)
    valid = labels != ignore_index
    z, y = z.reshape(-1, z.shape[-1])[valid], labels[valid]
    z_t = own = None
    teacher = as_teacher(teacher) if objective.spec.needs_teacher else None
    if isinstance(teacher, Mixture):
        own = z, y
        z, z_t, y = of_mixture(z, teacher, y, objective, temperature, valid, shape, vocab_size)
    elif isinstance(teacher, TopK):
        log_probs, indices = (x.reshape(-1, x.shape[-1])[valid] for x in (teacher.log_probs, teacher.indices))
        log_rest = None if teacher.log_rest is None else teacher.log_rest.reshape(-1)[valid]
        own = z, y
        z, z_t, y = of_lists(z, y, replace(teacher, log_probs=log_probs, indices=indices, log_rest=log_rest), objective)
    elif teacher is not None:
        mapped = isinstance(teacher, LMHead) and teacher.columns is not None
        z_t = full_logits(teacher)[..., : None if mapped else vocab_size]
        z_t = z_t.reshape(-1, z_t.shape[-1])[valid]

    def of_tokens(value: Any) -> Any:
        return value.expand(shape).reshape(-1)[valid] if isinstance(value, Tensor) else value

    tail = teacher.tail if isinstance(teacher, TopK) else ""
    if z_t is not None and isinstance(teacher, LMHead) and teacher.columns is not None:
        own, columns = (z, y), teacher.columns[:vocab_size]
        z, z_t = of_map(z, z_t, y, columns, teacher.tail, objective, of_tokens(temperature))
        tail = teacher.tail if bool((columns < 0).any()) else ""
    rows, difficulty, is_hard = reference_rows(z, z_t, y, _each(objective, of_tokens), of_tokens(temperature), own)
    if tail == "listed" and not objective.spec.mixes_label:
        # the label is none of the list
        difficulty = reference_rows(z, z_t, y, NoEvo(lam=1.0), of_tokens(temperature))[1]
    weights = torch.ones_like(rows) if token_weights is None else token_weights.double().reshape(-1)[valid]

    def scatter(values: Tensor) -> Tensor:
        full = torch.zeros(labels.shape, dtype=values.dtype, device=values.device)
        return full.masked_scatter(valid, values).reshape(shape)

    weighted = _weighed((weights, rows))
    if reduction == "none":
        loss = scatter(weighted)
    elif num_items is not None:
        loss = weighted.sum() / (num_items.reshape(()) if isinstance(num_items, Tensor) else num_items)
    elif reduction == "mean":
        total = torch.tensor(float(len(rows))) if signed else weights.sum()
        loss = weighted.sum() / total if total > 0 else weighted.sum()
    else:
        loss = weighted.sum()
    return KDOutput(loss, scatter(difficulty), scatter(is_hard))
