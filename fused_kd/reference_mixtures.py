"""Several teachers of the float64 oracle: each as a distribution over the vocabulary, then their sum; with a bucket, a
token's categories one by one."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .inputs import LMHead, TopK
from .mixtures import Mixture
from .objectives import Objective
from .reference_lists import LOG_ZERO, categories, full_logits, of_lists, of_map

Sides = tuple[Tensor, Tensor, Tensor]


def of_mixture(
    z: Tensor,
    mixture: Mixture,
    labels: Tensor,
    objective: Objective,
    temperature: float | Tensor,
    valid: Tensor,
    shape: torch.Size,
    vocab_size: int | None,
) -> Sides:
    """From the student's logits (N, V) and labels (N,) of the ``valid`` ones among tokens of ``shape``: both sides'
    logits and the labels, over the vocabulary or over categories."""
    T: Any = temperature
    if isinstance(T, Tensor):
        T = T.double().expand(shape).reshape(-1, 1)[valid]
    shares = _shares(mixture, shape)[valid]
    whole: list[Tensor] = []
    buckets: dict[int, TopK] = {}
    for i, teacher in enumerate(mixture.teachers):
        if isinstance(teacher, TopK):
            teacher = _some(teacher, valid)
            if teacher.tail == "bucket":
                buckets[i] = teacher
                whole.append(torch.zeros_like(z))
                continue
            z_t = of_lists(z, labels, teacher, objective)[1]
        else:
            z_t = full_logits(teacher)
            z_t = z_t.reshape(-1, z_t.shape[-1])[valid].detach()
            if isinstance(teacher, LMHead) and teacher.columns is not None:
                of_each = T if isinstance(T, Tensor) else torch.full_like(z[:, :1], T)
                z_t = of_map(z, z_t, labels, teacher.columns[:vocab_size], teacher.tail, objective, of_each)[1]
            z_t = z_t[:, :vocab_size]
        whole.append((z_t / T).softmax(-1))
    p = [x.where(share.unsqueeze(1) > 0, 0.0) for x, share in zip(whole, shares.unbind(1), strict=True)]
    if not buckets:
        mixed = torch.stack([share.unsqueeze(1) * x for x, share in zip(p, shares.unbind(1), strict=True)]).sum(0)
        return z, T * mixed.log().clamp(min=LOG_ZERO), labels
    rows = [_with_buckets(i, own, [x[i] for x in p], buckets) for i, own in enumerate(shares)]
    widest = max((len(ids) for ids, *_ in rows), default=0) or 1
    indices, log_p = torch.zeros(len(rows), widest, dtype=torch.int64), torch.full((len(rows), widest), -math.inf)
    log_p = log_p.double()
    for row, (ids, values, _) in enumerate(rows):
        indices[row, : len(ids)], log_p[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64), values
    rest = torch.stack([rest for *_, rest in rows]) if rows else torch.zeros(0, dtype=torch.float64)
    z, z_t, labels = categories(z, log_p, indices, labels, objective.spec.reads_label, rest, float(T))
    return z, (z_t * T).clamp(min=LOG_ZERO), labels


def _some(teacher: TopK, valid: Tensor) -> TopK:
    log_probs, indices = (x.reshape(-1, x.shape[-1])[valid] for x in (teacher.log_probs, teacher.indices))
    log_rest = None if teacher.log_rest is None else teacher.log_rest.reshape(-1)[valid]
    return replace(teacher, log_probs=log_probs, indices=indices, log_rest=log_rest)


def _shares(mixture: Mixture, shape: torch.Size) -> Tensor:
    """(tokens, teachers) float64, adding up to 1."""
    count = len(mixture.teachers)
    if mixture.which is not None:
        return torch.nn.functional.one_hot(mixture.which.reshape(-1).long().clamp(0, count - 1), count).double()
    given = mixture.weights or [1.0] * count
    each = [torch.as_tensor(w, dtype=torch.float64).detach().expand(shape).reshape(-1) for w in given]
    together = torch.stack(each, 1)
    return together / together.sum(1, keepdim=True)


def _with_buckets(
    row: int, shares: Tensor, p: list[Tensor], buckets: dict[int, TopK]
) -> tuple[list[int], Tensor, Tensor]:
    """A token's entries, their log-probabilities and the rest's. ``p`` are the teachers' that know all of theirs."""
    tables = {}
    for i, teacher in buckets.items():
        values, ids = teacher.log_probs[row].double().exp(), teacher.indices[row]
        listed = {int(v): x for v, x in zip(ids, values, strict=True) if x > 0}
        held = sum(listed.values(), torch.zeros((), dtype=torch.float64))
        if teacher.log_rest is None:
            rest = (1.0 - held).clamp(min=0.0)
        else:
            rest = teacher.log_rest[row].double().exp()
        tables[i] = {v: x / (held + rest) for v, x in listed.items()}, rest / (held + rest)
    with_part = [set(table) for i, (table, _) in tables.items() if shares[i] > 0] or [
        set(next(iter(tables.values()))[0])
    ]
    entries = sorted(set.intersection(*with_part))
    inside, outside = torch.zeros(len(entries), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for i, share in enumerate(shares):
        if share == 0:
            continue
        if i in tables:
            table, rest = tables[i]
            inside += share * torch.tensor([float(table[v]) for v in entries], dtype=torch.float64)
            outside = outside + share * (rest + sum(x for v, x in table.items() if v not in entries))
        else:
            others = torch.ones_like(p[i], dtype=torch.bool)
            others[entries] = False
            inside += share * p[i][entries]
            outside = outside + share * p[i][others].sum()
    return entries, inside.log(), outside.log()
