"""Rows of a top-k teacher: one sweep of the student's logits to condense them, one to expand the gradient.

All entries that the teacher does not list are alike to it, so a token's loss depends on them through their sum of
exponentials alone: with the K listed logits, the label's where the objective reads it, and ``log sum exp`` of the rest,
the row shrinks to at most K + 2 categories, whose softmax are the student's probabilities of them. Any dense row
implementation then gives loss, gate and gradient, whatever the objective: where the teacher is 0, ``h`` is proportional
to ``q``, so that summing the rest first changes nothing. Back on the vocabulary, listed entries take their category's
gradient, and each of the others its share ``q_v / q_rest`` of the rest's.

A uniform tail is a dense target: dense rows make the teacher's logits where they use them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..divergences import LOG_ZERO
from ..terms import RowSpec, Term
from .contract import Logits, Row, RowInputs, RowOutputs, Sparse

# By how much the logarithm of a probability near 1 may pass 0.
ROUNDING = 1e-4


def sparse_teacher(
    log_probs: Tensor, indices: Tensor, labels: Tensor, V: int, tail: str, *, reads_label: bool = True
) -> tuple[Sparse, Tensor]:
    """A chunk's teacher in the form that rows take, and which of its rows (C,) are malformed.

    Args:
        log_probs, indices: (C, K), see :class:`fused_kd.inputs.TopK`.
        labels: (C,) int64, negative for rows to be left out.
        V: vocabulary.
        tail: see :class:`fused_kd.inputs.TopK`.
        reads_label: whether the label is to be an entry of its own.
    """
    values, entries = log_probs.float(), indices.long()
    wanted = ~(values == -torch.inf)  # a NaN is somebody's value
    listed = wanted & (entries >= 0) & (entries < V)
    bad = (wanted & ~listed).any(1) | out_of_range(values, tail).any(1)
    y = labels.unsqueeze(1)
    own = torch.full_like(y, V)
    if reads_label:
        own = torch.where((listed & (entries == y)).any(1, keepdim=True) | (y < 0), V, y)
    entries, order = torch.cat([entries.where(listed, V), own], 1).sort(1)
    values = torch.cat([values.where(listed, -torch.inf), torch.full_like(values[:, :1], -torch.inf)], 1)
    values = values.gather(1, order)
    bad |= ((entries[:, 1:] == entries[:, :-1]) & (entries[:, 1:] < V)).any(1)
    if tail == "renormalize":
        bad |= ~listed.any(1)  # 0 / 0
        rest = torch.full_like(values[:, 0], -torch.inf)
    else:
        missing = (1.0 - values.double().exp().sum(1)).clamp_(min=0.0)
        others = V - (values > -torch.inf).sum(1)
        each = missing / others.clamp(min=1)
        values = torch.where((entries == y) & (values == -torch.inf), each.log().unsqueeze(1).float(), values)
        rest = (each if tail == "uniform" else each * (V - (entries < V).sum(1))).log().float()
    return Sparse(entries, values, rest, tail), bad & (labels >= 0)


def out_of_range(log_probs: Tensor, tail: str) -> Tensor:
    """Which values are no log-probabilities; with "renormalize" they may be logits."""
    return ~(log_probs < torch.inf if tail == "renormalize" else log_probs <= ROUNDING)


class Categories(NamedTuple):
    """``student`` and ``teacher`` (C, K + 2) fp32, the last column the rest's; ``labels`` (C,) their columns, any where
    the label is not an entry."""

    student: Tensor
    teacher: Tensor
    labels: Tensor


def categories(teacher: Sparse, labels: Tensor) -> Categories:
    """All but the student's logits, which the caller's sweep fills in."""
    C, K1 = teacher.indices.shape
    column = (teacher.indices == labels.unsqueeze(1)).to(torch.int8).argmax(1)
    return Categories(
        torch.empty(C, K1 + 1, dtype=torch.float32, device=labels.device),
        torch.cat([teacher.log_probs, teacher.rest.unsqueeze(1)], 1),
        torch.where(labels < 0, -1, column),
    )


class CategoryGradient(NamedTuple):
    """``entries`` (C, K + 1) and ``rest`` (C,): d loss / d final logit; ``cold`` (C,) the rest's at temperature 1."""

    entries: Tensor
    rest: Tensor
    cold: Tensor | None


def rest_gradient(gradient: Tensor, rest: Tensor) -> Tensor:
    """0 where the student excludes all tokens of the rest, by its logit: there is none to give it to."""
    return gradient.masked_fill(rest < LOG_ZERO / 2, 0.0)


def category_rows(
    dense: Row, inputs: RowInputs, outputs: RowOutputs, small: Categories, cold_rest: Tensor | None
) -> CategoryGradient | None:
    """Fill ``outputs`` but for dlogits by a dense row over categories; their gradient unless none is wanted.

    ``cold_rest`` (C,) is the rest's logit at temperature 1, for labels whose cross-entropy is taken there.
    """
    teacher = Logits(small.teacher, 1.0, None, False)
    wanted = outputs.dlogits is not None

    def of_rest(gradient: Tensor) -> Tensor:
        return rest_gradient(gradient[:, -1], small.student[:, -1])

    def run(z: Tensor, spec: RowSpec, out: RowOutputs) -> Tensor | None:
        gradient = torch.empty_like(z) if wanted else None
        dense(
            RowInputs(
                Logits(z, 1.0, None, False), teacher if spec.needs_teacher else None, small.labels,
                inputs.weights, inputs.scalars, spec, False, inputs.hard,
            ),
            out._replace(dlogits=gradient),
        )  # fmt: skip
        return gradient

    if cold_rest is None:
        gradient = run(small.student, inputs.spec, outputs)
        return None if gradient is None else CategoryGradient(gradient[:, :-1], of_rest(gradient), None)
    # The two temperatures see two rests, so the terms are rows of their own.
    gradient = run(small.student, RowSpec.of(*(term._replace(hard_label=False) for term in inputs.spec.terms)), outputs)
    ce = outputs._replace(**{name: torch.empty_like(getattr(outputs, name)) for name in ("loss", "difficulty")})
    ce = ce._replace(is_hard=torch.empty_like(outputs.is_hard))
    cold = torch.cat([small.student[:, :-1], cold_rest.unsqueeze(1)], 1)
    ce_gradient = run(cold, RowSpec.of(*(Term(None, hard_label=t.hard_label) for t in inputs.spec.terms)), ce)
    outputs.loss.add_(ce.loss)
    if gradient is None or ce_gradient is None:
        return None
    return CategoryGradient(gradient[:, :-1] + ce_gradient[:, :-1], of_rest(gradient), of_rest(ce_gradient))
