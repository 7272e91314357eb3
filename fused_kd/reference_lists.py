"""Top-k teachers of the float64 oracle, and those of another vocabulary: both sides over the vocabulary, or over the
categories that a tail makes."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from .inputs import LMHead, TopK
from .objectives import Objective

# Finite stands for log 0, so that 0 * log 0 = 0 and autograd stays free of NaN.
LOG_ZERO = -1e30


def full_logits(source: LMHead | Tensor) -> Tensor:
    """(..., V) float64 logits; differentiable in whatever ``source`` holds."""
    if isinstance(source, Tensor):
        return source.double()
    logits = source.hidden.double() @ source.weight.double().T
    if source.bias is not None:
        logits = logits + source.bias.double()
    logits = logits * source.logit_scale
    return logits if source.softcap is None else source.softcap * torch.tanh(logits / source.softcap)


class Floored(torch.autograd.Function):
    """``z.clamp(min=LOG_ZERO)`` whose gradient goes on to what was below, where an infinite loss has one."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z.clamp(min=LOG_ZERO)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def floored(z: Tensor) -> Tensor:
    return cast(Tensor, Floored.apply(z))  # type: ignore[no-untyped-call]


def _dense(z: Tensor, log_probs: Tensor, indices: Tensor, log_masses: Tensor) -> Tensor:
    """(N, V) log-probabilities of a top-k teacher that is defined on every entry."""
    rows = []
    for z_row, values, entries, missing in zip(z, log_probs, indices, log_masses, strict=True):
        listed = values > -math.inf
        base = (missing - math.log(max(len(z_row) - int(listed.sum()), 1))).clamp(min=LOG_ZERO)
        rows.append(base.expand(len(z_row)).index_put((entries[listed],), values[listed]))
    return torch.stack(rows) if rows else z.detach()


def categories(
    z: Tensor, log_probs: Tensor, indices: Tensor, labels: Tensor, reads_label: bool, log_masses: Tensor, T: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Student logits, teacher log-probabilities and labels over the listed entries, one for the rest and, where it is
    read, the label. The rest's logit is that which, over T, has the sum of its tokens' probabilities at T."""
    K, z = log_probs.shape[1], floored(z)
    students, teachers, positions = [], [], []
    for z_row, values, entries, y, missing in zip(
        z - z.detach().amax(1, keepdim=True), log_probs, indices, labels.tolist(), log_masses, strict=True
    ):
        table = {e: v for e, v in zip(entries.tolist(), values, strict=True) if v > -math.inf}
        others = len(z_row) - len(table)
        if reads_label and y not in table:
            table[y] = (missing - math.log(others)).clamp(min=LOG_ZERO)
            missing = missing + (math.log1p(-1 / others) if others > 1 else -math.inf)
        chosen = torch.tensor(list(table), dtype=torch.int64, device=z.device)
        rest = torch.ones_like(z_row, dtype=torch.bool).index_fill(0, chosen, False)
        nothing = z_row.new_full((K + 2 - len(table) - int(rest.any()),), LOG_ZERO)  # to a common width
        # A rest whose tokens are all excluded gives them no gradient.
        tail = (
            T * (z_row[rest].where(z_row[rest] > LOG_ZERO, LOG_ZERO) / T).logsumexp(0, keepdim=True)
            if rest.any()
            else z_row[:0]
        )
        students.append(torch.cat([z_row[chosen], tail, nothing]))
        teachers.append(
            torch.cat(
                [
                    *(value[None] for value in table.values()),
                    missing.clamp(min=LOG_ZERO)[None][: len(tail)],
                    nothing,
                ]
            )
        )
        positions.append(list(table).index(y) if y in table else 0)
    if not students:
        return z, z.detach(), labels
    return torch.stack(students), torch.stack(teachers), torch.tensor(positions, dtype=torch.int64, device=z.device)


def _listed(
    z: Tensor, log_probs: Tensor, indices: Tensor, labels: Tensor, joins: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Student logits, teacher log-probabilities and labels over the listed entries and, where it ``joins`` them, the
    label."""
    K, students, teachers, positions = log_probs.shape[1], [], [], []
    for z_row, values, entries, y in zip(floored(z), log_probs, indices, labels.tolist(), strict=True):
        listed = values > -math.inf
        chosen, own = entries[listed].long(), values[listed]
        if joins and not (chosen == y).any():
            chosen = torch.cat([chosen, chosen.new_tensor([y])])
            own = torch.cat([own, own.new_tensor([LOG_ZERO])])
        nothing = z_row.new_full((K + 1 - len(chosen),), LOG_ZERO)  # to a common width
        students.append(torch.cat([z_row[chosen] - z_row[chosen].detach().max(), nothing]))
        teachers.append(torch.cat([own, nothing]))
        positions.append((chosen == y).nonzero()[0] if joins else chosen.new_tensor([0]))
    if not students:
        return z, z.detach(), labels
    return torch.stack(students), torch.stack(teachers), torch.cat(positions)


def of_lists(z: Tensor, labels: Tensor, teacher: TopK, objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
    """From the student's logits (N, V), labels (N,) and lists of these tokens: both sides' logits and the labels, over
    the vocabulary or over categories."""
    log_probs, indices = teacher.log_probs.double(), teacher.indices.long()
    if teacher.log_rest is None:
        log_masses = (1.0 - log_probs.exp().sum(1)).clamp(min=0.0).log()
    else:
        log_masses = teacher.log_rest.double()
    T, spec = float(teacher.temperature), objective.spec
    if teacher.tail == "bucket":
        z, z_t, labels = categories(z, log_probs, indices, labels, spec.reads_label, log_masses, T)
    elif teacher.tail == "listed":
        z, z_t, labels = _listed(z, log_probs, indices, labels, spec.mixes_label)
    else:
        nothing = torch.full_like(log_masses, -math.inf)
        z_t = _dense(z, log_probs, indices, log_masses if teacher.tail == "uniform" else nothing)
    return z, (z_t * T).clamp(min=LOG_ZERO), labels


def of_map(
    z: Tensor,
    z_t: Tensor,
    labels: Tensor,
    columns: Tensor,
    tail: str,
    objective: Objective,
    temperature: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """From the student's logits (N, V), the teacher's (N, V_t) and labels (N,): both sides' logits over the student's
    columns and one for the rest."""
    T = torch.as_tensor(temperature, dtype=torch.float64, device=z.device).reshape(-1, 1)
    mapped, spec = columns >= 0, objective.spec
    others = torch.ones_like(z_t[0], dtype=torch.bool).index_fill(0, columns[mapped].long(), False)
    lacking = int((~mapped).sum())

    def of_others(T: Tensor) -> Tensor:
        return T * (z_t.where(others, LOG_ZERO) / T).logsumexp(-1, keepdim=True)

    shared = torch.full_like(z, LOG_ZERO).detach()
    shared[:, mapped] = z_t[:, columns[mapped].long()]
    if tail == "uniform" and lacking:
        shared = shared.where(mapped, of_others(torch.ones_like(T)) - math.log(lacking))
    if tail in ("renormalize", "uniform"):
        return z, shared
    z, is_label = floored(z), torch.nn.functional.one_hot(labels, z.shape[1]).bool()
    alone = is_label & ~mapped & (spec.reads_label if tail == "bucket" else spec.mixes_label)
    apart = ~mapped & ~alone
    student = z.where(~apart, LOG_ZERO)
    if tail == "listed":
        return student, shared
    left = apart.sum(-1, keepdim=True)
    rest = of_others(T)
    shared = shared.where(~alone, rest - T * math.log(max(lacking, 1)))
    rest = rest + T * (left / lacking).log().clamp(min=LOG_ZERO) if lacking else rest
    lumped = T * (z.where(apart, LOG_ZERO) / T).logsumexp(-1, keepdim=True)
    return torch.cat([student, lumped], 1), torch.cat([shared, rest], 1).clamp(min=LOG_ZERO)
