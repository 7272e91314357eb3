"""Rows of a top-k teacher: one sweep of the student's logits to condense them, one to expand the gradient.

All entries that the teacher does not list are alike to it, so a token's loss depends on them through their sum of
exponentials alone: with the K listed logits, the label's where the objective reads it, and ``log sum exp`` of the rest,
the row shrinks to at most K + 2 categories, whose softmax are the student's probabilities of them. Any dense row
implementation then gives loss, gate and gradient, whatever the objective: where the teacher is 0, ``h`` is proportional
to ``q``, so that summing the rest first changes nothing. Back on the vocabulary, listed entries take their category's
gradient, and each of the others its share ``q_v / q_rest`` of the rest's.

A uniform tail is a dense target: dense rows make the teacher's logits where they use them.

With ``tail="listed"`` both sides are over the list alone. Its divergence is then a row whose student has no rest; the
label's own cross-entropy, which stays over the whole vocabulary, is another row with the rest that there is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..divergences import EXCLUDED, LOG_ZERO, NOWHERE
from ..terms import RowSpec, Scalars, Term
from .contract import Logits, Row, RowInputs, RowOutputs, Sparse
from .torch.math import finish_logits_

# By how much the logarithm of a probability near 1 may pass 0.
ROUNDING = 1e-4


# Tails with which the loss may flatten a list anew; nothing is claimed of what is not listed.
OF_LIST_ALONE = ("renormalize", "listed")


def sparse_teacher(
    log_probs: Tensor,
    indices: Tensor,
    labels: Tensor,
    V: int,
    tail: str,
    *,
    reads_label: bool = True,
    temperature: float | Tensor = 1.0,
    log_rest: Tensor | None = None,
) -> tuple[Sparse, Tensor]:
    """A chunk's teacher in the form that rows take, and which of its rows (C,) are malformed.

    Args:
        log_probs, indices: (C, K), see :class:`fused_kd.inputs.TopK`.
        labels: (C,) int64, negative for rows to be left out.
        V: vocabulary.
        tail: see :class:`fused_kd.inputs.TopK`.
        reads_label: whether the label is to be an entry of its own.
        temperature: a number, (1,) or (C,); log_rest: (C,) or None; see :class:`fused_kd.inputs.TopK`.
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
    if tail in OF_LIST_ALONE:
        bad |= (values < EXCLUDED).all(1)  # 0 / 0
        rest = torch.full_like(values[:, 0], -torch.inf)
    else:
        if log_rest is None:
            missing = (1.0 - values.double().exp().sum(1)).clamp_(min=0.0).log()
        else:
            bad |= out_of_range(log_rest, tail)
            missing = log_rest.double()
        others = V - (values > -torch.inf).sum(1)
        each = (missing - others.double().log()).masked_fill(others == 0, -torch.inf)
        values = torch.where((entries == y) & (values == -torch.inf), each.unsqueeze(1).float(), values)
        rest = (each if tail == "uniform" else each + (V - (entries < V).sum(1)).double().log()).float()
    # Rows divide what they are given by the temperature of the loss.
    if isinstance(temperature, Tensor):
        values, rest = values * temperature.unsqueeze(1), rest * temperature
    elif temperature != 1.0:
        values, rest = values * temperature, rest * temperature
    return Sparse(entries, values, rest, tail), bad & (labels >= 0)


def out_of_range(log_probs: Tensor, tail: str) -> Tensor:
    """Which values are no log-probabilities; where a list alone counts they may be logits."""
    return ~(log_probs < torch.inf if tail in OF_LIST_ALONE else log_probs <= ROUNDING)


class Categories(NamedTuple):
    """``student`` and ``teacher`` (C, K + 2) fp32, the last column the rest's; ``labels`` (C,) their columns, any where
    the label is not an entry; ``listed`` the student of the divergence where that is over the list alone."""

    student: Tensor
    teacher: Tensor
    labels: Tensor
    listed: Tensor | None


def categories(inputs: RowInputs) -> Categories:
    """All but ``student``, which the caller's sweep fills in."""
    teacher, labels = inputs.teacher, inputs.labels
    assert isinstance(teacher, Sparse)
    C, K1 = teacher.indices.shape
    column = (teacher.indices == labels.unsqueeze(1)).to(torch.int8).argmax(1)
    return Categories(
        torch.empty(C, K1 + 1, dtype=torch.float32, device=labels.device),
        torch.cat([teacher.log_probs, teacher.rest.unsqueeze(1)], 1),
        torch.where(labels < 0, -1, column),
        _listed_student(inputs.student, teacher, inputs.spec) if teacher.tail == "listed" else None,
    )


def takes_part(teacher: Sparse, V: int, spec: RowSpec) -> Tensor:
    """(C, K + 1) bool: the entries of a divergence over the list alone. The label that the teacher does not list is one
    of them where a target holds it."""
    return teacher.indices < V if spec.mixes_label else teacher.log_probs > -torch.inf


def _listed_student(student: Logits, teacher: Sparse, spec: RowSpec) -> Tensor:
    """(C, K + 2) fp32: final logits over their own largest, log 0 for all others; the rest's is for later.

    Not those of the sweep: over the largest logit of all, theirs would lose digits where they are far below it.
    """
    V = student.raw.shape[1]
    z = student.raw.gather(1, teacher.indices.clamp(max=V - 1)).float()
    finish_logits_(z, student._replace(finite=False))
    part = takes_part(teacher, V, spec)
    top = z.where(part, NOWHERE).amax(1, keepdim=True)
    return torch.nn.functional.pad((z - top).where(part, LOG_ZERO), (0, 1))


def _without_label(scalars: Tensor) -> Tensor:
    """Numbers of terms that keep their divergence alone, so that a difficulty is ``KL(p||q)``."""
    own = dict(zip(Scalars._fields, scalars.unbind(-1), strict=True))
    share, nothing = own["weight"] * own["lam"], torch.zeros_like(own["lam"])
    own |= {"weight": share, "lam": torch.ones_like(share), "rest": nothing, "log_lam": nothing}
    return torch.stack(list(own.values()), -1)


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

    ``cold_rest`` (C,) is the rest's logit at temperature 1, for labels whose cross-entropy is taken there, or over more
    than the list.
    """
    teacher = Logits(small.teacher, 1.0, None, False)
    wanted = outputs.dlogits is not None
    student = small.student
    if small.listed is not None:
        student = small.listed
        student[:, -1] = small.student.amax(1).clamp_(LOG_ZERO, LOG_ZERO)  # a NaN is somebody's logit
    hard_label = any(term.hard_label for term in inputs.spec.terms)
    scalars = inputs.scalars
    if small.listed is not None and hard_label:
        assert cold_rest is not None, "the label's cross-entropy over the vocabulary is a row of its own"
        if not inputs.spec.mixes_label:
            scalars = _without_label(scalars)

    def of_rest(gradient: Tensor, student: Tensor) -> Tensor:
        return rest_gradient(gradient[:, -1], student[:, -1])

    def run(z: Tensor, spec: RowSpec, scalars: Tensor, out: RowOutputs) -> Tensor | None:
        gradient = torch.empty_like(z) if wanted else None
        dense(
            RowInputs(
                Logits(z, 1.0, None, False), teacher if spec.needs_teacher else None, small.labels,
                inputs.weights, scalars, spec, False, inputs.hard,
            ),
            out._replace(dlogits=gradient),
        )  # fmt: skip
        return gradient

    if cold_rest is None:
        gradient = run(student, inputs.spec, scalars, outputs)
        return None if gradient is None else CategoryGradient(gradient[:, :-1], of_rest(gradient, student), None)
    # The terms see two rests, so that they are rows of their own.
    divergences = RowSpec.of(*(term._replace(hard_label=False) for term in inputs.spec.terms))
    gradient = run(student, divergences, scalars, outputs)
    ce = outputs._replace(**{name: torch.empty_like(getattr(outputs, name)) for name in ("loss", "difficulty")})
    ce = ce._replace(is_hard=torch.empty_like(outputs.is_hard))
    cold = torch.cat([small.student[:, :-1], cold_rest.unsqueeze(1)], 1)
    own = RowSpec.of(*(Term(None, hard_label=term.hard_label) for term in inputs.spec.terms))
    ce_gradient = run(cold, own, inputs.scalars, ce)
    outputs.loss.add_(ce.loss)
    if gradient is None or ce_gradient is None:
        return None
    entries = gradient[:, :-1] + ce_gradient[:, :-1]
    return CategoryGradient(entries, of_rest(gradient, student), of_rest(ce_gradient, small.student))
