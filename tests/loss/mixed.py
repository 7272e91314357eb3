"""Several teachers as one by hand, in float64: each as its row of probabilities, token by token, then their sum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import fused_kd as fk
from fused_kd.reference import reference_kd_loss, reference_rows

from ..problems import JUMPS, Problem, gradients, relative, summands

TIGHT = 6e-6
Weights = Sequence[float | Tensor] | None
Temperature = float | Tensor


class Exact(fk.TopK):
    """Of float64 tensors, which the library refuses and the oracle needs."""

    def __post_init__(self) -> None:
        pass


# What a teacher may be, by name.


def teacher_of(kind: str, p: Problem, seed: int = 0) -> Any:
    """``kind``: "head", "capped" (other sizes, scale, cap and bias), "logits", "bf16 logits", "map" and "uniform map"
    (of another vocabulary), or a list's tail, with its number of entries behind a colon."""
    g = torch.Generator().manual_seed(seed + 77)
    V, dtype = len(p.weight), p.hidden_t.dtype

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=g) * std

    tokens = p.hidden_t.shape[:-1]
    if kind == "head":
        return p.teacher()
    if kind == "capped":
        hidden, weight, bias = normal(*tokens, 16), normal(V, 16, std=0.6), normal(V)
        return fk.LMHead(hidden.to(dtype), weight.to(dtype), bias.to(dtype), logit_scale=1.3, softcap=6.0)
    if kind.endswith("logits"):
        logits = normal(*tokens, V, std=3.0)
        return logits.bfloat16() if kind == "bf16 logits" else logits
    if kind.endswith("map"):
        columns = torch.randperm(V + 40, generator=g)[:V]
        columns[torch.randperm(V, generator=g)[: V // 4]] = -1
        hidden, weight = normal(*tokens, 20), normal(V + 40, 20, std=0.5)
        tail = "uniform" if kind == "uniform map" else "renormalize"
        return fk.LMHead(hidden.to(dtype), weight.to(dtype), columns=columns, tail=tail)
    tail, _, count = kind.partition(":")
    return list_of(normal(*tokens, V, std=2.5), int(count or 9), tail, seed=seed)


def list_of(
    logits: Tensor, K: int, tail: str, *, temperature: float = 1.0, seed: int = 0, rest: bool = True
) -> fk.TopK:
    """The K largest in no order, every third list an entry shorter."""
    log_p = (logits.double() / temperature).log_softmax(-1)
    values, ids = log_p.topk(K)
    order = torch.rand(values.shape, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    values, ids = values.gather(-1, order), ids.gather(-1, order)
    flat_values, flat_ids = values.reshape(-1, K), ids.reshape(-1, K)
    if K > 2:
        flat_values[::3, 1], flat_ids[::3, 1] = -math.inf, -1
    log_rest = None
    if rest:
        held = flat_values.exp().sum(1).reshape(values.shape[:-1])
        log_rest = (1.0 - held).clamp(min=0.0).log().float()
    return fk.TopK(values.float(), ids, tail, temperature=temperature, log_rest=log_rest)


# What each says of a token.


def probabilities(teacher: Any, V: int, T: Temperature) -> Tensor:
    """(N, V) float64 of all that has them, at T; lists and maps column by column."""
    if isinstance(teacher, fk.TopK):
        return torch.stack([_of_list(teacher, i, V, T) for i in range(len(flat(teacher.indices)))])
    z = teacher.double() if isinstance(teacher, Tensor) else _logits(teacher)
    z = flat(z)
    at = column(T, len(z))
    if isinstance(teacher, Tensor) or teacher.columns is None:
        return (z[:, :V] / at).softmax(1)
    known = [(j, c) for j, c in enumerate(teacher.columns.tolist()) if c >= 0]
    found = torch.full((len(z), V), -math.inf, dtype=torch.float64)
    for j, c in known:
        found[:, j] = z[:, c]
    lacking = [j for j, c in enumerate(teacher.columns.tolist()) if c < 0]
    if teacher.tail == "uniform" and lacking:
        others = [c for c in range(z.shape[1]) if c not in {c for _, c in known}]
        found[:, lacking] = (z[:, others].logsumexp(1) - math.log(len(lacking)))[:, None]
    return (found / at).softmax(1)


def _logits(head: Any) -> Tensor:
    z = flat(head.hidden).double() @ head.weight.double().T
    z = (z if head.bias is None else z + head.bias.double()) * head.logit_scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def _table(teacher: Any, i: int) -> tuple[dict[int, float], float]:
    """Listed log-probabilities of token i, and the logarithm of the rest."""
    values, ids = flat(teacher.log_probs)[i].tolist(), flat(teacher.indices)[i].tolist()
    table = {int(v): x for v, x in zip(ids, values, strict=True) if x > -math.inf}
    if teacher.log_rest is not None:
        return table, float(teacher.log_rest.reshape(-1)[i])
    missing = 1.0 - math.fsum(map(math.exp, table.values()))
    return table, math.log(missing) if missing > 0 else -math.inf


def _of_list(teacher: Any, i: int, V: int, T: Temperature) -> Tensor:
    table, rest = _table(teacher, i)
    each = rest - math.log(V - len(table)) if teacher.tail == "uniform" and len(table) < V else -math.inf
    z = torch.full((V,), each, dtype=torch.float64)
    for v, x in table.items():
        z[v] = x
    at = float(T.reshape(-1)[i]) if isinstance(T, Tensor) else T
    return (z * teacher.temperature / at).softmax(0)


def shares(weights: Weights, which: Tensor | None, count: int, N: int) -> Tensor:
    """(N, teachers) float64."""
    if which is not None:
        return torch.stack([(which.reshape(-1) == i).double() for i in range(count)], 1)
    given = [1.0 / count] * count if weights is None else weights
    each = [x.double().expand(N) if isinstance(x, Tensor) and x.dim() == 0 else x for x in given]
    return torch.stack([flat_numbers(x, N) for x in each], 1)


def flat_numbers(x: float | Tensor, N: int) -> Tensor:
    return x.double().reshape(-1) if isinstance(x, Tensor) else torch.full((N,), float(x), dtype=torch.float64)


def target(teachers: Sequence[Any], V: int, own: Tensor, T: Temperature = 1.0) -> Tensor:
    """(N, V) of the mixture: nothing that a teacher without a share holds is looked at."""
    total = torch.zeros(len(own), V, dtype=torch.float64)
    for i, teacher in enumerate(teachers):
        p = probabilities(teacher, V, T)
        for token, share in enumerate(own[:, i].tolist()):
            if share > 0:
                total[token] += share * p[token]
    return total


def one_list(teachers: Sequence[Any], V: int, own: Tensor, T: float = 1.0) -> Exact:
    """Of a mixture with buckets: entries that all of them share, and the rest."""
    whole = [
        None if isinstance(teacher, fk.TopK) and teacher.tail == "bucket" else probabilities(teacher, V, T)
        for teacher in teachers
    ]
    log_probs = torch.full((len(own), V), -math.inf, dtype=torch.float64)
    log_rest = torch.full((len(own),), -math.inf, dtype=torch.float64)
    for token in range(len(own)):
        parts = [i for i in range(len(teachers)) if own[token, i] > 0]
        tables = {i: _table(teachers[i], token) for i in parts if whole[i] is None}
        if not tables:  # nobody's bucket has a part: the first one's entries
            first = next(i for i, x in enumerate(whole) if x is None)
            entries = {*_table(teachers[first], token)[0]}
        else:
            entries = set.intersection(*({*table} for table, _ in tables.values()))
        beside = 0.0
        for v in range(V):
            mass = 0.0
            for i in parts:
                if whole[i] is None:
                    table, rest = tables[i]
                    total = math.fsum([*map(math.exp, table.values()), math.exp(rest)])
                    mass += float(own[token, i]) * math.exp(table.get(v, -math.inf)) / total
                else:
                    mass += float(own[token, i]) * float(whole[i][token, v])
            if v in entries:
                log_probs[token, v] = math.log(mass) if mass > 0 else -1e30
            else:
                beside += mass
        for i, (table, rest) in tables.items():
            total = math.fsum([*map(math.exp, table.values()), math.exp(rest)])
            beside += float(own[token, i]) * math.exp(rest) / total
        log_rest[token] = math.log(beside) if beside > 0 else -math.inf
    indices = torch.arange(V).expand(len(own), V)
    return Exact(log_probs, indices, "bucket", temperature=T, log_rest=log_rest)


def column(T: Temperature, N: int) -> Tensor:
    return flat_numbers(T, N).unsqueeze(1)


def flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


# The loss of it.


def by_hand(
    p: Problem, teachers: Sequence[Any], objective: Any, *, weights: Weights = None, which: Tensor | None = None,
    T: Temperature = 1.0,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """Losses, difficulties and hardness (n,) of valid tokens, and the gradients of the losses' mean."""
    leaves = [x.detach().double().requires_grad_() for x in p.leaves]
    z = leaves[0] @ leaves[1].T
    z = flat(z if len(leaves) == 2 else z + leaves[2])
    labels = p.labels.reshape(-1)
    valid, V = labels != -100, z.shape[1]
    own = shares(weights, which, len(teachers), len(labels))
    if any(isinstance(teacher, fk.TopK) and teacher.tail == "bucket" for teacher in teachers):
        assert not isinstance(T, Tensor)
        made = one_list(teachers, V, own, T)
        out = reference_kd_loss(z, made, labels, objective, temperature=T, reduction="none")
        return out.loss[valid], out.difficulty[valid], out.is_hard[valid], gradients(out.loss[valid].mean(), leaves)
    at: Any = T.reshape(-1)[valid].double() if isinstance(T, Tensor) else T
    teacher = target(teachers, V, own, T)[valid].log() * (at[:, None] if isinstance(T, Tensor) else at)
    losses, difficulty, hard = reference_rows(z[valid], teacher, labels[valid], objective, at)
    return losses, difficulty, hard, gradients(losses.mean(), leaves)


def compare(
    p: Problem, teachers: Sequence[Any], objective: Any, *, weights: Weights = None, which: Tensor | None = None,
    T: Temperature = 1.0, tight: float = TIGHT, rounding: float = 0.0, reference: bool = True, **options: Any,
) -> fk.KDOutput:  # fmt: skip
    """Loss, difficulty, gate and gradients, and the reference's too."""
    teacher = fk.Mixture(teachers, weights, which)
    out = fk.kd_loss(p.student(), teacher, p.labels, objective, temperature=T, **options)
    losses, difficulty, hard, grads = by_hand(p, teachers, objective, weights=weights, which=which, T=T)
    jumps = 4 if summands(objective) & JUMPS else 1
    valid = p.labels != -100
    assert relative(out.loss, losses.mean()) < tight
    for name, a, e in zip(("dH", "dW", "db"), gradients(out.loss, p.leaves), grads, strict=False):
        assert relative(a, e) < tight * jumps + rounding, name
    assert relative(out.difficulty[valid], difficulty) < tight
    assert torch.equal(out.is_hard[valid], hard)
    if reference:
        told = reference_kd_loss(p.student(), teacher, p.labels, objective, temperature=T)
        assert relative(told.loss, losses.mean()) < 1e-9
        assert relative(told.difficulty[valid], difficulty) < 1e-9
    return out
