"""Teachers of another vocabulary by hand, in float64: columns one by one, from full logits of both sides."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import fused_kd as fk
from fused_kd.reference import reference_rows

from ..problems import gradients


@dataclass
class MappedProblem:
    """Heads of V and V_t columns, and the map between them."""

    hidden: Tensor
    weight: Tensor
    hidden_t: Tensor
    weight_t: Tensor
    columns: Tensor
    labels: Tensor
    bias: Tensor | None = None
    bias_t: Tensor | None = None

    def student(self, **options: Any) -> fk.LMHead:
        return fk.LMHead(self.hidden, self.weight, self.bias, **options)

    def teacher(self, tail: str, **options: Any) -> fk.LMHead:
        return fk.LMHead(self.hidden_t, self.weight_t, self.bias_t, columns=self.columns, tail=tail, **options)

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None]


def mapped_problem(
    columns: Tensor,
    V_t: int,
    *,
    N: int = 19,
    H: int = 24,
    H_t: int = 40,
    std: float = 2.0,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> MappedProblem:
    """A teacher whose columns resemble those that are mapped to them; a label in six is ignored, some are unmapped."""
    g, V = torch.Generator().manual_seed(seed), len(columns)
    hidden, hidden_t = torch.randn(N, H, generator=g), torch.randn(N, H_t, generator=g)
    hidden_t[:, : min(H, H_t)] += hidden[:, : min(H, H_t)]
    weight = torch.randn(V, H, generator=g) * (std / H**0.5)
    weight_t = torch.randn(V_t, H_t, generator=g) * (std / (2 * H_t) ** 0.5)
    labels = torch.randint(0, V, (N,), generator=g)
    unmapped = (columns < 0).nonzero().squeeze(1)
    if len(unmapped):
        labels[1::4] = unmapped[torch.randint(0, len(unmapped), (len(labels[1::4]),), generator=g)]
    labels[::6] = -100
    biases = [torch.randn(size, generator=g).to(dtype) if bias else None for size in (V, V_t)]
    hidden, weight, hidden_t, weight_t = (x.to(dtype) for x in (hidden, weight, hidden_t, weight_t))
    own = biases[0].requires_grad_() if biases[0] is not None else None
    return MappedProblem(
        hidden.requires_grad_(), weight.requires_grad_(), hidden_t, weight_t, columns, labels, own, biases[1]
    )


def by_hand(
    p: MappedProblem,
    objective: Any,
    tail: str,
    temperature: float = 1.0,
    softcaps: tuple[float | None, float | None] = (None, None),
    scales: tuple[float, float] = (1.0, 1.0),
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Mean loss, difficulties (N,) of valid tokens, and the mean's gradients."""
    leaves = [x.detach().double().requires_grad_() for x in p.leaves]
    valid = p.labels != -100

    def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, which: int) -> Tensor:
        z = hidden @ weight.T if bias is None else hidden @ weight.T + bias
        z, cap = z * scales[which], softcaps[which]
        return z if cap is None else cap * torch.tanh(z / cap)

    z = logits(leaves[0][valid], leaves[1], leaves[2] if len(leaves) > 2 else None, 0)
    z_t = logits(p.hidden_t.double()[valid], p.weight_t.double(), None if p.bias_t is None else p.bias_t.double(), 1)
    y = p.labels[valid]
    lam = getattr(objective, "lam", 1.0)
    losses, difficulties = [], []
    separate = isinstance(objective, (fk.ForwardKD, fk.ReverseKD, fk.SkewTeacher))
    divergence = replace(objective, lam=1.0) if separate else objective
    for i, label in enumerate(y.tolist()):
        rows = _rows(z[i], z_t[i], p.columns, label, objective.spec, tail, temperature)
        loss, difficulty, _ = reference_rows(*rows, divergence, temperature)
        losses.append(lam * loss - (1 - lam) * z[i].log_softmax(0)[label] if separate else loss)
        if separate:
            # over a list that lacks the label there is no target with it
            lacks = tail == "listed" and bool((p.columns < 0).any())
            difficulty = reference_rows(*rows, fk.NoEvo(lam=1.0 if lacks else lam), temperature)[1]
        difficulties.append(difficulty)
    loss = torch.cat(losses).mean()
    return loss.detach(), torch.cat(difficulties), gradients(loss, leaves)


def _rows(
    z: Tensor, z_t: Tensor, columns: Tensor, label: int, spec: Any, tail: str, T: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(1, K) logits of both sides over what the tail compares, and the label's place among them."""
    others = torch.ones_like(z_t, dtype=torch.bool)
    others[columns[columns >= 0]] = False
    unmapped = (columns < 0).nonzero().squeeze(1).tolist()
    mixed = any(term.mixed for term in spec.terms)
    student, teacher, place = [], [], 0
    for j, column in enumerate(columns.tolist()):
        if column >= 0:
            value = z_t[column]
        elif tail == "uniform":
            value = z_t[others].logsumexp(0) - math.log(len(unmapped))
        elif tail == "bucket" and j == label and spec.reads_label:
            value = T * (z_t[others] / T).logsumexp(0) - T * math.log(len(unmapped))
        elif tail == "renormalize" or (tail == "listed" and j == label and mixed):
            value = z_t.new_tensor(-math.inf)
        else:
            continue
        place = len(student) if j == label else place
        student.append(z[j])
        teacher.append(value)
    if tail == "bucket":
        apart = [j for j in unmapped if not (j == label and spec.reads_label)]
        student.append(T * (z[apart] / T).logsumexp(0) if apart else z.new_tensor(-math.inf))
        rest = T * (z_t[others] / T).logsumexp(0) if bool(others.any()) else z_t.new_tensor(-math.inf)
        share = len(apart) / len(unmapped) if unmapped else 1.0
        teacher.append(rest + T * math.log(share) if share else z_t.new_tensor(-math.inf))
    return torch.stack(student)[None], torch.stack(teacher)[None], torch.tensor([place])
